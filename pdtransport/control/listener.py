"""The listening side: one ROUTER socket with a bounded number of connections, none of them trusted.

A connection is a *stranger's* until its Hello is accepted. Invariants: without CURVE keys, a connection must belong to
this user (:mod:`pdtransport.control.owners`), which is checked before any frame is decoded. A stranger's frame is
decoded only if its first bytes name a kind that strangers may send (Hello, and a few short messages). Strangers have a
budget of frames and bytes; beyond it, they are cut off.
"""

from __future__ import annotations

import errno
import math
import socket as stdlib_socket
from collections import OrderedDict, deque
from typing import get_args

import zmq
from zmq.utils.monitor import parse_monitor_message

from pdtransport.control import curve, handshake
from pdtransport.control.directory import NAME, Route, Sent
from pdtransport.control.door import Accepted, Door
from pdtransport.control.events import Event, MessageReceived, StatusRequested
from pdtransport.control.limits import (
    ANSWER_GARBAGE_EVERY_S,
    CUT_AFTER_S,
    CUT_SHOWS_S,
    HELLOS,
    HELLOS_PER_S,
    LOST_BOUND_S,
    MAX_PROBES,
    MAX_REPORTS_A_TURN,
    MAX_SHORT_FRAME,
    MAX_STRANGER_FRAME,
    MAX_STRANGERS,
    MAX_WATCHERS,
    PROBE_AFTER_S,
    STATUS_PER_S,
    STRANGER_FRAMES,
    STRANGER_FRAMES_PER_S,
    UNDER_WAY_FRAMES,
    WATCH_GRAIN_S,
)
from pdtransport.control.owners import descriptor_of
from pdtransport.control.shared import ChannelContext
from pdtransport.control.sockets import Inbox, Letter, Socket, close_watched, open_socket, tcp_url, watch
from pdtransport.control.status import Allowance, status_frame
from pdtransport.control.watchers import Watchers
from pdtransport.errors import SettingsError
from pdtransport.kv.fingerprint import plain
from pdtransport.protocol.messages import (
    PEEK_BYTES,
    PROTOCOL_VERSION,
    Hello,
    LinkCall,
    Message,
    Ping,
    Pong,
    Refused,
    StatusRequest,
    TransferMessage,
    Watch,
    Watching,
    Welcome,
    WireError,
    decode,
    encode,
    peek,
)
from pdtransport.settings import ControlSettings
from pdtransport.system.reclaim import Reclaim

WATCHED = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


_SHORT = frozenset(kind.model_fields["kind"].default for kind in (StatusRequest, Watch, Ping, Pong, Refused))
_HELLO = Hello.model_fields["kind"].default
_FROM_PEERS = frozenset(kind.model_fields["kind"].default for kind in (*get_args(TransferMessage), LinkCall))


class Inbound(Route):
    """One connection that was opened to us: a stranger's until its Hello is accepted."""

    inbound = True

    def __init__(self, name: bytes, caller: Accepted, address: str, key: str, listener: ControlListener) -> None:
        self.name = name  # libzmq's name for the connection
        self.caller = caller
        self.address = address  # IP address of the other end
        self.key = key
        self.where = str(caller)
        self.allowance = Allowance(STRANGER_FRAMES_PER_S, STRANGER_FRAMES)  # before its Hello
        self.hellos = Allowance(HELLOS_PER_S, HELLOS)
        self.cut_at: float | None = None  # set: cut off then; its frames are dropped from now on
        self.answer_at = 0.0  # garbage is not answered before this
        self.watch_at = 0.0  # a Watch is not answered before this
        self._listener = listener

    def send(self, frame: bytes) -> Sent:
        return self._listener.send(self, frame)

    def unbind(self, *, silent: bool) -> None:
        self._listener.make_stranger(self)

    def __str__(self) -> str:
        return f"{handshake.shown(self.peer.engine, self.peer.rank)} at {self.where}" if self.peer else self.where


