"""A control channel over the simulated network: who is a peer, and when it is lost, the real directory and handshake
decide; sockets, libzmq and heartbeats are replaced."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pdtransport.control import handshake
from pdtransport.control.directory import NAME, Directory
from pdtransport.control.events import Address, ConnectFailed, Event, Identity, MessageReceived, PeerId
from pdtransport.control.limits import (
    HELLO_AGAIN_S,
    LOST_BOUND_S,
    LOST_OPENER_S,
    RECONNECT_MAX_S,
    RECONNECT_S,
    RETRY_FOR_S,
    RETRY_MAX_S,
)
from pdtransport.protocol.messages import (
    Ended,
    FingerprintValue,
    Hello,
    LinkCall,
    Message,
    Ping,
    Refused,
    TransferMessage,
    Welcome,
    WireError,
    decode,
    encode,
)
from tests.sim.network import FOREVER, LIVENESS_S, End, Pipe, told

if TYPE_CHECKING:
    from tests.sim.worker import Worker

CONNECT_S = 2.0
FRAMES_A_TURN = 32
BEAT_S = 0.5  # within this, whoever was given up learns of it


class Dialer(End):
    """The connection to one endpoint, reopened as long as somebody asks for it."""

    def __init__(self, control: SimControl, endpoint: Address, now: float) -> None:
        super().__init__(control)
        self.endpoint = endpoint
        self.where = f"{endpoint.host}:{endpoint.port}"
        self.dial_at: float | None = None
        self.hello_due: float | None = None
        self.deadline: float | None = None  # set while a caller waits
        self._wanted_at = now
        self._pause = RECONNECT_S
        self._last_peer: PeerId | None = None
        self._said_breaks = 0

    def want(self, now: float) -> None:
        self._wanted_at = now
        if self.peer is not None or self.deadline is not None:
            return
        self.deadline = now + CONNECT_S
        if self.pipe is None:
            self.dial_at = now
        else:
            self.hello_due = now

    def unbind(self, *, silent: bool) -> None:
        now = self._wanted_at = self.control.world.now
        if silent:
            self.dial_at = now
        elif self.pipe is not None:
            self.hello_due = now

    def broken(self, now: float) -> None:
        super().broken(now)
        self.hello_due = None
        if self.peer is not None and self.broken_until is None:
            self.broken_until = now + LIVENESS_S
        self._try_later(now)

    def tick(self, now: float) -> list[Event]:
        if self.dial_at is not None and now >= self.dial_at:
            self._dial(now)
        if self.hello_due is not None and now >= self.hello_due:
            self._say_hello(now)
        if self.deadline is not None and now >= self.deadline:
            return self._fail(f"nobody answers at {self.where}", refused=False)
        return []

    def retired(self, now: float) -> bool:
        return self.peer is None and self.deadline is None and now >= self._wanted_at + RETRY_FOR_S

    def next_deadline(self) -> float:
        times = [self._wanted_at + RETRY_FOR_S] if self.peer is None and self.deadline is None else []
        times += [due for due in (self.deadline, self.hello_due, self.dial_at) if due is not None]
        return min(times, default=FOREVER)

    def _dial(self, now: float) -> None:
        network = self.control.world.network
        network.close(self)
        self._gone_at, self.dial_at = FOREVER, None
        problem = network.connect(self, self.endpoint)
        if not problem:
            self._say_hello(now)
            return
        if problem == "nobody" and self.broken_until is not None:
            self.broken_until = min(self.broken_until, now + LOST_OPENER_S)
        self._try_later(now)

    def _try_later(self, now: float) -> None:
        longest = RETRY_MAX_S if self.peer is None and self.deadline is None else RECONNECT_MAX_S
        self.dial_at = now + min(self._pause, longest) * self.control.world.rng.uniform(0.5, 1.0)
        self._pause = min(2 * self._pause, RETRY_MAX_S)

    def _say_hello(self, now: float) -> None:
        if self.pipe is None:
            self.hello_due = None
            return
        self._said_breaks = self.control.directory.our_breaks(self._last_peer)
        self.say(handshake.facts(Hello, self.control.me, self._said_breaks))
        self.hello_due = now + HELLO_AGAIN_S

    def _fail(self, reason: str, *, refused: bool) -> list[Event]:
        waited, self.deadline = self.deadline is not None, None
        return [ConnectFailed(*self.endpoint, reason, refused=refused)] if waited else []

    def on_message(self, message: Message, now: float) -> list[Event]:
        directory = self.control.directory
        if isinstance(message, Welcome):
            refusal = handshake.check(self.control.me, message) or directory.refusal(message)
            if refusal is not None:
                self.say(refusal)
                self.hello_due = None
                return [*directory.leave(self, refusal.reason), *self._fail(refusal.reason, refused=True)]
            self._last_peer = handshake.peer_of(message)
            if directory.our_breaks(self._last_peer) > self._said_breaks:
                self._say_hello(now)
                return []
            self.deadline = self.hello_due = None
            self._pause = RECONNECT_S
            if self.pipe is not None:
                self.control.world.at(BEAT_S, self.control.worker, self.beat, self.pipe)
            return directory.admit(message, self.endpoint.host, self, self.endpoint, now)
        if isinstance(message, Refused) and message.field == "hello":
            events = directory.leave(self, f"it had given us up: {message.reason}")
            self._say_hello(now)
            return events
        if isinstance(message, Refused) and message.field != NAME:
            self.hello_due = None
            return [*directory.leave(self, message.reason), *self._fail(message.reason, refused=True)]
        if isinstance(message, TransferMessage | LinkCall) and self.peer is not None and self.broken_until is None:
            return [MessageReceived(self.peer, message)]
        return []

    def beat(self, pipe: Pipe) -> None:
        """A heartbeat, if it would show us that the other side has given us up."""
        if self.pipe is pipe and self.peer is not None and pipe.ends[1].peer is None:
            self.say(Ping(incarnation=self.control.me.incarnation))
            self.control.world.at(BEAT_S, self.control.worker, self.beat, pipe)


class Inbound(End):
    """A connection that was opened to us: a stranger's until its Hello."""

    inbound = True

    def unbind(self, *, silent: bool) -> None:
        if self.pipe is not None:
            dialer = self.pipe.ends[0]
            assert isinstance(dialer, Dialer)
            delay = self.control.world.rng.uniform(0.0, BEAT_S)
            self.control.world.at(delay, dialer.control.worker, dialer.beat, self.pipe)

    def broken(self, now: float) -> None:
        super().broken(now)
        self.broken_until = now + LOST_BOUND_S

    def on_message(self, message: Message, now: float) -> list[Event]:
        directory, me = self.control.directory, self.control.me
        if isinstance(message, Hello):
            refusal = handshake.check(me, message) or directory.refusal(message)
            if refusal is not None:
                self.say(refusal)
                return directory.leave(self, refusal.reason)
            self.say(handshake.facts(Welcome, me, directory.our_breaks(handshake.peer_of(message))))
            return directory.admit(message, message.engine, self, None, now)
        if isinstance(message, Ping) and self.peer is None:
            self.say(handshake.refusal("hello", reason="say Hello first, on this connection"))
        if isinstance(message, TransferMessage | LinkCall) and self.peer is not None:
            return [MessageReceived(self.peer, message)]
        return []


