"""Virtual time, processes that crash and stall, and a control channel that loses things."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pdtransport.protocol.actions import Action
from pdtransport.protocol.messages import Message, WireError, decode, encode
from tests.sim.plan import Fault, Net, Plan

MAX_EVENTS = 60_000  # a run beyond this is a livelock
LIVENESS_S = 1.2  # silence after which the control channel calls a peer lost


class Violation(AssertionError):
    """A promise was broken."""


class PeerId(NamedTuple):
    """One worker process for as long as it lives."""

    instance: str
    rank: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.instance}.{self.rank}#{self.incarnation}"


class Worker:
    """One process: it owns a state machine book, and dies with it."""

    def __init__(self, world: World, instance: Instance, rank: int) -> None:
        self.world = world
        self.instance = instance
        self.id = PeerId(instance.name, rank, instance.incarnation)
        self.alive = True
        self.lost: set[PeerId] = set()
        self._tick_at = float("inf")

    def send(self, peer: PeerId, message: Message) -> None:
        if peer not in self.lost:
            self.world.transmit(self, peer, message)

    def deliver(self, sender: PeerId, frame: bytes, forged: bool = False) -> None:
        if sender in self.lost:
            return  # the control channel dropped that connection
        try:
            message = decode(frame)
        except WireError:
            self.world.counters["undecodable"] += 1
            return
        if self.world.tracing:
            mark = "forged " if forged else ""
            self.world.say(f"{self.id} <- {sender}: {mark}{short(message)}")
        before = self.fingerprint(message) if forged else None
        actions = self.on_message(sender, message)
        if forged and (before != self.fingerprint(message) or not self.harmless(actions)):
            raise Violation(f"a message of a generation that is not live changed something: {message} -> {actions}")
        self.do(actions)

    def lose(self, peer: PeerId, reason: str) -> None:
        if peer in self.lost:
            return
        if self.world.tracing:
            self.world.say(f"{self.id} lost {peer}: {reason}")
        self.lost.add(peer)
        self.on_lost(peer)
        self.do(self.peer_lost(peer, reason))

    def rearm(self) -> None:
        when = self.next_deadline()
        if when is not None and when < self._tick_at:
            self._tick_at = when
            self.world.at(max(0.0, when - self.world.now), self, self._tick)

    def _tick(self) -> None:
        self._tick_at = float("inf")
        self.do(self.tick())

    def harmless(self, actions: Sequence[Action]) -> bool:
        return all(type(action).__name__ == "Send" for action in actions)

    # What the two kinds of worker fill in:
    def do(self, actions: Sequence[Action]) -> None:
        raise NotImplementedError

    def on_message(self, peer: PeerId, message: Any) -> list[Action]:
        raise NotImplementedError

    def peer_lost(self, peer: PeerId, reason: str) -> list[Action]:
        raise NotImplementedError

    def on_lost(self, peer: PeerId) -> None:
        raise NotImplementedError

    def tick(self) -> list[Action]:
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError

    def fingerprint(self, message: Any) -> object:
        """Everything that a stale message about that transfer must leave alone."""
        raise NotImplementedError

    def live_generation(self, peer: PeerId, transfer: str) -> int | None:
        raise NotImplementedError


class Instance:
    """One server: ``tp`` workers and an engine, which crash and stall together."""

    def __init__(self, world: World, name: str, tp: int, make: Callable[[World, Instance, int], Worker]) -> None:
        self.world = world
        self.name = name
        self.tp = tp
        self.incarnation = 1
        self.stalled_until = 0.0
        self.alive = True
        self.born_at = self.died_at = world.now
        self._make = make
        self.workers = [make(world, self, rank) for rank in range(tp)]

    def crash(self) -> list[PeerId]:
        self.alive = False
        self.died_at = self.world.now
        for worker in self.workers:
            worker.alive = False
        return [worker.id for worker in self.workers]

    def restart(self) -> None:
        self.incarnation += 1
        self.alive = True
        self.born_at = self.world.now
        self.stalled_until = 0.0
        self.workers = [self._make(self.world, self, rank) for rank in range(self.tp)]


class World:
    """Events in order of virtual time; everything random comes from one generator."""

    def __init__(self, plan: Plan, tracing: bool = False) -> None:
        self.plan = plan
        self.rng = random.Random(plan.seed)
        self.now = 0.0
        self.tracing = tracing
        self.log: list[str] = []
        self.counters: Counter[str] = Counter()
        self.instances: dict[str, Instance] = {}
        self.told: dict[str, int | None] = {}  # transfer -> the first token that prefill gave out, if it gave one
        self.cut: set[frozenset[str]] = set()
        self._heap: list[tuple[float, int, Worker | None, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._last_arrival: dict[tuple[PeerId, PeerId], float] = {}
        self._dropped_once = False
        self._sent = 0

    # -- time ----------------------------------------------------------------------------------------------------

    def at(self, delay: float, owner: Worker | None, event: Callable[..., None], *args: Any) -> None:
        """Run ``event`` after ``delay`` seconds, in the process of ``owner`` if it still lives by then."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, owner, event, args))

    def run(self, until: float) -> None:
        events = 0
        while self._heap and self._heap[0][0] <= until:
            when, _, owner, event, args = heapq.heappop(self._heap)
            self.now = when
            if owner is not None:
                if not owner.alive:
                    continue
                if owner.instance.stalled_until > when:
                    self.at(owner.instance.stalled_until - when, owner, event, *args)
                    continue
            event(*args)
            if owner is not None:
                owner.check()
                owner.rearm()
            events += 1
            if events > MAX_EVENTS:
                raise Violation(f"{MAX_EVENTS} events and no end: a livelock")
        self.counters["events"] += events

    @property
    def idle(self) -> bool:
        return not self._heap

    def say(self, text: str) -> None:
        self.log.append(f"{self.now:9.4f}  {text}")

    def worker(self, peer: PeerId) -> Worker | None:
        instance = self.instances[peer.instance]
        worker = instance.workers[peer.rank]
        return worker if worker.alive and worker.id == peer else None

    @property
    def net(self) -> Net:
        return self.plan.net if self.now < self.plan.faults_end else Net()

    # -- the control channel -------------------------------------------------------------------------------------

    def transmit(self, sender: Worker, to: PeerId, message: Message) -> None:
        frame = encode(message)
        kind = message.kind
        self.counters[kind] += 1
        net, rng = self.net, self.rng
        lost = frozenset((sender.id.instance, to.instance)) in self.cut or (net.drop and rng.random() < net.drop)
        if kind == self.plan.drop_once and not self._dropped_once:
            self._dropped_once = lost = True
        lost = lost or self._sent == self.plan.drop_nth
        self._sent += 1
        if self.tracing:
            self.say(f"{sender.id} -> {to}: {short(message)}{'   LOST' if lost else ''}")
        if lost:
            self.counters["lost"] += 1
            return
        if net.flip and rng.random() < net.flip:
            self._damage(sender, to, frame)
            return
        self._carry(sender.id, to, frame, self._delay(net))
        if net.duplicate and rng.random() < net.duplicate:
            self._carry(sender.id, to, frame, self._delay(net))
        if net.replay and rng.random() < net.replay:
            self._carry(sender.id, to, frame, rng.uniform(0.5, 12.0), ordered=False)
        if net.forge and rng.random() < net.forge and hasattr(message, "generation"):
            self.at(rng.uniform(0.0, 2.0), None, self._forge, sender.id, to, message)

    def _delay(self, net: Net) -> float:
        return net.latency + (self.rng.uniform(0.0, net.jitter) if net.jitter else 0.0)

    def _carry(self, sender: PeerId, to: PeerId, frame: bytes, delay: float, ordered: bool = True) -> None:
        if ordered and self.net.fifo:
            arrival = max(self.now + delay, self._last_arrival.get((sender, to), 0.0))
            self._last_arrival[sender, to] = arrival
            delay = arrival - self.now
        target = self.worker(to)
        if target is not None:
            self.at(delay, target, target.deliver, sender, frame)

    def _damage(self, sender: Worker, to: PeerId, frame: bytes) -> None:
        """Flip or cut bytes. TCP and CURVE keep such frames from us; one that gets through must not decode into
        an exception other than WireError, and here is not delivered if it decodes."""
        data = bytearray(frame)
        if self.rng.random() < 0.5:
            del data[self.rng.randrange(len(data)) :]
        else:
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        try:
            decode(bytes(data))
        except WireError:
            target = self.worker(to)
            if target is not None:
                self.at(self.net.latency, target, target.deliver, sender.id, bytes(data))

    def _forge(self, sender: PeerId, to: PeerId, message: Any) -> None:
        """The same words about a live transfer, under a generation older or newer than the live one."""
        target = self.worker(to)
        live = target.live_generation(sender, message.transfer) if target else None
        if target is None or live is None or target.instance.stalled_until > self.now:
            return
        older = live - self.rng.randint(1, 3)
        generation = older if older > 0 and self.rng.random() < 0.7 else live + self.rng.randint(1, 1000)
        frame = encode(message.model_copy(update={"generation": generation}))
        target.deliver(sender, frame, forged=True)
        target.check()
        target.rearm()

    # -- faults --------------------------------------------------------------------------------------------------

    def inject(self, fault: Fault) -> None:
        if self.tracing:
            self.say(f"-- {fault.kind} {fault.who} {fault.other} for {fault.seconds} s")
        self.counters[fault.kind] += 1
        instance = self.instances[fault.who]
        if fault.kind == "stall":
            instance.stalled_until = max(instance.stalled_until, self.now + fault.seconds)
            if fault.seconds > LIVENESS_S:
                for other in self.instances.values():
                    if other is not instance:
                        self._estrange(other, instance, fault.seconds)
        elif fault.kind == "partition":
            pair = frozenset((fault.who, fault.other))
            self.cut.add(pair)
            self.at(fault.seconds, None, self.cut.discard, pair)
            if fault.seconds > LIVENESS_S:
                self._estrange(instance, self.instances[fault.other], fault.seconds)
                self._estrange(self.instances[fault.other], instance, fault.seconds)
        elif instance.alive:
            self._crash(instance, fault.seconds)

    def _crash(self, instance: Instance, down_s: float) -> None:
        dead = instance.crash()
        for other in self.instances.values():
            if other is not instance and other.alive:
                notice = min(LIVENESS_S, down_s) + self.rng.uniform(0.0, 0.2)
                for worker in other.workers:
                    for peer in dead:
                        self.at(notice, worker, worker.lose, peer, "it fell silent")
        self.at(down_s, None, instance.restart)

    def _estrange(self, here: Instance, there: Instance, seconds: float) -> None:
        """``here`` hears nothing of ``there`` for too long, and finds it again later."""
        notice = LIVENESS_S + self.rng.uniform(0.0, 0.2)
        for worker in here.workers:
            for peer in [w.id for w in there.workers]:
                self.at(notice, worker, worker.lose, peer, "it fell silent")
                self.at(max(seconds, notice) + 0.3, worker, self._reconnect, worker, peer)

    def _reconnect(self, worker: Worker, peer: PeerId) -> None:
        other = self.worker(peer)
        if other is not None:
            self.at(self.net.latency, other, self._reunite, worker, other)

    def _reunite(self, worker: Worker, other: Worker) -> None:
        """``worker`` had lost ``other``, which may not have noticed, and then holds grants that ``worker`` dropped."""
        if not worker.alive or other.id not in worker.lost:
            return
        worker.lost.discard(other.id)
        other.lost.discard(worker.id)


def short(message: Message) -> str:
    """A message in a line of a trace."""
    hidden = {"kind", "digest", "prompt_digest", "checksums", "offer", "transfer"}
    fields = {k: v for k, v in message.model_dump().items() if k not in hidden}
    words = " ".join(f"{k}={getattr(v, 'value', v)}" for k, v in fields.items())
    return f"{type(message).__name__}({getattr(message, 'transfer', '')} {words})"
