"""The pool's agent for clients on other hosts: it proxies each remote client through a local one.

Each remote client has its own connection to the service (a :class:`Wire`). So it can hold no more than a local client
(``client_bytes``), and everything that it holds is released when it is gone. Chunk bytes move by a transport whose
pages are the pool's frames: a loaded chunk is offered to the client; a stored chunk is fetched from the client,
verified, and then published.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from types import TracebackType

import zmq
from zmq.utils.monitor import parse_monitor_message

from pdtransport.control import curve
from pdtransport.control.door import Accepted, Door
from pdtransport.control.limits import (
    MAX_FRAMES_A_TURN,
    MAX_SHORT_FRAME,
    MAX_STRANGERS,
    STRANGER_FRAMES,
    STRANGER_FRAMES_PER_S,
)
from pdtransport.control.listener import bind, text_of
from pdtransport.control.owners import descriptor_of, owners_for
from pdtransport.control.shared import complaints_about_peers
from pdtransport.control.sockets import Inbox, Letter, Socket, close_watched, open_socket, watch
from pdtransport.control.status import Allowance
from pdtransport.errors import SettingsError
from pdtransport.io.reactor import Reactor
from pdtransport.kv.fingerprint import plain
from pdtransport.pool import messages
from pdtransport.pool.core.shared_memory import Mapping
from pdtransport.pool.local_wire import Wire
from pdtransport.pool.remote.chunk_transport import open_transport
from pdtransport.pool.remote.remote_messages import RemoteHello, RemotePing, RemotePong, RemoteWelcome, from_remote
from pdtransport.pool.remote.session import Caller, RemoteClientSession
from pdtransport.pool.settings import PoolSettings
from pdtransport.protocol.messages import PEEK_BYTES, Message, WireError, peek
from pdtransport.transport import Transport

logger = logging.getLogger("pdtransport.pool")

TICK_S = 0.25
LOOK_S = 1.0  # how long after a disconnect clients are probed, to find the one whose connection ended


class _Stranger:
    """A connection that has sent a message, with or without Hello."""

    def __init__(self, caller: Accepted) -> None:
        self.caller = caller
        self.allowance = Allowance(STRANGER_FRAMES_PER_S, STRANGER_FRAMES)  # rate limit before its Hello
        self.cut = False  # cut off: its messages are ignored


class RemoteServer:
    """The agent's socket and its remote clients; driven by a :class:`Reactor`."""

    def __init__(self, settings: PoolSettings, mapping: Mapping, transport: Transport, reactor: Reactor) -> None:
        assert settings.remote is not None
        self._settings, self._mapping, self._transport, self._reactor = settings, mapping, transport, reactor
        self._context: zmq.Context[Socket] = zmq.Context(1)
        self._silence_s = settings.remote.liveness_s
        control = settings.remote.control(0).model_copy(update={"max_frame_bytes": messages.MAX_FRAME_BYTES})
        self._sessions: dict[bytes, RemoteClientSession] = {}
        self._strangers: OrderedDict[bytes, _Stranger] = OrderedDict()  # by route; includes clients after their Hello
        self._leaving: list[RemoteClientSession] = []
        self._gatekeeper: curve.Gatekeeper | None = None
        self._socket: Socket | None = None
        self._monitor: Socket | None = None
        try:
            keys = curve.load_keys(control)
            owners = owners_for(control, keys=keys is not None)
            self._gatekeeper = curve.Gatekeeper(self._context, keys) if keys is not None else None
            self._socket = open_socket(self._context, zmq.ROUTER, control, ipv6=":" in control.host)
            curve.apply_server(self._socket, keys)
            self._monitor = watch(self._context, self._socket, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
            try:
                bind(self._socket, control, control.base_port(), 0)
            except SettingsError as error:
                raise SettingsError(f"remote.listen: {error}") from None
        except BaseException:
            self.close()
            raise
        self._inbox = Inbox(self._socket, addressed=True)
        self._door = Door(settings.remote.port, owners)
        self._complaints = complaints_about_peers()
        self._tick_at = self._look_until = 0.0

    # -- called by the reactor --------------------------------------------------------------------------------------

    def sockets(self) -> list[Socket]:
        own = [self._socket, self._monitor, self._gatekeeper.socket if self._gatekeeper is not None else None]
        return [
            *(each for each in own if each is not None),
            *(s for session in self._all for s in session.wire.sockets()),
        ]

    def descriptors(self) -> list[int]:
        return []

    def arm(self) -> bool:
        return not any(int(each.get(zmq.EVENTS)) & zmq.POLLIN for each in self.sockets())

    def next_deadline(self) -> float | None:
        times = [session.wire.next_deadline() for session in self._all]
        return min([self._tick_at, *(at for at in times if at is not None)])

    def turn(self, now: float) -> bool:
        for _ in range(MAX_FRAMES_A_TURN):
            if self._gatekeeper is None or not self._gatekeeper.step():
                break
        self._read_monitor(now)
        more = self._read(now)
        for session in self._all:
            more = session.wire.turn(now) or more
        if now >= self._tick_at:
            self._tick_at = now + TICK_S
            for caller in self._door.look(now):
                self._complain(f"cut off {caller}: it sent too much before Hello", now)
                self._door.cut(caller)
            for session in [session for session in self._sessions.values() if now - session.heard_at > self._silence_s]:
                logger.info("client %s of pool %s is silent", session.name, self._settings.name)
                self._part(session)
            if now < self._look_until:  # a connection has ended: sending to its client fails, which drops the client
                for route in list(self._sessions):
                    self._send(route, RemotePong())
        for session in [session for session in self._leaving if session.gone]:
            self._leaving.remove(session)
            session.wire.close()
        return more

    def close(self) -> None:
        """Close all connections. The transport must be closed already, so that nothing touches frames any more."""
        for session in self._all:
            session.wire.close()
        close_watched(self._socket, self._monitor)
        if self._gatekeeper is not None:
            self._gatekeeper.close()
        self._context.term()

    @property
    def _all(self) -> list[RemoteClientSession]:
        return [*self._sessions.values(), *self._leaving]

    # -- incoming messages ------------------------------------------------------------------------------------------

    def _read(self, now: float) -> bool:
        for _ in range(MAX_FRAMES_A_TURN):
            letter = self._inbox.read()
            if not letter:
                return False
            if isinstance(letter, Letter):
                self._on_letter(letter, now)
        return True

    def _read_monitor(self, now: float) -> None:
        for _ in range(MAX_FRAMES_A_TURN):  # bounded, since strangers may connect and disconnect at any rate
            try:
                assert self._monitor is not None
                report = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            descriptor = int(report["value"])
            if report["event"] == zmq.EVENT_ACCEPTED:
                if complaint := self._door.accepted(descriptor, now):
                    self._complain(complaint, now)
                continue
            self._look_until = now + LOOK_S
            if (caller := self._door.of(descriptor)) is not None:
                self._door.closed(caller)

    def _complain(self, text: str, now: float) -> None:
        self._complaints.warn(f"pool {self._settings.name}: {text}", "strangers", now)

    def _stranger(self, letter: Letter, now: float) -> _Stranger | None:
        """The connection of a sender that has not said Hello; None if its message must be ignored."""
        stranger = self._strangers.get(letter.sender)
        if stranger is None:
            self._read_monitor(now)  # the monitor reports a connection before its first frame arrives
            caller = self._door.of(descriptor_of(letter.part))
            try:
                complaint = self._door.identify(caller) if caller is not None else ""
            except OSError:
                return None
            if caller is None or complaint:
                if caller is not None:
                    self._complain(f"refused {caller}: {complaint}", now)
                    self._door.cut(caller)
                return None
            stranger = self._strangers[letter.sender] = _Stranger(caller)
            while len(self._strangers) > 2 * MAX_STRANGERS + len(self._sessions):
                self._strangers.popitem(last=False)
        if stranger.cut or stranger.allowance.take(now):
            return None if stranger.cut else stranger
        stranger.cut = True
        self._complain(f"cut off {stranger.caller}: more than {STRANGER_FRAMES} frames before Hello", now)
        assert self._socket is not None
        self._socket.get(zmq.EVENTS)  # makes libzmq report to this socket which connections have ended
        if self._send(
            letter.sender, messages.PoolRefused(what="client", reason="cut off: too many frames before Hello")
        ):
            self._door.cut(stranger.caller)  # only if it still exists: else another connection may have its descriptor
        return None

    @staticmethod
    def _from_stranger(body: zmq.Frame) -> Message:
        """Decode a frame that arrived before Hello, unless it is longer than a Hello can be.

        Raises:
            WireError: the frame is too long, or no message.
        """
        _, kind = peek(bytes(body.buffer[:PEEK_BYTES]))
        if len(body) > MAX_SHORT_FRAME:
            raise WireError(f"a {plain(kind, 40)} of {len(body)} bytes before Hello")
        return from_remote(body.bytes)

    def _on_letter(self, letter: Letter, now: float) -> None:
        session = self._sessions.get(letter.sender)
        if session is None and self._stranger(letter, now) is None:
            return
        try:
            if letter.body is None:
                raise WireError("a message of several parts")
            message = self._from_stranger(letter.body) if session is None else from_remote(letter.body.bytes)
            if isinstance(message, RemoteHello):
                self._on_hello(letter, message, now)
            elif session is None:
                number = getattr(message, "request", 0)
                self._send(letter.sender, messages.PoolRefused(request=number, what="hello", reason="say Hello first"))
            elif isinstance(message, RemotePing):
                session.heard_at = now
                self._send(letter.sender, RemotePong())
            elif isinstance(message, messages.Bye):
                self._part(session)
            else:
                session.heard_at = now
                session.on_message(message, now)
        except (WireError, RecursionError) as error:
            text = plain(str(error), 300)
            whose = "clients" if session is not None else "strangers"
            self._complaints.warn(f"garbage from a remote client of pool {self._settings.name}: {text}", whose, now)
            self._send(letter.sender, messages.PoolRefused(what="message", reason=text))

    def _on_hello(self, letter: Letter, hello: RemoteHello, now: float) -> None:
        route, remote, settings = letter.sender, self._settings.remote, self._settings
        assert remote is not None
        reason = "Hello was already sent on this connection" if route in self._sessions else ""
        if len(self._all) >= remote.max_clients:
            reason = f"{remote.max_clients} clients of other hosts are connected (remote.max_clients)"
        if reason:
            self._send(route, messages.PoolRefused(what="client", reason=reason))
            return
        self._door.know(self._strangers[route].caller)
        name = plain(hello.name, 100)
        wire = Wire(settings.dir, settings.name, f"{name} (remote)", hello.tenant, context=self._context)
        self._sessions[route] = RemoteClientSession(
            name,
            wire,
            self._transport,
            caller=Caller(text_of(letter.part, "Peer-Address"), remote.networks),
            batch_frames=max(1, hello.staging_bytes // 8 // settings.frame_bytes),
            send=lambda message: self._send(route, message),
            post=self._reactor.post,
            now=now,
        )
        self._send(
            route,
            RemoteWelcome(
                nbytes=self._mapping.nbytes,
                frame_bytes=settings.frame_bytes,
                client_bytes=settings.client_bytes,
                port=self._transport.port,
            ),
        )

    def _send(self, route: bytes, message: Message) -> bool:
        assert self._socket is not None
        try:
            self._socket.send_multipart([route, messages.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # the client is gone, or does not read (EAGAIN); returns False only if it is gone
            session = self._sessions.get(route)
            if session is not None:
                self._part(session)
            return error.errno == zmq.EAGAIN
        return True

    def _part(self, session: RemoteClientSession) -> None:
        """Drop a client; what it holds is released once none of its transfers is in flight."""
        for route in [route for route, each in self._sessions.items() if each is session]:
            del self._sessions[route]
            if (known := self._strangers.get(route)) is not None:
                self._door.forget(known.caller, time.monotonic())
        self._leaving.append(session)
        session.leave()


class Agent:
    """Listens for clients on other hosts at ``settings.remote.listen``; its transport listens at the next port.

    Args:
        mapping: the pool's memory. The agent owns it and closes it.

    Raises:
        SettingsError: the address is not this host's, a port is in use, or keys are missing or can't be used.
        LinkUnavailable: no link works here.
    """

    def __init__(self, settings: PoolSettings, mapping: Mapping) -> None:
        remote = settings.remote
        if remote is None:
            raise SettingsError("remote.listen is not set")
        self._mapping = mapping
        try:
            self._transport = open_transport(
                mapping.address,
                mapping.nbytes,
                settings.frame_bytes,
                remote.settings(),
                f"pdpool-{settings.name}",
                remote.port + 1,
                remote.liveness_s,
            )
            self._reactor = Reactor(
                lambda reactor: RemoteServer(settings, mapping, self._transport, reactor),
                name=f"pdpool-agent-{settings.name}",
            )
            try:
                self._reactor.start()
            except BaseException:
                self._transport.close()
                raise
        except BaseException:
            mapping.close()
            raise

    def close(self) -> None:
        """End all transfers, then release everything that remote clients hold. Call it once."""
        self._transport.close()
        self._reactor.stop()
        self._mapping.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
