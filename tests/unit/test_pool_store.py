"""The life of a chunk, without sockets: nothing wrong is granted, nothing is lost, whatever clients and tiers do."""

from __future__ import annotations

import pytest

from pdtransport.pool.core.budget import HARD, NO_PIN, SOFT
from pdtransport.pool.core.requests import KeyVerdict, PoolRequest
from pdtransport.pool.core.store import ChunkStore
from pdtransport.pool.core.tier_state import Delete, Promote, TierState, WriteBack
from pdtransport.pool.settings import PoolSettings
from pdtransport.pool.tiers.base import Stored
from tests.unit.pool_rig import FRAME, Asker, MemoryTier, chunk_store, key, keys


def test_a_chunk_is_invisible_until_it_is_published() -> None:
    """Lookups and loads never see what is being written."""
    on = chunk_store()
    writer, reader = Asker(on), Asker(on)
    request = writer.store(1)
    assert writer.told(request) == [KeyVerdict.WRITE]
    assert on.lookup(keys(1)) == (0, 0)
    reading = reader.load(1)
    assert reader.told(reading) == []  # it waits
    assert on.publish(request, [(0, 42)]) == 1
    assert on.lookup(keys(1)) == (1, 1)
    assert [(part.verdict, part.checksum) for part in reader.parts(reading)] == [(KeyVerdict.READ, 42)]


def test_equal_keys_in_flight_are_stored_once() -> None:
    """The second writer of a key is told to wait, and then that it is there."""
    on = chunk_store()
    first, second = Asker(on), Asker(on)
    one, other = first.store(1), second.store(1)
    assert first.told(one) == [KeyVerdict.WRITE]
    assert second.told(other) == []
    on.publish(one, [(0, 1)])
    assert second.told(other) == [KeyVerdict.HAVE]


def test_a_failed_store_never_becomes_visible_and_the_next_in_line_takes_over() -> None:
    """When the writer dies, the one who waits to store the key gets its place, and readers go on waiting."""
    on = chunk_store()
    first, second, reader = Asker(on), Asker(on), Asker(on)
    one, other, reading = first.store(1), second.store(1), reader.load(1)
    on.cancel(one)
    assert on.publish(one, [(0, 1)]) == 0  # too late
    assert on.lookup(keys(1)) == (0, 0)
    assert second.told(other) == [KeyVerdict.WRITE]
    assert reader.told(reading) == []
    on.cancel(other)
    assert reader.told(reading) == [KeyVerdict.MISS]
    assert (len(on.index), on.budget.frames.free) == (0, 4)


def test_one_request_may_name_a_key_twice() -> None:
    """The second one is answered once the first is published, instead of never."""
    on = chunk_store()
    asker = Asker(on)
    request = asker.store(1, 1)
    assert asker.told(request) == [KeyVerdict.WRITE]
    on.publish(request, [(0, 1)])
    assert asker.told(request) == [KeyVerdict.HAVE]


def test_what_is_referenced_is_never_evicted() -> None:
    """With all memory referenced a store is refused; once a reader lets go, its chunk may go."""
    on = chunk_store(frames=2)
    asker = Asker(on)
    asker.put(1, 2)
    reading = asker.load(1, 2)
    assert asker.put(3) == [KeyVerdict.FULL]
    on.release(reading, [0])
    assert asker.put(3) == [KeyVerdict.WRITE]
    assert on.lookup(keys(1)) == (0, 0)
    assert on.lookup(keys(2)) == (1, 1)


def test_a_store_that_evicts_a_key_it_names_itself_is_told_the_truth() -> None:
    """What made room for the first key of a request does not count as there for the second."""
    on = chunk_store(frames=1)
    asker = Asker(on)
    asker.put(1)
    request = asker.store(2, 1)
    assert asker.told(request) == [KeyVerdict.WRITE, KeyVerdict.FULL]


