"""Calls that wait for the GPU."""

from __future__ import annotations

import select
from collections.abc import Iterator

import pytest

from pdtransport.io.cuda_events import CudaEventQueue
from tests.rig import twin_gpu
from tests.rig.twin_gpu import TwinEvent


@pytest.fixture
def cuda_events() -> Iterator[CudaEventQueue]:
    with twin_gpu.installed():
        cuda_events = CudaEventQueue(0)
        yield cuda_events
        cuda_events.close()


def rings(cuda_events: CudaEventQueue) -> bool:
    poll = select.poll()  # select() takes no descriptor above 1023
    for descriptor in cuda_events.descriptors():
        poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def test_a_call_runs_only_after_its_event(cuda_events: CudaEventQueue) -> None:
    """No page is announced before the kernels that compute it have ended, and the GPU wakes the thread that waits."""
    done: list[str] = []
    event = TwinEvent()
    cuda_events.call("a", event, lambda: done.append("pages"))
    assert not cuda_events.run()
    assert not done
    assert not rings(cuda_events)
    event.happen()
    assert rings(cuda_events)
    assert cuda_events.run()
    assert done == ["pages"]
    assert cuda_events.waiting == 0
    assert cuda_events.descriptors() == []


def test_what_is_said_later_of_the_same_owner_waits_for_it(cuda_events: CudaEventQueue) -> None:
    """ "Finished" never overtakes the last pages."""
    done: list[str] = []
    event = TwinEvent()
    cuda_events.call("a", event, lambda: done.append("pages"))
    cuda_events.call("a", None, lambda: done.append("finish"))
    cuda_events.call("b", None, lambda: done.append("other"))
    assert done == ["other"], "one request's kernels hold up no other request"
    event.happen()
    cuda_events.run()
    assert done == ["other", "pages", "finish"]


def test_an_event_that_has_passed_costs_no_turn(cuda_events: CudaEventQueue) -> None:
    event = TwinEvent()
    event.happen()
    done: list[str] = []
    cuda_events.call("a", event, lambda: done.append("pages"))
    assert done == ["pages"]


def test_pages_taken_back_are_never_announced(cuda_events: CudaEventQueue) -> None:
    """A preemption voids what was said of pages whose kernels still run."""
    done: list[str] = []
    first, second = TwinEvent(), TwinEvent()
    cuda_events.call("a", first, lambda: done.append("a"))
    cuda_events.call("b", second, lambda: done.append("b"))
    cuda_events.drop("a")
    first.happen()
    second.happen()
    cuda_events.run()
    assert done == ["b"]


def test_closing_lets_nobody_wait(cuda_events: CudaEventQueue) -> None:
    """Each request finds its end, whatever the GPU does."""
    done: list[str] = []
    cuda_events.call("a", TwinEvent(), lambda: done.append("a"))
    cuda_events.flush()
    assert done == ["a"]


def test_one_failing_call_stops_no_other(cuda_events: CudaEventQueue) -> None:
    done: list[str] = []
    event = TwinEvent()

    def fail() -> None:
        raise RuntimeError("no")

    cuda_events.call("a", event, fail)
    cuda_events.call("b", event, lambda: done.append("b"))
    event.happen()
    cuda_events.run()
    assert done == ["b"]


def test_host_memory_waits_for_nothing() -> None:
    done: list[str] = []
    cuda_events = CudaEventQueue(-1)
    cuda_events.call("a", None, lambda: done.append("a"))
    assert done == ["a"]
    assert cuda_events.descriptors() == []
    cuda_events.close()
