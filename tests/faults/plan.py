"""From a seed to what happens in one run: transfers, their schedule, and what goes wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.faults.rules import Rule
from tests.faults.worker import BLOCK_SIZE

# Deadlines short enough that thousands of runs are affordable. Heartbeats and liveness are the defaults.
DEADLINES = {
    "answer_s": 2.0,
    "arrival_s": 2.5,
    "queue_s": 4.0,
    "stall_s": 3.0,
    "verify_s": 3.0,
    "hold_s": 3.0,
    "claim_s": 4.0,
    "ack_s": 3.0,
}
# From the last word of the engines to the last end: connecting, agreeing on a link, then each deadline above once.
REQUEST_S = 25.0
MAX_BLOCKS = 24

FRAME_ACTIONS = ("drop", "delay", "duplicate", "reorder", "flip", "truncate", "stall", "replay", "foreign")
DECODE_SAYS = ("grant", "received", "nack", "ack", "revoke")
PREFILL_SAYS = ("accept", "batch", "commit", "abort")
SHAKES = ("hello", "welcome", "ping", "pong", "link")
# What can happen to a batch on its link, and on which side.
LINK_FAULTS = (
    ("prefill", "send", "flip"),
    ("prefill", "send", "truncate"),
    ("prefill", "send", "busy"),
    ("prefill", "send", "error"),
    ("decode", "receive", "delay"),
    ("decode", "receive", "stall"),
    ("decode", "receive", "error"),
)
KILL, STOP, CANCEL = "kill", "stop", "cancel"


@dataclass
class Transfer:
    """One request. Times are seconds after the run began."""

    seed: int
    tokens: int
    first_block: int
    offer_at: float
    receive_at: float
    ready: list[tuple[float, int]]  # (when, tokens computed)
    finish_at: float
    withdraw_at: float | None = None  # then ``ready`` starts over
    cancel_at: float | None = None
    cancel_side: str = ""

    @property
    def blocks(self) -> int:
        return -(-self.tokens // BLOCK_SIZE)


@dataclass
class Plan:
    seed: int
    link: str
    prefills: int  # workers; decode is one
    row: str  # where it goes wrong: a cell of the matrix
    column: str  # what goes wrong
    replay: str = ""  # arguments that run it again
    transfers: list[Transfer] = field(default_factory=list)
    rules: dict[str, list[Rule]] = field(default_factory=dict)  # by the worker's name
    signals: list[tuple[float, str, str]] = field(default_factory=list)  # (when, worker, kill or stop)
    stopped_s: float = 0.0  # how long a stopped worker stands still
    drops_rest: bool = False  # when decode's half failed, prefill's is cancelled, as a router does


def shape_of(seed: int, links: list[str]) -> tuple[str, int]:
    """Link and number of prefill workers: every third run has two."""
    return links[seed % len(links)], 2 if seed // len(links) % 3 == 2 else 1


def plan_of(seed: int, links: list[str]) -> Plan:
    chance = random.Random(seed)
    link, prefills = shape_of(seed, links)
    plan = Plan(seed, link, prefills, "nothing", "nothing", f"--links {','.join(links)} --seed {seed}")
    for number in range(chance.randint(2, 5)):
        plan.transfers.append(_transfer(chance, seed * 100 + number))
    what = chance.random()
    if what < 0.04:
        pass
    elif what < 0.60:
        plan.row, plan.column = frame_fault(chance, plan)
    elif what < 0.75:
        plan.row, plan.column = link_fault(chance, plan)
    elif what < 0.85:
        plan.row, plan.column = _process(chance, plan)
    elif what < 0.90:
        plan.row, plan.column = "engines", CANCEL
        for each in plan.transfers:
            if chance.random() < 0.6:
                cancel(chance, each)
    else:
        plan.row, plan.column = "several at once", "mixed"
        for _ in range(chance.randint(2, 4)):
            chance.choice((frame_fault, frame_fault, link_fault))(chance, plan)
        if chance.random() < 0.3:
            _process(chance, plan)
        for each in plan.transfers:
            if chance.random() < 0.2:
                cancel(chance, each)
    return plan


def healthy(seed: int, link: str, prefills: int, blocks: int = 4) -> Plan:
    """One transfer with nothing wrong."""
    tokens = blocks * BLOCK_SIZE
    plan = Plan(seed, link, prefills, "nothing", "nothing", drops_rest=True)
    plan.transfers.append(Transfer(seed, tokens, 0, 0.0, 0.0, [(0.0, tokens)], 0.0))
    return plan


def _transfer(chance: random.Random, seed: int) -> Transfer:
    blocks = chance.randint(1, MAX_BLOCKS)
    tokens = blocks * BLOCK_SIZE - chance.randrange(BLOCK_SIZE)
    first = chance.choice((0, 0, 0, chance.randint(0, blocks)))
    offer_at = chance.uniform(0, 0.1)
    receive_at = chance.choice((chance.uniform(0, 0.1), chance.uniform(0, 0.4)))
    steps = sorted({chance.randint(1, tokens) for _ in range(chance.randint(0, 3))} | {tokens})
    at, ready = offer_at, []
    for step in steps:
        at += chance.uniform(0, 0.05)
        ready.append((at, step))
    each = Transfer(seed, tokens, first, offer_at, receive_at, ready, at)
    if chance.random() < 0.1:
        each.withdraw_at = ready[-1][0] + 0.01
        again = each.withdraw_at + chance.uniform(0.01, 0.1)
        each.ready.append((again, tokens))
        each.finish_at = again
    return each


def cancel(chance: random.Random, each: Transfer) -> None:
    each.cancel_side = chance.choice(("prefill", "decode"))
    begin = each.offer_at if each.cancel_side == "prefill" else each.receive_at
    each.cancel_at = begin + chance.choice((0.0, chance.uniform(0, 0.05), chance.uniform(0, 0.3)))


def frame_fault(chance: random.Random, plan: Plan) -> tuple[str, str]:
    """One kind of message, one fault."""
    action = chance.choice(FRAME_ACTIONS)
    if action in ("replay", "foreign"):
        kinds = [*DECODE_SAYS, *PREFILL_SAYS]
    elif action == "stall":
        kinds = ["any"]
    else:
        kinds = [*DECODE_SAYS, *PREFILL_SAYS, *SHAKES]
    kind = chance.choice(kinds)
    rule = Rule(
        "out",
        kind,
        action,
        first=chance.choice((0, 0, chance.randint(0, 8))),
        count=chance.choice((1, 1, 3, 1000)) if action != "stall" else 1,
        seconds=chance.choice((0.02, 0.2, 1.0)) if action == "delay" else chance.choice((0.3, 1.0, 3.0)),
        seed=chance.getrandbits(32),
    )
    if kind in DECODE_SAYS:
        sides = ["decode0"]
    elif kind in PREFILL_SAYS:
        sides = [f"prefill{chance.randrange(plan.prefills)}"]
    else:
        sides = [chance.choice(("decode0", "prefill0"))]
    for side in sides:
        plan.rules.setdefault(side, []).append(rule)
    if kind in ("revoke", "abort"):  # said only where somebody gives up
        for each in plan.transfers:
            cancel(chance, each)
            if kind != "abort":
                each.cancel_side = "decode"
    if kind == "nack":  # said only where something is missing
        damage = Rule("send", "any", "flip", count=3, seed=chance.getrandbits(32))
        plan.rules.setdefault("prefill0", []).append(damage)
    return (kind if kind != "any" else f"all of {sides[0][:-1]}'s messages"), action


def link_fault(chance: random.Random, plan: Plan) -> tuple[str, str]:
    side, point, action = chance.choice(LINK_FAULTS)
    rule = Rule(
        point,
        "any",
        action,
        first=chance.randint(0, 4),
        count=chance.choice((1, 2, 4)) if action != "busy" else chance.choice((1, 20)),
        seconds=chance.choice((0.05, 0.5, 1.5)),
        seed=chance.getrandbits(32),
    )
    name = f"{side}{chance.randrange(plan.prefills) if side == 'prefill' else 0}"
    plan.rules.setdefault(name, []).append(rule)
    return ("a batch on the link, sent" if side == "prefill" else "a batch on the link, received"), action


def _process(chance: random.Random, plan: Plan) -> tuple[str, str]:
    """A worker dies, or stands still, at some moment."""
    name = chance.choice(["decode0", *(f"prefill{rank}" for rank in range(plan.prefills))])
    what = chance.choice((KILL, STOP))
    plan.signals.append((chance.uniform(0, 0.3), name, what))
    plan.stopped_s = chance.choice((0.3, 1.0, 3.0))
    if chance.random() < 0.5:
        plan.transfers[-1].receive_at += 1.2  # when all know that it is dead
    return f"the {name[:-1]} process, at any moment", what if what == KILL else f"stop {plan.stopped_s:g} s"
