"""What one client may hold of a pool, one chunk or many at a time, and what it believes of a load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from pdtransport.errors import SettingsError
from pdtransport.kernels import pages
from pdtransport.kernels.runs import run
from pdtransport.pool import messages
from pdtransport.pool.client.copiers import HostCopier
from pdtransport.pool.client.copying import Copying, Operation
from pdtransport.pool.core import batches
from pdtransport.pool.core.chunks import Chunks, answer_of
from pdtransport.pool.core.index import MAX_REFS, key_rows
from pdtransport.pool.core.locks import check_private
from pdtransport.pool.core.prefetched import FORGOTTEN_S, Hints
from pdtransport.pool.core.requests import KeyAnswer, KeyVerdict
from pdtransport.pool.core.store import ChunkStore
from pdtransport.pool.tiers.base import HEADER_BYTES, TierError
from pdtransport.pool.tiers.envelope import Opening, seal
from pdtransport.protocol.messages import WireError
from tests.unit.pool_rig import FRAME, Asker, chunk_store, key, keys

READ, WRITE, BUSY, MISS = KeyVerdict.READ, KeyVerdict.WRITE, KeyVerdict.BUSY, KeyVerdict.MISS
CHUNK = 1 << 18  # a client may hold four
SHARE = 4 * CHUNK


def pool(chunks: int = 16) -> ChunkStore:
    return chunk_store(chunks * CHUNK // FRAME, client_bytes=SHARE)


@pytest.mark.parametrize("more", [1, 2])
@pytest.mark.parametrize("held", [0, 2, 3, 4])
def test_a_writer_holds_no_more_than_its_share(held: int, more: int) -> None:
    """Backpressure: whoever publishes nothing can't take the pool's memory, one chunk at a time or several; others
    are served."""
    on = pool()
    asker, other = Asker(on), Asker(on)
    for number in range(held):
        assert asker.told(asker.store(number, nbytes=CHUNK)) == [WRITE]
    asked = range(10, 10 + more)
    verdicts = sorted(asker.told(asker.store(*asked, nbytes=CHUNK)))
    assert verdicts == sorted([WRITE] * min(more, 4 - held) + [BUSY] * max(0, more - (4 - held)))
    assert asker.session.held_bytes <= SHARE
    assert other.told(other.store(20, 21, nbytes=CHUNK)) == [WRITE] * 2


@pytest.mark.parametrize("more", [1, 2])
@pytest.mark.parametrize("held", [0, 2, 3, 4])
def test_a_reader_holds_no_more_than_its_share(held: int, more: int) -> None:
    """Whoever releases nothing can't keep the pool's memory from being given out again."""
    on = pool(32)
    writer, reader = Asker(on), Asker(on)
    for number in range(20):
        writer.put(number, nbytes=CHUNK)
    for number in range(held):
        assert reader.told(reader.load(number, nbytes=CHUNK)) == [READ]
    verdicts = sorted(reader.told(reader.load(*range(10, 10 + more), nbytes=CHUNK)))
    assert verdicts == sorted([READ] * min(more, 4 - held) + [BUSY] * max(0, more - (4 - held)))
    assert reader.session.held_bytes <= SHARE


def test_who_takes_a_write_over_stays_within_its_share() -> None:
    """The next in line goes on with an abandoned write only if it may hold that much more; else it is told to come
    again, and the chunk is gone."""
    on = pool()
    first, full, fit = Asker(on), Asker(on), Asker(on)
    begun = first.store(1, nbytes=CHUNK)
    waits = full.store(1, nbytes=CHUNK)
    full.store(2, 3, 4, 5, nbytes=CHUNK)
    late = fit.store(1, nbytes=CHUNK)
    on.cancel(begun)
    assert full.session.held_bytes == SHARE
    assert fit.told(late) == [WRITE]
    on.cancel(late)
    assert full.told(waits) == [BUSY]
    assert on.lookup(keys(1)) == (0, 0)


@pytest.mark.parametrize("numbers", [(1,), (1, 2), (1, 1), (2, 1, 1)])
def test_references_stop_at_the_most_that_are_counted(numbers: Sequence[int]) -> None:
    """One reader more than a chunk's counter holds is told to come again. Were it counted from zero, memory that is
    being read would be given out."""
    on = chunk_store(8)
    writer, reader = Asker(on), Asker(on)
    writer.put(1, 2)
    entry = on.index.entry(key(1))
    for left in (0, 1):
        on.index.refs[entry] = MAX_REFS - left
        request = reader.load(*numbers)
        told = {part.place: part.verdict for part in reader.parts(request)}
        ones = [told[place] for place, number in enumerate(numbers) if number == 1]
        assert ones == [READ] * left + [BUSY] * (len(ones) - left)
        assert all(told[place] is READ for place, number in enumerate(numbers) if number == 2)
        assert on.index.refs[entry] == MAX_REFS
        on.release(request, list(request.held))
        assert on.index.refs[entry] == MAX_REFS - left


@pytest.mark.parametrize("age", [FORGOTTEN_S - 1, FORGOTTEN_S])
def test_a_hint_that_nobody_follows_gives_its_share_back(age: float) -> None:
    """After FORGOTTEN_S the next hints have the room; before, they don't."""
    counters: Counter[str] = Counter()
    hints = Hints(100, counters)
    hints.began(1, 80, 5.0)
    hints.tick(5.0 + age)
    assert hints.fits(40) == (age >= FORGOTTEN_S)
    assert counters["hint_unused"] == (age >= FORGOTTEN_S)


