"""A real GPU's stream waits at a barrier, and nothing else does. Needs numpy, cupy and pytest."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pdtransport.kernels import gpu
from pdtransport.kernels.barrier import Barrier
from pdtransport.vllm import holding
from pdtransport.vllm.holding import Holding

pytestmark = pytest.mark.gpu
NBYTES = 1 << 20
WAIT_S = 30.0
FRESH = 'extern "C" __global__ void fresh(unsigned *word) { *word += 1; }'


@pytest.fixture(scope="module")
def cupy() -> Any:
    module = pytest.importorskip("cupy", reason="needs cupy")
    try:
        count = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    if not count:
        pytest.skip("needs an NVIDIA GPU")
    return module


@pytest.fixture
def pages(cupy: Any) -> Iterator[gpu.GpuPages]:
    opened = gpu.GpuPages(0)
    yield opened
    opened.close()


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
    ticket = barrier.close(model.ptr)
    cupy.cuda.runtime.memcpyAsync(result.data.ptr, target.data.ptr, NBYTES, 3, model.ptr)
    behind = model.record()
    pages.copy_runs(runs(source), runs(target)).wait()
    time.sleep(0.01)
    assert not behind.done
    barrier.open(ticket)
    behind.synchronize()
    assert bool((result == 1).all())


@pytest.mark.parametrize("closed", [0, (1 << 31) - 2, (1 << 32) - 2])
def test_tickets_are_let_through_in_order_for_ever(cupy: Any, closed: int) -> None:
    barrier, model = Barrier(0), cupy.cuda.Stream(non_blocking=True)
    barrier._closed = closed
    barrier.open(closed)
    events, tickets = [], []
    for _ in range(3):
        tickets.append(barrier.close(model.ptr))
        events.append(model.record())
    for at, ticket in enumerate(tickets):
        time.sleep(0.005)
        assert not events[at].done
        barrier.open(ticket)
        events[at].synchronize()


@pytest.mark.parametrize("kind", ["null", "blocking", "non-blocking"])
def test_the_links_streams_go_on_beside_any_of_the_models(cupy: Any, kind: str) -> None:
    stream = 0 if kind == "null" else cupy.cuda.Stream(non_blocking=kind == "non-blocking")
    Barrier(0).try_beside(getattr(stream, "ptr", stream))


class Model:
    """The stream of a model."""

    def __init__(self, cupy: Any) -> None:
        self.stream, self._barrier = cupy.cuda.Stream(non_blocking=True), Barrier(0)

    def close(self) -> int:
        return self._barrier.close(self.stream.ptr)

    def open(self, ticket: int) -> None:
        self._barrier.open(ticket)


def test_a_kernel_that_was_never_launched_holds_a_step_up_for_a_moment_and_no_more(
    cupy: Any, pages: gpu.GpuPages
) -> None:
    """CUDA loads it when it is first launched, and waits for the stream with that; the transfer's launches may wait
    with it. The step that was launched so counts for nothing."""
    word, array = memory(cupy, 0), memory(cupy, 5)
    cancelled: list[str] = []
    held = Holding(lambda req_id, reason: cancelled.append(reason), lambda req_id, seconds: None)
    model = Model(cupy)
    held.use(model)
    pages.checksum(runs(array), 1).wait()
    fresh = cupy.RawKernel(FRESH, "fresh")
    fresh.compile()
    arrival = held.coming("r")
    held.before_forward(["r"], True)
    came: list[bool] = []

    def transfer() -> None:
        pages.checksum(runs(array), 1).wait()
        came.append(held.ended(arrival))
        held.noted("r", arrival)

    began = time.monotonic()
    carrier = threading.Timer(0.02, transfer)
    carrier.start()
    with model.stream:
        fresh((1,), (1,), (word,))
    held.launched()
    carrier.join(WAIT_S)
    model.stream.synchronize()
    assert int(word[0]) == 1
    assert time.monotonic() - began < holding.HOLD_S
    # Whoever was first: either the pages were in time, or the step is void and the transfer given up.
    while came == [False] and not cancelled and time.monotonic() - began < holding.HOLD_S:
        time.sleep(0.001)
    assert came == [not cancelled]
    held.close()