class ControlListener:
    """The listening socket and its connections. The constructor binds.

    Raises:
        SettingsError: the address can't be bound; names ``control.port`` or ``control.host``.
    """

    def __init__(self, port: int, shared: ChannelContext) -> None:
        self._shared = shared
        self._bound: dict[bytes, Inbound] = {}
        self._strangers: OrderedDict[bytes, Inbound] = OrderedDict()
        self._probes: deque[tuple[float, Inbound]] = deque()
        self._allowance = Allowance()
        self._watchers: Watchers[Inbound] = Watchers()
        host = shared.settings.host
        self.socket = open_socket(shared.context, zmq.ROUTER, shared.settings, ipv6=":" in host)
        self.monitor: Socket | None = None
        try:
            curve.apply_server(self.socket, shared.keys)
            self.monitor = watch(shared.context, self.socket, WATCHED)
            bind(self.socket, shared.settings, port, shared.me.rank)
        except BaseException:
            self.close()
            raise
        self._inbox = Inbox(self.socket, addressed=True)
        self.endpoint = self.socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._door = Door(int(self.endpoint.rpartition(":")[2]), shared.owners)
        self._cutting: deque[Inbound] = deque()
        self._cut_at = -math.inf
        self._reclaim = Reclaim()

    def close(self) -> None:
        close_watched(self.socket, self.monitor)

    # -- sending -------------------------------------------------------------------------------------------------

    def send(self, connection: Inbound, frame: bytes) -> Sent:
        try:
            self.socket.send_multipart([connection.name, frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno == zmq.EAGAIN:
                return Sent.FULL
            self._on_gone(connection)
            return Sent.GONE
        self._shared.counters["frames_out"] += 1
        return Sent.OK

    def _on_gone(self, connection: Inbound) -> None:
        """A connection's TCP is down. If the peer is alive, it opens a new connection, with a new name in libzmq."""
        self._door.lost(connection.caller)
        self._strangers.pop(connection.name, None)
        self._watchers.drop(connection.name)
        if self._bound.pop(connection.name, None) is not None:
            now = self._shared.clock()
            connection.broken_until = now + min(LOST_BOUND_S, self._shared.settings.liveness_s)

    def make_stranger(self, connection: Inbound) -> None:
        """The connection's handshake no longer counts: the peer must say Hello again."""
        if self._bound.pop(connection.name, None) is not None:
            # Frames that it sent before it learns this must not use up its budget as a stranger.
            connection.allowance = Allowance(STRANGER_FRAMES_PER_S, STRANGER_FRAMES + UNDER_WAY_FRAMES)
            self._door.forget(connection.caller, self._shared.clock())
            self._add_stranger(connection)

    def ask_for_hello(self, reason: str) -> None:
        """Ask all connections for a new Hello: peers must say it again, and refused ones may try again."""
        for connection in [*self._bound.values(), *self._strangers.values()]:
            self.send(connection, encode(handshake.refusal("hello", reason=reason)))

    def _add_stranger(self, connection: Inbound) -> None:
        self._strangers[connection.name] = connection
        while len(self._strangers) > 2 * MAX_STRANGERS:  # 2: some may be closed without libzmq having reported it
            self._strangers.popitem(last=False)

    def _cut(self, connection: Inbound, why: str, now: float) -> list[Event]:
        """Cut a stranger off: send it the reason, and close its connection. Its further frames are dropped unread."""
        self._count_cut(f"cut off {connection.where}: {why}", now)
        connection.cut_at = now + CUT_AFTER_S
        self.socket.get(zmq.EVENTS)  # makes libzmq process closed connections
        if self.send(connection, encode(handshake.refusal("frame", reason=f"cut off: {why}"))) is not Sent.GONE:
            self._cutting.append(connection)  # else the descriptor may be another connection's by now
        return []

    # -- libzmq's reports, and time --------------------------------------------------------------------------------

    def step_monitor(self, now: float) -> list[Event] | None:
        """Handle one report about a connection; None if there is none."""
        if self.monitor is None:
            return None
        try:
            report = parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return None
        if report["event"] == zmq.EVENT_ACCEPTED:
            self._on_accepted(int(report["value"]), now)
            return []
        if report["event"] != zmq.EVENT_DISCONNECTED:
            self._shared.counters["handshakes_failed"] += 1
            ours = report["event"] == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and now < self._cut_at + CUT_SHOWS_S
            if ours:  # a connection that was closed here, which was logged with its reason
                return []
            text = "a connection failed in its handshake: not ZeroMQ, or a wrong CURVE key"
            self._shared.complaints.warn(text, "strangers", now)
            return []
        caller = self._door.of(int(report["value"]))
        if caller is None:
            return []
        self._door.closed(caller)
        if not caller.known:
            self._reclaim.freed(now)
        gone = [each for each in self._bound.values() if each.caller is caller]
        for connection in gone[: MAX_PROBES - len(self._probes)]:
            self._probes.extend((now + delay, connection) for delay in PROBE_AFTER_S)
        return []

    def _on_accepted(self, descriptor: int, now: float) -> None:
        complaint = self._door.accepted(descriptor, now, [each.caller for each in self._watchers.all(now)])
        if complaint:
            self._count_cut(complaint, now)

    def tick(self, now: float) -> None:
        self._probe(now)
        while self._cutting and now >= (self._cutting[0].cut_at or 0.0):
            self._close_caller(self._cutting.popleft().caller, now)
        for caller in self._door.look(now):
            self._count_cut(f"cut off {caller}: it sent too much before Hello", now)
            self._door.cut(caller)
        self._reclaim.tick(now)

    def _close_caller(self, caller: Accepted, now: float) -> None:
        self._cut_at = now
        self._door.cut(caller)

    def _count_cut(self, complaint: str, now: float) -> None:
        self._cut_at = now
        self._shared.counters["callers_cut"] += 1
        self._shared.complaints.warn(complaint, "strangers", now)
        self._reclaim.freed(now)

    def _probe(self, now: float) -> None:
        """Check connections that may be closed, by sending a Pong: if it can't be sent, the connection is closed.

        The report that libzmq gave is only a hint, because it names a descriptor, which the system may have reused.
        """
        for _ in range(len(self._probes)):
            due, connection = self._probes.popleft()
            if now < due:
                self._probes.append((due, connection))
            elif connection.name in self._bound:
                self.send(connection, encode(Pong(incarnation=self._shared.me.incarnation)))

    def next_deadline(self) -> float | None:
        times = [self._door.next_deadline(), self._reclaim.next_deadline()]
        times += [due for due, _ in self._probes]
        times += [each.cut_at for each in self._cutting]
        return min((due for due in times if due is not None), default=None)

    # -- frames ----------------------------------------------------------------------------------------------------

    def step(self, now: float) -> list[Event] | None:
        """Handle one frame; None if there is none."""
        letter = self._inbox.read()
        if isinstance(letter, bool):
            return [] if letter else None
        self._shared.counters["frames_in"] += 1
        connection = self._connection(letter, now)
        if connection is None or connection.cut_at is not None:
            self._shared.counters["dropped_unknown_peer"] += 1
            return []
        if connection.peer is None:
            return self._on_stranger(connection, letter.body, now)
        if letter.body is None:
            return self._garbage(connection, "a message of several parts", now)
        frame = letter.body.bytes
        try:
            message = decode(frame)
        except (WireError, RecursionError) as error:
            return self._garbage(connection, str(error), now, handshake.foreign_version(frame))
        connection.last_heard = now
        return self._on_message(connection, message, now)

    def _connection(self, letter: Letter, now: float) -> Inbound | None:
        """The connection of a frame; None if it is closed or was not admitted."""
        name = letter.sender
        known = self._bound.get(name) or self._watchers.get(name)
        if known is not None:
            return known
        stranger = self._strangers.pop(name, None)
        if stranger is None:
            for _ in range(MAX_REPORTS_A_TURN):  # its accept was reported before its first frame
                if self.step_monitor(now) is None:
                    break
            caller = self._door.of(descriptor_of(letter.part))
            if caller is None or not self._let_in(caller, now):
                return None
            stranger = Inbound(
                name, caller, text_of(letter.part, "Peer-Address"), text_of(letter.part, "User-Id"), self
            )
        self._add_stranger(stranger)
        return stranger

    def _let_in(self, caller: Accepted, now: float) -> bool:
        try:
            complaint = self._door.identify(caller)
        except OSError:  # the connection is closed already
            return False
        if complaint:
            self._shared.counters["callers_refused"] += 1
            self._shared.complaints.warn(f"refused {caller}: {complaint}", "users", now)
            self._close_caller(caller, now)
        return not complaint

    def _on_stranger(self, connection: Inbound, body: zmq.Frame | None, now: float) -> list[Event]:
        """Handle a stranger's frame, decoding as little of it as possible."""
        if not connection.allowance.take(now):
            return self._cut(connection, f"more than {STRANGER_FRAMES} frames before Hello", now)
        if body is None:
            return self._garbage(connection, "a message of several parts", now)
        if len(body) > MAX_STRANGER_FRAME:
            return self._garbage(connection, f"{len(body)} bytes before the handshake", now)
        try:
            version, kind = peek(bytes(body.buffer[:PEEK_BYTES]))
            if version != PROTOCOL_VERSION:
                foreign = version if isinstance(version, int) and not isinstance(version, bool) else None
                return self._garbage(connection, f"protocol version {plain(str(foreign), 40)}", now, foreign)
            if kind in _FROM_PEERS:
                self._shared.counters["dropped_unknown_peer"] += 1
                return []
            if kind not in _SHORT and kind != _HELLO:
                return self._garbage(connection, f"an unexpected {plain(kind, 40)}", now)
            if kind in _SHORT and len(body) > MAX_SHORT_FRAME:
                return self._garbage(connection, f"a {kind} of {len(body)} bytes", now)
            message = decode(body.bytes, flat=True)
        except (WireError, RecursionError) as error:
            return self._garbage(connection, str(error), now)
        return self._on_message(connection, message, now)

    def _on_message(self, connection: Inbound, message: Message, now: float) -> list[Event]:
        if isinstance(message, Hello):
            return self._on_hello(connection, message, now)
        if isinstance(message, StatusRequest):
            return self._on_status_request(connection, message, now)
        if isinstance(message, Watch):
            self._on_watch(connection, now)
            return []
        if isinstance(message, Ping):
            self._on_ping(connection, message)
            return []
        if isinstance(message, Refused):
            return self._on_refused(connection, message)
        if isinstance(message, Pong):
            return []
        if not isinstance(message, TransferMessage | LinkCall):
            return self._garbage(connection, f"an unexpected {message.kind}", now)
        return [MessageReceived(connection.peer, message)] if connection.peer is not None else []

    def _on_hello(self, connection: Inbound, hello: Hello, now: float) -> list[Event]:
        shared = self._shared
        if not connection.hellos.take(now):
            return []  # it repeats its Hello
        refusal = handshake.check(shared.me, hello) or shared.directory.refusal(hello, connection.key)
        if refusal is not None:
            shared.counters["refused"] += 1
            self.send(connection, encode(refusal))
            shared.complaints.warn(f"refused {connection.where}: {refusal.reason}", "refused", now)
            return shared.directory.leave(connection, refusal.reason)  # it may have been a peer before it changed
        breaks = shared.directory.our_breaks(handshake.peer_of(hello))
        self.socket.get(zmq.EVENTS)  # makes libzmq process closed connections
        if self.send(connection, encode(handshake.facts(Welcome, shared.me, breaks))) is not Sent.OK:
            return []  # it repeats its Hello, if it is still there
        self._door.know(connection.caller)
        events = shared.directory.admit(hello, connection.address, connection, None, now)
        self._strangers.pop(connection.name, None)
        self._bound[connection.name] = connection
        return events

    def _on_ping(self, connection: Inbound, ping: Ping) -> None:
        if connection.peer is None or ping.incarnation != connection.peer.incarnation:
            self.send(connection, encode(handshake.refusal("hello", reason="say Hello first, on this connection")))
        else:
            self.send(connection, encode(Pong(incarnation=self._shared.me.incarnation)))

    def _on_refused(self, connection: Inbound, refused: Refused) -> list[Event]:
        if connection.peer is None or refused.field in {"frame", "status"}:
            return []
        if refused.field == NAME:
            self._shared.on_name(connection.where, refused.reason, self._shared.clock())
            return []
        reason = f"{connection} refused us: {plain(refused.reason or refused.field, 512)}"
        return self._shared.directory.leave(connection, reason)

    # -- status ----------------------------------------------------------------------------------------------------

    def _on_status_request(self, connection: Inbound, request: StatusRequest, now: float) -> list[Event]:
        if not self._allowance.take(now):
            self._shared.counters["status_limited"] += 1
            reason = f"more than {STATUS_PER_S} status requests a second; ask less often"
            self.send(connection, encode(handshake.refusal("status", reason=reason)))
            return []
        return [StatusRequested(lambda text: self._reply(connection, text), request.transfer)]

    def _reply(self, connection: Inbound, text: str) -> None:
        limit = self._shared.settings.max_frame_bytes
        frame = status_frame(text, limit)
        if frame is None:
            reason = f"the status is longer than control.max_frame_bytes ({limit}): raise it, or ask for one transfer"
            frame = encode(handshake.refusal("status", reason=reason))
        if not self.socket.closed:
            self.send(connection, frame)

    # -- watchers --------------------------------------------------------------------------------------------------

    def watched(self, now: float) -> bool:
        """Whether any client watches how transfers end."""
        return self._watchers.any(now)

    def publish(self, message: Message, now: float) -> None:
        """Send ``message`` to every watcher, without waiting; a watcher whose queue is full does not get it."""
        frame = encode(message)
        for watcher in self._watchers.all(now):
            if self.send(watcher, frame) is not Sent.OK:
                self._shared.counters["reports_dropped"] += 1

    def _on_watch(self, connection: Inbound, now: float) -> None:
        if now < connection.watch_at:
            return
        connection.watch_at = now + WATCH_GRAIN_S
        if not self._watchers.admit(connection.name, connection, now):
            self._shared.counters["watchers_refused"] += 1
            reason = f"{MAX_WATCHERS} clients already watch this worker's transfers: stop routers that are not needed"
            self.send(connection, encode(handshake.refusal("watch", reason=reason)))
            return
        me = self._shared.me
        told = handshake.told_incarnation(me.incarnation)
        answer = Watching(engine=me.engine, rank=me.rank, world=me.world, incarnation=told)
        self.send(connection, encode(answer))

    # -- garbage ---------------------------------------------------------------------------------------------------

    def _garbage(self, connection: Inbound, what: str, now: float, version: int | None = None) -> list[Event]:
        """Count a bad frame, log it now and then, and answer its sender at most once a second."""
        self._shared.counters["garbage"] += 1
        what = plain(what, 200)
        topic = "peers" if connection.peer is not None else "strangers"
        self._shared.complaints.warn(f"invalid frame from {connection}: {what}", topic, now)
        if now >= connection.answer_at:
            connection.answer_at = now + ANSWER_GARBAGE_EVERY_S
            known = version is not None
            refusal = handshake.version_refusal(version) if known else handshake.refusal("frame", reason=what)  # type: ignore[arg-type]
            self.send(connection, encode(refusal))
        return []


def bind(socket: Socket, settings: ControlSettings, port: int, rank: int) -> None:
    """Bind to the first address of ``settings.host``. An address other than loopback needs CURVE keys.

    Raises:
        SettingsError: the address can't be bound, or needs keys.
    """
    host = settings.host
    if port > 65535:
        raise SettingsError(f"control.port: rank {rank} would listen on port {port}; choose a lower control.port")
    try:
        # libzmq binds addresses and interfaces, not names
        family, *_, address = stdlib_socket.getaddrinfo(host, port, type=stdlib_socket.SOCK_STREAM)[0]
        if family == stdlib_socket.AF_INET6:
            socket.set(zmq.IPV6, 1)
        if settings.needs_keys(str(address[0])):  # even `localhost` may resolve to anything
            raise SettingsError(
                f"control.host: {host!r} is {address[0]}, which is not loopback, so CURVE keys are needed: make a pair "
                "with `pdlaunch keys DIR` and set control.curve_public_key_file and control.curve_secret_key_file"
            )
        socket.bind(tcp_url(str(address[0]), port or "*"))
    except (OSError, zmq.ZMQError) as error:
        where = f"control.port: port {port} of {host} (rank {rank} uses control.port + {rank})"
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"{where} is in use, maybe by another instance of this role: give this one its own control.port "
                '("kv_connector_extra_config": {"control": {"port": N}}, or PDTRANSPORT_CONTROL_PORT=N)'
            ) from None
        if error.errno == errno.EACCES:
            raise SettingsError(f"{where} needs privileges: choose a control.port above 1023") from None
        raise SettingsError(
            f"control.host: {host!r} is not an address of this machine ({error.strerror}): set control.host to one"
        ) from None


def text_of(frame: zmq.Frame, name: str) -> str:
    """Metadata ``name`` of the frame's connection, as libzmq reports it; empty if it has none."""
    try:
        return str(frame.get(name)).removeprefix("::ffff:")
    except zmq.ZMQError:
        return ""
