"""Copiers move chunks between a client's memory and the pool's and return checksums of the copied bytes.

The CPU copies host memory; a GPU copies its own memory. GPU kernels access the pool's memory directly, once it is
registered (:meth:`Mapping.register`): gather and checksum are one launch, and so are scatter and checksum. They run on
their own streams after an event of the engine's, with few thread blocks, so that the model never waits for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

from pdtransport.errors import PoolUnavailable
from pdtransport.io.cuda_events import event_handle
from pdtransport.kernels import pages
from pdtransport.kernels.reference import Checksums
from pdtransport.kernels.runs import Runs, merge_runs
from pdtransport.kv.geometry import HOST
from pdtransport.pool.core.shared_memory import Mapping

if TYPE_CHECKING:
    from pdtransport.kernels.gpu import GpuPages, Launch

# Thread blocks of a store and of a load. These saturate the bus and leave the rest of the GPU to the model.
BLOCKS_OUT, BLOCKS_IN = 16, 64
HOST_THREADS = 2


class UnderWay(Protocol):
    """A copy in flight."""

    def done(self) -> bool:
        """Whether the copy has ended, with or without success. Does not block."""
        ...

    def wait(self) -> Checksums:
        """Wait for the end of the copy; returns the checksums of the copied chunks.

        Raises:
            PoolUnavailable: the copy failed; it writes nothing any more.
        """
        ...


class Copier(ABC):
    """Copies batches of chunks; used by one thread at a time.

    Attributes:
        depth: copies that may be in flight at once.
        batch_bytes: maximum bytes of one copy, unless a single chunk is longer.
        ahead: maximum number of unanswered requests to the pool.
        first_bytes: bytes of the first request; later ones are longer.
        window_bytes: maximum bytes of one request.
    """

    depth = 1
    batch_bytes = 32 << 20
    first_bytes = window_bytes = 64 << 20
    ahead = 3

    @abstractmethod
    def begin(
        self, ours: Runs, theirs: Runs, blocks: int, *, storing: bool, mapping: Mapping, after: Any | None
    ) -> UnderWay:
        """Start a copy.

        Args:
            ours: runs of the client's memory.
            theirs: runs of the pool's memory, in ``mapping``.
            blocks: number of chunks, all of one length; one checksum is computed for each.
            storing: copy ``ours`` to ``theirs``; else the other way.
            after: event to wait for before the client's memory is accessed.

        Raises:
            PoolUnavailable: the copy can't be made; the text says why.
        """

    def close(self) -> None:
        """Free resources. No copy may be in flight."""
        return


class _Done:
    def __init__(self, checksums: Checksums) -> None:
        self._checksums = checksums

    def done(self) -> bool:
        return True

    def wait(self) -> Checksums:
        return self._checksums


class HostCopier(Copier):
    """Copies host memory; the copy is done when :meth:`begin` returns.

    Long copies use two threads if a core is free for the second, since building tables and waiting for answers take a
    third as long as the copy and come on top of it.
    """

    batch_bytes = 64 << 20

    def begin(
        self, ours: Runs, theirs: Runs, blocks: int, *, storing: bool, mapping: Mapping, after: Any | None
    ) -> UnderWay:
        theirs = merge_runs(theirs)  # most frames are adjacent
        source, target = (ours, theirs) if storing else (theirs, ours)
        return _Done(pages.read_mapped(source, target, blocks, threads=HOST_THREADS))


class _Launched:
    def __init__(self, launch: Launch, error: type[Exception]) -> None:
        self._launch, self._error = launch, error

    def done(self) -> bool:
        try:
            return self._launch.done()
        except self._error:
            return True  # it has ended; wait() raises the error

    def wait(self) -> Checksums:
        try:
            return self._launch.wait()
        except self._error as error:
            raise PoolUnavailable(f"the copy failed: {error}") from None


class GpuCopier(Copier):
    """Copies memory of GPU ``device``. The kernels for a direction are built at the first copy that way."""

    depth = 3  # enough to hide the latency of launches and answers
    # A batch takes 2.5 ms to copy. On a busy host it costs half a millisecond of this thread and of the pool's.
    batch_bytes = window_bytes = 128 << 20
    first_bytes = 64 << 20  # its copy lasts until the second request is answered
    ahead = 16  # a request's round trip takes half as long as its copy, on a busy host as long as its copy

    def __init__(self, device: int) -> None:
        self._device = device
        self._kernels: dict[bool, GpuPages] = {}  # by storing

    def begin(
        self, ours: Runs, theirs: Runs, blocks: int, *, storing: bool, mapping: Mapping, after: Any | None
    ) -> UnderWay:
        from pdtransport.kernels import gpu

        if not mapping.registered:
            raise PoolUnavailable(mapping.problem or "its memory is not registered with the GPU yet")
        source, target = (ours, theirs) if storing else (theirs, ours)
        try:
            if storing not in self._kernels:
                self._kernels[storing] = gpu.GpuPages(self._device, blocks=BLOCKS_OUT if storing else BLOCKS_IN)
            kernels = self._kernels[storing]
            if after is not None:
                kernels.after(event_handle(after))
            return _Launched(kernels.copy_runs(source, target, blocks), gpu.GpuError)
        except (ValueError, gpu.GpuError) as error:
            raise PoolUnavailable(f"the copy can't be made: {error}") from None

    def close(self) -> None:
        for kernels in self._kernels.values():
            kernels.close()
        self._kernels.clear()


def make_copier(device: int) -> Copier:
    """Make a copier for the memory of GPU ``device`` (-1: host memory)."""
    return HostCopier() if device == HOST else GpuCopier(device)
