"""From a seed to one run of the pool's rig: stores and loads of two clients, and what goes wrong meanwhile."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.faults.plan import KILL, STOP, Plan
from tests.faults.pool_worker import CopyRule

KINDS = ("memory", "disk", "redis")  # what the pool has
CLIENTS = ("client0", "client1")
AGAIN_S = 0.15  # after a death, until the process is started again
SHORT_S, LONG_S = 1.0, 4.0  # halts below and above most deadlines
FLOOD = 24  # chunks that push all others out of a small pool's memory
SMALL, LARGE = 2 << 20, 32 << 20  # bytes of its memory: below and above what a run stores


@dataclass(frozen=True)
class Call:
    """``verb``: store, load, pin (``seconds``: for how long) or cancel (of the call before it)."""

    at: float
    client: str
    verb: str
    numbers: tuple[int, ...]
    seconds: float  # deadline


@dataclass(frozen=True)
class Strike:
    """``whom``: a process by its name, ``disk``, ``memory`` or ``redis``. ``at`` None: when a client has halted in the
    middle of a copy."""

    at: float | None
    whom: str
    what: str


@dataclass
class PoolPlan(Plan):
    """``link`` is the pool's kind, ``prefills`` has no meaning here. ``keeps``: nothing that was stored may be lost."""

    calls: list[Call] = field(default_factory=list)
    copies: dict[str, list[CopyRule]] = field(default_factory=dict)  # by client
    strikes: list[Strike] = field(default_factory=list)
    keeps: bool = True


def pool_plan_of(seed: int) -> PoolPlan:
    chance = random.Random(seed)
    plan = PoolPlan(seed, "memory", 1, "nothing", "nothing", f"--rig pool --seed {seed}")
    base = seed * 64
    chunks = [base + place for place in range(chance.randint(3, 8))]
    for _ in range(chance.randint(3, 6)):
        _some(chance, plan, chunks, 0.25)
    weights = {_nothing: 1, _the_pool: 6, _a_client: 6, _two_writers: 3, _the_disk: 4, _redis: 2, _pins: 2, _memory: 2}
    (fault,) = chance.choices(list(weights), list(weights.values()))
    fault(chance, plan, chunks)
    if chance.random() < 0.1:  # somebody changes his mind
        last = plan.calls[-1]
        plan.calls.append(Call(last.at + chance.uniform(0, 0.01), last.client, "cancel", (), 0.0))
    plan.calls.sort(key=lambda call: call.at)
    return plan


def _some(chance: random.Random, plan: PoolPlan, chunks: list[int], within_s: float) -> None:
    some = tuple(chance.sample(chunks, chance.randint(1, len(chunks))))
    verb = chance.choice(("store", "store", "load"))
    at, deadline = chance.uniform(0, within_s), chance.choice((0.5, 1.0, 3.0))
    plan.calls.append(Call(at, chance.choice(CLIENTS), verb, some, deadline))


def _nothing(chance: random.Random, plan: PoolPlan, chunks: list[int]) -> None:
    plan.link = chance.choice(KINDS)


def _copy(chance: random.Random, plan: PoolPlan, chunks: list[int], action: str) -> str:
    """Strike in the middle of a copy of a client of its own, while others go on. Whether it is a store or a load."""
    verb, who = chance.choice(("store", "load")), chance.choice(CLIENTS)
    fresh = tuple(chunks[0] + 40 + place for place in range(3))
    at = 0.1
    if verb == "load":
        other = CLIENTS[1 - CLIENTS.index(who)]
        plan.calls.append(Call(0.0, other, "store", fresh, 3.0))
        plan.calls = [call for call in plan.calls if call.client != who or call.verb != "load" or call.at > at]
    else:
        plan.calls = [call for call in plan.calls if call.client != who or call.verb != "store" or call.at > at]
    plan.calls.append(Call(at, who, verb, fresh, 3.0))
    plan.copies[who] = [CopyRule(verb, 0, action)]
    return verb


def _halts(chance: random.Random, plan: PoolPlan) -> str:
    plan.stopped_s = chance.choice((SHORT_S, SHORT_S, SHORT_S, LONG_S))
    return f"stop {plan.stopped_s:g} s"


