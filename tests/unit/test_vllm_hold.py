"""A step that began before its pages is held until these have found their end, whichever, and not for ever; and what
ran over pages that were not there is never passed for what was computed from them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pdtransport.vllm import holding
from pdtransport.vllm.holding import MOST_STUCK, Arrival, Holding

WAIT_S = 30.0


class Stream:
    """A GPU's stream that notes what lets it go on."""

    def __init__(self) -> None:
        self.closed: list[int] = []
        self.opened: list[int] = []
        self.refuses = False

    def close(self) -> int:
        if self.refuses:
            raise RuntimeError("no")
        self.closed.append(len(self.closed) + 1)
        return self.closed[-1]

    def open(self, ticket: int) -> None:
        self.opened.append(ticket)

    @property
    def waits(self) -> bool:
        return self.closed[-1:] > self.opened[-1:]


class Worker:
    """One worker's thread and its I/O thread, as the tests wish."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.waited: dict[str, float] = {}
        self.on_cancel: Callable[[], None] = lambda: None
        self.holding = Holding(self._cancel, self.waited.__setitem__)
        self.stream = Stream()

    def _cancel(self, req_id: str, reason: str) -> None:
        self.cancelled.append(reason)
        self.on_cancel()

    def use_stream(self) -> Stream:
        self.holding.use(self.stream)
        return self.stream

    def end(self, arrival: Arrival, req_id: str = "r") -> bool:
        in_time = self.holding.ended(arrival)
        self.holding.noted(req_id, arrival)
        return in_time


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.holding.close()


def step(worker: Worker, ahead: bool = True) -> threading.Thread:
    """A step of request r, in a thread: launched, then waited for."""

    def run() -> None:
        worker.holding.before_forward(["r"], ahead)
        worker.holding.launched()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_step_is_held_until_the_end_of_its_transfer_was_noted(worker: Worker, on_gpu: bool) -> None:
    if on_gpu:
        worker.use_stream()
    arrival = worker.holding.coming("r")
    held = step(worker)
    held.join(0.1)
    assert held.is_alive()
    worker.holding.ended(arrival)
    held.join(0.1)
    assert held.is_alive(), "its report would not say how it went"
    worker.holding.noted("r", arrival)
    held.join(WAIT_S)
    assert not held.is_alive()
    assert worker.waited["r"] >= 0.1


def test_without_a_stream_the_forward_pass_is_not_launched_before_its_pages(worker: Worker) -> None:
    arrival = worker.holding.coming("r")
    held = threading.Thread(target=worker.holding.before_forward, args=[["r"], True])
    held.start()
    held.join(0.1)
    assert held.is_alive()
    worker.end(arrival)
    held.join(WAIT_S)
    assert not held.is_alive()


def test_the_forward_pass_is_launched_while_its_pages_come_and_the_gpu_waits(worker: Worker) -> None:
    stream = worker.use_stream()
    arrival = worker.holding.coming("r")
    worker.holding.before_forward(["r"], True)
    assert stream.waits
    assert worker.end(arrival)
    assert not stream.waits, "the GPU goes on before anybody looks at it"
    worker.holding.launched()
    assert worker.waited["r"] <= 0
    assert not worker.cancelled


def test_what_was_never_launched_before_is_not_launched_behind_a_barrier(worker: Worker) -> None:
    """CUDA may load a kernel then, and wait for the GPU with that."""
    stream = worker.use_stream()
    arrival = worker.holding.coming("r")
    held = step(worker, ahead=False)
    held.join(0.1)
    assert held.is_alive()
    assert not stream.closed
    worker.end(arrival)
    held.join(WAIT_S)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_transfer_that_has_ended_holds_nothing(worker: Worker, on_gpu: bool) -> None:
    """How long ago its pages came is told: the step could have begun so much sooner."""
    if on_gpu:
        worker.use_stream()
    worker.end(worker.holding.coming("r"))
    time.sleep(0.05)
    step(worker).join(WAIT_S)
    assert worker.waited["r"] <= -0.05
    step(worker).join(WAIT_S)
    worker.end(worker.holding.coming("other"), "other")
    step(worker).join(WAIT_S)
    assert worker.waited["r"] == 0.0, "nothing is known of it"
    assert not worker.stream.closed


@pytest.mark.parametrize("on_gpu", [False, True])
def test_pages_that_do_not_come_are_given_up(worker: Worker, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits behind the step waits for no peer that fell silent."""
    monkeypatch.setattr(holding, "HOLD_S", 0.05)
    if on_gpu:
        worker.use_stream()
    arrival = worker.holding.coming("r")
    used: list[bool] = []
    worker.on_cancel = lambda: used.append(worker.end(arrival))
    step(worker).join(WAIT_S)
    assert len(worker.cancelled) == 1
    # A GPU that was let go on read what was not there: whatever the transfer came to, the step is void.
    assert used == [not on_gpu]
    assert not worker.stream.waits


def test_no_step_ends_while_its_pages_may_still_be_written(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "HOLD_S", 0.01)
    monkeypatch.setattr(holding, "REWIND_S", 0.01)
    worker.holding.coming("r")
    with pytest.raises(RuntimeError, match="did not let go"):
        worker.holding.before_forward(["r"], False)


def test_a_launch_that_waits_for_the_gpu_which_waits_for_it_is_let_go(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transfer's own launches may wait with it; what came of the step counts for nothing, and it is not tried for
    ever."""
    monkeypatch.setattr(holding, "LAUNCH_S", 0.05)
    stream = worker.use_stream()
    for times in range(1, MOST_STUCK + 1):
        arrival = worker.holding.coming("r")
        worker.holding.before_forward(["r"], True)
        assert stream.waits
        gone = time.monotonic() + WAIT_S
        while stream.waits and time.monotonic() < gone:  # as a launch would
            time.sleep(0.001)
        assert not stream.waits
        while len(worker.cancelled) < times and time.monotonic() < gone:
            time.sleep(0.001)
        assert not worker.end(arrival)
        worker.holding.launched()
    arrival = worker.holding.coming("r")
    held = step(worker)
    held.join(0.1)
    assert not stream.waits
    assert len(stream.closed) == MOST_STUCK
    assert worker.end(arrival)
    held.join(WAIT_S)


def test_who_launches_in_time_is_not_disturbed(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the pages take after that."""
    monkeypatch.setattr(holding, "LAUNCH_S", 0.05)
    worker.use_stream()
    for _ in range(3):
        arrival = worker.holding.coming("r")
        held = step(worker)
        held.join(0.12)
        assert held.is_alive()
        assert worker.end(arrival)
        held.join(WAIT_S)
    assert not worker.cancelled


def test_a_gpu_that_can_not_be_held_is_left_alone(worker: Worker) -> None:
    stream = worker.use_stream()
    stream.refuses = True
    for _ in range(2):
        arrival = worker.holding.coming("r")
        held = step(worker)
        held.join(0.05)
        assert held.is_alive()
        assert worker.end(arrival)
        held.join(WAIT_S)
    assert not stream.closed


def test_a_worker_that_closes_leaves_no_gpu_waiting(worker: Worker) -> None:
    """Its process would not end."""
    stream = worker.use_stream()
    worker.holding.coming("r")
    worker.holding.before_forward(["r"], True)
    worker.holding.close()
    assert not stream.waits
