"""The control channel: finds and watches peers, and carries every message between them except the pages.

Has no thread of its own: the transport's I/O thread polls :meth:`ControlChannel.sockets` and calls
:meth:`~ControlChannel.receive` and :meth:`~ControlChannel.tick`. Invariant: no frame, however malformed, makes these
methods raise.
"""

from __future__ import annotations

import re
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import replace

import zmq

from pdtransport.control.curve import Gatekeeper, load_keys
from pdtransport.control.dialer import Dialer
from pdtransport.control.directory import Directory
from pdtransport.control.events import (
    Address,
    ConnectFailed,
    Event,
    Identity,
    MessageReceived,
    NameShared,
    PeerDown,
    PeerId,
    PeerUp,
    StatusRequested,
)
from pdtransport.control.handshake import checked_identity
from pdtransport.control.limits import (
    AGAIN_PER_S,
    FRAMES_BEFORE_ANSWERS,
    MAX_CONNECTIONS,
    MAX_DIALS_A_TURN,
    MAX_PROVEN,
    MAX_REPORTS_A_TURN,
    MAX_TRIED,
    NEW_PER_S,
    TICK_GRAIN_S,
)
from pdtransport.control.listener import ControlListener
from pdtransport.control.owners import owners_for
from pdtransport.control.reach import Reach
from pdtransport.control.shared import COUNTERS, ChannelContext, logger
from pdtransport.control.sockets import Socket
from pdtransport.control.status import Allowance
from pdtransport.errors import SettingsError
from pdtransport.kv.fingerprint import plain
from pdtransport.protocol.messages import Ended, FingerprintValue, Message, encode
from pdtransport.settings import ControlSettings

__all__ = [
    "ConnectFailed",
    "ControlChannel",
    "Event",
    "Identity",
    "MessageReceived",
    "NameShared",
    "PeerDown",
    "PeerId",
    "PeerUp",
    "StatusRequested",
]

Step = Callable[[float], "list[Event] | None"]

# Host names and IP addresses only: libzmq gives other characters a special meaning.
_HOST = re.compile(r"[A-Za-z0-9_.\-]+|[0-9A-Fa-f:.]+(%[A-Za-z0-9_.\-]+)?")


