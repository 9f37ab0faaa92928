"""Bounds and intervals of the control channel that users need not change; the others are in the settings."""

from __future__ import annotations

MAX_PEERS = 1024  # workers that may be up at once; more are refused with field "peers"
MAX_CONNECTIONS = 512  # endpoints that we connect to; each holds two sockets and about four descriptors
MAX_TRIED = 64  # those of them that never led to a peer; one more replaces the oldest
MAX_PROVEN = 4096  # endpoints remembered to have led to a peer, without a connection now
NEW_PER_S = 64.0  # first dials a second of endpoints that never led to a peer; burst of as many ...
AGAIN_PER_S = 16.0  # ... and repeated dials a second of such endpoints, all together
MAX_ROUTES_PER_PEER = 8  # connections between the same two processes, both directions together
MAX_STRANGERS = 512  # connections without a handshake; one more closes the oldest
MAX_SHARED_NAMES = 64  # names used by several processes that are tracked and shown
DESCRIPTORS_SPARE = 256  # file descriptors for everything but connections: files, other sockets, the engine
MAX_BREAKS = 4096  # peers of which it is remembered how often they were given up
MAX_PROBES = 4096  # connections that may be checked at once after libzmq reported a disconnect

SEND_QUEUE_FRAMES = 2048  # per connection; a full queue makes send() return False
RECEIVE_QUEUE_FRAMES = 256  # per connection that we open; beyond it, TCP flow control stops the sender
LISTEN_BUFFER_BYTES = 128 << 10  # TCP receive buffer: how much libzmq's one thread reads before the next connection
LISTEN_QUEUE_FRAMES = 32  # per accepted connection: there may be many, from anyone
MONITOR_QUEUE_EVENTS = 1 << 16  # deep, because a full queue would block libzmq's I/O thread
TCP_BACKLOG = 512

MAX_STRANGER_FRAME = 256 << 10  # bytes of a frame before the handshake: the largest Hello with all its exports
MAX_SHORT_FRAME = 4096  # bytes of any other frame before the handshake
STRANGER_BYTES = 1 << 20  # budget of a connection before its handshake ...
STRANGER_BYTES_PER_S = 256 << 10  # ... and its growth per second: one largest Hello
STRANGER_FRAMES = 64  # the same budget in frames
STRANGER_FRAMES_PER_S = 16
UNDER_WAY_FRAMES = SEND_QUEUE_FRAMES + RECEIVE_QUEUE_FRAMES  # frames that a peer may have sent when it is given up ...
UNDER_WAY_BYTES = 16 << 20  # ... and their bytes
HELLOS_PER_S = 2  # Hellos accepted per connection, with a burst of HELLOS: a new Hello may end all transfers
HELLOS = 8
LOOK_AGAIN_S = 0.1  # interval between checks of how much strangers have sent
CUT_AFTER_S = 0.05  # a stranger is cut off this long after it was sent the reason
CUT_SHOWS_S = 1.0  # libzmq reports a connection that we closed in its handshake as failed within this
MAX_FRAMES_A_TURN = 256
FRAMES_BEFORE_ANSWERS = 32  # frames read before the first is answered: about 5 ms of a peer that never pauses
MAX_REPORTS_A_TURN = 1024  # of opened or closed connections: cheap to read, and excess connections must be closed soon

MAX_DIALS_A_TURN = 4  # further ones wait for the next turn: opening a socket takes 1 ms, and peers wait meanwhile
RECONNECT_S = 0.1  # first pause before TCP connects again; a random half to whole of it is used ...
RECONNECT_MAX_S = 1.0  # ... longest pause while a caller waits, or while a lost peer may come back ...
RETRY_MAX_S = 8.0  # ... and longest pause while no caller waits
NAME_POLL_S = 0.005  # interval between checks whether a name was resolved
HELLO_AGAIN_S = 1.0  # an unanswered Hello is repeated after this, on the same connection
LOST_OPENER_S = 0.3  # a broken connection that we can't reopen: its peer is down after this
LOST_BOUND_S = 1.0  # a broken connection that the peer must reopen: likewise, plus the peer's own pauses
RETRY_FOR_S = 60.0  # background attempts (about fifteen) at an endpoint that no caller asks for
REFUSAL_HOLDS_S = 1.0  # an endpoint that refused us is not asked again before this
PROBE_AFTER_S = (0.02, 0.3)  # when to check, after a reported disconnect, which connection it was
ANSWER_GARBAGE_EVERY_S = 1.0  # per connection
SHARED_NAME_AFTER_S = 0.5  # a peer that sends something this long after another process took its name is alive as well
SHARED_NAME_AGAIN_S = 60.0  # interval between warnings about the same name
FAILED_CURVE_HANDSHAKES = 3  # in a row, before an endpoint that silently hangs up counts as refusing us

MAX_WATCHERS = 64  # clients that watch how transfers end; more are refused
WATCH_LEASE_S = 10.0  # a watcher that did not repeat its Watch for this long is dropped
WATCH_AGAIN_S = 2.0  # how often our watchers repeat their Watch
WATCH_GRAIN_S = 0.05  # a Watch repeated sooner on the same connection is ignored
WATCH_QUEUE_FRAMES = 2  # Watch messages of a watcher that may wait for a connection

STATUS_PER_S = 50  # status requests answered, of all clients together
TICK_GRAIN_S = 0.005  # timers are checked no more often than this
