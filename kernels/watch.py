"""Wakes a sleeping thread when events recorded on a GPU have passed; also allocates memory that can be exported."""

from __future__ import annotations

import os
from contextlib import suppress

from pdtransport.kernels._cuda import HIGH_PRIORITY, GpuError, cuda, driver, on
from pdtransport.kernels.gpu import bell, reached, ring

GRAIN = 2 << 20  # smaller allocations share physical memory with others, and CUDA IPC would map those too


class DeviceMemory:
    """GPU memory in an allocation of its own, which another process can map; freed with this object.

    Raises:
        GpuError: not enough memory.
    """

    def __init__(self, nbytes: int, device: int) -> None:
        self.nbytes, self.device = -(-nbytes // GRAIN) * GRAIN, device
        with on(device, f"allocating {self.nbytes} bytes on GPU {device}") as api:
            self._memory = api.Memory(self.nbytes)  # cudaMalloc directly, not a pool
        self.address = int(self._memory.ptr)


class EventWatch:
    """Writes to an eventfd whenever an event has passed. Used by one thread.

    Args:
        device: CUDA's number of the device in this process.

    Raises:
        GpuError: no cupy, or no such device.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        with on(device, f"opening GPU {device}") as api:
            self._stream = api.Stream(non_blocking=True, priority=HIGH_PRIORITY)  # independent of the model's streams
        self._bell = bell()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def add(self, event_handle: int) -> None:
        """Signal once the raw cudaEvent_t, which is already recorded, and all events added before it have passed."""
        with on(self._device, "waiting for an event") as api:
            api.runtime.streamWaitEvent(self._stream.ptr, event_handle)
            if self._bell:
                driver("asking to be woken", "cuLaunchHostFunc", self._stream.ptr, self._bell, self._fd)
            else:
                self._stream.launch_host_func(ring, self._fd)

    def passed(self, event_handle: int) -> bool:
        """True if the GPU has reached the event.

        Raises:
            GpuError: work that the event was recorded behind failed.
        """
        with on(self._device, "looking at an event") as api:
            return reached(api, event_handle)

    def fileno(self) -> int:
        return self._fd

    def clear(self) -> None:
        """Reset the eventfd until the next event."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        """Waits for the events that were added. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(GpuError), cuda("closing a watch"):
                self._stream.synchronize()
            os.close(fd)
