"""Chunks that a message names are taken together where that is faster, and nobody can tell by the outcome."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtransport.pool.core import batches
from pdtransport.pool.core.index import FILLING, MEMORY, key_rows
from pdtransport.pool.core.requests import KeyVerdict, PoolRequest
from pdtransport.pool.core.tier_state import Promote, TierState, WriteBack
from tests.unit.pool_rig import FRAME, Asker, MemoryTier, chunk_store, keys

Step = tuple[str, int, list[int]]

CHUNK = 1 << 18

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["store", "load", "publish", "release", "drop", "work", "hint"]),
        st.integers(0, 3),
        st.lists(st.integers(0, 7), min_size=1, max_size=5),
    ),
    max_size=30,
)


class Pool:
    """One shelf, and two clients that say what the steps want."""

    def __init__(self, policy: str, below: bool) -> None:
        lower = [TierState(MemoryTier(), 2, 5 * CHUNK, "lru")] if below else []
        self.chunk_store = chunk_store(7 * CHUNK // FRAME, lower, policy=policy, client_bytes=1 << 20)
        self.askers = [Asker(self.chunk_store), Asker(self.chunk_store)]
        self.asked: list[PoolRequest] = []

    def may_come(self, entry: int) -> bool:
        """From a tier below."""
        index = self.chunk_store.index
        return bool(index.tiers[entry]) and not index.tiers[entry] & MEMORY and index.state[entry] != FILLING

    def take(self, what: str, which: int, numbers: list[int]) -> Any:
        if what in ("store", "load"):
            request = self.askers[which % 2]._request(what == "store")
            sizes = [CHUNK * (1 + number % 2) for number in numbers]
            (self.chunk_store.store if request.store else self.chunk_store.load)(request, keys(*numbers), sizes)
            self.asked.append(request)
        elif what == "drop":
            self.chunk_store.drop(keys(*numbers))
        elif what == "hint":
            for entry in self.chunk_store.entries(keys(*numbers)):
                if entry >= 0 and self.may_come(entry) and self.chunk_store.bring_up(entry):
                    self.chunk_store.hints.began(entry, self.chunk_store.index.nbytes[entry], 0.0)
        elif what == "work":
            jobs, self.chunk_store.jobs = self.chunk_store.jobs, deque()
            for job in jobs:
                if isinstance(job, WriteBack):
                    self.chunk_store.written_back(job, job.nbytes)
                elif isinstance(job, Promote):
                    self.chunk_store.promoted(job, 7)
        elif self.asked and what == "publish":
            request = self.asked[-1 - which % len(self.asked)]
            places = list(request.held) if len(numbers) > 1 else numbers  # mostly what it may
            self.chunk_store.publish(request, [(place, 7 + place) for place in places])
        elif self.asked:
            self.chunk_store.release(
                self.asked[-1 - which % len(self.asked)], range(5) if len(numbers) > 1 else numbers
            )
        told = []
        for request in self.asked:
            parts = self.askers[0].parts(request)
            told.append(sorted((part.place, part.verdict, part.checksum, len(part.frames)) for part in parts))
        jobs = [(type(job), job.key) for job in self.chunk_store.jobs]
        there = [self.chunk_store.lookup(keys(number)) for number in range(10)]
        held = [(asker.session.held_bytes, self.chunk_store.budget.frames.free) for asker in self.askers]
        return (
            told,
            jobs,
            there,
            held,
            len(self.chunk_store.index),
            self.chunk_store.being_filled,
            dict(self.chunk_store.counters),
        )


def never(*_: object) -> bool:
    return False


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("policy", ["lru", "s3fifo", "lfu"])
def test_together_and_one_by_one_come_to_the_same(policy: str, below: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts, what is visible, what clients hold, what was evicted."""
    ways: dict[str, Callable[..., bool]] = {name: getattr(batches, name) for name in ("store", "load", "publish")}

    @given(steps=STEPS)
    def compare(steps: list[Step]) -> None:
        one_by_one, fast = Pool(policy, below), Pool(policy, below)
        for step in steps:
            for name in ways:
                monkeypatch.setattr(batches, name, never)
            expected = one_by_one.take(*step)
            for name, way in ways.items():
                monkeypatch.setattr(batches, name, way)
            assert fast.take(*step) == expected

    compare()


def test_what_is_alike_is_taken_together() -> None:
    """Otherwise the comparison above compares nothing."""
    on = chunk_store(8)
    writer, reader = Asker(on), Asker(on)
    storing = writer.store(1, 2, 3)
    assert writer.told(storing) == [KeyVerdict.WRITE] * 3
    assert batches.publish(on, storing, [(0, 1), (1, 2)])
    assert not batches.publish(on, storing, [(1, 2), (2, 3)])  # one is no more to publish
    for numbers, sizes, all_there in (((1, 2), 2, True), ((1, 3), 2, False), ((1, 9), 2, False)):
        request = reader._request(False)
        entries = on.index.find(key_rows(keys(*numbers)))
        assert batches.load(on, request, entries, [FRAME] * sizes) is all_there


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_chunks_that_were_loaded_together_stay_longest(policy: str) -> None:
    """What nobody read goes first, as if they had been loaded one by one."""
    on = chunk_store(4, policy=policy)
    asker = Asker(on)
    asker.put(1, 2, 3, 4)
    request = asker._request(False)
    assert batches.load(on, request, on.index.find(key_rows(keys(1, 2))), [FRAME] * 2)
    on.release(request, range(2))
    asker.put(5, 6)
    assert [on.lookup(keys(number))[0] for number in range(1, 7)] == [1, 1, 0, 0, 1, 1]


def test_a_hinted_chunk_that_is_loaded_together_was_of_use() -> None:
    """It gives back its share of memory, for the next hints."""
    on = chunk_store(4)
    asker = Asker(on)
    asker.put(1, 2)
    entries = on.index.find(key_rows(keys(1, 2)))
    on.hints.began(int(entries[0]), FRAME, 0.0)
    assert batches.load(on, asker._request(False), entries, [FRAME] * 2)
    assert (on.hints.nbytes, on.counters["hint_used"]) == (0, 1)
