"""The GPU as the ucx link needs it: page kernels, memory for slots, and what UCX can do with that memory."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pdtransport.errors import LinkError, LinkUnavailable
from pdtransport.kernels.reference import Checksums
from pdtransport.kernels.runs import Runs
from pdtransport.links.memory import Block
from pdtransport.links.ucx.binding import Context
from pdtransport.links.ucx.lanes import why_not_direct

if TYPE_CHECKING:
    from pdtransport.kernels.gpu import GpuPages

PROBED_BYTES = 1 << 20  # registered once, to find out which UCX memory domains accept GPU memory
REMEDY = "lower links.gpu_staging_bytes"
# This few thread blocks saturate the bus; the model keeps the other SMs.
BUS_BLOCKS_OUT, BUS_BLOCKS_IN = 16, 64
GATHER_S = 5.0  # a batch takes less than a millisecond; a GPU that needs this long has hung
LOOK_S = 0.1  # poll interval, because a failed kernel does not write the eventfd


class KernelLaunch(Protocol):
    """A kernel in flight, such as :class:`pdtransport.kernels.gpu.Launch`."""

    def done(self) -> bool: ...

    def wait(self) -> Checksums: ...


class Gpu(Protocol):
    """Interface of one GPU."""

    def gather(self, src: Runs, dst: Runs, blocks: int, direct: bool) -> Checksums:
        """Copy pages into a slot in GPU memory (``direct``) or pinned host memory, and wait until it is done.

        Raises:
            ValueError: ``blocks`` do not fit the stream, or an address or length is not a multiple of 8 bytes; nothing
                was begun.
            LinkError: the GPU failed or timed out.
        """
        ...

    def place(self, src: Runs, dst: Runs, blocks: int, direct: bool) -> KernelLaunch:
        """Begin to copy a slot into pages; its end is signalled on an eventfd."""
        ...

    def device_block(self, nbytes: int) -> Block:
        """Allocate GPU memory for slots.

        Raises:
            LinkError: not enough memory.
        """
        ...

    def pinned_block(self, nbytes: int) -> Block:
        """As :meth:`device_block`, but pinned host memory that kernels can access."""
        ...

    def sendable(self, context: Context) -> bool:
        """True if UCX supports GPU memory at all."""
        ...

    def why_not_direct(self, context: Context, lanes: Sequence[str]) -> str:
        """Why UCX can't send memory of :meth:`device_block` directly over ``lanes``; "" if it can."""
        ...

    def close(self) -> None:
        """Call after UCX has released the GPU's memory."""
        ...


class CudaGpu:
    """A CUDA GPU.

    Args:
        device: its number in this process.
        wake_fd: eventfd to write when a kernel of :meth:`place` ended.

    Raises:
        LinkUnavailable: the GPU can't be used, or cupy is not installed.
    """

    def __init__(self, device: int, wake_fd: int) -> None:
        from pdtransport.kernels import gpu

        self._cuda = gpu
        self._device, self._wake_fd = device, wake_fd
        self._gathered = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._rings = select.poll()  # select() takes no descriptor above 1023; an engine may have more
        self._rings.register(self._gathered, select.POLLIN)
        self._gathering: dict[bool, GpuPages] = {}  # key: slots are in GPU memory
        self._placing: dict[bool, GpuPages] = {}
        self._domains: list[str] | None = None
        try:
            # Compiles the kernels, and makes the device's context current on this thread, as UCX requires.
            self._pages(self._placing, False)
        except gpu.GpuError as error:
            self.close()
            raise LinkUnavailable(str(error)) from None

    def _pages(self, made: dict[bool, GpuPages], direct: bool) -> GpuPages:
        """Kernels with their own stream per direction, so that arriving batches don't queue behind leaving ones."""
        if direct not in made:
            gathers = made is self._gathering
            blocks = self._cuda.COPY_BLOCKS if direct else BUS_BLOCKS_OUT if gathers else BUS_BLOCKS_IN
            fd = self._gathered if gathers else self._wake_fd
            made[direct] = self._cuda.GpuPages(self._device, blocks=blocks, wake_fd=fd)
        return made[direct]

    def gather(self, src: Runs, dst: Runs, blocks: int, direct: bool) -> Checksums:
        deadline = time.monotonic() + GATHER_S
        try:
            launch = self._pages(self._gathering, direct).copy_runs(src, dst, blocks)
            while not launch.done():
                if time.monotonic() > deadline:
                    raise LinkError(f"the GPU did not gather a batch within {GATHER_S} s")
                self._rings.poll(LOOK_S * 1000)
                drain(self._gathered)
            return launch.wait()
        except self._cuda.GpuError as error:
            raise LinkError(str(error)) from None

    def place(self, src: Runs, dst: Runs, blocks: int, direct: bool) -> KernelLaunch:
        try:
            return self._pages(self._placing, direct).copy_runs(src, dst, blocks)
        except self._cuda.GpuError as error:
            raise LinkError(str(error)) from None

    def device_block(self, nbytes: int) -> Block:
        return DeviceBlock(self._device, nbytes)

    def pinned_block(self, nbytes: int) -> Block:
        try:
            return PinnedBlock(self._cuda.pinned(nbytes))
        except self._cuda.GpuError as error:
            raise LinkError(f"no room for staging slots: {error}; {REMEDY}") from None

    def sendable(self, context: Context) -> bool:
        return context.takes_gpu_memory()

    def why_not_direct(self, context: Context, lanes: Sequence[str]) -> str:
        if self._domains is None:
            try:
                block = DeviceBlock(self._device, PROBED_BYTES)
            except LinkError as error:
                return str(error)
            self._domains = context.domains_of(block.address, PROBED_BYTES)
        return why_not_direct(lanes, self._domains)

    def close(self) -> None:
        for pages in (*self._gathering.values(), *self._placing.values()):
            pages.close()
        self._gathering, self._placing = {}, {}
        if self._gathered >= 0:
            os.close(self._gathered)
            self._gathered = -1


def drain(eventfd: int) -> None:
    """Reset the eventfd."""
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        pass


class DeviceBlock:
    """GPU memory in an allocation of its own, not from a pool: UCX registers it, and a peer may map all of it.

    Raises:
        LinkError: not enough memory.
    """

    def __init__(self, device: int, nbytes: int) -> None:
        from pdtransport.kernels.gpu import GpuError
        from pdtransport.kernels.watch import DeviceMemory

        try:
            self._memory = DeviceMemory(nbytes, device)
        except GpuError as error:
            remedy = f"{REMEDY} or the engine's share of the GPU"
            raise LinkError(f"no room for staging slots: {error}; {remedy}") from None
        self.address = int(self._memory.address)

    def part(self, offset: int, nbytes: int) -> DeviceBytes:
        return DeviceBytes(self.address + offset, nbytes, self._memory)


@dataclass(frozen=True)
class DeviceBytes:
    """GPU memory in the form that UCX' bindings accept; ``owner`` keeps it alive."""

    address: int
    nbytes: int
    owner: Any

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data, shape = (self.address, False), (self.nbytes,)
        return {"data": data, "shape": shape, "typestr": "|u1", "strides": None, "version": 3}


class PinnedBlock:
    """Host memory that the GPU's kernels read and write."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self._memory = memory
        self.address = int(memory.ctypes.data)

    def part(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        return self._memory[offset : offset + nbytes]
