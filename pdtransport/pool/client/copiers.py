"""What moves chunks between a client's memory and the pool's, and takes the checksums of what arrived: this processor,
or the GPU that holds the client's memory.

A GPU's kernels read and write the pool's memory themselves, once it is registered (:meth:`Mapping.register`): gather
and checksum are one launch, and so are scatter and checksum. They run on streams of their own with few blocks of
threads, behind an event of the engine's, so that the model never waits for them.
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

# The bus is full with so few blocks of threads; the model keeps the rest of the GPU.
BLOCKS_OUT, BLOCKS_IN = 16, 64
HOST_THREADS = 2


class UnderWay(Protocol):
    """A copy that has begun."""

    def done(self) -> bool:
        """Has it ended, well or not? Does not wait."""
        ...

    def wait(self) -> Checksums:
        """To its end; the checksums of what arrived.

        Raises:
            PoolUnavailable: it failed; nothing is written any more.
        """
        ...


class Copier(ABC):
    """Used by one thread at a time. ``depth``: copies that may be under way at once, of at most ``batch_bytes`` each,
    unless a chunk is longer. Chunks are asked for in ``ahead`` requests at one time, the first of ``first_bytes``, the
    next ones longer, up to ``window_bytes``."""

    depth = 1
    batch_bytes = 32 << 20
    first_bytes = window_bytes = 64 << 20
    ahead = 3

    @abstractmethod
    def begin(
        self, ours: Runs, theirs: Runs, blocks: int, *, storing: bool, mapping: Mapping, after: Any | None
    ) -> UnderWay:
        """Copy ``ours`` into ``theirs``, runs in ``mapping``, if ``storing``, else the other way; checksums of
        ``blocks`` equally long blocks. ``after``: an event behind which ours are to be used.

        Raises:
            PoolUnavailable: this can't be done here, and why.
        """

    def close(self) -> None:
        """Nothing is under way."""
        return


class _Done:
    def __init__(self, checksums: Checksums) -> None:
        self._checksums = checksums

    def done(self) -> bool:
        return True

    def wait(self) -> Checksums:
        return self._checksums


class HostCopier(Copier):
    """Host memory: the copy is done when :meth:`begin` returns. Long ones take two threads, where there is a core for
    the second: beside a copy, making tables and waiting for answers take as long as a third of it."""

    batch_bytes = 64 << 20

    def begin(
        self, ours: Runs, theirs: Runs, blocks: int, *, storing: bool, mapping: Mapping, after: Any | None
    ) -> UnderWay:
        theirs = merge_runs(theirs)  # neighbouring frames, mostly
        source, target = (ours, theirs) if storing else (theirs, ours)
        return _Done(pages.read_mapped(source, target, blocks, threads=HOST_THREADS))


class _Launched:
    def __init__(self, launch: Launch, error: type[Exception]) -> None:
        self._launch, self._error = launch, error

    def done(self) -> bool:
        try:
            return self._launch.done()
        except self._error:
            return True  # as wait() will say

    def wait(self) -> Checksums:
        try:
            return self._launch.wait()
        except self._error as error:
            raise PoolUnavailable(f"the copy failed: {error}") from None


class GpuCopier(Copier):
    """Memory of GPU number ``device``. Kernels are made at the first copy of their direction."""

    depth = 3  # enough to hide how long launches and answers take
    batch_bytes = window_bytes = 128 << 20  # 2.5 ms: each costs this thread and the pool's half of one on a busy host
    first_bytes = 64 << 20  # lasts until the answer to the second request
    ahead = 16  # a request's way there and back takes as long as half of its copy, or all of it on a busy host

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
    """For memory of GPU number ``device`` (-1: of the host)."""
    return HostCopier() if device == HOST else GpuCopier(device)
