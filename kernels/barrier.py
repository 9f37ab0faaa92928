"""Makes a GPU stream wait for a host thread, while kernels behind the wait are launched already."""

from __future__ import annotations

import time

import numpy as np

from pdtransport.kernels import pages
from pdtransport.kernels._cuda import HIGH_PRIORITY, GpuError, driver, on, pinned
from pdtransport.kernels.gpu import reached

WAIT_VALUE_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: passes if (int32)(*word - value) >= 0
TRIAL_S = 1.0
LOOK_S = 1e-4
NS = 1_000_000_000


class Barrier:
    """Holds a stream until a host thread opens the barrier, or until a deadline.

    After the barrier opens, the stream's next kernels see what was in GPU memory at that time. The barrier's word is in
    pinned memory of this process, and a watchdog thread in C opens the barrier at its deadline (``csrc/barrier.c``). So
    the stream does not wait forever if another process dies, or if a thread waits for the GPU while it holds the GIL.

    While the barrier is closed, these calls wait too: synchronizing with the stream, the device or the legacy default
    stream; freeing or unmapping GPU or pinned memory; loading modules; and recording an event or launching a kernel
    while another thread is inside one of these calls. Launches continue until the driver's queue is full (1,020
    launches on an H100). Before such a call of our own, call :func:`pdtransport.kernels._cuda.let_go`.

    Args:
        device: CUDA's number of the device in this process.

    Raises:
        GpuError: no cupy, no such device, a driver without this feature, or the C kernels were not built.
    """

    def __init__(self, device: int) -> None:
        if pages._C is None:
            raise GpuError("holding a stream needs the C kernels: install where there is a C compiler")
        self._c, self._device = pages._C, device
        with on(device, f"opening GPU {device}"):
            self._words = pinned(8).view(np.uint32)  # [last ticket that was opened, scratch word for try_beside]
        self._closed = 0

    def close(self, stream: int, seconds: float) -> int:
        """Make the raw cudaStream_t wait behind what is launched on it; returns the ticket for :meth:`open`.

        It waits for at most ``seconds``. Call from one thread only.

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
        """Open the barrier for this ticket and earlier ones.

        Returns:
            False if it was open already: its time was over, or all barriers were opened.
        """
        return bool(self._c.pdt_barrier_open(self._words.ctypes.data, ticket))

    def try_beside(self, stream: int) -> None:
        """Check that a closed barrier holds ``stream`` (a raw cudaStream_t) while another stream continues.

        The other stream is like those of :class:`pdtransport.kernels.gpu.GpuPages`. The two may share a hardware queue,
        and then the barrier holds both. The check takes the GPU a moment.

        Raises:
            GpuError: the other stream waits too, ``stream`` does not wait, or CUDA refuses.
        """
        with on(self._device, "trying to hold a stream") as api:
            runtime, word = api.runtime, self._words.ctypes.data + 4
            behind, beside = (api.Event(block=True, disable_timing=True) for _ in range(2))
            other = api.Stream(non_blocking=True, priority=HIGH_PRIORITY)
            runtime.memsetAsync(word, 1, 4, other.ptr)  # warm up: CUDA may load a module
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
