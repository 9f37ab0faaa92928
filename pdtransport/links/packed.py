"""Run lists on the wire, packed as arithmetic progressions.

KV pages are laid out in regular strides (layer after layer, token after token): 32 layers of a block take one
progression of 28 bytes instead of 32 addresses of 8.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pdtransport.kernels.runs import MAX_RUN_BYTES, MAX_RUNS, Runs

# `count` runs of `nbytes` bytes each; the first is at `address`, each next one `stride` bytes further.
_PROGRESSION = np.dtype([("address", "<u8"), ("stride", "<i8"), ("count", "<u4"), ("nbytes", "<u8")], align=False)


def pack(runs: Runs) -> bytes:
    """Pack ``runs``, shape (n, 2), as progressions."""
    if not len(runs):
        return b""
    regular = _regular(runs)
    if regular is not None:
        return regular.tobytes()
    starts = _starts(runs)
    ends = np.append(starts[1:], len(runs))
    packed = np.empty(len(starts), dtype=_PROGRESSION)
    packed["address"], packed["nbytes"] = runs[starts, 0], runs[starts, 1]
    packed["count"] = ends - starts
    second = np.minimum(starts + 1, ends - 1)
    packed["stride"] = (runs[second, 0] - runs[starts, 0]).view(np.int64)
    return packed.tobytes()


def unpack(packed: bytes, nbytes: int) -> Runs:
    """Unpack a run list that must cover ``nbytes`` bytes in all.

    Raises:
        ValueError: not a run list, or one of another length. Memory is allocated only after the length was checked.
    """
    if len(packed) % _PROGRESSION.itemsize:
        raise ValueError(f"{len(packed)} bytes are not a list of runs")
    items = np.frombuffer(packed, dtype=_PROGRESSION)
    counts, lengths = items["count"].astype(np.uint64), items["nbytes"].astype(np.uint64)
    total = int(counts.sum())  # no uint64 overflow: counts are below 2**32, the message is bounded
    if total > MAX_RUNS or (len(lengths) and int(lengths.max()) > MAX_RUN_BYTES):
        raise ValueError(f"{total} runs in one list")
    if int((counts * lengths).sum()) != nbytes:
        raise ValueError(f"a list of {int((counts * lengths).sum())} bytes, {nbytes} are expected")
    runs = np.empty((total, 2), dtype=np.uint64)
    if len(items) and bool((counts == counts[0]).all() and (lengths == lengths[0]).all()):
        strides = items["stride"].astype(np.int64).view(np.uint64)
        steps = strides[:, None] * np.arange(int(counts[0]), dtype=np.uint64)
        runs[:, 0] = (items["address"].astype(np.uint64)[:, None] + steps).reshape(-1)
        runs[:, 1] = lengths[0]
        return runs
    firsts = np.cumsum(counts) - counts
    place = np.arange(total, dtype=np.uint64) - np.repeat(firsts, counts.astype(np.int64))
    strides = items["stride"].astype(np.int64).view(np.uint64)
    runs[:, 0] = np.repeat(items["address"].astype(np.uint64), counts.astype(np.int64))
    runs[:, 0] += place * np.repeat(strides, counts.astype(np.int64))  # modulo 2**64: strides may be negative
    runs[:, 1] = np.repeat(lengths, counts.astype(np.int64))
    return runs


def _regular(runs: Runs) -> npt.NDArray[np.void] | None:
    """Fast path: progressions of runs that all have the same length, count and stride, as whole pages do; else None."""
    addresses = np.ascontiguousarray(runs[:, 0])
    steps = np.diff(addresses)
    if not len(steps) or not bool((runs[:, 1] == runs[0, 1]).all()):
        return None
    other = steps != steps[0]
    count = int(other.argmax()) + 1 if other.any() else len(runs)
    if count < 2 or len(runs) % count:
        return None
    table = addresses.reshape(-1, count)
    if not bool((table[:, 1:] - table[:, :-1] == steps[0]).all()):
        return None
    packed = np.empty(len(table), dtype=_PROGRESSION)
    packed["address"], packed["nbytes"] = table[:, 0], runs[0, 1]
    packed["count"], packed["stride"] = count, steps[:1].view(np.int64)[0]
    return packed


def _starts(runs: Runs) -> npt.NDArray[np.int64]:
    """Indices where a progression begins: greedy, so that each holds at least two runs wherever two fit."""
    steps = np.diff(runs[:, 0])
    breaks = np.zeros(len(steps), dtype=bool)  # between run i and run i + 1
    changed = steps[1:] != steps[:-1]
    # The step after a break is the stride of the new progression, so it can't be a break itself: of consecutive
    # changes, every other one is a break.
    place = np.arange(1, len(changed) + 1)
    since = place - np.maximum.accumulate(np.where(changed, 0, place)) if len(changed) else place
    breaks[1:] = changed & (since % 2 == 1)
    breaks |= np.diff(runs[:, 1]) != 0
    return np.concatenate(([0], np.flatnonzero(breaks) + 1)).astype(np.int64)