def _the_pool(chance: random.Random, plan: PoolPlan, chunks: list[int]) -> None:
    plan.row, plan.link = "the pool", chance.choice(("memory", "memory", "disk"))
    what = chance.choice((KILL, KILL, STOP))
    plan.keeps = what == STOP
    plan.column = KILL if what == KILL else _halts(chance, plan)
    if chance.random() < 0.6:
        plan.column += f", mid-{_copy(chance, plan, chunks, 'halt')}"
        plan.strikes.append(Strike(None, "pool", what))
    else:
        plan.column += ", at any moment"
        plan.strikes.append(Strike(chance.uniform(0, 0.3), "pool", what))
    for _ in range(3):
        _some(chance, plan, chunks, 0.6)


def _a_client(chance: random.Random, plan: PoolPlan, chunks: list[int]) -> None:
    what = chance.choice((KILL, KILL, STOP))
    plan.row, plan.link = "a client", chance.choice(("memory", "memory", "disk"))
    plan.column = KILL if what == KILL else _halts(chance, plan)
    plan.column += f", mid-{_copy(chance, plan, chunks, what)}"
    for _ in range(2):  # the other one wants the same
        _some(chance, plan, [chunks[0] + 40, *chunks], 0.4)


def _two_writers(chance: random.Random, plan: PoolPlan, chunks: list[int]) -> None:
    plan.row = "two writers of one key"
    same = tuple(chunks[0] + 40 + place for place in range(chance.randint(1, 4)))
    what = chance.choice(("nothing", KILL, STOP))
    first = chance.choice(CLIENTS)
    plan.calls = [call for call in plan.calls if call.client != first or call.at > 0.1 or call.verb != "store"]
    for who in CLIENTS:
        plan.calls.append(Call(0.1 if who == first else 0.1 + chance.uniform(0, 0.02), who, "store", same, 3.0))
    plan.column = {"nothing": "at the same time", KILL: "the first is killed"}.get(what, "")
    if what == STOP:
        plan.column = f"the first stands still, {_halts(chance, plan)}"
    if what != "nothing":
        plan.copies[first] = [CopyRule("store", 0, what)]


def _the_disk(chance: random.Random, plan: PoolPlan, chunks: list[int]) -> None:
    plan.row, plan.link, plan.keeps = "the disk tier", "disk", False
    what = chance.choice(("full", "damage", "damage"))
    plan.column = "full" if what == "full" else "a file is damaged, cut, gone or another's"
    at = 0.0 if what == "full" else 0.3
    plan.strikes.append(Strike(at, "disk", what))
    _flood(plan, chunks, 0.05 if what == "full" else 0.15)
    for _ in range(3):
        some = tuple(chance.sample(chunks, chance.randint(1, len(chunks))))
        plan.calls.append(Call(chance.uniform(0.35, 0.6), chance.choice(CLIENTS), "load", some, 3.0))


def _flood(plan: PoolPlan, chunks: list[int], at: float) -> None:
    many = tuple(chunks[0] + 16 + place for place in range(FLOOD))
    for first in range(0, FLOOD, 8):
        plan.calls.append(Call(at + first / 200, CLIENTS[first // 8 % 2], "store", many[first : first + 8], 3.0))


def _redis(chance: random.Random, plan: PoolPlan, chunks: list[int]) -> None:
    plan.row, plan.link, plan.keeps = "redis-server", "redis", False
    what = chance.choice((KILL, STOP))
    plan.column = "killed and started again" if what == KILL else _halts(chance, plan)
    plan.strikes.append(Strike(0.3, "redis", what))
    _flood(plan, chunks, 0.1)
    for _ in range(3):
        _some(chance, plan, chunks, 0.6)


def _pins(chance: random.Random, plan: PoolPlan, chunks: list[int]) -> None:
    plan.row, plan.column, plan.link, plan.keeps = "a pin", "expires", "disk", False
    who, seconds = chance.choice(CLIENTS), chance.choice((0.2, 0.4))
    plan.calls = [Call(0.0, who, "store", (chunks[0],), 3.0), Call(0.1, who, "pin", (chunks[0],), seconds)]
    _flood(plan, chunks, 0.15)
    plan.calls.append(Call(0.1 + seconds + 0.3, who, "load", (chunks[0],), 3.0))


def _memory(chance: random.Random, plan: PoolPlan, chunks: list[int]) -> None:
    plan.row, plan.column, plan.keeps = "the pool's memory", "a bit of each frame flips", False
    plan.strikes.append(Strike(0.3, "memory", "flip"))
    for _ in range(3):
        some = tuple(chance.sample(chunks, chance.randint(1, len(chunks))))
        plan.calls.append(Call(chance.uniform(0.32, 0.5), chance.choice(CLIENTS), "load", some, 3.0))
