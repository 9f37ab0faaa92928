"""Chunks that come up on a hint: a prompt's, in order, as far as a share of memory goes, until they are loaded."""

from __future__ import annotations

import pytest

from pdtransport.pool import messages
from pdtransport.pool.core.prefetched import FORGOTTEN_S
from pdtransport.pool.core.requests import KeyVerdict
from pdtransport.pool.core.store import MEMORY, ChunkStore
from pdtransport.pool.core.tier_state import Promote, TierState
from pdtransport.pool.server.admin_requests import AdminRequests
from pdtransport.pool.settings import PoolSettings
from pdtransport.pool.tiers.base import Stored
from tests.unit.pool_rig import FRAME, Asker, MemoryTier, key, keys

SEVEN = 7  # a checksum


class Below:
    """A pool of 8 frames with chunks 0..15 in the tier below; two of them may be up on hints."""

    def __init__(self) -> None:
        settings = PoolSettings.parse(
            {"memory_bytes": 1 << 20, "frame_bytes": FRAME, "max_chunks": 64, "client_bytes": 1 << 20}
        )
        tier = TierState(MemoryTier(), MEMORY << 1, 1 << 20, "lru", None)
        self.chunk_store = ChunkStore(settings, 8, lambda *_: True, [tier])
        for number in range(16):
            assert self.chunk_store.adopt(tier, Stored(key(number), "", FRAME, FRAME))
        self.control, self.asker, self.now = AdminRequests(self.chunk_store), Asker(self.chunk_store), 0.0

    def hint(self, *numbers: int) -> int:
        return self.control.manage(messages.Manage(request=1, keys=keys(*numbers), action="hint"), self.now)

    def bring(self, checksum: int | None = SEVEN) -> int:
        """What the tier's threads do; how many chunks they read."""
        jobs = [self.chunk_store.jobs.popleft() for _ in range(len(self.chunk_store.jobs))]
        promoted = [job for job in jobs if isinstance(job, Promote)]
        for job in promoted:
            self.chunk_store.promoted(job, checksum)
        return len(promoted)

    def load(self, *numbers: int) -> list[KeyVerdict]:
        request = self.asker.load(*numbers)
        self.bring()
        verdicts = self.asker.told(request)
        self.chunk_store.release(request, list(request.held))
        return verdicts

    def counts(self) -> dict[str, int]:
        return {
            name: self.chunk_store.counters[name] for name in ("hint_begun", "hint_used", "hint_unused", "hints_cut")
        }


@pytest.fixture
def below() -> Below:
    return Below()


def test_hinted_chunks_are_in_memory_when_they_are_asked_for(below: Below) -> None:
    """Once is enough: a second hint for the same begins nothing."""
    assert (below.hint(0, 1), below.hint(0, 1), below.bring()) == (2, 0, 2)
    assert below.chunk_store.lookup(keys(0, 1)) == (2, 2)
    assert below.load(0, 1) == [KeyVerdict.READ] * 2
    assert below.chunk_store.counters["memory_hits"] == 2
    assert below.counts() == {"hint_begun": 2, "hint_used": 2, "hint_unused": 0, "hints_cut": 0}


def test_a_load_while_they_are_on_their_way_waits_for_the_same_read(below: Below) -> None:
    below.hint(0)
    request = below.asker.load(0)
    assert below.asker.told(request) == []
    assert below.bring() == 1
    assert below.asker.told(request) == [KeyVerdict.READ]
    assert below.counts()["hint_used"] == 1


def test_hints_for_a_long_queue_take_their_share_of_memory_and_no_more(below: Below) -> None:
    """What others use stays; there is room for hints again as chunks are loaded, or time passes."""
    assert below.load(10, 11, 12, 13, 14, 15) == [KeyVerdict.READ] * 6
    assert (below.hint(0, 1, 2, 3), below.hint(4), below.bring()) == (2, 0, 2)
    assert below.counts()["hints_cut"] == 2
    assert below.chunk_store.lookup(keys(10, 11, 12, 13, 14, 15)) == (6, 6)
    assert below.load(0) == [KeyVerdict.READ]
    assert below.hint(2, 3) == 1
    below.bring()
    below.now = FORGOTTEN_S
    below.chunk_store.hints.tick(below.now)
    assert below.hint(4, 5, 6) == 2
    assert below.counts() == {"hint_begun": 5, "hint_used": 1, "hint_unused": 2, "hints_cut": 4}


def test_a_hint_ends_where_a_load_would(below: Below) -> None:
    """At the first chunk that is not there."""
    assert (below.hint(0, 99, 1), below.bring()) == (1, 1)


@pytest.mark.parametrize("how", ["damaged", "dropped", "dropped on its way"])
def test_what_does_not_come_up_takes_no_room_of_hints(below: Below, how: str) -> None:
    below.hint(0, 1)
    if how == "dropped on its way":
        below.chunk_store.drop(keys(0, 1))
    below.bring(None if how == "damaged" else SEVEN)
    if how == "dropped":
        below.chunk_store.drop(keys(0, 1))
    assert below.counts()["hint_unused"] == 2
    assert below.chunk_store.hints.nbytes == 0
    assert below.hint(2, 3) == 2