def test_a_dropped_chunk_stays_whole_for_its_readers() -> None:
    """Dropping makes it invisible at once; its memory is given out again after the last reader let go."""
    on = chunk_store(frames=1)
    asker = Asker(on)
    asker.put(1)
    reading = asker.load(1)
    assert on.drop(keys(1)) == 1
    assert on.lookup(keys(1)) == (0, 0)
    assert asker.put(2) == [KeyVerdict.FULL]
    assert asker.put(1) == [KeyVerdict.BUSY]
    on.release(reading, [0])
    assert asker.put(1) == [KeyVerdict.WRITE]


@pytest.mark.parametrize("store", [True, False])
def test_another_length_under_the_same_key_is_no_hit(store: bool) -> None:
    """A key that means something else to somebody is refused, not served."""
    on = chunk_store()
    asker = Asker(on)
    asker.put(1)
    request = asker.store(1, nbytes=8) if store else asker.load(1, nbytes=8)
    assert asker.told(request) == [KeyVerdict.MISMATCH]


def test_damage_is_believed_only_if_it_is_there() -> None:
    """A chunk that does not have its checksum is dropped; a reader that is wrong about it drops nothing."""
    on = chunk_store()
    asker = Asker(on)
    request = asker.store(1, 2)
    on.publish(request, [(0, 666), (1, 1)])
    reading = asker.load(1, 2)
    assert on.damaged(reading, 0)
    assert not on.damaged(reading, 1)
    assert on.lookup(keys(1)) == (0, 0)
    assert on.lookup(keys(2)) == (1, 1)


def test_a_client_holds_no_more_than_it_may() -> None:
    """Beyond client_bytes it is told to release first; after that it may."""
    on = chunk_store(frames=512, client_bytes=1 << 20)
    asker = Asker(on)
    asker.put(1, 2, nbytes=1 << 19)
    reading = asker.load(1, 2, nbytes=1 << 19)
    assert asker.told(reading) == [KeyVerdict.READ, KeyVerdict.READ]
    assert asker.put(3) == [KeyVerdict.BUSY]
    on.cancel(reading)
    assert asker.session.held_bytes == 0
    assert asker.put(3) == [KeyVerdict.WRITE]


def test_pins() -> None:
    """Hard pins stay, soft ones go last, and a pin that runs out is none."""
    on = chunk_store(frames=4)
    asker = Asker(on)
    asker.put(1, 2, 3, 4)
    assert on.pin(keys(1), HARD, until=10.0) == 1
    assert on.pin(keys(2), SOFT, until=None) == 1
    assert on.pin(keys(9), HARD, until=None) == 0  # not there
    asker.put(5, 6)
    assert [on.lookup(keys(n))[0] for n in (1, 2, 3, 4)] == [1, 1, 0, 0]
    reading = asker.load(5, 6)
    assert asker.put(7) == [KeyVerdict.WRITE]
    assert on.lookup(keys(2)) == (0, 0)
    on.cancel(reading)
    on.budget.tick(10.0)
    asker.put(8, 9, 10, 11)
    assert on.lookup(keys(1)) == (0, 0)


@pytest.mark.parametrize(("until", "stays"), [(None, True), (60.0, True), (20.0, False)])
def test_the_last_word_about_a_pin_counts(until: float | None, stays: bool) -> None:
    """A pin that is renewed, for longer or for good, does not run out with the first one."""
    on = chunk_store()
    Asker(on).put(1)
    on.pin(keys(1), HARD, until=10.0)
    on.pin(keys(1), HARD, until=until)
    on.budget.tick(30.0)
    assert bool(on.budget.hard_frames) == stays


def test_hard_pins_can_not_take_all_memory() -> None:
    """Half of the memory stays for stores."""
    on = chunk_store(frames=4)
    Asker(on).put(1, 2, 3, 4)
    assert on.pin(keys(1, 2, 3, 4), HARD, until=None) == 2
    assert on.pin(keys(1, 2), NO_PIN, until=None) == 2
    assert on.budget.hard_frames == 0


