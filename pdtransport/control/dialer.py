"""Connections that we open: TCP, ZMTP and CURVE (all done by libzmq), then Hello and Welcome, then heartbeats."""

from __future__ import annotations

import math
import random

import zmq
from zmq.utils.monitor import parse_monitor_message

from pdtransport.control import curve, handshake
from pdtransport.control.directory import NAME, Route, Sent
from pdtransport.control.events import Address, ConnectFailed, Event, MessageReceived, PeerId
from pdtransport.control.limits import (
    FAILED_CURVE_HANDSHAKES,
    HELLO_AGAIN_S,
    LOST_OPENER_S,
    NAME_POLL_S,
    RECONNECT_MAX_S,
    RECONNECT_S,
    REFUSAL_HOLDS_S,
    RETRY_FOR_S,
    RETRY_MAX_S,
)
from pdtransport.control.owners import ListenerOwner
from pdtransport.control.shared import ChannelContext
from pdtransport.control.sockets import Inbox, Letter, Socket, close_watched, open_socket, tcp_url, watch
from pdtransport.kv.fingerprint import plain
from pdtransport.protocol.messages import (
    Hello,
    LinkCall,
    Message,
    Ping,
    Pong,
    Refused,
    TransferMessage,
    Welcome,
    WireError,
    decode,
    encode,
)

WATCHED = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Pauses:
    """Pauses between tries: exponential backoff with random jitter."""

    def __init__(self) -> None:
        self._next = RECONNECT_S

    def take(self, longest: float) -> float:
        pause = min(self._next, longest)
        self._next = min(2 * self._next, RETRY_MAX_S)
        return pause * random.uniform(0.5, 1.0)

    def start_anew(self) -> None:
        self._next = RECONNECT_S


