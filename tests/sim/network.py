"""The network between the processes: it delays, and it loses, copies and damages what transfers say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgpack

from pdtransport.control.directory import Route, Sent
from pdtransport.control.events import Address
from pdtransport.protocol.messages import LinkCall, Message, WireError, decode, encode
from tests.sim.plan import Net

if TYPE_CHECKING:
    from tests.sim.control import SimControl
    from tests.sim.world import World

LIVENESS_S = 1.2  # silence after which the control channel gives a peer up
FIRST_PORT = 7570
FOREVER = float("inf")
SETUP_JITTER = (
    0.1  # of the words that set links up, in parts of that of others: else little of a run is left for transfers
)


class End(Route):
    """One end of a connection, as one side knows it. Heartbeats are not simulated: who lives and is not cut off is
    heard all the time."""

    def __init__(self, control: SimControl) -> None:
        self.control = control
        self.pipe: Pipe | None = None
        self.silent = False
        self._gone_at = FOREVER

    @property
    def last_heard(self) -> float:
        return -FOREVER if self.silent else self._gone_at

    @last_heard.setter
    def last_heard(self, _now: float) -> None:
        self.silent = False

    def broken(self, now: float) -> None:
        """The connection has ended, and this side has noticed."""
        self.pipe = None

    def send(self, frame: bytes) -> Sent:
        """A frame about a transfer or a link: the network may do anything with it."""
        if self.pipe is None:
            return Sent.GONE
        assert self.control.saying is not None
        self.control.world.network.transmit(self, self.control.saying, frame)
        return Sent.OK

    def say(self, message: Message) -> None:
        """A word of the handshake: it arrives, in order, unless the other side is cut off."""
        if self.pipe is not None:
            self.control.world.network.carry(self, encode(message), sure=True)


class Pipe:
    """One connection between two processes."""

    def __init__(self, dialer: End, inbound: End) -> None:
        self.ends = (dialer, inbound)
        self.arrivals = dict.fromkeys(self.ends, 0.0)  # of the latest frame, where frames keep their order
        dialer.pipe = inbound.pipe = self

    def far(self, end: End) -> End:
        return self.ends[1] if end is self.ends[0] else self.ends[0]


class Network:
    def __init__(self, world: World) -> None:
        self.world = world
        self.cut: set[frozenset[str]] = set()
        self._pipes: list[Pipe] = []
        self._dropped_once = False
        self._sent = self._called = 0

    # -- connections ---------------------------------------------------------------------------------------------

    def connect(self, dialer: End, address: Address) -> str:
        """Connect ``dialer``; else why it can't: ``silence``, or ``nobody`` listens there."""
        there = self.world.instances.get(address.host)
        if there is not None and self.is_cut(dialer.control.me.engine, there.name):
            return "silence"
        if there is None or not there.alive or not 0 <= address.port - FIRST_PORT < len(there.workers):
            return "nobody"
        listener: SimControl = there.workers[address.port - FIRST_PORT].control
        self._pipes.append(Pipe(dialer, listener.accept()))
        return ""

    def close(self, end: End) -> None:
        """This end closes the connection; the other one notices."""
        pipe, end.pipe = end.pipe, None
        if pipe is not None and pipe in self._pipes:
            self._pipes.remove(pipe)
            self._notice(pipe, pipe.far(end))

    def ended(self, dead: Sequence[Any]) -> None:
        """These processes have ended: their connections are closed."""
        controls = [worker.control for worker in dead]
        for pipe in [pipe for pipe in self._pipes if any(end.control in controls for end in pipe.ends)]:
            self._pipes.remove(pipe)
            for end in pipe.ends:
                if end.control not in controls:
                    self._notice(pipe, end)

    def _notice(self, pipe: Pipe, end: End) -> None:
        end._gone_at = self.world.now
        self.world.at(self.world.rng.uniform(0.0, 0.3), end.control.worker, end.control.on_broken, end, pipe)

    def is_cut(self, one: str, other: str) -> bool:
        return bool(self.cut) and frozenset((one, other)) in self.cut

    def silence(self, hits: Callable[[str, str], bool], seconds: float) -> None:
        """Ends for which ``hits(here, there)`` hear nothing for ``seconds``: too long, if it is longer than that."""
        if seconds <= LIVENESS_S:
            return
        for pipe in self._pipes:
            for end in pipe.ends:
                if hits(end.control.me.engine, pipe.far(end).control.me.engine):
                    notice = LIVENESS_S + self.world.rng.uniform(0.0, 0.2)
                    self.world.at(notice, end.control.worker, end.control.fall_silent, end, pipe)

    def hears_nothing(self, end: End, pipe: Pipe) -> bool:
        far = pipe.far(end).control
        stalled = self.world.instances[far.me.engine].stalled_until > self.world.now
        return stalled or self.is_cut(end.control.me.engine, far.me.engine)

    # -- frames --------------------------------------------------------------------------------------------------

    @property
    def net(self) -> Net:
        return self.world.plan.net if self.world.faulty else Net()

    def transmit(self, end: End, message: Message, frame: bytes) -> None:
        world, net, rng, plan = self.world, self.net, self.world.rng, self.world.plan
        assert end.pipe is not None
        kind = message.kind
        world.counters[kind] += 1
        if isinstance(message, LinkCall):
            lost = bool(net.setup_drop) and rng.random() < net.setup_drop
            lost = lost or self._called == plan.drop_call
            self._called += 1
        else:
            lost = bool(net.drop) and rng.random() < net.drop
            if kind == plan.drop_once and not self._dropped_once:
                self._dropped_once = lost = True
            lost = lost or self._sent == plan.drop_nth
            self._sent += 1
        lost = lost or self.is_cut(end.control.me.engine, end.pipe.far(end).control.me.engine)
        if world.tracing:
            world.say(f"{end.control} -> {end.pipe.far(end).control}: {told(message)}{'   LOST' if lost else ''}")
        if lost:
            world.counters["lost"] += 1
            return
        if isinstance(message, LinkCall):  # TCP's: nothing is copied or overtaken
            self.carry(end, frame, sure=True)
            return
        if net.flip and rng.random() < net.flip:
            self._damage(end, frame)
            return
        self.carry(end, frame)
        if net.duplicate and rng.random() < net.duplicate:
            self.carry(end, frame)
        if net.replay and rng.random() < net.replay:
            self.carry(end, frame, late=rng.uniform(0.5, 12.0))
        if net.forge and rng.random() < net.forge and hasattr(message, "generation"):
            world.at(rng.uniform(0.0, 2.0), None, self._forge, end, end.pipe, message)

    def carry(self, end: End, frame: bytes, *, sure: bool = False, late: float = 0.0) -> None:
        pipe, net = end.pipe, self.net
        assert pipe is not None
        far = pipe.far(end)
        if self.is_cut(end.control.me.engine, far.control.me.engine):
            return
        jitter = net.jitter * (SETUP_JITTER if sure else 1.0)
        when = self.world.now + net.latency + (self.world.rng.uniform(0.0, jitter) if jitter else 0.0)
        if late:
            when = self.world.now + late
        elif net.fifo or sure:
            when = pipe.arrivals[far] = max(when, pipe.arrivals[far])
        self.world.at_time(when, far.control.worker, far.control.arrive, far, pipe, frame)

    def _damage(self, end: End, frame: bytes) -> None:
        """Flip or cut bytes. TCP and CURVE keep such frames from us; one that gets through must not decode into
        an exception other than WireError, and here is not delivered if it decodes."""
        data, rng = bytearray(frame), self.world.rng
        if rng.random() < 0.5:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            decode(bytes(data))
        except WireError:
            self.carry(end, bytes(data))

    def _forge(self, end: End, pipe: Pipe, message: Any) -> None:
        """The same words about a live transfer, under a generation older or newer than the live one."""
        target, rng = pipe.far(end).control.worker, self.world.rng
        if not target.alive or target.instance.stalled_until > self.world.now:
            return
        live = target.live_generation(end.control.worker.id, message)
        if live is None or pipe.far(end).pipe is not pipe:
            return
        older = live - rng.randint(1, 3)
        generation = older if older > 0 and rng.random() < 0.7 else live + rng.randint(1, 1000)
        target.hear_forged(end.control.worker.id, message.model_copy(update={"generation": generation}))


def told(message: Message) -> str:
    """A message in a line of a trace."""
    if isinstance(message, LinkCall):
        words = msgpack.unpackb(message.body)
        return f"LinkCall({message.link} {' '.join(f'{k}={v}' for k, v in words.items() if k != 'offer')})"
    hidden = {"kind", "digest", "checksums", "offer", "transfer", "links", "fingerprint", "body"}
    fields = {k: v for k, v in message.model_dump().items() if k not in hidden}
    words = " ".join(f"{k}={getattr(v, 'value', v)}" for k, v in fields.items())
    return f"{type(message).__name__}({getattr(message, 'transfer', '')} {words})"
