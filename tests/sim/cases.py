"""Hand-made plans: one thing goes wrong, at every place where it can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.sim.plan import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    FLOOR_BYTES_S,
    FOR_GOOD,
    LINK_KINDS,
    SIM_LIMITS,
    Bytes,
    Fault,
    Group,
    Net,
    Plan,
    Request,
    with_groups,
)

DELIVERY_KINDS = ("grant", "accept", "batch", "received", "commit", "ack")
ENDING_KINDS = ("revoke", "abort")
MAX_MESSAGES = 60  # no plain hand-off of these cases says more
MAX_CALLS = 20  # nor more to set its links up

REQUEST = Request(
    transfer="t",
    prompt=7,
    blocks=6,
    producer="p0",
    consumer="d0",
    open_at=0.1,
    begin_at=0.0,
    must_be_ready=True,
    within_s=4.0,
)


def plain(
    link: str = "direct", *, tp: tuple[int, int] = (1, 1), window: int = 2 * BLOCK_BYTES, **changes: object
) -> Plan:
    """One request, one batch a block, nothing wrong. ``changes`` go into the request."""
    return Plan(
        seed=1,
        producers={"p0": tp[0]},
        consumers={"d0": tp[1]},
        links={("p0", "d0"): link},
        limits=replace(SIM_LIMITS, batch_bytes=BLOCK_BYTES, window_bytes=window),
        requests=(replace(REQUEST, **changes),),  # type: ignore[arg-type]
    )


def lost_once() -> Iterator[tuple[str, Plan]]:
    """The first message of each kind is lost; the transfer must arrive all the same."""
    for link in LINK_KINDS:
        for kind in DELIVERY_KINDS:
            for window in (BLOCK_BYTES, 2 * BLOCK_BYTES):  # one batch at a time, two at a time
                yield f"{kind} lost, {link}, window {window}", replace(plain(link, window=window), drop_once=kind)
        damaged = replace(plain(link), bytes=Bytes(corrupt=0.12), seed=3)
        yield f"nack lost, {link}", replace(damaged, drop_once="nack")


def lost_anywhere() -> Iterator[tuple[str, Plan]]:
    """One message is lost: each one of a hand-off in turn."""
    for link in LINK_KINDS:
        for tp in ((1, 1), (2, 1), (1, 2)):
            for nth in range(MAX_MESSAGES):
                yield f"message {nth} lost, {link}, tp {tp}", replace(plain(link, tp=tp), drop_nth=nth)


def copied() -> Iterator[tuple[str, Plan]]:
    """Everything is said two or three times, in any order."""
    for link in LINK_KINDS:
        for jitter in (0.0, 0.3):
            net = Net(jitter=jitter, fifo=False, duplicate=1.0, replay=0.5)
            yield f"copies, {link}, jitter {jitter}", replace(plain(link), net=net)


def windows() -> Iterator[tuple[str, Plan]]:
    """A window smaller than a batch, than a block, and of odd sizes."""
    for link in LINK_KINDS:
        for window in (1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2000):
            yield f"window {window}, {link}", plain(link, window=window)


def shapes() -> Iterator[tuple[str, Plan]]:
    """What decode holds already, both orders of dispatch, preemptions: everything must arrive."""
    for link in LINK_KINDS:
        for held in (0, 1, 5, 6):
            yield f"held {held}, {link}", plain(link, held=held)
            yield f"held {held}, {link}, serial", plain(link, held=held, begin_at=2.0)
        yield f"late prefill, {link}", plain(link, open_at=3.0, begin_at=0.0)
        for at in (0.01, 0.06, 0.11, 0.16, 0.17, 0.18, 0.2):
            slow = replace(plain(link, preempt_at=(at,), lazy_finish_s=0.3), bytes=Bytes(copy_delay=0.1))
            yield f"preempted after {at}, {link}", slow


def foretold() -> Iterator[tuple[str, Plan]]:
    """Prefill says before each step what it will compute, and is preempted in the middle of one: what it said is void.
    Its steps end within blocks."""
    for link in LINK_KINDS:
        for tokens in (BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE - 1):
            for seed in range(12):
                at = 0.01 + 0.02 * seed
                told = plain(link, foretold=True, step_tokens=tokens, preempt_at=(at, at + 0.3))
                yield f"foretold, {link}, {tokens} a step, preempted after {at:.2f}", replace(told, seed=seed)


WINDOW = 9  # tokens
MODELS = {
    "twins": (Group(), Group()),
    "window behind full attention": (Group(), Group(window=WINDOW)),
    "window before full attention": (Group(window=WINDOW), Group()),
    "small blocks, large blocks": (Group(2, window=WINDOW), Group(8)),
    "large blocks, small blocks": (Group(8, window=WINDOW), Group(2)),
    "two windows": (Group(4), Group(2, window=5), Group(8, window=14)),
    "windows alone": (Group(4, window=6), Group(2, window=11)),
    "whole cache beside a split one": (Group(heads=1), Group()),
    "split cache beside a whole one": (Group(), Group(heads=1, window=WINDOW)),
}


def of_groups() -> Iterator[tuple[str, Plan]]:
    """Models of several cache groups: prefill gives back what lies behind a window, decode asks for the rest. In steps
    of a few tokens and in one, with what decode holds, and with preemptions."""
    for name, groups in MODELS.items():
        for link in LINK_KINDS:
            for tp in ((1, 1), (2, 1), (1, 2), (2, 2)):
                for tokens in (3, 2 * BLOCK_SIZE, 8 * BLOCK_SIZE):
                    plan = with_groups(plain(link, tp=tp, step_tokens=tokens, within_s=8.0), groups)
                    yield f"{name}, {link}, tp {tp}, {tokens} a step", plan
            for held in (1, 3, 6):
                yield f"{name}, {link}, held {held}", with_groups(plain(link, held=held), groups)
            for at in (0.06, 0.11, 0.3):
                again = plain(link, preempt_at=(at,), step_tokens=5, foretold=True, lazy_finish_s=0.3, within_s=8.0)
                yield f"{name}, {link}, preempted after {at}", with_groups(again, groups)


def given_back_early() -> Iterator[tuple[str, Plan]]:
    """Prefill gives back a block that decode attends to, and says so."""
    for name, groups in MODELS.items():
        for link in LINK_KINDS:
            for tp in ((1, 1), (2, 1), (1, 2)):
                if any(group.window is not None for group in groups):
                    early = plain(link, tp=tp, must_be_ready=False, gives_back_early=True)
                    yield f"{name}, {link}, tp {tp}", with_groups(early, groups)


def set_up() -> Iterator[tuple[str, Plan]]:
    """Decode finds its link though the better one is refused, too slow, or one word about it is lost."""
    for kind in ("half", "slow"):
        plan = plain(within_s=8.0)
        floor = FLOOR_BYTES_S if kind == "slow" else 0.0
        yield kind, replace(plan, links={("p0", "d0"): kind}, floor_bytes_s=floor)
    for tp in ((1, 1), (2, 1), (1, 2)):
        for nth in range(MAX_CALLS):
            yield f"word {nth} about a link is lost, tp {tp}", replace(plain(tp=tp, within_s=16.0), drop_call=nth)


def claimed() -> Iterator[tuple[str, Plan]]:
    """Decode has no pages for a second request until the first one is over: longer than prefill holds pages of which
    nobody spoke. The second one's prefill comes; or it never does, and does not hear that decode gave up."""
    deaf = Fault(14.9, "partition", "p1", "d0", seconds=0.3)
    for link in LINK_KINDS:
        first = plain(link, open_at=5.5, step_s=0.5, step_tokens=BLOCK_SIZE, within_s=6.0)
        for open_at in (0.3, None):
            second = replace(REQUEST, transfer="u", producer="p1", open_at=open_at, begin_at=0.2, within_s=9.0)
            second = replace(second, must_be_ready=open_at is not None)
            plan = replace(first, producers={"p0": 1, "p1": 1}, requests=(*first.requests, second), pages=8)
            yield f"claimed, opened at {open_at}, {link}", replace(plan, faults=() if open_at else (deaf,))


