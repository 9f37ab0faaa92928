"""Runs and answers of a store or load, as arrays: what a wrong one can not do, and that nothing is mixed up."""

from __future__ import annotations

import numpy as np
import pytest

from pdtransport.errors import PoolUnavailable
from pdtransport.kernels.runs import Runs
from pdtransport.pool import messages
from pdtransport.pool.core.chunks import Chunks, Heard, parts_of, verdicts_of
from pdtransport.pool.core.requests import KeyVerdict

FRAME = 4096


def runs(*pairs: tuple[int, int]) -> Runs:
    return np.array(pairs, dtype=np.uint64).reshape(-1, 2)


def answer(
    places: list[int], verdicts: list[int], frames: list[int], checksums: list[int] | None = None
) -> messages.KeyAnswers:
    return messages.KeyAnswers(
        request=1,
        indices=np.array(places, dtype="<u4").tobytes(),
        verdicts=bytes(verdicts),
        checksums=np.array(checksums or [0] * len(places), dtype="<u8").tobytes(),
        frames=np.array(frames, dtype="<u4").tobytes(),
    )


def test_chunks_keep_their_runs_whatever_is_asked_of_them() -> None:
    """Neighbours, some of them, and in another order: each chunk's own runs, in its order."""
    each = [runs((100 * i + 8, 8 * (i + 1)), (100 * i + 64, 16)) for i in range(5)] + [runs((1, 40))]
    chunks = Chunks(each)
    assert chunks.sizes.tolist() == [24, 32, 40, 48, 56, 40]
    for picked in ([0, 1, 2], [4], [1, 3], [3, 2, 5], [0, 1, 2, 3, 4, 5]):
        expected = np.concatenate([each[i] for i in picked])
        assert np.array_equal(chunks.runs(np.array(picked)), expected)
    assert len(Chunks([])) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 2), dtype=np.int64),
        np.zeros((2, 2), dtype=np.uint32),
        np.zeros((2, 3), dtype=np.uint64),
        np.zeros(4, dtype=np.uint64),
        [(1, 2)],
        runs((8, (1 << 40) + 8)),
        runs((8, 12)),
        runs((8, (1 << 30) + 8)),
        runs(),
    ],
)
def test_runs_that_are_none_are_refused(wrong: Runs) -> None:
    """Alone and among others, before anything is asked for."""
    for each in ([wrong], [runs((8, 8)), wrong], [wrong, wrong]):
        with pytest.raises(ValueError, match=r"runs|a run|a chunk of"):
            Chunks(each)


def test_an_answer_is_taken_apart_as_it_was_meant() -> None:
    """Chunks of one length make a batch, as long as they are not too many bytes; each has its own frames."""
    sizes = np.array([FRAME, FRAME, FRAME + 8, 8, FRAME, FRAME], dtype=np.int64)
    verdicts = [KeyVerdict.READ, KeyVerdict.MISS, KeyVerdict.READ, KeyVerdict.READ, KeyVerdict.READ, KeyVerdict.READ]
    said = answer([0, 1, 2, 3, 4, 5], list(verdicts), [10, 20, 21, 30, 40, 50], [1, 2, 3, 4, 5, 6])
    heard = Heard.of(said, sizes, FRAME)
    assert verdicts_of(heard.codes) == tuple(verdicts)
    batches = [
        (each.places.tolist(), each.checksums.tolist(), np.frombuffer(each.frames, dtype="<u4").tolist())
        for each in heard.granted.batches(2 * FRAME)
    ]
    assert batches == [([0], [1], [10]), ([2], [3], [20, 21]), ([3], [4], [30]), ([4, 5], [5, 6], [40, 50])]
    assert [len(each.places) for each in heard.granted.batches(FRAME)] == [1, 1, 1, 1, 1]
    parts = list(parts_of(said, sizes.tolist(), FRAME))
    assert [(part.place, part.verdict, part.checksum, len(part.frames) // 4) for part in parts] == [
        (place, verdict, place + 1, frames)
        for place, verdict, frames in zip(range(6), verdicts, [1, 0, 2, 1, 1, 1], strict=True)
    ]
    assert list(Heard.of(answer([1], [KeyVerdict.MISS], []), sizes, FRAME).granted.batches(FRAME)) == []


@pytest.mark.parametrize(
    "said",
    [
        answer([0, 1], [KeyVerdict.READ], [1, 2]),  # fewer verdicts
        answer([0], [99], []),  # no verdict
        answer([7], [KeyVerdict.READ], [1]),  # a chunk that was not asked for
        answer([7], [KeyVerdict.MISS], []),
        answer([0], [KeyVerdict.READ], []),  # too few frames
        answer([0], [KeyVerdict.READ], [1, 2]),  # too many
        answer([0], [KeyVerdict.READ], [1], [1, 2]),  # more checksums
    ],
)
def test_an_answer_that_makes_no_sense_is_not_used(said: messages.KeyAnswers) -> None:
    """Whatever is wrong with it, it ends as an unavailable pool."""
    with pytest.raises(PoolUnavailable, match="is malformed"):
        Heard.of(said, np.array([FRAME, FRAME], dtype=np.int64), FRAME)
    with pytest.raises(PoolUnavailable, match="is malformed"):
        list(parts_of(said, [FRAME, FRAME], FRAME))
