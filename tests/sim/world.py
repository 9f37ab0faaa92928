"""Virtual time, and processes that crash and stall. One thread runs them all."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from pdtransport.control.channel import PeerId
from tests.sim.memory import Violation
from tests.sim.network import Network
from tests.sim.plan import FOR_GOOD, Fault, Plan

MAX_EVENTS = 60_000  # a run beyond this is a livelock


class Process:
    """A worker process, as the world sees it."""

    instance: Instance
    id: PeerId
    alive: bool

    def check(self) -> None:
        """Raise if a promise is broken right now."""
        raise NotImplementedError


class Instance:
    """One server: ``tp`` workers and an engine, which crash and stall together."""

    def __init__(self, world: World, name: str, tp: int, make: Callable[[World, Instance, int], Any]) -> None:
        self.world = world
        self.name = name
        self.tp = tp
        self.incarnation = 1
        self.stalled_until = 0.0
        self.alive = True
        self._make = make
        self.workers: list[Any] = [make(world, self, rank) for rank in range(tp)]

    def reload(self) -> None:
        """Load weights anew: the pages hold nothing of use, and peers must shake hands again."""
        raise NotImplementedError

    def shut_down(self) -> None:
        """End all transfers, before the processes end."""
        for worker in self.workers:
            worker.shut_down()

    def crash(self) -> None:
        self.alive = False
        for worker in self.workers:
            worker.alive = False

    def restart(self) -> None:
        self.incarnation += 1
        self.alive = True
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
        self.network = Network(self)
        self.broken: Exception | None = None  # by a callback, whose exceptions the drivers catch
        self._heap: list[tuple[float, int, Process | None, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    # -- time ----------------------------------------------------------------------------------------------------

    def clock(self) -> float:
        return self.now

    def at(self, delay: float, owner: Process | None, event: Callable[..., None], *args: Any) -> None:
        """Run ``event`` after ``delay`` seconds, in the process of ``owner`` if it still lives by then."""
        self.at_time(self.now + delay, owner, event, *args)

    def at_time(self, when: float, owner: Process | None, event: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, owner, event, args))

    def run(self, until: float) -> None:
        events = 0
        while self._heap and self._heap[0][0] <= until:
            when, _, owner, event, args = heapq.heappop(self._heap)
            self.now = when
            if owner is not None:
                if not owner.alive:
                    continue
                if owner.instance.stalled_until > when:
                    self.at_time(owner.instance.stalled_until, owner, event, *args)
                    continue
            event(*args)
            if owner is not None:
                owner.check()
            if self.broken is not None:
                raise self.broken
            events += 1
            if events > MAX_EVENTS:
                raise Violation(f"{MAX_EVENTS} events and no end: a livelock")
        self.counters["events"] += events

    @property
    def idle(self) -> bool:
        return not self._heap

    def say(self, text: str) -> None:
        self.log.append(f"{self.now:9.4f}  {text}")

    def worker(self, peer: PeerId) -> Any:
        """The process that is ``peer``; None if it has ended."""
        worker = self.instances[peer.engine].workers[peer.rank]
        return worker if worker.alive and worker.id == peer else None

    @property
    def faulty(self) -> bool:
        return self.now < self.plan.faults_end

    # -- faults --------------------------------------------------------------------------------------------------

    def inject(self, fault: Fault) -> None:
        if self.tracing:
            self.say(f"-- {fault.kind} {fault.who} {fault.other} for {fault.seconds} s")
        self.counters[fault.kind] += 1
        instance = self.instances[fault.who]
        if fault.kind == "stall":
            instance.stalled_until = max(instance.stalled_until, self.now + fault.seconds)
            self.network.silence(lambda here, there: there == fault.who, fault.seconds)
        elif fault.kind == "partition":
            pair = frozenset((fault.who, fault.other))
            self.network.cut.add(pair)
            self.at(fault.seconds, None, self.network.cut.discard, pair)
            self.network.silence(lambda here, there: {here, there} == pair, fault.seconds)
        elif fault.kind == "reload":
            self.at(0.0, instance.workers[0], instance.reload)
        elif instance.alive:
            if fault.kind == "shutdown":
                instance.shut_down()
            dead = list(instance.workers)
            instance.crash()
            self.network.ended(dead)
            if fault.seconds != FOR_GOOD:
                self.at(fault.seconds, None, instance.restart)
