"""Stands in for :mod:`pdtransport.kernels.gpu` on machines without a GPU: "device" memory is shared memory, a launch is
a copy that some thread does later, an event passes when the test says so.

What the links and the gate do around kernels (order, fences, mappings, wake-ups) runs for real, between real processes;
the kernels themselves are tested on a GPU.

There are as many such GPUs as are asked for, and each reaches all others' memory unless :data:`unreachable` says
otherwise; a mapping belongs to the one that it was made for.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np

from pdtransport.kernels import pages
from pdtransport.kernels.runs import Runs

GRAIN = 2 << 20
HANDLE = struct.Struct("<QQQQ32x")  # pid, descriptor, bytes, device: as long as a cudaIpcMemHandle_t
COPY_BLOCKS = 1
Plan = tuple[Runs, Runs]
delay_s = 0.0  # how long a launch waits before it copies: tests set it
going = threading.Event()  # launches wait while it is clear
going.set()
under_way: list[Launch] = []

registered: dict[int, int] = {}  # host memory -> bytes
unregistered: list[int] = []
strict = False  # refuse to copy from and to memory that a GPU would not reach: tests set it

unreachable: set[tuple[int, int]] = set()  # (device, peer) without peer access: tests set it
reached: list[tuple[int, int]] = []  # (device, peer): peer access within this process that was asked for

_allocations: dict[int, tuple[int, int, int]] = {}  # base -> bytes, descriptor, device; as long as something holds it
_mappings: dict[int, tuple[Any, int]] = {}  # address -> memory, the device that it was mapped for


class GpuError(RuntimeError):
    """As on a GPU."""


class DeviceMemory:
    def __init__(self, nbytes: int, device: int) -> None:
        size = -(-nbytes // GRAIN) * GRAIN
        descriptor = os.memfd_create("twin-gpu")
        os.ftruncate(descriptor, size)
        self._map = mmap.mmap(descriptor, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        _allocations[self.address] = (size, descriptor, device)
        weakref.finalize(self._map, _free, self.address)

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(self._map, dtype=np.uint8)[: int(np.prod(shape))].reshape(shape)


def _free(base: int) -> None:
    os.close(_allocations.pop(base)[1])


class Launch:
    def __init__(self, work: Future[Any]) -> None:
        self._work = work

    def done(self) -> bool:
        return self._work.done()

    def wait(self) -> Any:
        return self._work.result(30)[0]

    @property
    def seconds(self) -> float:
        return float(self._work.result(0)[1])


class GpuPages:
    def __init__(self, device: int, *, wake_fd: int = -1, **_: Any) -> None:
        del device
        self._stream = ThreadPoolExecutor(1)
        self._wake_fd = wake_fd

    def _launch(self, call: Any) -> Launch:
        def run() -> tuple[Any, float]:
            going.wait()
            time.sleep(delay_s)
            begun = time.perf_counter()
            return call(), time.perf_counter() - begun

        launch = Launch(self._stream.submit(run))
        under_way.append(launch)
        launch._work.add_done_callback(lambda _: under_way.remove(launch))
        if self._wake_fd >= 0:
            launch._work.add_done_callback(lambda _: os.eventfd_write(self._wake_fd, 1))
        return launch

    def plan(self, src: Runs, dst: Runs, blocks: int = 0) -> Plan:
        total = int(src[:, 1].sum())
        if total != int(dst[:, 1].sum()) or (blocks and (total % blocks or total // blocks % 8)):
            raise ValueError(f"a stream of {total} bytes does not hold {blocks} equally long blocks of whole words")
        if strict:
            for address, nbytes in np.concatenate([src, dst]).tolist():
                _must_reach(address, nbytes)
        return src, dst

    def start(self, plan: Plan, blocks: int = 0, most: int = 0) -> Launch:
        return self._launch(lambda: pages.copy_runs(*plan, blocks))

    def copy_runs(self, src: Runs, dst: Runs, blocks: int = 0) -> Launch:
        return self.start(self.plan(src, dst, blocks), blocks)

    def after(self, event_handle: int) -> None:
        """What is launched from now on waits for it."""
        self._stream.submit(TwinEvent._all[event_handle].passed.wait, 30)

    def checksum(self, runs: Runs, blocks: int, *, timed: bool = True) -> Launch:
        return self._launch(lambda: pages.checksum(runs, blocks))

    def close(self) -> None:
        self._stream.shutdown()


class TwinEvent:
    """What a test passes as ``after``; :meth:`happen` is the GPU reaching it."""

    _all: ClassVar[dict[int, TwinEvent]] = {}

    def __init__(self) -> None:
        self.ptr = len(TwinEvent._all) + 1
        TwinEvent._all[self.ptr] = self
        self.passed = threading.Event()
        self.watches: list[EventWatch] = []

    def happen(self) -> None:
        self.passed.set()
        for watch in self.watches:
            watch.ring()


class EventWatch:
    def __init__(self, device: int) -> None:
        del device
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)

    def add(self, handle: int) -> None:
        event = TwinEvent._all[handle]
        event.watches.append(self)
        if event.passed.is_set():
            self.ring()

    def ring(self) -> None:
        os.eventfd_write(self._fd, 1)

    def passed(self, handle: int) -> bool:
        return TwinEvent._all[handle].passed.is_set()

    def fileno(self) -> int:
        return self._fd

    def clear(self) -> None:
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            pass

    def close(self) -> None:
        os.close(self._fd)


def device_uuid(device: int) -> str:
    return f"twin-{device}"


def allocation_of(address: int) -> tuple[int, int]:
    for base, (nbytes, *_) in _allocations.copy().items():  # a copy takes one step: other threads allocate
        if base <= address < base + nbytes:
            return base, nbytes
    raise GpuError(f"{address:#x} is no device memory")


def ipc_handle(base: int) -> bytes:
    nbytes, descriptor, device = _allocations[base]
    return HANDLE.pack(os.getpid(), descriptor, nbytes, device)


def reach(device: int, uuid: str, ours: bool) -> None:
    peer = int(uuid.removeprefix("twin-"))
    if (device, peer) in unreachable:
        raise GpuError(f"GPU {device} has no peer access to GPU {uuid}")
    if ours and device != peer:
        reached.append((device, peer))


def ipc_open(handle: bytes, device: int) -> int:
    pid, descriptor, nbytes, peer = HANDLE.unpack(handle)
    if (device, peer) in unreachable:
        raise GpuError("cudaIpcOpenMemHandle: peer access is not supported between these two devices")
    try:
        theirs = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
    except OSError as error:
        raise GpuError(f"cudaIpcOpenMemHandle: {error.strerror}") from None
    mapped = mmap.mmap(theirs, nbytes)
    os.close(theirs)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    _mappings[address] = mapped, device
    return address


def ipc_close(address: int, device: int) -> None:
    if _mappings[address][1] != device:
        raise GpuError(f"cudaIpcCloseMemHandle on GPU {device}: it was mapped for GPU {_mappings[address][1]}")
    del _mappings[address]


def open_mappings() -> int:
    return len(_mappings)


def _must_reach(address: int, nbytes: int) -> None:
    """Registrations of neighbours make one stretch."""
    known = sorted([*registered.items(), *((base, size) for base, (size, *_) in _allocations.items())])
    at = address
    for base, size in known:
        if base <= at < base + size:
            at = base + size
    if at < address + nbytes:
        raise GpuError(f"an illegal memory access at {at:#x}")


def register_host(address: int, nbytes: int, device: int) -> None:
    del device
    registered[address] = nbytes


def unregister_host(address: int, device: int) -> None:
    del device
    del registered[address]
    unregistered.append(address)


def pinned(nbytes: int) -> np.ndarray:
    return np.zeros(nbytes, dtype=np.uint8)


def to_host(address: int, nbytes: int, device: int | None = None, *, beside: bool = False) -> bytes:
    del device
    return ctypes.string_at(address, nbytes)


def from_host(address: int, data: bytes, device: int | None = None) -> None:
    del device
    ctypes.memmove(address, bytes(data), len(data))


@contextmanager
def installed() -> Iterator[ModuleType]:
    """``pdtransport.kernels.gpu`` and ``.watch`` are this module, within the block."""
    import pdtransport.kernels as package

    twin = sys.modules[__name__]
    with ExitStack() as stack:
        for name in ("gpu", "watch"):
            stack.enter_context(patch.dict(sys.modules, {f"pdtransport.kernels.{name}": twin}))
            stack.enter_context(patch.object(package, name, twin, create=True))
        yield twin
