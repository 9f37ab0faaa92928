"""How the ucx link moves pages into and out of staging slots, and which buffer it gives UCX to send.

* Host memory: a copy is done when the call returns.
* GPU memory: a copy is a kernel. Slots are in GPU memory if UCX can send that (*direct*), else in pinned host memory,
  which the kernels reach over the bus (*staged*).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pdtransport.errors import LinkError
from pdtransport.kernels import pages
from pdtransport.kernels.reference import Checksums, memory
from pdtransport.kernels.runs import Runs
from pdtransport.links.memory import SlotRing
from pdtransport.links.ucx.binding import Bytes
from pdtransport.links.ucx.gpu import Gpu, KernelLaunch
from pdtransport.settings import LinkSettings


class Copy(Protocol):
    """A copy in flight. Once it is done, in success or failure, it writes nothing any more."""

    def done(self) -> bool: ...

    def error(self) -> str | None:
        """Why the copy failed, or None; only valid once done."""
        ...


class PageMemory(Protocol):
    """One kind of memory, and the two staging rings for its pages."""

    sending: SlotRing
    receiving: SlotRing

    def in_place(self, runs: Runs, blocks: int) -> tuple[Bytes, Checksums] | None:
        """One run of pages as a buffer for UCX to send without staging, and its checksums; None if UCX can't.

        Raises:
            ValueError: ``blocks`` do not fit the stream.
        """
        ...

    def gather(self, runs: Runs, slot: int, nbytes: int, blocks: int) -> Checksums:
        """Copy pages into a sending slot and wait until it is done.

        Raises:
            ValueError: ``blocks`` do not fit the stream; nothing was begun.
            LinkError: the GPU failed.
        """
        ...

    def place(self, slot: int, nbytes: int, runs: Runs, blocks: int, checksums: bytes) -> Copy:
        """Begin to copy a receiving slot into pages and to verify it (empty ``checksums``: not verified)."""
        ...


@dataclass(frozen=True)
class EndedCopy:
    """A copy that is done."""

    problem: str | None

    def done(self) -> bool:
        return True

    def error(self) -> str | None:
        return self.problem


class HostMemory:
    """Pages in host memory."""

    def __init__(self, settings: LinkSettings) -> None:
        self.sending = SlotRing(settings.staging_bytes, settings.batch_bytes)
        self.receiving = SlotRing(settings.staging_bytes, settings.batch_bytes)

    def in_place(self, runs: Runs, blocks: int) -> tuple[Bytes, Checksums] | None:
        return memory(int(runs[0, 0]), int(runs[0, 1])), pages.checksum(runs, blocks)

    def gather(self, runs: Runs, slot: int, nbytes: int, blocks: int) -> Checksums:
        return pages.copy_runs(runs, self.sending.run(slot, nbytes), blocks)

    def place(self, slot: int, nbytes: int, runs: Runs, blocks: int, checksums: bytes) -> Copy:
        """Verifies first, while the slot is in the CPU cache: damaged bytes never reach the pages."""
        source = self.receiving.run(slot, nbytes)
        try:
            problem = _mismatch(pages.checksum(source, blocks), checksums) if checksums else None
            if problem is None:
                pages.copy_runs(source, runs)
        except ValueError as error:
            problem = f"link: {error}"
        return EndedCopy(problem)


class GpuMemory:
    """Pages in GPU memory.

    Args:
        gpu: the GPU that holds the pages.
        settings: ``gpu_staging_bytes`` and ``gpu_slot_bytes`` size the rings.
        direct: slots are in GPU memory too, else in pinned host memory.
    """

    def __init__(self, gpu: Gpu, settings: LinkSettings, direct: bool) -> None:
        self._gpu, self._direct = gpu, direct
        allocate = gpu.device_block if direct else gpu.pinned_block
        self.sending = SlotRing(settings.gpu_staging_bytes, settings.gpu_slot_bytes, allocate)
        self.receiving = SlotRing(settings.gpu_staging_bytes, settings.gpu_slot_bytes, allocate)

    def in_place(self, runs: Runs, blocks: int) -> tuple[Bytes, Checksums] | None:
        # UCX would have to register the engine's own allocation, which may be of a kind that it can't register.
        return None

    def gather(self, runs: Runs, slot: int, nbytes: int, blocks: int) -> Checksums:
        """Waits for the copy of one batch: tens of microseconds within the GPU, 0.3 ms for 16 MiB over the bus.

        Sending takes at least as long, and nothing can be sent to the peer earlier: the announcement carries the
        checksums.
        """
        return self._gpu.gather(runs, self.sending.run(slot, nbytes), blocks, self._direct)

    def place(self, slot: int, nbytes: int, runs: Runs, blocks: int, checksums: bytes) -> Copy:
        """Copies and verifies in one pass.

        Damaged bytes may reach pages granted to this batch; they are reported, and the pages are not read until the
        batch arrived undamaged.
        """
        try:
            source = self.receiving.run(slot, nbytes)
            launch = self._gpu.place(source, runs, blocks if checksums else 0, self._direct)
        except (ValueError, LinkError) as error:
            return EndedCopy(f"link: {error}")
        return _Placing(launch, checksums)


class _Placing:
    """A kernel that places a batch."""

    def __init__(self, launch: KernelLaunch, checksums: bytes) -> None:
        self._launch, self._checksums = launch, checksums
        self._failed = ""

    def done(self) -> bool:
        try:
            return self._launch.done()
        except Exception as error:  # noqa: BLE001 - CUDA's; a kernel that failed writes nothing any more
            self._failed = f"link: {error}"
            return True

    def error(self) -> str | None:
        if self._failed:
            return self._failed
        return _mismatch(self._launch.wait(), self._checksums) if self._checksums else None


def _mismatch(found: Checksums, expected: bytes) -> str | None:
    wrong = np.flatnonzero(found != np.frombuffer(expected, dtype="<u8"))
    if not len(wrong):
        return None
    return f"damaged: {len(wrong)} of {len(found)} blocks differ from their checksums, first {wrong[0]}"
