"""Memory addresses of a store's or load's chunks, and the pool's answers about them, as flat arrays.

Arrays keep up with a GPU: a gigabyte is about 500 chunks, and a GPU copies each of them in the time of a few dozen
Python calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdtransport.errors import PoolUnavailable
from pdtransport.kernels.runs import MAX_RUN_BYTES, MAX_RUNS, Runs, as_runs
from pdtransport.pool import messages
from pdtransport.pool.core.requests import Grants, KeyAnswer, KeyVerdict
from pdtransport.pool.settings import MAX_CHUNK_BYTES

Numbers = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint8]  # verdicts

_VERDICTS = tuple(KeyVerdict)


class Chunks:
    """The caller's memory: the bytes of each chunk in ``sizes``, and the runs of all chunks in one array.

    Raises:
        ValueError: malformed runs, or a chunk of a length that the pool does not accept.
    """

    def __init__(self, runs: Sequence[Runs]) -> None:
        self._runs = _joined(runs)
        lengths, count = self._runs[:, 1], len(runs)
        if len(lengths) and int(lengths.max()) > MAX_RUN_BYTES:
            raise ValueError(f"a run is longer than {MAX_RUN_BYTES} bytes")
        self._rows = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, runs), dtype=np.int64, count=count), out=self._rows[1:])
        self.sizes: Numbers = np.zeros(count, dtype=np.int64)
        some = np.diff(self._rows) > 0
        self.sizes[some] = np.add.reduceat(lengths, self._rows[:-1][some]) if some.any() else 0
        bad = (self.sizes % 8 != 0) | (self.sizes <= 0) | (self.sizes > MAX_CHUNK_BYTES)
        if bad.any():
            nbytes = int(self.sizes[bad.argmax()])
            raise ValueError(f"a chunk of {nbytes} bytes: it must have 8 to {MAX_CHUNK_BYTES} bytes, a multiple of 8")

    def __len__(self) -> int:
        return len(self.sizes)

    def runs(self, chunks: Numbers) -> Runs:
        """The runs of these chunks, concatenated."""
        first, last = int(chunks[0]), int(chunks[-1])
        if last - first == len(chunks) - 1 and (np.diff(chunks) == 1).all():
            return self._runs[self._rows[first] : self._rows[last + 1]]
        return np.concatenate([self._runs[self._rows[at] : self._rows[at + 1]] for at in chunks.tolist()])


def _joined(runs: Sequence[Runs]) -> Runs:
    """Concatenate all runs, shape (n, 2), uint64.

    Checks the concatenated array, and single arrays only if that fails: checking each would take longer than the copy.
    """
    if not runs:
        return np.empty((0, 2), dtype=np.uint64)
    with suppress(ValueError, TypeError):
        joined = np.concatenate(runs, dtype=np.uint64, casting="no")
        if joined.ndim == 2 and joined.shape[1] == 2 and len(joined) <= MAX_RUNS:
            return joined
    return np.concatenate([as_runs(each) for each in runs])


@dataclass(frozen=True)
class Granted:
    """Chunks of a request that may be copied, each with its place in the request, length, checksum and frames.

    ``checksums`` matter for a load only. ``frames`` holds the frame ids of all chunks, 4 bytes each; ``counts`` says
    how many belong to each chunk.
    """

    places: Numbers
    sizes: Numbers
    checksums: npt.NDArray[np.uint64]
    counts: Numbers
    frames: bytes

    def batches(self, most: int) -> Iterator[Granted]:
        """Split into batches, one for each call of the copy kernel.

        The chunks of a batch have one length, and together at most ``most`` bytes unless a single chunk is longer.
        """
        if not len(self.sizes):
            return
        if len(self.sizes) * int(self.sizes[0]) <= most and (self.sizes == self.sizes[0]).all():
            yield self
            return
        ends = np.cumsum(self.counts)
        changes = (np.flatnonzero(np.diff(self.sizes)) + 1).tolist()
        for low, high in zip([0, *changes], [*changes, len(self.sizes)], strict=True):
            step = max(1, most // int(self.sizes[low]))
            for first in range(low, high, step):
                last = min(first + step, high)
                frames = self.frames[4 * int(ends[first] - self.counts[first]) : 4 * int(ends[last - 1])]
                cut = slice(first, last)
                yield Granted(self.places[cut], self.sizes[cut], self.checksums[cut], self.counts[cut], frames)


@dataclass(frozen=True)
class Heard:
    """A decoded :class:`messages.KeyAnswers`: a verdict code for each of ``places``, and the granted chunks."""

    places: Numbers
    codes: Codes
    granted: Granted

    @classmethod
    def of(cls, answer: messages.KeyAnswers, sizes: Numbers, frame_bytes: int) -> Heard:
        """Decode an answer to a request whose chunks have these ``sizes``.

        Raises:
            PoolUnavailable: the answer's arrays contradict each other or the request; no part of it may be used.
        """
        try:
            places = np.frombuffer(answer.indices, dtype="<u4").astype(np.int64)
            checksums = np.frombuffer(answer.checksums, dtype="<u8").astype(np.uint64)
            codes = np.frombuffer(answer.verdicts, dtype=np.uint8)
            if not len(places) == len(codes) == len(checksums):
                raise ValueError(f"{len(places)} places, {len(codes)} verdicts, {len(checksums)} checksums")
            if len(codes) and int(codes.max()) >= len(_VERDICTS):
                raise ValueError(f"{int(codes.max())} is not a verdict")
            may = (codes == KeyVerdict.WRITE) | (codes == KeyVerdict.READ)
            nbytes = sizes[places[may]]
            if len(places) and int(places.max()) >= len(sizes):
                raise ValueError(f"chunk {int(places.max())} of {len(sizes)}")
            counts = -(-nbytes // frame_bytes)
            if 4 * int(counts.sum()) != len(answer.frames):
                raise ValueError(f"{len(answer.frames)} bytes of frames for {int(counts.sum())}")
        except (ValueError, IndexError) as error:
            raise PoolUnavailable(f"the pool's answer is malformed: {error}") from None
        return cls(places, codes, Granted(places[may], nbytes, checksums[may], counts, answer.frames))


def parts_of(answer: messages.KeyAnswers, sizes: Sequence[int], frame_bytes: int) -> Iterator[KeyAnswer]:
    """Decode an answer into one :class:`KeyAnswer` for each key.

    Raises:
        PoolUnavailable: as :meth:`Heard.of`.
    """
    heard = Heard.of(answer, np.array(sizes, dtype=np.int64), frame_bytes)
    checksums = np.frombuffer(answer.checksums, dtype="<u8").tolist()
    counts, at = iter(heard.granted.counts.tolist()), 0
    for place, code, checksum in zip(heard.places.tolist(), heard.codes.tolist(), checksums, strict=True):
        end = at
        if code in (KeyVerdict.WRITE, KeyVerdict.READ):
            end += 4 * next(counts)
        yield KeyAnswer(place, KeyVerdict(code), checksum, answer.frames[at:end])
        at = end


def answer_of(request: int, parts: Sequence[KeyAnswer]) -> messages.KeyAnswers:
    return messages.KeyAnswers(
        request=request,
        indices=np.array([part.place for part in parts], dtype="<u4").tobytes(),
        verdicts=bytes(part.verdict for part in parts),
        checksums=np.array([part.checksum for part in parts], dtype="<u8").tobytes(),
        frames=b"".join(part.frames for part in parts),
    )


def granted(request: int, grants: Grants) -> messages.KeyAnswers:
    count = len(grants.checksums)
    return messages.KeyAnswers(
        request=request,
        indices=np.arange(count, dtype="<u4").tobytes(),
        verdicts=bytes([grants.verdict]) * count,
        checksums=np.array(grants.checksums, dtype="<u8").tobytes(),
        frames=grants.frames,
    )


def verdicts_of(codes: Codes) -> tuple[KeyVerdict, ...]:
    return tuple(map(_VERDICTS.__getitem__, codes.tolist()))