def test_a_pools_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made it could read the pages that go into it, and put others there."""
    tmp_path.chmod(0o700)
    check_private(tmp_path)
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr("os.getuid", lambda: owner + 1)
    with pytest.raises(SettingsError, match=r"pool.dir: .* must be a directory of user"):
        check_private(tmp_path)
    monkeypatch.undo()
    for mode in (0o750, 0o705, 0o701):
        tmp_path.chmod(mode)
        with pytest.raises(SettingsError, match="mode 0700"):
            check_private(tmp_path)
    tmp_path.chmod(0o700)


def test_a_pool_of_another_version_is_not_understood() -> None:
    """Its messages may mean something else: refused by number, with what to do, before any field is read."""
    for version in (messages.POOL_VERSION - 1, messages.POOL_VERSION + 1, None, "2"):
        frame = msgpack.packb({"v": version, "kind": "bye"})
        with pytest.raises(WireError, match="run the same pdtransport on both"):
            messages.from_client(frame)
    assert isinstance(messages.from_client(messages.encode(messages.Bye())), messages.Bye)


def test_a_tier_that_gives_another_chunk_back_is_not_believed() -> None:
    """Two file names swapped, or a bucket that others write to: what was stored under one key is never taken for the
    content of another, though its own checksum is right."""
    content = bytearray(range(256)) * 16
    sealed = b"".join(seal(key(1), [memoryview(content)], 7, None))
    header, payload = sealed[:HEADER_BYTES], sealed[HEADER_BYTES:]
    assert payload == content
    room = bytearray(len(content))
    Opening(key(1), [memoryview(room)]).place(header)
    for other, parts in ((key(2), [memoryview(room)]), (key(1), [memoryview(room)[8:]])):
        with pytest.raises(TierError, match="is not that of chunk"):
            Opening(other, parts).place(header)
    damaged = bytearray(header)
    damaged[-40] ^= 1
    with pytest.raises(TierError, match="is damaged"):
        Opening(key(1), [memoryview(room)]).place(bytes(damaged))


class PoolMemory:
    """A session of a client: the pool's memory, which here is an array."""

    def __init__(self, frames: int) -> None:
        self.memory = np.zeros((frames, FRAME), dtype=np.uint8)
        self.mapping: Any = type("Mapped", (), {"address": self.memory.ctypes.data})
        self.frame_bytes = FRAME

    def enter(self) -> bool:
        return True

    def leave(self) -> None: ...


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_a_loaded_chunk_is_good_only_if_all_of_its_checksum_is(bit: int) -> None:
    """The damaged one is a miss, and the pool hears of it by its place; the others are used."""
    session: Any = PoolMemory(3)
    session.memory[:] = np.random.default_rng(1).integers(0, 256, session.memory.shape, dtype=np.uint8)
    ours = np.zeros((3, FRAME), dtype=np.uint8)
    told: list[Any] = []
    loading = Operation(
        storing=False,
        keys=[key(number) for number in range(3)],
        chunks=Chunks([run(ours[number].ctypes.data, FRAME) for number in range(3)]),
        window_bytes=lambda most: (most, most),
        number=lambda: 1,
        ask=lambda message, number: loading.heard.put((number, session, answer_of(number, parts))),
        tell=lambda _session, message: told.append(message),
        forget=lambda number, cancel: None,
    )
    sums = [int(pages.checksum(run(frame.ctypes.data, FRAME), 1)[0]) for frame in session.memory]
    sums[1] ^= 1 << bit
    parts = [KeyAnswer(place, READ, sums[place], place.to_bytes(4, "little")) for place in range(3)]
    copying = Copying(loading, HostCopier())
    copying.run()
    assert copying.error == ""
    assert copying.verdicts.tolist() == [READ, MISS, READ]
    assert [message.index for message in told if isinstance(message, messages.ChunkDamaged)] == [1]
    assert copying.damaged == 1
    kinds = [type(message) for message in told]
    released = kinds.index(messages.ReleaseChunks)
    assert kinds.index(messages.ChunkDamaged) < released, "the pool looks only at what the reader still holds"


def test_many_are_answered_together_up_to_the_bound_itself() -> None:
    """The fast way has the same bounds as the one by one, not narrower ones."""
    on = pool()
    writer, reader = Asker(on), Asker(on)
    assert writer.put(1, 2, 3, 4, nbytes=CHUNK) == [WRITE] * 4
    request = reader._request(False)
    entries = on.index.find(key_rows(keys(1, 2, 3, 4)))
    on.index.refs_column[entries] = MAX_REFS - 4
    assert batches.load(on, request, entries, [CHUNK] * 4)
    assert reader.session.held_bytes == SHARE
