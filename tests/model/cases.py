"""What is explored. Each case is whole: every order of everything in it."""

from __future__ import annotations

from tests.model.case import READ, WRITE, Case, Wanted

ONE = (Wanted("t", ("p",), (0,)),)
AGAIN = (Wanted("t", ("p",), (0,), times=2),)
NEXT = (Wanted("t", ("p",), (0,)), Wanted("u", ("q",), (0,)))
PARTS = (Wanted("t", ("p", "q"), (0,)),)
BATCHES = (Wanted("t", ("p",), (0, 1)),)
FAULTS = {"consumer_cancels": 1, "producer_cancels": 1}


def both(name: str, wanted: tuple[Wanted, ...], **bounds: int) -> list[Case]:
    return [Case(f"{name}, {link}", link, wanted, **bounds) for link in (READ, WRITE)]


ONE_NAME, AGAIN_NAME = "one transfer, damage, preemption", "an id granted twice"
PRODUCER_NAME, CONSUMER_NAME = "a producer restarts", "the consumer restarts"
LOSS_NAME, PARTS_NAME = "a peer is given up and comes back", "two producers' parts"

# In make test: one of each kind.
SHORT = [
    *both("an id granted twice, decode aborts", AGAIN, consumer_cancels=1),
    Case("one transfer, damage, read", READ, ONE, damages=1, consumer_cancels=1),
    Case("one transfer, preemption, write", WRITE, ONE, preemptions=1, consumer_cancels=1),
    *both("one transfer, a peer is given up", ONE, losses=1),
]
FULL = [
    *SHORT,
    *both(AGAIN_NAME, AGAIN, **FAULTS),
    *both(ONE_NAME, ONE, damages=1, preemptions=1, **FAULTS),
    *both("two batches, damage, preemption", BATCHES, damages=1, preemptions=1),
    *both("two batches, aborts", BATCHES, **FAULTS),
    *both(PRODUCER_NAME, AGAIN, producer_restarts=1, **FAULTS),
    *both(CONSUMER_NAME, AGAIN, consumer_restarts=1, **FAULTS),
    *both(LOSS_NAME, AGAIN, losses=1, **FAULTS),
    *both(PARTS_NAME, PARTS, consumer_cancels=1),
    *both("a page goes from one producer's transfer to another's", NEXT, consumer_cancels=1),
    *both("a page goes from one to another, a producer restarts", NEXT, producer_restarts=1),
    *both("a page goes from one to another, a peer is given up", NEXT, losses=1),
]
