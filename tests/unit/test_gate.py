"""Calls that wait for the GPU."""

from __future__ import annotations

import select
from collections.abc import Iterator

import pytest

from pdtransport.io.cuda_events import Gate
from tests.rig import twin_gpu
from tests.rig.twin_gpu import TwinEvent


@pytest.fixture
def gate() -> Iterator[Gate]:
    with twin_gpu.installed():
        gate = Gate(0)
        yield gate
        gate.close()


def rings(gate: Gate) -> bool:
    poll = select.poll()  # select() takes no descriptor above 1023
    for descriptor in gate.descriptors():
        poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def test_a_call_runs_only_after_its_event(gate: Gate) -> None:
    """No page is announced before the kernels that compute it have ended, and the GPU wakes the thread that waits."""
    done: list[str] = []
    event = TwinEvent()
    gate.call("a", event, lambda: done.append("pages"))
    assert not gate.run()
    assert not done
    assert not rings(gate)
    event.happen()
    assert rings(gate)
    assert gate.run()
    assert done == ["pages"]
    assert gate.waiting == 0
    assert gate.descriptors() == []


def test_what_is_said_later_of_the_same_owner_waits_for_it(gate: Gate) -> None:
    """ "Finished" never overtakes the last pages."""
    done: list[str] = []
    event = TwinEvent()
    gate.call("a", event, lambda: done.append("pages"))
    gate.call("a", None, lambda: done.append("finish"))
    gate.call("b", None, lambda: done.append("other"))
    assert done == ["other"], "one request's kernels hold up no other request"
    event.happen()
    gate.run()
    assert done == ["other", "pages", "finish"]


def test_an_event_that_has_passed_costs_no_turn(gate: Gate) -> None:
    event = TwinEvent()
    event.happen()
    done: list[str] = []
    gate.call("a", event, lambda: done.append("pages"))
    assert done == ["pages"]


def test_pages_taken_back_are_never_announced(gate: Gate) -> None:
    """A preemption voids what was said of pages whose kernels still run."""
    done: list[str] = []
    first, second = TwinEvent(), TwinEvent()
    gate.call("a", first, lambda: done.append("a"))
    gate.call("b", second, lambda: done.append("b"))
    gate.drop("a")
    first.happen()
    second.happen()
    gate.run()
    assert done == ["b"]


def test_closing_lets_nobody_wait(gate: Gate) -> None:
    """Each request finds its end, whatever the GPU does."""
    done: list[str] = []
    gate.call("a", TwinEvent(), lambda: done.append("a"))
    gate.flush()
    assert done == ["a"]


def test_one_failing_call_stops_no_other(gate: Gate) -> None:
    done: list[str] = []
    event = TwinEvent()

    def fail() -> None:
        raise RuntimeError("no")

    gate.call("a", event, fail)
    gate.call("b", event, lambda: done.append("b"))
    event.happen()
    gate.run()
    assert done == ["b"]


def test_host_memory_waits_for_nothing() -> None:
    done: list[str] = []
    gate = Gate(-1)
    gate.call("a", None, lambda: done.append("a"))
    assert done == ["a"]
    assert gate.descriptors() == []
    gate.close()
