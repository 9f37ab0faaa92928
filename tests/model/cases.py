"""What is explored. Each case is whole: every order of everything in it."""

from __future__ import annotations

from tests.model.case import Case, Wanted

ONE = (Wanted("t", ("p",), ((0,),)),)
AGAIN = (Wanted("t", ("p",), ((0,),), times=2),)
NEXT = (Wanted("t", ("p",), ((0,),)), Wanted("u", ("q",), ((0,),)))
PARTS = (Wanted("t", ("p", "q"), ((0,),)),)
BATCHES = (Wanted("t", ("p",), ((0, 1),)),)
GROUPS = (Wanted("t", ("p",), ((0,), (0,))),)  # of two cache groups
FAULTS = {"consumer_cancels": 1, "producer_cancels": 1}

ONE_NAME, AGAIN_NAME = "one transfer, damage, preemption", "an id granted twice"
PRODUCER_NAME, CONSUMER_NAME = "a producer restarts", "the consumer restarts"
PARTS_NAME, GROUPS_NAME = "two producers' parts", "two cache groups, damage, preemption"

# In make test: one of each kind.
SHORT = [
    Case("an id granted twice, decode aborts", AGAIN, consumer_cancels=1),
    Case("one transfer, damage", ONE, damages=1, consumer_cancels=1),
    Case("one transfer, preemption", ONE, preemptions=1, consumer_cancels=1),
    Case("one transfer, a peer is given up", ONE, losses=1),
    Case("two cache groups, aborts", GROUPS, **FAULTS),
]
FULL = [
    *SHORT,
    Case(AGAIN_NAME, AGAIN, **FAULTS),
    Case(ONE_NAME, ONE, damages=1, preemptions=1, **FAULTS),
    Case("two batches, damage, preemption", BATCHES, damages=1, preemptions=1),
    Case("two batches, aborts", BATCHES, **FAULTS),
    Case(GROUPS_NAME, GROUPS, damages=1, preemptions=1),
    Case(PRODUCER_NAME, AGAIN, producer_restarts=1, **FAULTS),
    Case(CONSUMER_NAME, AGAIN, consumer_restarts=1, **FAULTS),
    Case("a peer is given up and comes back", AGAIN, losses=1, **FAULTS),
    Case(PARTS_NAME, PARTS, consumer_cancels=1),
    Case("a page goes from one producer's transfer to another's", NEXT, consumer_cancels=1),
    Case("a page goes from one to another, a producer restarts", NEXT, producer_restarts=1),
    Case("a page goes from one to another, a peer is given up", NEXT, losses=1),
]
