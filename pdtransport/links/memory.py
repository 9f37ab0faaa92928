"""Memory that links may touch: regions registered by the engine, and the links' own rings of staging slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pdtransport.errors import LinkError
from pdtransport.kernels import pages
from pdtransport.kernels.runs import Runs, run
from pdtransport.kv.geometry import HOST, Region

PAGE = 4096


class Regions:
    """The memory that links of this process may read and write.

    Regions may be added and removed, and may overlap. All are on one device.

    Raises:
        ValueError: regions on several devices.
    """

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        self._regions = list(regions)
        self._rebuild()

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions)

    @property
    def device(self) -> int:
        """Number of the GPU that holds the regions; -1: host memory."""
        return self._regions[0].device if self._regions else HOST

    def __len__(self) -> int:
        return len(self._regions)

    def add(self, region: Region) -> None:
        self._regions.append(region)
        self._rebuild()

    def remove(self, region: Region) -> None:
        """Forget ``region`` (the object that was added); unknown ones are ignored."""
        self._regions = [known for known in self._regions if known is not region]
        self._rebuild()

    def check(self, runs: Runs) -> None:
        """Check that every run is within registered memory.

        Raises:
            LinkError: a run is not.
        """
        if pages.translate(runs, self._spans) is None:
            outside = next(run for run in runs if pages.translate(run.reshape(1, 2), self._spans) is None)
            raise LinkError(f"{outside[1]} bytes at {int(outside[0]):#x} are outside the registered memory")

    def _rebuild(self) -> None:
        """Compute sorted, non-overlapping spans.

        Without regions there is one empty span, so that lookups need no special case.
        """
        if any(region.device != self.device for region in self._regions):
            raise ValueError(f"regions on several devices: {sorted({region.device for region in self._regions})}")
        spans: list[list[int]] = []
        for low, high in sorted((r.address, r.address + r.nbytes) for r in self._regions):
            if spans and low <= spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], high)
            else:
                spans.append([low, high])
        self._spans = np.array([[low, high, 0] for low, high in spans] or [[0, 0, 0]], dtype=np.uint64)


class Block(Protocol):
    """Contiguous memory that is valid as long as the object lives."""

    address: int

    def part(self, offset: int, nbytes: int) -> Any:
        """A part of the block as UCX accepts it: an array, or an object with ``__cuda_array_interface__``."""
        ...


class HostBlock:
    """Page-aligned host memory."""

    def __init__(self, nbytes: int) -> None:
        raw = np.empty(nbytes + PAGE, dtype=np.uint8)
        skip = -raw.ctypes.data % PAGE
        self._memory: npt.NDArray[np.uint8] = raw[skip : skip + nbytes]
        self.address: int = self._memory.ctypes.data

    def part(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        return self._memory[offset : offset + nbytes]


class SlotRing:
    """A fixed number of equally long staging slots in one block of memory, allocated at first use.

    Args:
        nbytes: wanted size of the ring; it has at least two slots.
        slot_bytes: size of a slot.
        allocate: makes the block, given its length in bytes.
    """

    MIN_SLOTS = 2

    def __init__(self, nbytes: int, slot_bytes: int, allocate: Callable[[int], Block] = HostBlock) -> None:
        self.slot_bytes = -(-slot_bytes // PAGE) * PAGE
        self.count = max(self.MIN_SLOTS, nbytes // self.slot_bytes)
        self._allocate = allocate
        self._block: Block | None = None
        self._free = list(range(self.count))

    @property
    def block(self) -> Block:
        """The memory of all slots.

        Raises:
            LinkError: not enough (GPU or pinned) memory.
        """
        if self._block is None:
            self._block = self._allocate(self.count * self.slot_bytes)
        return self._block

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def take(self) -> int:
        """Take a free slot; returns its number.

        Raises:
            IndexError: no slot is free.
        """
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        if slot in self._free:
            raise ValueError(f"slot {slot} was given back twice")
        self._free.append(slot)

    def view(self, slot: int, nbytes: int) -> Any:
        """The first ``nbytes`` bytes of a slot, as :meth:`Block.part`."""
        if not 0 <= nbytes <= self.slot_bytes:
            raise ValueError(f"{nbytes} bytes do not fit a slot of {self.slot_bytes}")
        return self.block.part(slot * self.slot_bytes, nbytes)

    def run(self, slot: int, nbytes: int) -> Runs:
        """The first ``nbytes`` bytes of a slot as a run list."""
        return run(self.block.address + slot * self.slot_bytes, nbytes)
