"""The GPU, as the ucx link needs it: its page kernels, memory for slots, and what UCX can do with that memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pdtransport.errors import LinkError, LinkUnavailable
from pdtransport.kernels.reference import Checksums
from pdtransport.kernels.runs import Runs
from pdtransport.links._ucx_binding import Context
from pdtransport.links.memory import Block
from pdtransport.links.ucx_lanes import why_not_direct

PROBED_BYTES = 1 << 20  # registered once, to see which of UCX' memory domains take GPU memory
REMEDY = "lower links.device_staging_bytes"


class Launch(Protocol):
    """A kernel under way: :class:`pdtransport.kernels.gpu.Launch`."""

    def done(self) -> bool: ...

    def wait(self) -> Checksums: ...


class Gpu(Protocol):
    """One GPU. It writes to an eventfd whenever a launch ended."""

    def copy_runs(self, src: Runs, dst: Runs, blocks: int) -> Launch: ...

    def device_block(self, nbytes: int) -> Block:
        """GPU memory for slots.

        Raises:
            LinkError: there is not that much.
        """
        ...

    def pinned_block(self, nbytes: int) -> Block:
        """As :meth:`device_block`, host memory that the kernels reach."""
        ...

    def sendable(self, context: Context) -> bool:
        """UCX knows GPU memory at all."""
        ...

    def why_not_direct(self, context: Context, lanes: Sequence[str]) -> str:
        """Why UCX can't send memory of :meth:`device_block` over ``lanes`` as it is; "" if it can."""
        ...

    def close(self) -> None:
        """After UCX let go of its memory."""
        ...


class CudaGpu:
    """A real one.

    Args:
        device: its number in this process.
        wake_fd: the eventfd.

    Raises:
        LinkUnavailable: it can't be used, or cupy is not installed.
    """

    def __init__(self, device: int, wake_fd: int) -> None:
        try:
            import cupy

            from pdtransport.kernels.gpu import GpuPages

            cupy.cuda.Device(device).use()  # UCX needs a current context on the thread that calls it
            cupy.cuda.runtime.free(0)  # makes the context
            self._pages = GpuPages(device, wake_fd=wake_fd)
        except ImportError as error:
            raise LinkUnavailable(f"GPU memory needs cupy: {error}") from None
        except Exception as error:  # noqa: BLE001 - of cupy, of the compiler, of the driver
            raise LinkUnavailable(f"GPU {device} can't be used: {error}") from None
        self._device = device
        self._domains: list[str] | None = None

    def copy_runs(self, src: Runs, dst: Runs, blocks: int) -> Launch:
        launch: Launch = self._pages.copy_runs(src, dst, blocks)
        return launch

    def device_block(self, nbytes: int) -> Block:
        return DeviceBlock(self._device, nbytes)

    def pinned_block(self, nbytes: int) -> Block:
        try:
            return PinnedBlock(self._pages.pinned(nbytes))
        except Exception as error:  # noqa: BLE001 - of cupy or the driver
            raise LinkError(f"{nbytes} bytes of pinned host memory for slots: {error}; {REMEDY}") from None

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
        self._pages.close()


class DeviceBlock:
    """GPU memory allocated by itself, not out of a pool: UCX registers it, and a peer may map it as a whole.

    Raises:
        LinkError: there is not that much.
    """

    def __init__(self, device: int, nbytes: int) -> None:
        import cupy

        try:
            with cupy.cuda.Device(device):
                self._memory = cupy.cuda.Memory(nbytes)
        except Exception as error:  # noqa: BLE001 - cupy has several types for memory that is not there
            remedy = f"{REMEDY} or the engine's share of the GPU"
            raise LinkError(f"{nbytes} bytes of GPU memory for slots: {error}; {remedy}") from None
        self.address = int(self._memory.ptr)

    def part(self, offset: int, nbytes: int) -> DeviceBytes:
        return DeviceBytes(self.address + offset, nbytes, self._memory)


@dataclass(frozen=True)
class DeviceBytes:
    """GPU memory in the shape that UCX' bindings take; ``owner`` keeps it alive."""

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
