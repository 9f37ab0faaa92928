"""A real GPU's stream waits at a barrier, and nothing else does. Needs numpy, cupy and pytest."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from pdtransport.engine import holding
from pdtransport.engine.holding import Holding
from pdtransport.kernels import gpu
from pdtransport.kernels.barrier import Barrier

pytestmark = pytest.mark.gpu
NBYTES = 1 << 20
WAIT_S, SHORT_S = 30.0, 0.1
FRESH = 'extern "C" __global__ void fresh(unsigned *word) { *word += 1; }'


def memory(cupy: Any, value: int) -> Any:
    array = cupy.full(NBYTES // 8, value, dtype=cupy.uint64)
    cupy.cuda.Device(0).synchronize()
    return array


def runs(array: Any) -> np.ndarray:
    return np.array([[array.data.ptr, NBYTES]], dtype=np.uint64)


def test_what_comes_behind_waits_and_other_streams_do_not(cupy: Any, pages: gpu.GpuPages) -> None:
    """And it sees what was written before the barrier was opened."""
    source, target, result = memory(cupy, 1), memory(cupy, 2), memory(cupy, 3)
    barrier, model = Barrier(0), cupy.cuda.Stream(non_blocking=True)
    pages.copy_runs(runs(source), runs(target)).wait()  # its kernel is loaded
    target.fill(2)
    cupy.cuda.Device(0).synchronize()
    ticket = barrier.close(model.ptr, WAIT_S)
    cupy.cuda.runtime.memcpyAsync(result.data.ptr, target.data.ptr, NBYTES, 3, model.ptr)
    behind = model.record()
    pages.copy_runs(runs(source), runs(target)).wait()
    time.sleep(0.01)
    assert not behind.done
    assert barrier.open(ticket)
    behind.synchronize()
    assert bool((result == 1).all())


@pytest.mark.parametrize("closed", [0, (1 << 31) - 2, (1 << 32) - 2])
def test_tickets_are_let_through_in_order_for_ever(cupy: Any, closed: int) -> None:
    barrier, model = Barrier(0), cupy.cuda.Stream(non_blocking=True)
    barrier._closed = closed
    barrier._words[0] = closed
    events, tickets = [], []
    for _ in range(3):
        tickets.append(barrier.close(model.ptr, WAIT_S))
        events.append(model.record())
    for at, ticket in enumerate(tickets):
        time.sleep(0.005)
        assert not events[at].done
        assert barrier.open(ticket)
        events[at].synchronize()


@pytest.mark.parametrize("kind", ["null", "blocking", "non-blocking"])
def test_the_links_streams_go_on_beside_any_of_the_models(cupy: Any, kind: str) -> None:
    stream = 0 if kind == "null" else cupy.cuda.Stream(non_blocking=kind == "non-blocking")
    Barrier(0).try_beside(getattr(stream, "ptr", stream))


def test_nobody_waits_for_long_that_waits_for_the_gpu(cupy: Any) -> None:
    """Freeing memory does."""
    barrier, model = Barrier(0), cupy.cuda.Stream(non_blocking=True)
    address = cupy.cuda.runtime.malloc(NBYTES)
    began = time.monotonic()
    ticket = barrier.close(model.ptr, SHORT_S)
    cupy.cuda.runtime.free(address)
    assert time.monotonic() - began < WAIT_S
    late = not barrier.open(ticket)
    model.synchronize()
    print(f"\nfree waited: {late}")


def test_another_process_memory_is_unmapped_at_once_and_the_step_is_void(cupy: Any) -> None:
    """That waits for the GPU, and is done when a peer died, whose pages the GPU may wait for."""
    code = "from pdtransport.kernels import gpu, watch; memory = watch.DeviceMemory(1 << 21, 0)"
    code += "; print(gpu.ipc_handle(memory.address).hex(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as peer:
        assert peer.stdout is not None
        here = gpu.ipc_open(bytes.fromhex(peer.stdout.readline().decode()), 0)
        barrier, model = Barrier(0), cupy.cuda.Stream(non_blocking=True)
        ticket = barrier.close(model.ptr, WAIT_S)
        peer.kill()
        peer.wait()
        began = time.monotonic()
        gpu.ipc_close(here, 0)
        assert time.monotonic() - began < WAIT_S / 3
        assert not barrier.open(ticket)
        model.synchronize()


class Model:
    """The stream of a model, and who holds it."""

    def __init__(self, cupy: Any) -> None:
        self.stream, self._barrier = cupy.cuda.Stream(non_blocking=True), Barrier(0)
        self.given_up: list[str] = []
        self.void: list[bool] = []

    def close(self, seconds: float) -> int:
        return self._barrier.close(self.stream.ptr, seconds)

    def open(self, ticket: int) -> bool:
        return self._barrier.open(ticket)

    def give_up(self, req_id: str, reason: str) -> None:
        self.given_up.append(reason)

    def held(self, req_id: str, seconds: float, *, void: bool, usual: bool) -> None:
        self.void.append(void)


@pytest.mark.parametrize("kernels", [1, 3000])
def test_launches_that_wait_for_the_gpu_hold_a_step_up_for_a_moment_and_no_more(
    cupy: Any, pages: gpu.GpuPages, kernels: int
) -> None:
    """A module that is loaded, or more launches than fit the driver's queue; the transfer's own may wait with them. The
    step that was launched so is void, the transfer is not."""
    word, array = memory(cupy, 0), memory(cupy, 5)
    model = Model(cupy)
    held = Holding(model)
    held.use(model)
    pages.checksum(runs(array), 1).wait()
    fresh = cupy.RawKernel(FRESH + f"/* {kernels} */", "fresh")
    if kernels > 1:
        fresh((1,), (1,), (memory(cupy, 0),))
    arrival = held.coming("r")
    held.before_forward(["r"], True)

    def transfer() -> None:
        pages.checksum(runs(array), 1).wait()
        held.ended(arrival)
        held.noted("r", arrival)

    began = time.monotonic()
    carrier = threading.Timer(0.05, transfer)
    carrier.start()
    with model.stream:
        for _ in range(kernels):
            fresh((1,), (1,), (word,))
    held.after_launch()
    carrier.join(WAIT_S)
    model.stream.synchronize()
    assert int(word[0]) % (1 << 32) == kernels
    assert time.monotonic() - began < holding.HOLD_S
    assert not model.given_up
    print(f"\nvoid: {model.void}, {time.monotonic() - began:.3f} s")
