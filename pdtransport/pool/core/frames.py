"""The frame allocator: the pool's memory is divided into frames of one size.

A chunk takes as many frames as it needs, anywhere in memory. Any free frame serves any chunk, whatever its size, so
there is no fragmentation, and a chunk wastes less than one frame. Copies take lists of runs, so a chunk's frames need
not be adjacent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pdtransport.kernels.runs import Runs

FrameIds = npt.NDArray[np.uint32]


class Frames:
    """A stack of free frames; at first all ``count`` are free."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._stack = np.arange(count, dtype=np.uint32)[::-1].copy()  # lowest id on top: chunks get adjacent frames
        self.free = count

    def take(self, wanted: int) -> bytes | None:
        """Allocate ``wanted`` frames; returns their ids, uint32 each, or None if fewer are free."""
        if wanted > self.free:
            return None
        self.free -= wanted
        return self._stack[self.free : self.free + wanted][::-1].tobytes()

    def give_back(self, frames: bytes) -> None:
        """Free frames that have no reader and no writer.

        Raises:
            ValueError: more frames would be free than exist.
        """
        ids = np.frombuffer(frames, dtype=np.uint32)
        if self.free + len(ids) > self.count:
            raise ValueError("more frames were freed than exist")
        self._stack[self.free : self.free + len(ids)] = ids[::-1]
        self.free += len(ids)


def frames_for(nbytes: int, frame_bytes: int) -> int:
    """Number of frames that a chunk of ``nbytes`` takes."""
    return -(-nbytes // frame_bytes)


def frame_runs(base: int, frames: bytes, frame_bytes: int, sizes: Sequence[int] | npt.NDArray[np.int64]) -> Runs:
    """The runs of memory that hold these chunks: (n, 2) uint64 of address and bytes, one row a frame.

    Args:
        base: address of frame 0.
        frames: uint32 ids of all chunks' frames, chunk after chunk.
        sizes: bytes of each chunk.

    Raises:
        ValueError: the number of frames does not match the sizes.
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
