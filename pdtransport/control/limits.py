"""Bounds and intervals of the control channel that nobody needs to set. Settings hold the others."""

from __future__ import annotations

MAX_PEERS = 1024  # workers that may be up at once; more are refused with field "peers"
MAX_CONNECTIONS = 512  # endpoints we connect to; each holds two sockets and about four descriptors
MAX_TRIED = 64  # of them, endpoints that never led to a peer; one more takes the place of the one tried longest
MAX_PROVEN = 4096  # endpoints without a connection that are remembered to have led to a peer
NEW_PER_S = 64.0  # endpoints that never led to a peer are called so often first; as many at once after a pause ...
AGAIN_PER_S = 16.0  # ... and so often again, all of them together
MAX_ROUTES_PER_PEER = 8  # connections between the same two processes, both directions together
MAX_STRANGERS = 512  # connections without a handshake; of more, the one that has had most time for it is closed
MAX_SHARED_NAMES = 64  # names of several live processes that are watched and shown
DESCRIPTORS_SPARE = 256  # for everything but connections: files, other sockets, the engine's own
MAX_BREAKS = 4096  # peers whose past partings are remembered
MAX_PROBES = 4096  # connections that may be checked at once after the system reported a disconnect

SEND_QUEUE_FRAMES = 2048  # per connection; a full queue makes send() return False
RECEIVE_QUEUE_FRAMES = 256  # per connection that we open; beyond it TCP's own window holds the sender
LISTEN_BUFFER_BYTES = 128 << 10  # of the system, likewise: what libzmq's one thread reads of it before the next one's
LISTEN_QUEUE_FRAMES = 32  # the same per connection to us: there may be many, from anybody
MONITOR_QUEUE_EVENTS = 1 << 16  # deep, since libzmq's I/O thread would block on a full one
TCP_BACKLOG = 512

MAX_STRANGER_FRAME = 256 << 10  # bytes of a frame before the handshake: the largest Hello with all its exports
MAX_SHORT_FRAME = 4096  # the same of any other message
STRANGER_BYTES = 1 << 20  # that a connection may send before its handshake ...
STRANGER_BYTES_PER_S = 256 << 10  # ... and in each second of it: a largest Hello, repeated
STRANGER_FRAMES = 64  # frames likewise
STRANGER_FRAMES_PER_S = 16
UNDER_WAY_FRAMES = SEND_QUEUE_FRAMES + RECEIVE_QUEUE_FRAMES  # that a peer may have sent when it is given up, ...
UNDER_WAY_BYTES = 16 << 20  # ... and how long they may be
HELLOS_PER_S = 2  # that a connection may say, and HELLOS at once: each that brings news ends what is under way
HELLOS = 8
LOOK_AGAIN_S = 0.1  # between looks at how much strangers have sent
CUT_AFTER_S = 0.05  # a stranger that is told why is cut off after this
CUT_SHOWS_S = 1.0  # a connection that we close in its handshake is reported as failed within this
MAX_FRAMES_A_TURN = 256
FRAMES_BEFORE_ANSWERS = 32  # that a worker hears before it answers the first: some 5 ms of a peer that never ends
MAX_REPORTS_A_TURN = 1024  # of connections that came or went: cheaper than frames, and too many must not stay open
ENDS_BEFORE_TRIM = 64  # so many strangers leave memory that the C library keeps; it is given back once they are gone
TRIM_AFTER_S = 1.0

MAX_DIALS_A_TURN = 4  # the others wait for the next one: to open a socket takes a millisecond, which peers wait for
RECONNECT_S = 0.1  # first pause before TCP is tried again, each at random half to whole ...
RECONNECT_MAX_S = 1.0  # ... the longest while somebody waits, or while a peer may come back that was up ...
RETRY_MAX_S = 8.0  # ... and the longest while nobody waits
LOOK_AGAIN_S = 0.005  # whether a name was looked up
HELLO_AGAIN_S = 1.0  # an unanswered Hello is repeated after this, on the same connection
LOST_OPENER_S = 0.3  # a broken connection that can't be opened again: its peer is down after this
LOST_BOUND_S = 1.0  # the same where the peer must do the reconnecting: its own pauses come on top
RETRY_FOR_S = 60.0  # background attempts, some fifteen, at an endpoint that nobody has asked for since
REFUSAL_HOLDS_S = 1.0  # an endpoint that refused us is not asked again before this
PROBE_AFTER_S = (0.02, 0.3)  # after a disconnect, see which connection it was
ANSWER_GARBAGE_EVERY_S = 1.0  # per connection
SHARED_NAME_AFTER_S = 0.5  # who is heard so long after another took its name lives, too
SHARED_NAME_AGAIN_S = 60.0  # and is complained of again after this
FAILED_CURVE_HANDSHAKES = 3  # in a row, before a connection that hangs up without a word counts as refused

MAX_WATCHERS = 64  # who is told how transfers end; one more is refused
WATCH_LEASE_S = 10.0  # a watcher that did not ask again for this long is forgotten
WATCH_AGAIN_S = 2.0  # how often ours ask again
WATCH_GRAIN_S = 0.05  # asked again sooner over the same connection, a worker says nothing
WATCH_QUEUE_FRAMES = 2  # a watcher's own questions that wait for a connection

STATUS_PER_S = 50  # status requests answered, all askers together
TICK_GRAIN_S = 0.005  # timers are looked at no more often than this