def gone() -> Iterator[tuple[str, Plan]]:
    """One side dies for good, or is silent just long enough for one of two workers to be given up: everything ends."""
    quiet = {"must_be_ready": False, "step_s": 0.1, "step_tokens": BLOCK_SIZE}
    for link in LINK_KINDS:
        for who in ("p0", "d0"):
            for at in (0.001, 0.005, 0.02, 0.035, 0.15, 0.3, 0.5):
                fault = Fault(at, "crash", who, seconds=FOR_GOOD)
                yield f"{who} dies at {at}, {link}", replace(plain(link, **quiet), faults=(fault,))
    for tp in ((2, 1), (1, 2)):
        for seed in range(20):
            silence = Fault(0.5, "partition", "p0", "d0", seconds=1.3)
            plan = replace(plain(tp=tp, **quiet), seed=seed, drop_call=seed % 5, faults=(silence,))
            yield f"silent for {silence.seconds} s, tp {tp}, seed {seed}", plan


def overtaken() -> Iterator[tuple[str, Plan]]:
    """Decode gives up soon, and its words overtake each other: its pages must be safe."""
    for link in LINK_KINDS:
        for seed in range(30):
            open_at, begin_at = (0.1, 0.2) if seed % 2 else (2.0, 0.0)
            abort_at = 0.05 * (seed % 5) if seed % 2 else 0.1 * seed
            hasty = plain(link, must_be_ready=False, open_at=open_at, begin_at=begin_at, consumer_abort_at=abort_at)
            net = Net(jitter=0.8, fifo=False, duplicate=0.5)
            yield f"overtaken {seed}, {link}", replace(hasty, seed=seed, net=net, bytes=Bytes(copy_delay=0.5))


def declined() -> Iterator[tuple[str, Plan, str]]:
    """Decode rejects the request while prefill has it, or had it: ``(name, plan, code of prefill's release)``."""
    for tp in ((1, 1), (2, 1), (1, 2)):
        for begin_at in (0.2, 3.0):
            plan = plain(tp=tp, must_be_ready=False, declines=True, begin_at=begin_at)
            yield f"declined at {begin_at}, tp {tp}", plan, "rejected"
    yield "word of it lost", replace(plan, drop_once="revoke", consumers={"d0": 1}), "timeout"


def endings() -> Iterator[tuple[str, Plan, str]]:
    """Aborts on either side, the words about it lost: ``(name, plan, counter of the code that decode reports)``."""
    for link in LINK_KINDS:
        for kind in ("", *ENDING_KINDS):
            for after in (0.0, 0.05, 0.12, 0.2, 0.4):
                quiet = {"must_be_ready": False, "step_s": 0.1, "step_tokens": BLOCK_SIZE}
                slow = Bytes(copy_delay=0.2)
                mine = replace(plain(link, consumer_abort_at=after, **quiet), bytes=slow)
                theirs = replace(plain(link, producer_abort_at=after, **quiet), bytes=slow)
                name = f"after {after}, {kind or 'nothing'} lost, {link}"
                yield f"decode aborts {name}", replace(mine, drop_once=kind), "failed cancelled"
                yield f"prefill aborts {name}", replace(theirs, drop_once=kind), "failed peer_cancelled"