class Watched(list[Event]):
    """Events that the worker's checks see each just before the engine handles it, and right after."""

    worker: Worker

    def __iter__(self) -> Iterator[Event]:
        for event in super().__iter__():
            self.worker.sees(event)
            yield event
            self.worker.saw(event)


class SimControl:
    """Stands for :class:`pdtransport.control.channel.ControlChannel`."""

    watched = True

    def __init__(self, worker: Worker, me: Identity) -> None:
        self.worker = worker
        self.world = worker.world
        self.me = me
        self.counters: Counter[str] = Counter()
        self.directory = Directory(LIVENESS_S, self.counters)
        self.saying: Message | None = None  # what is being sent
        self._frames: deque[tuple[End, Pipe, bytes]] = deque()
        self._dialers: dict[Address, Dialer] = {}

    def __str__(self) -> str:
        return str(self.worker)

    # -- what the drivers call -----------------------------------------------------------------------------------

    def connect(self, host: str, port: int) -> None:
        endpoint, now = Address(host, port), self.world.now
        if endpoint not in self._dialers:
            self._dialers[endpoint] = Dialer(self, endpoint, now)
        self._dialers[endpoint].want(now)

    def send(self, peer: PeerId, message: Message) -> bool:
        self.worker.says(peer, message)
        self.saying = message
        return self.directory.send(peer, encode(message))

    def publish(self, report: Ended) -> None:
        self.worker.reports(report)

    def change_fingerprint(self, facts: Mapping[str, FingerprintValue], reason: str) -> list[Event]:
        self.me = replace(self.me, fingerprint={**self.me.fingerprint, **facts})
        return self._watched(self.directory.give_up_all(reason))

    @property
    def fingerprint(self) -> Mapping[str, FingerprintValue]:
        return self.me.fingerprint

    def shared_names(self) -> list[tuple[PeerId, list[str]]]:
        return []

    def sockets(self) -> list[Any]:
        return []

    def close(self) -> None:
        self._frames.clear()

    def receive(self, now: float) -> list[Event]:
        events: list[Event] = []
        for _ in range(min(FRAMES_A_TURN, len(self._frames))):
            end, pipe, frame = self._frames.popleft()
            if end.pipe is pipe:
                events += self._read(end, frame, now)
        return self._watched(events)

    def tick(self, now: float) -> list[Event]:
        events: list[Event] = []
        due = self.directory.next_deadline()
        if due is not None and now >= due:
            events += self.directory.tick(now)
        for dialer in list(self._dialers.values()):
            events += dialer.tick(now)
            if dialer.retired(now):
                self.world.network.close(dialer)
                del self._dialers[dialer.endpoint]
        return self._watched(events)

    def next_deadline(self) -> float | None:
        if self._frames:
            return self.world.now
        times = [dialer.next_deadline() for dialer in self._dialers.values()]
        times.append(self.directory.next_deadline() or FOREVER)
        soonest = min(times)
        return None if soonest == FOREVER else soonest

    # -- what the network does -----------------------------------------------------------------------------------

    def accept(self) -> Inbound:
        return Inbound(self)

    def arrive(self, end: End, pipe: Pipe, frame: bytes) -> None:
        self._frames.append((end, pipe, frame))
        self.worker.wake()

    def on_broken(self, end: End, pipe: Pipe) -> None:
        if end.pipe is pipe:
            end.broken(self.world.now)
            self.worker.wake()

    def fall_silent(self, end: End, pipe: Pipe) -> None:
        if end.pipe is pipe and end.peer is not None and self.world.network.hears_nothing(end, pipe):
            end.silent = True
            self.worker.wake()

    def _read(self, end: End, frame: bytes, now: float) -> list[Event]:
        try:
            message = decode(frame)
        except WireError:
            self.world.counters["undecodable"] += 1
            return []
        if self.world.tracing:
            self.world.say(f"{self} <- {end.pipe.far(end).control if end.pipe else '?'}: {told(message)}")
        assert isinstance(end, Dialer | Inbound)
        return end.on_message(message, now)

    def _watched(self, events: list[Event]) -> list[Event]:
        watched = Watched(events)
        watched.worker = self.worker
        return watched
