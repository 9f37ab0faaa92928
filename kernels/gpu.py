"""Page kernels for the GPU: the functions of :mod:`pdtransport.kernels.pages`, asynchronous and at memory speed.

Runs are (n, 2) uint64 arrays of ``[address, nbytes]``. Addresses may be in this process's device memory, in another
process's that :func:`ipc_open` mapped, or in host memory from :func:`pinned` or :func:`register_host`. Addresses and
lengths are multiples of 8; multiples of 16 are faster, and whole stripes of 1 KiB are fastest.

The caller is responsible for every address: a wrong one ends all CUDA work of the process.

The kernels (``csrc/pages.cu``) are compiled at first use, which takes some seconds, and cached on disk by cupy.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pdtransport.kernels import pages, pieces, reference
from pdtransport.kernels._cuda import (
    HIGH_PRIORITY,
    GpuError,
    allocation_of,
    can_access,
    cuda,
    cupy,
    device_of,
    device_uuid,
    driver,
    from_host,
    ipc_close,
    ipc_handle,
    ipc_open,
    on,
    pinned,
    reach,
    register_host,
    to_host,
    unregister_host,
)
from pdtransport.kernels.reference import Checksums
from pdtransport.kernels.runs import Runs

__all__ = [
    "COPY_BLOCKS",
    "GpuError",
    "GpuPages",
    "Launch",
    "Plan",
    "allocation_of",
    "can_access",
    "device_of",
    "device_uuid",
    "from_host",
    "ipc_close",
    "ipc_handle",
    "ipc_open",
    "pinned",
    "reach",
    "register_host",
    "to_host",
    "unregister_host",
]

Plan = pieces.Pieces

COPY_BLOCKS = 528  # thread blocks: four on each of an H200's 132 SMs, all at once
MAX_COPY_BLOCKS = 1 << 16
WARPS = 8  # per thread block, as in csrc/pages.cu
THREADS = 32 * WARPS
TABLE_BYTES = 8 << 20  # ring through which tables go to the GPU
PART_BYTES = 2 << 20  # longest table; longer ones are split
RESULT_BYTES = 4 << 20  # ring through which checksums come back; a launch needs at most 1 MiB
MAX_LAUNCHES = 256  # in flight; a further one waits for the oldest
ALIGNMENT = 256
EVENT_FLAGS = 1  # cudaEventBlockingSync: waiting threads sleep
MEMCPY_TO_DEVICE, MEMCPY_TO_HOST = 1, 2
NOT_READY = 600
MS = 1e-3
CLOSED = "it was closed"
KERNELS = [f"pdt_{what}_{grain}" for what in ("copy", "copy_sum", "sum") for grain in ("stripes", "pairs", "singles")]


@functools.cache
def _module() -> Any:
    source = Path(__file__).with_name("csrc") / "pages.cu"
    with cuda("compiling the page kernels"):
        return cupy().RawModule(code=source.read_text(encoding="utf-8"), options=("-std=c++17",), backend="nvrtc")


class Launch:
    """One launch in flight; made by :class:`GpuPages`."""

    def __init__(self, pages: GpuPages, blocks: int, block_bytes: int, timed: bool) -> None:
        self._pages, self._timed = pages, timed
        self._blocks, self._block_bytes = blocks, block_bytes
        self._begun = self._computed = self._ended = 0  # events; computed == ended if no checksums come back
        self._held: list[int] = []  # all events of this launch, to be reused
        self._regions: list[_Region] = []  # parts of the rings
        self._result: _Region | None = None
        self._sums: Checksums | None = None
        self._seconds = 0.0

    def done(self) -> bool:
        """True if the launch has ended. Does not block.

        Raises:
            GpuError: the launch failed; discard what was written.
        """
        if self._sums is None:
            with self._pages._using("looking at a launch") as api:
                if not reached(api, self._ended):
                    return False
                self._finish()
        return True

    def wait(self) -> Checksums:
        """Block, without the GIL, until the launch has ended; returns its checksums, uint64, shape (blocks,).

        Raises:
            GpuError: the launch failed; discard what was written.
        """
        if self._sums is None:
            with self._pages._using("waiting for a launch") as api:
                api.runtime.eventSynchronize(self._ended)
                self._finish()
        assert self._sums is not None
        return self._sums

    @property
    def seconds(self) -> float:
        """GPU time from when the first kernel could start to the end of the last kernel.

        It excludes what the stream waited for before, including the upload of the first table. Known once :meth:`done`
        is True.

        Raises:
            GpuError: the launch has not ended, or was not timed.
        """
        if self._sums is None or not self._timed:
            raise GpuError("a launch that has not ended has taken no time yet" if self._timed else "it was not timed")
        return self._seconds

    def _finish(self) -> None:
        """Collect the results of a launch that has ended, and release what it held."""
        if self._sums is not None:
            return
        sums = np.empty(0, dtype=np.uint64)
        if self._result is not None:
            sums = reference.finish(self._result.host.view(np.uint64)[: self._blocks], self._block_bytes)
        if self._timed:
            with cuda("timing a launch") as api:
                self._seconds = float(api.runtime.eventElapsedTime(self._begun, self._computed)) * MS
        self._sums = sums
        for region in self._regions:
            region.event = 0
        self._regions.clear()
        self._result = None
        self._pages._events += self._held
        self._held.clear()


class GpuPages:
    """Copies and checksums pages on its own stream. Used by one thread at a time.

    Launches run in the order in which they were made. Making one blocks only if ``MAX_LAUNCHES`` are in flight, or
    tables of more than ``TABLE_BYTES``.

    Args:
        device: CUDA's number of the device in this process.
        blocks: maximum number of thread blocks (256 threads each) that run at a time; an SM holds four. Each thread
            uses at most 64 registers, so a block takes a quarter of an SM's registers.
        priority: take precedence over blocks of other streams that wait for an SM.
        wake_fd: an eventfd that gets 1 added whenever a launch ended (but not when it failed, so waiting threads need a
            timeout).

    Raises:
        GpuError: no cupy, no such device, no memory, or the kernels do not compile.
        ValueError: ``blocks`` is out of range.
    """

    def __init__(self, device: int, *, blocks: int = COPY_BLOCKS, priority: bool = True, wake_fd: int = -1) -> None:
        if not 1 <= blocks <= MAX_COPY_BLOCKS:
            raise ValueError(f"{blocks} blocks of threads; 1 to {MAX_COPY_BLOCKS} are allowed")
        self.device = device
        self._blocks, self._wake_fd = blocks, wake_fd
        self._broken = ""
        self._events: list[int] = []
        self._running: deque[Launch] = deque()
        with on(device, f"opening GPU {device}") as api:
            functions = _module()
            self._kernels = {name: functions.get_function(name) for name in KERNELS}
            self._stream = api.Stream(non_blocking=True, priority=HIGH_PRIORITY if priority else 0)
            self._uploader = api.Stream(non_blocking=True, priority=HIGH_PRIORITY if priority else 0)
            self._tables = _Ring(api, TABLE_BYTES)
            self._results = _Ring(api, RESULT_BYTES)
        self._bell = bell()

    @property
    def stream(self) -> int:
        """The raw cudaStream_t on which all launches run."""
        return int(self._stream.ptr)

    def copy_runs(self, src: Runs, dst: Runs, blocks: int = 0) -> Launch:
        """Start to copy the stream ``src`` into ``dst``, which may be cut differently. The two must not overlap.

        With ``blocks`` > 0, checksums are those of the bytes that were loaded and written.

        Raises:
            ValueError: the streams differ in length, ``blocks`` does not fit, or an address or length is not a multiple
                of 8.
            GpuError: CUDA refuses, or an earlier launch failed.
        """
        return self.start(self.plan(src, dst, blocks), blocks)

    def plan(self, src: Runs, dst: Runs, blocks: int = 0) -> Plan:
        """The part of :meth:`copy_runs` that needs no GPU; pass the result to :meth:`start`.

        Raises:
            ValueError: as :meth:`copy_runs`.
        """
        return pieces.cut(src, dst, blocks)

    def start(self, plan: Plan, blocks: int = 0, most: int = 0) -> Launch:
        """Start a planned copy.

        Args:
            blocks: number of checksums, as for :meth:`plan`.
            most: maximum number of thread blocks; 0: as many as this object has.

        Raises:
            GpuError: CUDA refuses, or an earlier launch failed.
        """
        return self._launch(plan, blocks, most=most)

    def checksum(self, runs: Runs, blocks: int, *, timed: bool = True) -> Launch:
        """Start to checksum ``blocks`` equally long blocks of the stream.

        Args:
            timed: measure :attr:`Launch.seconds`. It takes one more CUDA call, which is expensive for a thread that
                competes for the GIL.

        Raises:
            ValueError: the stream can't be cut into that many blocks, or an address or length is not a multiple of 8.
            GpuError: CUDA refuses, or an earlier launch failed.
        """
        return self._launch(pieces.cut(runs, None, blocks), blocks, timed)

    def after(self, event_handle: int) -> None:
        """Run later launches after the work that the raw cudaEvent_t was recorded behind.

        The caller is responsible for the handle's validity.

        Raises:
            GpuError: CUDA refuses, or an earlier launch failed.
        """
        with self._using("waiting for an event", fatal=False) as api:
            api.runtime.streamWaitEvent(self.stream, event_handle)

    def record(self, event_handle: int) -> None:
        """Record the raw cudaEvent_t behind all launches made so far, so that another stream can wait for them.

        The caller is responsible for the handle's validity.

        Raises:
            GpuError: the event belongs to another device, or an earlier launch failed.
        """
        with self._using("recording an event", fatal=False) as api:
            api.runtime.eventRecord(event_handle, self.stream)

    def close(self) -> None:
        """Wait for the launches in flight and free everything. May be called again."""
        if self._broken == CLOSED:
            return
        with suppress(GpuError):
            while self._running:
                self._running.popleft().wait()
        self._broken = CLOSED
        with suppress(GpuError), on(self.device, "closing the page kernels") as api:
            self._stream.synchronize()
            self._uploader.synchronize()
            for event in self._events:
                api.runtime.eventDestroy(event)
            self._events.clear()
            self._tables.free(api)
            self._results.free(api)

    def _launch(self, plan: pieces.Pieces, blocks: int, timed: bool = True, most: int = 0) -> Launch:
        with self._using("launching a page kernel") as api:
            self._retire(api)
            runtime, launch = api.runtime, Launch(self, blocks, plan.block_bytes, timed)
            launch._begun = self._event(api, launch)
            if blocks:
                launch._result = self._results.take(api, 8 * blocks)
                launch._regions.append(launch._result)
                runtime.memsetAsync(launch._result.device, 0, 8 * blocks, self._uploader.ptr)
            for part in plan.parts(PART_BYTES // 24):
                self._run(api, plan, part, launch, blocks, min(self._blocks, most or self._blocks))
            if not plan.total:
                runtime.eventRecord(launch._begun, self.stream)
                launch._computed = self._event(api, launch)
                runtime.eventRecord(launch._computed, self.stream)
            launch._ended = launch._computed
            if launch._result is not None:
                host, device = launch._result.address, launch._result.device
                if plan.total:
                    runtime.memcpyAsync(host, device, 8 * blocks, MEMCPY_TO_HOST, self.stream)
                else:
                    launch._result.host[:] = 0
                launch._ended = launch._result.event = self._event(api, launch)
                launch._result.launch = launch
                runtime.eventRecord(launch._ended, self.stream)
            self._running.append(launch)
            if self._wake_fd >= 0:
                self._ask_for_ring()
            return launch

    def _run(
        self, api: Any, plan: pieces.Pieces, part: pieces.TilePart, launch: Launch, blocks: int, most: int
    ) -> None:
        """Launch the kernel for one part.

        Tables are uploaded on a separate stream, so that the next table travels while this part's kernel runs.
        """
        nbytes = plan.table_bytes(part)
        region = self._tables.take(api, nbytes)
        launch._regions.append(region)
        plan.fill(part, region.host.view(np.uint64))
        runtime, uploaded = api.runtime, self._event(api, launch)
        runtime.memcpyAsync(region.device, region.address, nbytes, MEMCPY_TO_DEVICE, self._uploader.ptr)
        runtime.eventRecord(uploaded, self._uploader.ptr)
        runtime.streamWaitEvent(self.stream, uploaded)
        grid = min(most, -(-(part.end - part.first) // WARPS))
        sums = launch._result.device if launch._result is not None else 0
        arguments = tuple(map(np.uint64, plan.arguments(part, region.device, sums, grid * WARPS)))
        kernel = self._kernels[plan.kernel(blocks)]
        with self._stream:
            if part.first == 0:
                runtime.eventRecord(launch._begun, self.stream)
            kernel((grid,), (THREADS,), arguments)
        region.event = launch._computed = self._event(api, launch)
        runtime.eventRecord(region.event, self.stream)

    def _ask_for_ring(self) -> None:
        if self._bell:
            driver("asking to be woken", "cuLaunchHostFunc", self.stream, self._bell, self._wake_fd)
        else:
            self._stream.launch_host_func(ring, self._wake_fd)

    def _retire(self, api: Any) -> None:
        """Release launches that have ended; if ``MAX_LAUNCHES`` are in flight, wait for the oldest."""
        while self._running:
            launch = self._running[0]
            if launch._sums is None and not reached(api, launch._ended):
                if len(self._running) < MAX_LAUNCHES:
                    return
                api.runtime.eventSynchronize(launch._ended)
            launch._finish()
            self._running.popleft()

    def _event(self, api: Any, launch: Launch) -> int:
        event = self._events.pop() if self._events else int(api.runtime.eventCreateWithFlags(EVENT_FLAGS))
        launch._held.append(event)
        return event

    @contextmanager
    def _using(self, doing: str, *, fatal: bool = True) -> Iterator[Any]:
        """cupy.cuda on this device; after a fatal error all later uses fail with that error."""
        if self._broken:
            raise GpuError(f"GPU {self.device}'s page kernels can't be used: {self._broken}")
        try:
            with on(self.device, doing) as api:
                yield api
        except GpuError as error:
            if fatal:
                self._broken = f"earlier, {error}"
            raise


@dataclass
class _Region:
    """Part of a ring, in use until its event is reached."""

    host: npt.NDArray[np.uint8]
    address: int  # address of `host`
    device: int
    start: int
    nbytes: int
    event: int = 0  # 0: free
    launch: Launch | None = None  # the launch whose result is here; it must be collected before reuse


class _Ring:
    """A ring of pinned host memory, an equal ring on the device, and the regions in use, in order."""

    def __init__(self, api: Any, nbytes: int) -> None:
        self.host = pinned(nbytes)
        self._address = self.host.ctypes.data
        self.device = int(api.runtime.malloc(nbytes))
        self._taken: deque[_Region] = deque()

    def take(self, api: Any, nbytes: int) -> _Region:
        """Take a region of ``nbytes``; waits for the oldest regions if there is no space."""
        nbytes = -(-nbytes // ALIGNMENT) * ALIGNMENT
        assert nbytes <= self.host.size // 4
        while True:
            while self._taken and not self._taken[0].event:
                self._taken.popleft()
            start = self._room(nbytes)
            if start is not None:
                region = _Region(
                    self.host[start : start + nbytes], self._address + start, self.device + start, start, nbytes
                )
                self._taken.append(region)
                return region
            oldest = self._taken[0]
            api.runtime.eventSynchronize(oldest.event)
            if oldest.launch is not None:
                oldest.launch._finish()
            oldest.event = 0

    def _room(self, nbytes: int) -> int | None:
        if not self._taken:
            return 0
        head, tail = self._taken[0].start, self._taken[-1].start + self._taken[-1].nbytes
        if tail > head:  # in use: [head, tail)
            if tail + nbytes <= self.host.size:
                return tail
            return 0 if nbytes < head else None
        return tail if tail + nbytes < head else None

    def free(self, api: Any) -> None:
        api.runtime.free(self.device)


def reached(api: Any, event: int) -> bool:
    status = api.runtime.eventQuery(event)
    if status not in (None, 0, NOT_READY):
        api.runtime.check_status(status)
    return status != NOT_READY


def bell() -> int:
    """Address of the C function that writes the eventfd without the GIL; 0 if it was not built."""
    function = getattr(pages._C, "pdt_ring", None)
    return ctypes.cast(function, ctypes.c_void_p).value or 0 if function is not None else 0


def ring(eventfd: int) -> None:
    with suppress(OSError):  # a full counter wakes as well; or the eventfd is closed by now
        os.write(eventfd, (1).to_bytes(8, "little"))