def test_a_tenant_never_exceeds_its_quota_and_recycles_its_own() -> None:
    """One tenant's flood costs that tenant alone."""
    on = chunk_store(frames=8, quotas={"a": 2 * FRAME})
    flood, other = Asker(on, on.budget.group_of("a")), Asker(on, on.budget.group_of("b"))
    other.put(1, 2)
    for number in range(10, 30):
        assert flood.put(number) == [KeyVerdict.WRITE]
    assert on.lookup(keys(1, 2)) == (2, 2)
    assert on.budget.groups[1].used == 2
    assert on.lookup(keys(28, 29)) == (2, 2)
    assert flood.put(99, nbytes=3 * FRAME) == [KeyVerdict.FULL]
    other.put(*range(40, 48))
    assert on.budget.groups[1].used <= 2


def test_what_a_scan_finds_is_its_tenants_again() -> None:
    """After a restart a tenant's chunks are read from its own place and count to its quota."""
    tier = TierState(MemoryTier(), 2, 8 * FRAME, "lru")
    on = chunk_store(8, [tier], quotas={"a": 2 * FRAME})
    for number, tenant in ((1, "a"), (2, "a"), (3, "a"), (4, "")):
        assert on.adopt(tier, Stored(key(number), tenant, FRAME, FRAME))
    asker = Asker(on)
    asker.load(1, 2, 4)
    read = {job.key: job.tenant for job in on.jobs if isinstance(job, Promote)}
    assert read == {key(1): "a", key(2): "a", key(4): ""}
    assert on.budget.groups[1].used == 2


def test_admission_twice_stores_what_comes_again() -> None:
    """A chunk that is stored once and never again takes no memory."""
    on = chunk_store(admission="twice")
    asker = Asker(on)
    assert asker.put(1) == [KeyVerdict.LATER]
    assert asker.put(1) == [KeyVerdict.WRITE]
    assert asker.put(1) == [KeyVerdict.HAVE]


def test_a_full_index_makes_room_by_forgetting() -> None:
    """The number of chunks has a limit like their bytes, and reaching it stops nothing."""
    on = chunk_store(frames=64, max_chunks=16)
    asker = Asker(on)
    assert asker.put(*range(40)) == [KeyVerdict.WRITE] * 16 + [KeyVerdict.FULL] * 24  # all of them being written
    assert asker.put(*range(16, 24)) == [KeyVerdict.WRITE] * 8
    assert len(on.index) == 16


def test_a_tier_that_is_down_is_no_hit_and_keeps_what_it_has() -> None:
    """While it can't be reached its chunks don't count as there; afterwards they do again."""
    on, tier = with_tier(frames=1)
    asker = Asker(on)
    for number in (1, 2):
        asker.put(number)
        written(on)
    reading = asker.load(1)
    job = on.jobs.popleft()
    assert isinstance(job, Promote)
    on.went_down(tier)
    on.promoted(job, None)
    assert asker.told(reading) == [KeyVerdict.MISS]
    assert on.lookup(keys(1)) == (0, 0)
    assert asker.told(asker.load(1)) == [KeyVerdict.MISS]
    tier.up = True
    assert on.lookup(keys(1)) == (1, 0)
    assert not on.jobs


def with_tier(limit: int = 8 * FRAME, frames: int = 4) -> tuple[ChunkStore, TierState]:
    made = PoolSettings.parse({"memory_bytes": 1 << 20, "frame_bytes": FRAME, "max_chunks": 64})
    tier = TierState(MemoryTier(), 2, limit, "lru")
    return ChunkStore(made, frames, lambda _frames, _nbytes, checksum: checksum != 666, [tier]), tier


def written(on: ChunkStore) -> None:
    """All write-backs that wait succeed."""
    while on.jobs:
        job = on.jobs.popleft()
        if isinstance(job, WriteBack):
            on.written_back(job, job.nbytes)


def test_a_chunk_goes_down_and_comes_up_again() -> None:
    """Stored chunks are written back, and one that memory lost is promoted for the first who loads it, and all others
    who wait."""
    on, _ = with_tier(frames=1)
    asker, other = Asker(on), Asker(on)
    asker.put(1)
    assert asker.put(2) == [KeyVerdict.FULL]  # it is referenced while it is written
    written(on)
    asker.put(2)
    written(on)
    assert on.lookup(keys(1)) == (1, 0)
    one, two = asker.load(1), other.load(1)
    [job] = on.jobs
    assert isinstance(job, Promote)
    assert on.lookup(keys(1, 2)) == (2, 0)
    on.promoted(job, 7)
    assert asker.told(one) == other.told(two) == [KeyVerdict.READ]


