"""A stream of the GPU that waits for a thread of the host, while what comes after it is launched already."""

from __future__ import annotations

import time

import numpy as np

from pdtransport.kernels._cuda import GpuError, driver, on, pinned
from pdtransport.kernels.gpu import HIGH_PRIORITY, reached

WAIT_VALUE_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: the difference of the two, as a signed number, is not negative
TRIAL_S = 1.0
LOOK_S = 1e-4


class Barrier:
    """Closed on a stream, opened by any thread; the stream's next kernels see what was in the GPU's memory when it was
    opened. Its word lies in pinned memory of this process, so that no other process' end leaves a stream waiting; it
    is this process' to open it in the end, whatever happens.

    With the stream wait: who synchronizes with it, the legacy default stream, the first launch of a kernel, which CUDA
    loads then, and frees of memory. Other launches go on until the driver's queue is full (with 1,020 of them, on an
    H100); the one that finds it full keeps those of other threads and streams waiting with it.

    Args:
        device: as CUDA numbers it in this process.

    Raises:
        GpuError: no cupy, no such device, or a driver that does not know of it.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        with on(device, f"opening GPU {device}"):
            self._words = pinned(8).view(np.uint32)  # the ticket that was opened last, and what a trial writes
        self._closed = 0

    def close(self, stream: int) -> int:
        """Lets the raw cudaStream_t wait behind what is launched on it; returns the ticket for :meth:`open`.

        Raises:
            GpuError: CUDA refuses; the stream does not wait.
        """
        ticket = (self._closed + 1) % (1 << 32)
        with on(self._device, "holding a stream"):
            at = self._words.ctypes.data
            driver("holding a stream", "cuStreamWaitValue32_v2", stream, at, ticket, WAIT_VALUE_GEQ)
        self._closed = ticket
        return ticket

    def open(self, ticket: int) -> None:
        """Lets go on what waits for this ticket, and for those before."""
        self._words[0] = ticket

    def try_beside(self, stream: int) -> None:
        """Sees to it that a stream like those of :class:`pdtransport.kernels.gpu.GpuPages` goes on while ``stream``, a
        raw cudaStream_t, waits; it takes the GPU a moment. Streams may share one of the hardware's queues.

        Raises:
            GpuError: it does not, or CUDA refuses.
        """
        with on(self._device, "trying to hold a stream") as api:
            runtime, passed = api.runtime, api.Event(block=True, disable_timing=True)
            other = api.Stream(non_blocking=True, priority=HIGH_PRIORITY)
            ticket = self.close(stream)
            try:
                runtime.memsetAsync(self._words.ctypes.data + 4, 1, 4, other.ptr)
                runtime.eventRecord(passed.ptr, other.ptr)
                ends = time.monotonic() + TRIAL_S
                while not (beside := reached(api, passed.ptr)) and time.monotonic() < ends:
                    time.sleep(LOOK_S)
            finally:
                self.open(ticket)
            runtime.streamSynchronize(stream)
            other.synchronize()
            if not beside:
                raise GpuError("this GPU's streams wait for one another")