class ControlChannel:
    """One worker's control channel.

    Args:
        settings: address, intervals, limits and keys.
        me: this worker's identity, sent in every handshake.
        clock: monotonic seconds; the same clock as ``now`` in the methods below.
        context: ZeroMQ context; default: a new one, terminated by :meth:`close`.

    Raises:
        SettingsError: a CURVE key can't be used, ``me`` does not fit into a Hello, or ``control.peers`` or the check of
            users can't be applied here.
    """

    def __init__(
        self,
        settings: ControlSettings,
        me: Identity,
        *,
        clock: Callable[[], float] = time.monotonic,
        context: zmq.Context[Socket] | None = None,
    ) -> None:
        keys = load_keys(settings)
        owners = owners_for(settings, keys=keys is not None)
        reach = Reach(settings, strict=False, clock=clock)
        checked_identity(me)
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.version = 0  # grows whenever sockets() changes
        self._own_context = context is None
        self._context = context or _context()
        self._directory = Directory(settings.liveness_s, self.counters)
        self._shared = ChannelContext(
            settings, me, keys, clock, self._context, self.counters, self._directory, reach, owners
        )
        self._gatekeeper: Gatekeeper | None = None
        self._listener: ControlListener | None = None
        self._dialers: dict[Address, Dialer] = {}
        self._proven: OrderedDict[Address, None] = OrderedDict()  # endpoints that led to a peer, now without a dialer
        self._new, self._again = Allowance(NEW_PER_S), Allowance(AGAIN_PER_S)
        self._steps: dict[Socket, Step] = {}
        self._poller = zmq.Poller()
        self._pending: deque[Event] = deque()  # at most two per call of connect()
        self._last_tick = clock()
        self._turn = 0
        self._dialled = 0  # sockets opened since the last tick
        self._closed = False

    # -- connections -----------------------------------------------------------------------------------------------

    def bind(self, port: int | None = None) -> str:
        """Listen on ``port`` (default: the settings' port + rank; 0: any free port) and return the endpoint's URL.

        Raises:
            SettingsError: the address can't be bound.
        """
        if self._listener is not None:
            raise SettingsError(f"this control channel listens at {self._listener.endpoint} already")
        if port is None:
            base = self._shared.settings.base_port()
            port = base + self._shared.me.rank if base else 0
        if self._shared.keys is not None and self._gatekeeper is None:
            self._gatekeeper = Gatekeeper(self._context, self._shared.keys)  # before the socket that it guards
        try:
            self._listener = ControlListener(port, self._shared)
        except SettingsError:
            if self._gatekeeper is not None:
                self._gatekeeper.close()
                self._gatekeeper = None
            raise
        self._sockets_changed()
        return self._listener.endpoint

    def connect(self, host: str, port: int) -> None:
        """Connect to the peer at ``host:port``. PeerUp or ConnectFailed follows, unless the peer is up already.

        Reconnects in the background for a while after the peer goes down or can't be reached.
        """
        if self._closed:
            return
        endpoint, now = Address(host, port), self._shared.clock()
        if not self._attentive:
            self._last_tick = (
                now  # nothing was timed until now: a long gap since the last tick is not a pause of this process
            )
        dialer = self._dialers.get(endpoint)
        if dialer is None:
            problem = self._obstacle(endpoint, now)
            if problem is not None:
                self._pending.append(problem)
                return
            proven = endpoint in self._proven
            dialer = self._dialers[endpoint] = Dialer(endpoint, self._shared, now, proven=proven)
        answer = dialer.want(now)
        if answer is not None:
            self._pending.append(answer)
        elif dialer.first and dialer.due(now) and self._dialled < MAX_DIALS_A_TURN:
            self._pending += self._dial(dialer, now)

    def send(self, peer: PeerId, message: Message) -> bool:
        """Send without waiting. Returns False, and counts it, if the message could not be queued.

        That is: this incarnation of the peer is not up, its connection is down, its queue is full, or the message is
        longer than ``max_frame_bytes``.
        """
        frame = encode(message)
        limit = self._shared.settings.max_frame_bytes
        if len(frame) > limit:
            logger.error("a %s of %d bytes exceeds control.max_frame_bytes (%d)", message.kind, len(frame), limit)
        elif not self._closed and self._directory.send(peer, frame):
            return True
        self.counters["send_failed"] += 1
        return False

    @property
    def watched(self) -> bool:
        """Whether any client watches how transfers end."""
        return self._listener is not None and self._listener.watched(self._shared.clock())

    def publish(self, report: Ended) -> None:
        """Send ``report`` to all watchers, without waiting."""
        if self._listener is not None and not self._closed:
            self._listener.publish(report, self._shared.clock())

    def change_fingerprint(self, facts: Mapping[str, FingerprintValue], reason: str) -> list[Event]:
        """Change ``facts`` of our fingerprint: give up all peers, which must shake hands again under the new facts.

        Returns the resulting events.

        Raises:
            SettingsError: a fact does not fit into a Hello; nothing has changed.
        """
        shared = self._shared
        shared.me = checked_identity(replace(shared.me, fingerprint={**shared.me.fingerprint, **facts}))
        for dialer in self._dialers.values():
            dialer.forget_refusal()
        if self._listener is not None:
            self._listener.ask_for_hello(reason)
        return shared.directory.give_up_all(reason)

    def shared_names(self) -> list[tuple[PeerId, list[str]]]:
        """Names that several live peers use: one of these peers, and the addresses of all."""
        return [(peers[0].id, [peer.where for peer in peers]) for peers in self._directory.shared_names]

    @property
    def fingerprint(self) -> Mapping[str, FingerprintValue]:
        """The fingerprint that this worker sends in handshakes."""
        return self._shared.me.fingerprint

    def sockets(self) -> list[Socket]:
        """Sockets to poll for reading. Changes whenever :attr:`version` does."""
        return list(self._steps)

    def close(self) -> None:
        """Close everything at once. Peers get no message, but notice the closed connections. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for dialer in self._dialers.values():
            dialer.hang_up()
        self._shared.reach.close()
        if self._listener is not None:
            self._listener.close()
        if self._gatekeeper is not None:
            self._gatekeeper.close()
        self._steps.clear()
        self._poller = zmq.Poller()
        self._pending.clear()
        self.version += 1
        if self._own_context:
            self._context.term()

    def _obstacle(self, endpoint: Address, now: float) -> ConnectFailed | None:
        """Why ``endpoint``, which has no dialer yet, can't be dialled; None if it can."""
        host, port = endpoint
        if not _HOST.fullmatch(host) or len(host) > 255:
            return ConnectFailed(host, port, f"{plain(host, 80)!r} is not a host name or address", "host", refused=True)
        if self._shared.settings.needs_keys(host):
            text = (
                f"{host} is not this machine, and this side has no CURVE keys: make a pair with `pdlaunch keys DIR` "
                "and set control.curve_public_key_file and control.curve_secret_key_file, or control.allow_plaintext"
            )
            return ConnectFailed(host, port, text, "curve", refused=True)
        if not 1 <= port <= 65535:
            return ConnectFailed(host, port, f"port {port} is not within 1..65535", "port", refused=True)
        if endpoint not in self._proven:
            if not self._new.take(now):
                text = f"{host}:{port} exceeds the limit of {NEW_PER_S:g} new endpoints per second"
                return ConnectFailed(host, port, text, "peers", refused=True)
            self._replace_tried()
        if len(self._dialers) >= MAX_CONNECTIONS and not self._make_room():
            text = f"{host}:{port} exceeds the limit of {MAX_CONNECTIONS} connected endpoints"
            return ConnectFailed(host, port, text, "peers", refused=True)
        return None

    def _replace_tried(self) -> None:
        """Drop the oldest of the endpoints that never led to a peer, if there are ``MAX_TRIED`` of them.

        Requests may name any endpoint: unreachable ones must not block new ones.
        """
        tried = [dialer for dialer in self._dialers.values() if not dialer.proven]
        if len(tried) < MAX_TRIED:
            return
        oldest = min(tried, key=Dialer.wanted_since)
        if oldest.waiting:
            text = f"no answer from {{}}:{{}}, and {MAX_TRIED} other endpoints were requested since"
            self._pending.append(ConnectFailed(*oldest.endpoint, text.format(*oldest.endpoint), "peers"))
        self._drop(oldest)

    def _make_room(self) -> bool:
        """Drop the least recently wanted endpoint that has no peer and no waiting caller; False if there is none."""
        idle = [dialer for dialer in self._dialers.values() if dialer.peer is None and not dialer.waiting]
        if idle:
            self._drop(min(idle, key=Dialer.wanted_since))
        return bool(idle)

    def _dial(self, dialer: Dialer, now: float) -> list[Event]:
        events: list[Event] = []
        try:
            events = dialer.dial(now)
            self._dialled += dialer.socket is not None  # else its name is being looked up, or it must not be called
        except zmq.ZMQError as error:
            # Callers that wait get ConnectFailed at the dialer's deadline.
            self._shared.complaints.warn(
                f"no socket for {dialer.endpoint.host}:{dialer.endpoint.port}: {error}", "", now
            )
        self._sockets_changed()
        return events

    def _drop(self, dialer: Dialer) -> None:
        dialer.hang_up()
        del self._dialers[dialer.endpoint]
        if dialer.proven:
            self._proven[dialer.endpoint] = None
            while len(self._proven) > MAX_PROVEN:
                self._proven.popitem(last=False)
        self._sockets_changed()

    def _sockets_changed(self) -> None:
        """Collect the open sockets and their handlers."""
        steps: dict[Socket, Step] = {}
        if self._gatekeeper is not None:
            steps[self._gatekeeper.socket] = self._step_gatekeeper
        for part in (*self._dialers.values(), self._listener):
            if part is not None and part.socket is not None and part.monitor is not None:
                steps[part.socket] = part.step
                steps[part.monitor] = part.step_monitor
        if steps.keys() != self._steps.keys():
            self._poller = zmq.Poller()
            for socket in steps:
                self._poller.register(socket, zmq.POLLIN)
            self.version += 1
        self._steps = steps

    # -- the I/O thread's turn ---------------------------------------------------------------------------------------

    def receive(self, now: float, limit: int = FRAMES_BEFORE_ANSWERS) -> list[Event]:
        """Handle at most about ``limit`` frames that have arrived, shared evenly among the sockets.

        Sockets with frames left stay readable.
        """
        events = self._take_pending()
        if self._closed:
            return events
        ready = [socket for socket, _ in self._poller.poll(0)]
        if not ready:
            return events
        self._turn += 1
        share = max(1, limit // len(ready))
        first = self._turn % len(ready)
        if self._listener is not None and self._listener.monitor is not None and self._listener.monitor in ready:
            events += self._read(self._listener.monitor, MAX_REPORTS_A_TURN, now)  # accepts before their frames
        for socket in (ready[first:] + ready[:first])[:limit]:
            events += self._read(socket, share, now)
        if any(socket.closed for socket in self._steps):
            self._sockets_changed()
        return events

    def tick(self, now: float) -> list[Event]:
        """Do what is due: dials, handshakes, heartbeats, and giving up silent peers."""
        events = self._take_pending()
        if self._closed or now < self._last_tick + TICK_GRAIN_S:
            return events
        self._forgive_own_pause(now)
        self._last_tick = now
        for event in self._directory.tick(now):
            events.append(event)
            if isinstance(event, NameShared):
                self._shared.complaints.warn(event.reason, "names", now)
        if self._listener is not None:
            self._listener.tick(now)
        self._dialled = 0
        for dialer in list(self._dialers.values()):
            if dialer.due(now) and self._dialled < MAX_DIALS_A_TURN:
                if dialer.first or self._again.take(now):
                    events += self._dial(dialer, now)
                else:
                    dialer.put_off(now)
            events += dialer.tick(now)
            if dialer.retired(now):
                self._drop(dialer)
        return events

    def next_deadline(self) -> float | None:
        """When :meth:`tick` must be called at the latest; None: not before something arrives."""
        if self._closed:
            return None
        if self._pending:
            return self._last_tick
        times = [dialer.next_deadline() for dialer in self._dialers.values()]
        if self._attentive:
            times.append(self._last_tick + self._shared.beat_s)  # regular, so that our own pauses are noticed
        for part in (self._directory, self._listener):
            due = part.next_deadline() if part is not None else None
            if due is not None:
                times.append(due)
        return max(min(times), self._last_tick + TICK_GRAIN_S) if times else None

    @property
    def _attentive(self) -> bool:
        """Whether the silence of a peer or endpoint is being timed."""
        return bool(len(self._directory)) or any(dialer.waiting for dialer in self._dialers.values())

    def _take_pending(self) -> list[Event]:
        events = list(self._pending)
        self._pending.clear()
        return events

    def _read(self, socket: Socket, share: int, now: float) -> list[Event]:
        events: list[Event] = []
        step = self._steps.get(socket)
        while step is not None and share > 0 and not socket.closed:
            share -= 1
            try:
                found = step(now)
            except Exception as error:  # noqa: BLE001 - whatever a frame provokes must not stop the others
                self.counters["garbage"] += 1
                self._shared.complaints.warn(f"error while handling a frame: {error!r:.300}", "error", now)
                continue
            if found is None:
                break
            events += found
        return events

    def _step_gatekeeper(self, now: float) -> list[Event] | None:
        gatekeeper = self._gatekeeper
        if gatekeeper is None or not gatekeeper.step():
            return None
        if gatekeeper.denied > 0:
            self.counters["refused"] += gatekeeper.denied
            gatekeeper.denied = 0
            text = "refused a connection: its key is not in control.curve_allowed_keys"
            self._shared.complaints.warn(text, "key", now)
        return []

    def _forgive_own_pause(self, now: float) -> None:
        """If this thread was paused (stopped process, busy machine), extend the deadlines by the pause.

        The peers were not silent meanwhile; this process just did not read.
        """
        gap = now - self._last_tick
        if self._attentive and gap > max(self._shared.settings.liveness_s / 2, 2 * self._shared.beat_s):
            self._directory.forgive(gap, now)
            for dialer in self._dialers.values():
                dialer.forgive(gap)


def _context() -> zmq.Context[Socket]:
    """A context with one I/O thread, and room for the sockets of all connections and their monitors."""
    context: zmq.Context[Socket] = zmq.Context(1)
    context.set(zmq.MAX_SOCKETS, 3 * MAX_CONNECTIONS + 16)
    return context
