"""Bounds and intervals of the control channel that nobody needs to set. Settings hold the others."""

from __future__ import annotations

MAX_PEERS = 1024  # workers that may be up at once; more are refused with field "peers"
MAX_CONNECTIONS = 512  # endpoints we connect to; each holds two sockets and about four descriptors
MAX_TRIED = 64  # of them, endpoints that never led to a peer; one more takes the place of the one tried longest
MAX_PROVEN = 4096  # endpoints without a connection that are remembered to have led to a peer
NEW_PER_S = 64.0  # endpoints that never led to a peer are called so often first; as many at once after a pause ...
AGAIN_PER_S = 16.0  # ... and so often again, all of them together
MAX_ROUTES_PER_PEER = 8  # connections between the same two processes, both directions together
MAX_STRANGERS = 1024  # connections without a handshake that are remembered, to answer each at most once a second
MAX_BURIED = 1024  # incarnations that a newer one replaced
MAX_BREAKS = 4096  # peers whose past partings are remembered
MAX_PROBES = 4096  # connections that may be checked at once after the system reported a disconnect

SEND_QUEUE_FRAMES = 2048  # per connection; a full queue makes send() return False
RECEIVE_QUEUE_FRAMES = 256  # per connection; beyond it TCP's own window holds the sender
MONITOR_QUEUE_EVENTS = 1 << 16  # deep, since libzmq's I/O thread would block on a full one
TCP_BACKLOG = 512

MAX_STRANGER_FRAME = 256 << 10  # bytes of a frame before the handshake: the largest Hello with all its exports
MAX_FRAMES_A_TURN = 256

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
FAILED_CURVE_HANDSHAKES = 3  # in a row, before a connection that hangs up without a word counts as refused

MAX_WATCHERS = 64  # who is told how transfers end; one more is refused
WATCH_LEASE_S = 10.0  # a watcher that did not ask again for this long is forgotten
WATCH_AGAIN_S = 2.0  # how often ours ask again
WATCH_GRAIN_S = 0.05  # asked again sooner over the same connection, a worker says nothing
WATCH_QUEUE_FRAMES = 2  # a watcher's own questions that wait for a connection

STATUS_PER_S = 50  # status requests answered, all askers together
TICK_GRAIN_S = 0.005  # timers are looked at no more often than this