class Dialer(Route):
    """The connection to one endpoint, reopened as long as callers ask for the endpoint.

    Args:
        proven: the endpoint led to a peer before.
    """

    def __init__(self, endpoint: Address, shared: ChannelContext, now: float, *, proven: bool = False) -> None:
        self.endpoint = endpoint
        self.where = f"{endpoint.host}:{endpoint.port}"
        self.key = shared.keys.server.decode() if shared.keys is not None else ""
        self.socket: Socket | None = None
        self.monitor: Socket | None = None
        self._shared = shared
        self._proven = proven
        self._dial_at: float | None = now  # when the channel must close the sockets and dial again; None: not at all
        self._tried_at = -math.inf  # when it last dialled
        self._pauses = Pauses()
        self._wanted_at = now  # when a caller last asked for this endpoint, or its peer was lost
        self._deadline: float | None = None  # set while a caller waits for an answer
        self._failure: ConnectFailed | None = None
        self._failed_at = now
        self._reached_tcp = self._session = False  # how far the current attempt came
        self._reached_at = now
        self._failed_handshakes = 0
        self._listening = ListenerOwner(shared.owners, endpoint.port)
        self._owner_known = False  # the owner of this connection is checked
        self._hello_due: float | None = None
        self._said_breaks = 0
        self._last_peer: PeerId | None = None
        self._ping_due = now

    # -- sockets -------------------------------------------------------------------------------------------------

    def due(self, now: float) -> bool:
        """Whether the endpoint should be dialled now."""
        return self._dial_at is not None and now >= self._dial_at

    def put_off(self, now: float) -> None:
        """Dial later: the limit on dials is reached."""
        self._dial_at = now + self._pauses.take(RECONNECT_MAX_S)

    def dial(self, now: float) -> list[Event]:
        """Open the sockets; libzmq connects, and reconnects by itself until the peer is given up.

        Raises:
            zmq.ZMQError: no socket can be opened, or the address is malformed.
        """
        shared, port = self._shared, self.endpoint.port
        self.hang_up()
        verdict = shared.reach.ask(self.endpoint.host)
        if verdict is None:
            self._dial_at = now + NAME_POLL_S
            return []
        self._dial_at, self._tried_at = None, now
        if verdict.problem:
            return self._fail(now, verdict.problem, "host", refused=True)
        host = verdict.address
        socket = open_socket(shared.context, zmq.DEALER, shared.settings, ipv6=":" in host)
        monitor = None
        try:
            curve.apply_client(socket, shared.keys)
            monitor = watch(shared.context, socket, WATCHED)
            socket.connect(tcp_url(host, port))
        except BaseException:
            close_watched(socket, monitor)
            raise
        self.socket, self.monitor = socket, monitor
        self._inbox = Inbox(socket, addressed=False)
        return []

    def hang_up(self) -> None:
        close_watched(self.socket, self.monitor)
        self.socket = self.monitor = None
        self._session, self._hello_due = False, None

    def send(self, frame: bytes) -> Sent:
        if self.socket is None or not self._session:
            return Sent.GONE
        try:
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError:
            return Sent.FULL
        self._shared.counters["frames_out"] += 1
        return Sent.OK

    # -- calls of the channel --------------------------------------------------------------------------------------

    def want(self, now: float) -> ConnectFailed | None:
        """A caller asks for this endpoint. Repeats a recent refusal instead of asking the endpoint again."""
        self._wanted_at = now
        if self.peer is not None or self._deadline is not None:
            return None
        if self._failure is not None and self._failure.refused and now < self._failed_at + REFUSAL_HOLDS_S:
            return self._failure
        self._deadline = now + self._shared.settings.connect_s
        if self.socket is None:
            soon = max(now, self._tried_at + RECONNECT_MAX_S)
            self._dial_at = soon if self._dial_at is None else min(self._dial_at, soon)
        elif self._session:
            self._hello_due = now
        return None

    def forget_refusal(self) -> None:
        """Our fingerprint has changed: forget the refusal of the old one."""
        self._failure = None

    def unbind(self, *, silent: bool) -> None:
        now = self._shared.clock()
        self._wanted_at = now
        if silent:
            self._dial_at = -math.inf  # new sockets: frames queued on the old ones must not arrive later
        elif self._session:
            self._hello_due = now

    @property
    def waiting(self) -> bool:
        return self._deadline is not None

    def wanted_since(self) -> float:
        return self._wanted_at

    @property
    def first(self) -> bool:
        """Whether the endpoint was never dialled, or led to a peer before: its next dial is not rate-limited."""
        return self.proven or self._tried_at == -math.inf

    @property
    def proven(self) -> bool:
        """Whether the endpoint ever led to a peer."""
        return self._proven or self._last_peer is not None

    def retired(self, now: float) -> bool:
        """Whether the endpoint has no peer, and no caller has asked for it for ``RETRY_FOR_S``."""
        return self.peer is None and not self.waiting and now >= self._wanted_at + RETRY_FOR_S

    def forgive(self, gap: float) -> None:
        if self._deadline is not None:
            self._deadline += gap

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Event]:
        if self._hello_due is not None and now >= self._hello_due:
            self._say_hello(now)
        if self.peer is not None and self.broken_until is None and now >= self._ping_due:
            self._ping_due = now + self._shared.beat_s
            self.send(encode(Ping(incarnation=self._shared.me.incarnation)))
        if self._deadline is not None and now >= self._deadline:
            return self._fail(now, self._why_unanswered())
        return []

    def next_deadline(self) -> float:
        times = [self._wanted_at + RETRY_FOR_S] if self.peer is None and self._deadline is None else []
        if self.peer is not None and self.broken_until is None:
            times.append(self._ping_due)
        times += [due for due in (self._deadline, self._hello_due, self._dial_at) if due is not None]
        return min(times, default=math.inf)  # a broken peer's deadline is the directory's

    def _say_hello(self, now: float) -> None:
        directory = self._shared.directory
        self._said_breaks = directory.our_breaks(self._last_peer)
        sent = self.send(encode(handshake.facts(Hello, self._shared.me, self._said_breaks)))
        # libzmq may attach a new connection to the socket a moment after it reported it
        self._hello_due = now + (HELLO_AGAIN_S if sent is Sent.OK else 0.01) if sent is not Sent.GONE else None

    def _why_unanswered(self) -> str:
        host, port = self.endpoint
        within = f"within {self._shared.settings.connect_s:g} s (control.connect_s)"
        if self._session:
            return (
                f"{host}:{port} accepted the connection but did not answer Hello {within}: it hangs, or is overloaded"
            )
        if self._failed_handshakes:
            side = "ours are on" if self._shared.keys else "ours are off"
            return (
                f"{host}:{port} kept closing the connection {within}: either no control channel listens there, or its "
                f"CURVE keys don't match ({side})"
            )
        if self._reached_tcp:
            return f"{host}:{port} accepted the connection but did not speak ZeroMQ {within}: check the port"
        return f"no answer from {host}:{port} {within}: check the address, and that the peer runs"

    def _fail(self, now: float, reason: str, field: str = "", *, refused: bool = False) -> list[Event]:
        self._failure = ConnectFailed(*self.endpoint, reason, field, refused)
        self._failed_at = now
        if self._deadline is None:  # no caller waits: it was a background attempt
            self._shared.complaints.warn(reason, "attempt", now)
            return []
        self._deadline = None
        return [self._failure]

    # -- libzmq's reports about the connection ---------------------------------------------------------------------

    def step_monitor(self, now: float) -> list[Event] | None:
        """Handle one report; None if there is none."""
        if self.monitor is None:
            return None
        try:
            report = parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return None
        event, value = report["event"], int(report["value"])
        if event == zmq.EVENT_CONNECTED:
            self._owner_known = False
            self._reached_tcp, self._reached_at = True, now
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._session, self._failed_handshakes = True, 0
            self._say_hello(now)
        elif event == zmq.EVENT_DISCONNECTED:
            self._on_disconnected(now)
        elif event == zmq.EVENT_CLOSED:
            self._on_turned_away(now)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            return self._on_hung_up(now)
        else:
            return self._on_handshake_refused(event, value, now)
        return []

    def _try_later(self, now: float) -> None:
        """The endpoint has no peer: close the sockets and dial after a pause. libzmq would retry at its own pace."""
        self.hang_up()
        self._dial_at = now + self._pauses.take(RECONNECT_MAX_S if self.waiting else RETRY_MAX_S)

    def _on_disconnected(self, now: float) -> None:
        self._session, self._hello_due = False, None
        if self.peer is None:
            self._try_later(now)
        elif self.broken_until is None:
            self.broken_until = self.last_heard + self._shared.settings.liveness_s

    def _on_turned_away(self, now: float) -> None:
        """A TCP connect failed, for example because nothing listens there any more: don't wait long for a lost peer."""
        self._reached_tcp, self._failed_handshakes = False, 0
        if self.peer is None:
            self._try_later(now)
        elif self.broken_until is not None:
            self.broken_until = min(self.broken_until, now + LOST_OPENER_S)

    def _on_hung_up(self, now: float) -> list[Event]:
        self._shared.counters["handshakes_failed"] += 1
        hung_up = now < self._reached_at + 0.8 * self._shared.settings.connect_s
        self._failed_handshakes += hung_up  # else libzmq's handshake timeout: the port sends nothing at all
        if not hung_up or self._shared.keys is None or self._failed_handshakes < FAILED_CURVE_HANDSHAKES:
            if self.peer is None:
                self._try_later(now)
            return []
        self.hang_up()
        return self._fail(
            now,
            f"CURVE handshake with {self.endpoint.host}:{self.endpoint.port} failed: it does not hold the key that "
            "we expect; check control.curve_server_key",
            "curve",
            refused=True,
        )

    def _on_handshake_refused(self, event: int, value: int, now: float) -> list[Event]:
        """The ZMTP or CURVE handshake was refused, after which libzmq does not try again."""
        self._shared.counters["handshakes_failed"] += 1
        self.hang_up()
        where = f"{self.endpoint.host}:{self.endpoint.port}"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            text = f"{where} refuses our CURVE key; add it to control.curve_allowed_keys there"
        elif value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            side = "on here and off" if self._shared.keys else "off here and on"
            text = f"CURVE is {side} at {where}: set keys on both sides, or on neither (control.curve_*_key_file)"
        elif self._shared.keys is not None:
            text = f"CURVE handshake with {where} failed: check control.curve_server_key"
        else:
            return self._fail(now, f"{where} does not speak ZeroMQ: check the port", "protocol", refused=True)
        return self._fail(now, text, "curve", refused=True)

    # -- frames ----------------------------------------------------------------------------------------------------

    def step(self, now: float) -> list[Event] | None:
        """Handle one frame; None if there is none."""
        if self.socket is None:
            return None
        letter = self._inbox.read()
        if isinstance(letter, bool):
            return [] if letter else None
        self._shared.counters["frames_in"] += 1
        events: list[Event] = []
        while (found := self.step_monitor(now)) is not None:  # a new connection is reported before its frames
            events += found
        if self.socket is None:
            return events
        return events + self._on_letter(letter, now)

    def _on_letter(self, letter: Letter, now: float) -> list[Event]:
        if not self._owner_known:
            try:
                complaint = self._listening.complaint(letter.part)
            except OSError:
                return []  # the frame's connection is closed
            if complaint:
                self._shared.counters["refused"] += 1
                events = self._shared.directory.leave(self, complaint)
                self.hang_up()
                return [*events, *self._fail(now, f"{self.where}: {complaint}", "user", refused=True)]
            self._owner_known = True
        if letter.body is None:
            return self._garbage("a message of several parts", now)
        frame = letter.body.bytes
        try:
            message = decode(frame)
        except (WireError, RecursionError) as error:
            version = handshake.foreign_version(frame)
            if version is not None and self.peer is None:
                where = f"{self.endpoint.host}:{self.endpoint.port}"
                refused = handshake.version_refusal(version, "this side", where)
                return self._fail(now, refused.reason, refused.field, refused=True)
            return self._garbage(str(error), now)
        self.last_heard = now
        return self._on_message(message, now)

    def _on_message(self, message: Message, now: float) -> list[Event]:
        if isinstance(message, Welcome):
            return self._on_welcome(message, now)
        if isinstance(message, Refused):
            return self._on_refused(message, now)
        if isinstance(message, Pong):
            return []
        if isinstance(message, Ping):
            self.send(encode(Pong(incarnation=self._shared.me.incarnation)))
            return []
        if not isinstance(message, TransferMessage | LinkCall):
            return self._garbage(f"an unexpected {message.kind}", now)
        if self.peer is None or self.broken_until is not None:  # the new listener has not sent Welcome yet
            self._shared.counters["dropped_unknown_peer"] += 1
            return []
        return [MessageReceived(self.peer, message)]

    def _on_welcome(self, welcome: Welcome, now: float) -> list[Event]:
        shared = self._shared
        refusal = handshake.check(shared.me, welcome) or shared.directory.refusal(welcome, self.key)
        if refusal is not None:
            shared.counters["refused"] += 1
            self.send(encode(refusal))
            self._hello_due = None
            return [
                *shared.directory.leave(self, refusal.reason),
                *self._fail(now, refusal.reason, refusal.field, refused=True),
            ]
        self._last_peer = handshake.peer_of(welcome)
        if shared.directory.our_breaks(self._last_peer) > self._said_breaks:
            self._say_hello(now)  # the Welcome shows that this is a peer we gave up: notify it
            return []
        events = shared.directory.admit(welcome, self.endpoint.host, self, self.endpoint, now)
        self._deadline = self._hello_due = self._failure = None
        self._pauses.start_anew()
        self._ping_due = now + shared.beat_s
        return events

    def _on_refused(self, refused: Refused, now: float) -> list[Event]:
        shared = self._shared
        where = f"{self.endpoint.host}:{self.endpoint.port}"
        if refused.field in {"frame", "status"}:  # concerns one frame, not the connection
            shared.complaints.warn(f"{where} could not use a frame of ours: {refused.reason!r}", "frame", now)
            return []
        if refused.field == NAME:
            shared.on_name(where, refused.reason, now)
            return []
        if refused.field == "hello":  # it has given us up, and has forgotten this connection
            why = plain(refused.reason, 512)
            events = shared.directory.leave(self, f"it had given us up: {why}" if why else "it had given us up")
            self._say_hello(now)
            return events
        shared.counters["refused"] += 1
        self._hello_due = None
        name = plain(refused.field, 128)
        reason = f"{where} refused us: {plain(refused.reason, 512) or name}"
        events = shared.directory.leave(self, reason)
        self._hello_due = None
        return [*events, *self._fail(now, reason, name, refused=True)]

    def _garbage(self, what: str, now: float) -> list[Event]:
        self._shared.counters["garbage"] += 1
        where = f"{self.endpoint.host}:{self.endpoint.port}"
        self._shared.complaints.warn(f"invalid frame from {where}: {plain(what, 200)}", "garbage", now)
        return []
