"""Run lists: a byte stream that is scattered in memory.

A list is an array of shape (n, 2), dtype uint64: ``[address, nbytes]`` of each run, in stream order.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

Runs = npt.NDArray[np.uint64]

MAX_RUN_BYTES = 1 << 40
MAX_RUNS = 1 << 22  # with MAX_RUN_BYTES: a stream's length fits 64 bits, whatever a peer claims


def as_runs(runs: npt.ArrayLike) -> Runs:
    """Validate ``runs`` and return them as a C-contiguous (n, 2) uint64 array.

    Raises:
        ValueError: another shape or dtype, more than ``MAX_RUNS`` runs, or a run longer than ``MAX_RUN_BYTES``.
    """
    array = np.asarray(runs)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype != np.uint64:
        raise ValueError(f"runs must be a (n, 2) uint64 array, not {array.shape} {array.dtype}")
    if len(array) > MAX_RUNS:
        raise ValueError(f"{len(array)} runs in one stream; at most {MAX_RUNS} are allowed")
    if len(array) and int(array[:, 1].max()) > MAX_RUN_BYTES:
        raise ValueError(f"a run is longer than {MAX_RUN_BYTES} bytes")
    return np.ascontiguousarray(array)


def run(address: int, nbytes: int) -> Runs:
    """A list of one run."""
    return np.array([[address, nbytes]], dtype=np.uint64)


def stream_bytes(runs: Runs) -> int:
    """Length of the stream in bytes."""
    return int(runs[:, 1].sum())


def merge_runs(runs: Runs) -> Runs:
    """The same stream with adjacent runs joined and empty runs dropped."""
    kept = runs[runs[:, 1] > 0] if len(runs) and not runs[:, 1].all() else runs
    if len(kept) < 2:
        return kept
    joins = kept[1:, 0] - kept[:-1, 0] == kept[:-1, 1]
    if not joins.any():
        return kept
    starts = np.flatnonzero(np.concatenate(([True], ~joins)))
    merged = np.empty((len(starts), 2), dtype=np.uint64)
    merged[:, 0] = kept[starts, 0]
    merged[:, 1] = np.add.reduceat(kept[:, 1], starts)
    return merged


def cut_runs(runs: Runs, bounds: list[int]) -> list[Runs]:
    """Cut the stream at ``bounds``; returns ``len(bounds) - 1`` lists.

    ``bounds`` are ascending stream offsets, the last at most the stream's length.
    """
    ends = np.cumsum(runs[:, 1], dtype=np.uint64)
    starts = ends - runs[:, 1]
    pieces = []
    for low, high in pairwise(bounds):
        first = int(np.searchsorted(ends, np.uint64(low), side="right"))
        last = int(np.searchsorted(starts, np.uint64(high), side="left"))
        piece = runs[first:last].copy()
        if len(piece):
            skip = np.uint64(low) - starts[first]
            piece[0, 0] += skip
            piece[0, 1] -= skip
            piece[-1, 1] -= ends[last - 1] - np.uint64(high) if ends[last - 1] > high else np.uint64(0)
        pieces.append(piece)
    return pieces


def layout_runs(
    pages: npt.ArrayLike,
    order: Literal["NHC", "HNC"],
    tokens: int,
    heads: int,
    row_bytes: int,
    *,
    first: int = 0,
    count: int | None = None,
) -> Runs:
    """Heads ``[first, first + count)`` of KV pages as one stream in the order page, head, token.

    The stream order is the same for both of vLLM's page layouts, so copying the runs of one layout into those of the
    other converts pages.

    Args:
        pages: address of each page, integers, shape (n,).
        order: order of a page's bytes: token, head, channels ("NHC"), or head, token, channels ("HNC").
        tokens: tokens per page.
        heads: all heads of a page.
        row_bytes: bytes of one head of one token.
        first: first head to include.
        count: number of heads; default: all from ``first`` on.

    Raises:
        ValueError: heads that the pages do not have, or an unknown order.
    """
    count = heads - first if count is None else count
    if first < 0 or count < 0 or first + count > heads:
        raise ValueError(f"heads {first} to {first + count} of pages with {heads}")
    bases = np.asarray(pages, dtype=np.uint64)
    if order == "HNC":
        inside, nbytes = np.array([first * tokens * row_bytes], dtype=np.uint64), count * tokens * row_bytes
    elif order == "NHC":
        head, token = np.meshgrid(np.arange(first, first + count), np.arange(tokens), indexing="ij")
        inside, nbytes = ((token * heads + head) * row_bytes).reshape(-1).astype(np.uint64), row_bytes
    else:
        raise ValueError(f"KV order {order!r}; NHC and HNC are known")
    addresses = (bases[:, None] + inside[None, :]).reshape(-1)
    return np.stack([addresses, np.full(addresses.size, nbytes, dtype=np.uint64)], axis=1)
