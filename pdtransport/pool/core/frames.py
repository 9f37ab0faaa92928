"""Who may write where: the pool's memory as equal frames.

A chunk takes as many frames as it needs, anywhere. So any freed frame serves any chunk, however sizes change over
time: memory can't be lost to fragmentation, and a chunk wastes less than one frame. Copies go through lists of runs,
which do not care whether frames adjoin.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pdtransport.kernels.runs import Runs

FrameIds = npt.NDArray[np.uint32]


class Frames:
    """The free frames among ``count``; all are free at first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._stack = np.arange(count, dtype=np.uint32)[::-1].copy()  # lowest first: neighbours, where there are any
        self.free = count

    def take(self, wanted: int) -> bytes | None:
        """Ids of ``wanted`` frames, uint32 each; None if there are not so many."""
        if wanted > self.free:
            return None
        self.free -= wanted
        return self._stack[self.free : self.free + wanted][::-1].tobytes()

    def give_back(self, frames: bytes) -> None:
        """Frames that nobody reads or writes any more."""
        ids = np.frombuffer(frames, dtype=np.uint32)
        if self.free + len(ids) > self.count:
            raise ValueError("more frames came back than there are")
        self._stack[self.free : self.free + len(ids)] = ids[::-1]
        self.free += len(ids)


def frames_for(nbytes: int, frame_bytes: int) -> int:
    """Frames that a chunk of ``nbytes`` takes."""
    return -(-nbytes // frame_bytes)


def frame_runs(base: int, frames: bytes, frame_bytes: int, sizes: Sequence[int] | npt.NDArray[np.int64]) -> Runs:
    """The runs of chunks of ``sizes`` bytes that lie in ``frames`` (uint32 ids, chunk after chunk) at ``base``.

    Raises:
        ValueError: the frames are not as many as the sizes need.
    """
    ids, nbytes = np.frombuffer(frames, dtype=np.uint32), np.asarray(sizes, dtype=np.int64)
    ends = np.cumsum(-(-nbytes // frame_bytes))
    if (int(ends[-1]) if len(ends) else 0) != len(ids):
        raise ValueError(f"{len(ids)} frames for {len(nbytes)} chunks of {int(nbytes.sum())} bytes")
    runs = np.empty((len(ids), 2), dtype=np.uint64)
    runs[:, 0] = ids.astype(np.uint64) * np.uint64(frame_bytes) + np.uint64(base)
    runs[:, 1] = frame_bytes
    rest = nbytes % frame_bytes
    if rest.any():
        runs[ends[rest > 0] - 1, 1] = rest[rest > 0]
    return runs