def test_chunks_that_left_memory_together_can_be_dropped_and_stored_again() -> None:
    """One store that evicts several chunks, which a lower tier still has: once they are dropped there, too, nothing of
    them is left in the index."""
    on, _ = with_tier(frames=4)
    asker = Asker(on)
    asker.put(1, 2, 3)
    written(on)
    asker.put(4, 5, 6)
    written(on)
    assert on.lookup(keys(1, 2)) == (2, 0), "evicted together"
    assert on.drop(keys(1, 2)) == 2
    written(on)
    assert on.lookup(keys(1)) == (0, 0)
    assert asker.put(1, 2) == [KeyVerdict.WRITE, KeyVerdict.WRITE]


def test_a_chunk_that_can_not_be_read_below_is_a_miss_and_can_be_stored() -> None:
    """A failed promotion drops the chunk there, and a storer who waits takes over."""
    on, _ = with_tier(frames=1)
    asker = Asker(on)
    for number in (1, 2):
        asker.put(number)
        written(on)
    reading, storing = asker.load(1), PoolRequest(asker.session, 99, True)
    [job] = on.jobs
    on.jobs.clear()
    assert isinstance(job, Promote)
    on.drop(keys(1))  # so that a store of it waits for the same frames
    on.store(storing, keys(1), [FRAME])
    on.promoted(job, None)
    assert asker.told(storing) == [KeyVerdict.WRITE]
    on.publish(storing, [(0, 1)])
    assert asker.told(reading) == [KeyVerdict.READ]


def test_a_chunk_dropped_on_its_way_down_stays_dropped() -> None:
    """What was forgotten while it was written to a tier is removed there and does not come back."""
    on, tier = with_tier()
    Asker(on).put(1)
    job = on.jobs.popleft()
    assert isinstance(job, WriteBack)
    on.drop(keys(1))
    on.written_back(job, FRAME)
    assert on.lookup(keys(1)) == (0, 0)
    assert [type(each) for each in on.jobs] == [Delete]
    assert (tier.used, len(on.index), on.budget.frames.free) == (0, 0, 4)


def test_a_chunk_dropped_on_its_way_up_stays_dropped() -> None:
    """Its readers get a miss, and it does not become visible."""
    on, _ = with_tier(frames=1)
    asker = Asker(on)
    for number in (1, 2):
        asker.put(number)
        written(on)
    reading = asker.load(1)
    job = on.jobs.popleft()
    assert isinstance(job, Promote)
    on.drop(keys(1))
    on.promoted(job, 7)
    assert asker.told(reading) == [KeyVerdict.MISS]
    assert on.lookup(keys(1)) == (0, 0)
    assert on.budget.frames.free == 1


def test_a_tier_never_exceeds_its_limit_writes_under_way_included() -> None:
    """Room is made before a write begins, not after it."""
    on, tier = with_tier(limit=3 * FRAME, frames=8)
    asker = Asker(on)
    for number in range(12):
        asker.put(number)
        if number > 5:
            written(on)
        assert tier.used <= 3 * FRAME
    assert on.counters["below_write_skipped"] == 4  # while its room was all reserved
    assert on.lookup(keys(10, 11)) == (2, 2)


def test_a_damaged_chunk_is_not_promoted_over_its_readers() -> None:
    """Its memory copy is dropped while someone reads it; until that ends, the copy below has to wait."""
    on, _ = with_tier()
    asker = Asker(on)
    request = asker.store(1)
    on.publish(request, [(0, 666)])
    written(on)
    reading = asker.load(1)
    assert on.damaged(reading, 0)
    again = asker.load(1)
    assert asker.told(again) == [KeyVerdict.FULL]
    on.cancel(reading)
    again = asker.load(1)
    job = on.jobs.popleft()
    assert isinstance(job, Promote)
    on.promoted(job, 5)
    assert [(part.verdict, part.checksum) for part in asker.parts(again)] == [(KeyVerdict.READ, 5)]
