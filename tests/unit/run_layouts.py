"""Streams laid out in memory in every way that a GPU kernel must cope with: strategies, bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from pdtransport.kernels.runs import Runs

Bytes = npt.NDArray[np.uint8]
UNITS = (8, 16, 24, 64, 256, 1024, 1536, 4096, 16384)  # what lengths of runs are multiples of
GUARD = 256


@dataclass(frozen=True)
class Layout:
    """Runs as offsets into a buffer for each side, and the number of blocks that the stream divides into."""

    src: Runs
    dst: Runs
    src_bytes: int
    dst_bytes: int
    blocks: int

    @property
    def total(self) -> int:
        return int(self.src[:, 1].sum())


def placed(runs: Runs, base: int) -> Runs:
    """Runs of offsets as runs of addresses."""
    return runs + np.array([base, 0], dtype=np.uint64)


def stream(buffer: Bytes, runs: Runs) -> bytes:
    return b"".join(buffer[at : at + nbytes].tobytes() for at, nbytes in runs.tolist())


def outside(buffer: Bytes, runs: Runs) -> Bytes:
    """The bytes that no run covers."""
    kept = np.ones(buffer.size, dtype=bool)
    for at, nbytes in runs.tolist():
        kept[at : at + nbytes] = False
    return buffer[kept]


def laid_out(lengths: list[int], order: list[int], gap: int, first: int) -> tuple[Runs, int]:
    """Runs of ``lengths``, in memory in ``order`` with ``gap`` bytes between, from ``first``; and the buffer's size."""
    runs, at = np.zeros((len(lengths), 2), dtype=np.uint64), first
    for index in order:
        runs[index] = at, lengths[index]
        at += lengths[index] + gap
    return runs, at + GUARD


@st.composite
def layouts(draw: st.DrawFn, most: int = 96 << 10) -> Layout:
    """Both sides cut differently, shuffled, aligned to 8 or more bytes; up to about ``most`` bytes."""
    unit, blocks = draw(st.sampled_from(UNITS)), draw(st.integers(1, 5))
    units = draw(st.integers(1, max(1, min(400, most // unit // blocks)))) * blocks
    total = unit * units
    sides = []
    for _ in range(2):
        kind = draw(st.sampled_from(["pages", "cuts", "whole"]))
        if kind == "pages":
            fits = [n for n in range(1, min(units, 64) + 1) if units % n == 0]
            pages = draw(st.sampled_from(fits))
            lengths = [total // pages] * pages
        else:
            points = draw(st.lists(st.integers(0, units), max_size=20)) if kind == "cuts" else []
            lengths = [b - a for a, b in pairwise(sorted([0, total, *(unit * point for point in points)]))]
        order = draw(st.permutations(range(len(lengths))))
        grain = draw(st.sampled_from([8, 16]))
        gap, first = grain * draw(st.integers(0, 3)), GUARD + grain * draw(st.integers(0, 5))
        sides.append(laid_out(lengths, list(order), gap, first))
    (src, src_bytes), (dst, dst_bytes) = sides
    return Layout(src, dst, src_bytes, dst_bytes, blocks)
