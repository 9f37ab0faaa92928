"""A stream of the GPU that waits for a thread of the host, while what comes after it is launched already."""

from __future__ import annotations

import time

import numpy as np

from pdtransport.kernels import pages
from pdtransport.kernels._cuda import HIGH_PRIORITY, GpuError, driver, on, pinned
from pdtransport.kernels.gpu import reached

WAIT_VALUE_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: the difference of the two, as a signed number, is not negative
TRIAL_S = 1.0
LOOK_S = 1e-4
NS = 1_000_000_000


class Barrier:
    """Closed on a stream for a while, opened by any thread; the stream's next kernels see what was in the GPU's memory
    when it was opened. Its word lies in pinned memory of this process, and a thread of its own opens it when its time
    is over (``csrc/barrier.c``): neither another process' end leaves the stream waiting, nor a thread that waits for
    the GPU with the interpreter's lock.

    Others wait with the stream: who synchronizes with it or the device, the legacy default stream, what frees or
    unmaps memory of the GPU's or pinned memory, the loading of modules; and whoever records an event or launches while
    one of these stands in CUDA. Launches go on until the driver's queue is full (with 1,020 of them, on an H100).
    Where we do such a thing on purpose, :func:`pdtransport.kernels._cuda.let_go` comes first.

    Args:
        device: as CUDA numbers it in this process.

    Raises:
        GpuError: no cupy, no such device, a driver that does not know of it, or the C kernels were not built.
    """

    def __init__(self, device: int) -> None:
        if pages._C is None:
            raise GpuError("holding a stream needs the C kernels: install where there is a C compiler")
        self._c, self._device = pages._C, device
        with on(device, f"opening GPU {device}"):
            self._words = pinned(8).view(np.uint32)  # the ticket that was let through last, and what a trial writes
        self._closed = 0

    def close(self, stream: int, seconds: float) -> int:
        """Lets the raw cudaStream_t wait behind what is launched on it, so long at most; returns the ticket for
        :meth:`open`. Called by one thread.

        Raises:
            GpuError: CUDA refuses; the stream does not wait.
        """
        ticket = (self._closed + 1) % (1 << 32)
        at = self._words.ctypes.data
        if self._c.pdt_barrier_close(at, ticket, int(seconds * NS)):
            raise GpuError("holding a stream: nobody could see to its end")
        self._closed = ticket
        try:
            with on(self._device, "holding a stream"):
                driver("holding a stream", "cuStreamWaitValue32_v2", stream, at, ticket, WAIT_VALUE_GEQ)
        except GpuError:
            self.open(ticket)
            raise
        return ticket

    def open(self, ticket: int) -> bool:
        """Lets go on what waits for this ticket, and for those before; False: it went on before, for its time was over
        or somebody let go of all."""
        return bool(self._c.pdt_barrier_open(self._words.ctypes.data, ticket))

    def try_beside(self, stream: int) -> None:
        """Sees to it that ``stream``, a raw cudaStream_t, waits, and that one like those of
        :class:`pdtransport.kernels.gpu.GpuPages` goes on meanwhile; it takes the GPU a moment. Streams may share one of
        the hardware's queues.

        Raises:
            GpuError: they do not, or CUDA refuses.
        """
        with on(self._device, "trying to hold a stream") as api:
            runtime, word = api.runtime, self._words.ctypes.data + 4
            behind, beside = (api.Event(block=True, disable_timing=True) for _ in range(2))
            other = api.Stream(non_blocking=True, priority=HIGH_PRIORITY)
            runtime.memsetAsync(word, 1, 4, other.ptr)  # CUDA may load something
            other.synchronize()
            ticket = self.close(stream, TRIAL_S)
            try:
                runtime.eventRecord(behind.ptr, stream)
                runtime.memsetAsync(word, 2, 4, other.ptr)
                runtime.eventRecord(beside.ptr, other.ptr)
                ends = time.monotonic() + TRIAL_S
                while not reached(api, beside.ptr) and time.monotonic() < ends:
                    time.sleep(LOOK_S)
                waits = not reached(api, behind.ptr)
            finally:
                in_time = self.open(ticket)
            runtime.streamSynchronize(stream)
            other.synchronize()
            if not in_time:
                raise GpuError("this GPU's streams wait for one another")
            if not waits:
                raise GpuError("this GPU's streams do not wait for a word of the host's")
