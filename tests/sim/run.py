"""Run a plan to its end, and check what must hold then."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass

from pdtransport.control.events import PeerId
from tests.sim.decode import DecodeEngine
from tests.sim.memory import Violation
from tests.sim.plan import LINK_KINDS, Plan
from tests.sim.prefill import PrefillEngine
from tests.sim.worker import settings_of
from tests.sim.world import World

END_S = 200.0  # virtual; every deadline of the plans lies well before


@dataclass
class Result:
    seed: int
    violation: str
    outcomes: dict[str, str]
    counters: Counter[str]
    log: list[str]


class SimWorld(World):
    """The world with its engines and requests in it."""

    def __init__(self, plan: Plan, tracing: bool = False) -> None:
        super().__init__(plan, tracing)
        self.settings = settings_of(plan)
        self.processes = 0  # that ever were
        self.outcomes: dict[str, str] = {}
        self.ended_at: dict[str, float] = {}
        self.computed: dict[PeerId, set[int]] = defaultdict(set)
        self.told: dict[str, int | None] = {}  # transfer -> the first token that prefill gave out, if it gave one
        for name, tp in plan.producers.items():
            self.instances[name] = PrefillEngine(self, name, tp)
        for name, tp in plan.consumers.items():
            self.instances[name] = DecodeEngine(self, name, tp)
        for request in plan.requests:
            if request.open_at is not None:
                for repeat in range(1 + request.open_twice):
                    self.at(request.open_at + 0.4 * repeat, None, self.submit, request.producer, request)
            if request.begin_at is not None:
                for repeat in range(1 + request.begin_twice):
                    self.at(request.begin_at + 0.4 * repeat, None, self.submit, request.consumer, request)
        for fault in plan.faults:
            self.at(fault.at, None, self.inject, fault)

    def submit(self, name: str, request: object) -> None:
        instance = self.instances[name]
        if instance.alive:  # a stalled server finds the request once it goes on
            self.at(0.0, instance.workers[0], instance.submit, request)  # type: ignore[attr-defined]

    def receives(self, peer: PeerId) -> bool:
        return peer.engine in self.plan.consumers

    def kind_of(self, one: PeerId, other: PeerId) -> str:
        """How two workers reach each other."""
        pair = (other.engine, one.engine) if self.receives(one) else (one.engine, other.engine)
        return self.plan.links.get(pair, LINK_KINDS[0])

    def outcome(self, transfer: str, how: str) -> None:
        self.outcomes.setdefault(transfer, how)
        self.ended_at.setdefault(transfer, self.now)
        if self.tracing:
            self.say(f"== {transfer}: {how}")

    def settle(self) -> None:
        """After the run: everything ended, nothing is left anywhere, and what had to arrive did."""
        self.run(END_S)
        left = [text for instance in self.instances.values() if instance.alive for text in instance.leftovers()]  # type: ignore[attr-defined]
        if left:
            raise Violation("; ".join(left))
        if not self.idle:
            raise Violation("events go on for ever")
        for request in self.plan.requests:
            if not request.must_be_ready:
                continue
            how = self.outcomes.get(request.transfer)
            if how != "ready":
                raise Violation(f"{request.transfer} had to arrive, but: {how}")
            took = self.ended_at[request.transfer] - max(request.open_at or 0.0, request.begin_at or 0.0)
            for worker in self.instances[request.producer].workers:
                outcome = worker.released.get(request.transfer)
                if outcome is not None and not outcome.ok:
                    raise Violation(f"{request.transfer} arrived, but {worker} says {outcome.code}: {outcome.reason}")
            if took > request.within_s:
                raise Violation(f"{request.transfer} took {took:.1f} s, {request.within_s} s are enough")


def run(plan: Plan, tracing: bool = False) -> Result:
    """Run ``plan``; a broken promise, or an exception of the drivers, is a violation."""
    silenced = logging.root.manager.disable
    logging.disable()
    world = SimWorld(plan, tracing)
    violation = ""
    try:
        world.settle()
    except Exception as raised:  # noqa: BLE001 - whatever the drivers raise is a finding
        error = world.broken or raised
        violation = f"{type(error).__name__}: {error}"
        if tracing:
            import traceback

            world.log.append(traceback.format_exc())
    finally:
        logging.disable(silenced)
    world.counters.update(f"outcome {how}" for how in world.outcomes.values())
    return Result(plan.seed, violation, world.outcomes, world.counters, world.log)
