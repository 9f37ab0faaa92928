"""A step that began before its pages is held until these have found their end, whichever, and not for ever; and one
that ran before they came is void."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from pdtransport.engine import holding
from pdtransport.engine.commands import Commands, StartReceive
from pdtransport.engine.holding import MOST_STUCK, Arrival, Holding
from pdtransport.settings import Settings
from pdtransport.transfer.outcome import Outcome
from pdtransport.vllm.worker import WorkerSide

WAIT_S = 30.0


class Stream:
    """A GPU's stream that notes what lets it go on."""

    def __init__(self) -> None:
        self.closed = 0
        self.waits = False
        self.seconds = 0.0
        self.refuses = False

    def close(self, seconds: float) -> int:
        if self.refuses:
            raise RuntimeError("no")
        self.closed += 1
        self.waits, self.seconds = True, seconds
        return self.closed

    def open(self, ticket: int) -> bool:
        assert ticket == self.closed
        was, self.waits = self.waits, False
        return was


class Owner:
    def __init__(self) -> None:
        self.holding = Holding(self)
        self.given_up: list[str] = []
        self.waited: list[float] = []
        self.voids: list[bool] = []
        self.usual: list[bool] = []
        self.late: Arrival | None = None  # ends when it is given up

    def give_up(self, req_id: str, reason: str) -> None:
        self.given_up.append(reason)
        if self.late is not None:
            self.end(self.late)

    def held(self, req_id: str, seconds: float, *, void: bool, usual: bool) -> None:
        self.waited.append(seconds)
        self.voids.append(void)
        self.usual.append(usual)

    def use_stream(self) -> Stream:
        stream = Stream()
        self.holding.use(stream)
        return stream

    def end(self, arrival: Arrival, req_id: str = "r") -> None:
        self.holding.ended(arrival)
        self.holding.noted(req_id, arrival)

    def step(self, ahead: bool = True) -> threading.Thread:
        """A step of request r, in a thread: launched, then waited for."""

        def run() -> None:
            self.holding.before_forward(["r"], ahead)
            self.holding.after_launch()

        thread = threading.Thread(target=run)
        thread.start()
        return thread


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_step_is_held_until_the_end_of_its_transfer_was_noted(owner: Owner, on_gpu: bool) -> None:
    if on_gpu:
        owner.use_stream()
    arrival = owner.holding.coming("r")
    held = owner.step()
    held.join(0.1)
    assert held.is_alive()
    owner.holding.ended(arrival)
    held.join(0.1)
    assert held.is_alive(), "its report would not say how it went"
    owner.holding.noted("r", arrival)
    held.join(WAIT_S)
    assert not held.is_alive()
    assert owner.waited[0] >= 0.1
    assert owner.voids == [False]


def test_without_a_stream_the_forward_pass_is_not_launched_before_its_pages(owner: Owner) -> None:
    arrival = owner.holding.coming("r")
    held = threading.Thread(target=owner.holding.before_forward, args=[["r"], True])
    held.start()
    held.join(0.1)
    assert held.is_alive()
    owner.end(arrival)
    held.join(WAIT_S)
    assert not held.is_alive()


def test_the_forward_pass_is_launched_while_its_pages_come_and_the_gpu_waits(owner: Owner) -> None:
    stream = owner.use_stream()
    arrival = owner.holding.coming("r")
    owner.holding.before_forward(["r"], True)
    assert stream.waits
    assert 0 < stream.seconds < 1, "whoever waits with it does not wait for long"
    assert owner.holding.ended(arrival)
    assert not stream.waits, "the GPU goes on before anybody looks at it"
    owner.holding.noted("r", arrival)
    owner.holding.after_launch()
    assert owner.waited[0] <= 0
    assert owner.voids == [False]
    assert not owner.given_up


def test_a_step_whose_gpu_went_on_before_its_pages_came_is_void(owner: Owner) -> None:
    stream = owner.use_stream()
    arrival = owner.holding.coming("r")
    owner.holding.before_forward(["r"], True)
    stream.waits = False  # its time is over
    assert not owner.holding.ended(arrival)
    owner.holding.noted("r", arrival)
    owner.holding.after_launch()
    assert owner.voids == [True]


def test_what_was_never_launched_before_is_not_launched_behind_a_barrier(owner: Owner) -> None:
    """CUDA may load a kernel then, and wait for the GPU with that. How early to begin is not learned from it."""
    stream = owner.use_stream()
    arrival = owner.holding.coming("r")
    held = owner.step(ahead=False)
    held.join(0.1)
    assert held.is_alive()
    assert not stream.closed
    owner.end(arrival)
    held.join(WAIT_S)
    assert owner.usual == [False]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_transfer_that_has_ended_holds_nothing(owner: Owner, on_gpu: bool) -> None:
    """How long ago its pages came is told: the step could have begun so much sooner."""
    stream = owner.use_stream() if on_gpu else Stream()
    owner.end(owner.holding.coming("r"))
    time.sleep(0.05)
    owner.step().join(WAIT_S)
    assert owner.waited.pop() <= -0.05
    owner.end(owner.holding.coming("other"), "other")
    owner.step().join(WAIT_S)
    assert owner.waited.pop() == 0.0, "nothing is known of it"
    assert not stream.closed


def test_no_stream_waits_for_a_transfer_that_has_ended_and_is_not_noted_yet(owner: Owner) -> None:
    """Nobody would let it go on."""
    stream = owner.use_stream()
    arrival = owner.holding.coming("r")
    owner.holding.ended(arrival)
    held = owner.step()
    held.join(0.05)
    assert held.is_alive()
    owner.holding.noted("r", arrival)
    held.join(WAIT_S)
    assert not stream.closed


def test_a_stream_waits_for_one_request_alone(owner: Owner) -> None:
    stream = owner.use_stream()
    arrivals = {name: owner.holding.coming(name) for name in ("r", "s")}
    held = threading.Thread(target=owner.holding.before_forward, args=[["r", "s"], True])
    held.start()
    for name, arrival in arrivals.items():
        held.join(0.05)
        assert held.is_alive()
        owner.end(arrival, name)
    held.join(WAIT_S)
    assert not stream.closed
    assert len(owner.waited) == 2


@pytest.mark.parametrize("on_gpu", [False, True])
def test_pages_that_do_not_come_are_given_up(owner: Owner, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits behind the step waits for no peer that fell silent."""
    monkeypatch.setattr(holding, "HOLD_S", 0.05)
    stream = owner.use_stream() if on_gpu else Stream()
    owner.late = owner.holding.coming("r")
    owner.step().join(WAIT_S)
    assert len(owner.given_up) == 1
    assert not stream.waits


def test_no_step_ends_while_its_pages_may_still_be_written(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "HOLD_S", 0.01)
    monkeypatch.setattr(holding, "REWIND_S", 0.01)
    owner.holding.coming("r")
    with pytest.raises(RuntimeError, match="did not let go"):
        owner.holding.before_forward(["r"], False)


def test_launches_that_wait_for_the_gpu_are_not_tried_for_ever(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a request as long as a barrier may be closed. One that is quick starts the count anew."""
    monkeypatch.setattr(holding, "BARRIER_S", 0.02)
    stream = owner.use_stream()
    slow = [True] * (MOST_STUCK - 1) + [False] + [True] * MOST_STUCK
    for stuck in slow:
        arrival = owner.holding.coming("r")
        owner.holding.before_forward(["r"], True)
        assert stream.waits
        if stuck:
            time.sleep(0.03)
        owner.end(arrival)
        owner.holding.after_launch()
    assert owner.usual == [not stuck for stuck in slow]
    arrival = owner.holding.coming("r")
    held = owner.step()
    held.join(0.1)
    assert held.is_alive()
    assert stream.closed == len(slow)
    owner.end(arrival)
    held.join(WAIT_S)
    assert owner.usual[-1], "from here on it is"


def test_a_gpu_that_can_not_be_held_is_left_alone(owner: Owner) -> None:
    stream = owner.use_stream()
    stream.refuses = True
    for _ in range(2):
        arrival = owner.holding.coming("r")
        held = owner.step()
        held.join(0.05)
        assert held.is_alive()
        owner.end(arrival)
        held.join(WAIT_S)
    assert owner.voids == [False, False]


def test_who_closes_leaves_no_gpu_waiting(owner: Owner) -> None:
    """Its process would not end."""
    stream = owner.use_stream()
    owner.holding.coming("r")
    owner.holding.before_forward(["r"], True)
    owner.holding.close()
    assert not stream.waits


class Carrier:
    """In place of the transport: keeps what is asked for, ends it when it is told to."""

    def __init__(self) -> None:
        self.geometry = SimpleNamespace(device=-1, block_size=16)
        self.on_end: Any = None

    def receive(self, *_: Any, on_end: Any, **__: Any) -> Any:
        self.on_end = on_end
        return SimpleNamespace(future=Future(), cancel=lambda reason: self.end(ok=False))

    def end(self, ok: bool = True) -> None:
        self.on_end(Outcome(transfer="t", ok=ok))

    def close(self) -> None:
        pass


@pytest.fixture
def side() -> Iterator[Any]:
    made: Any = WorkerSide(Settings(), SimpleNamespace(), "kv_consumer")  # type: ignore[arg-type]
    made._transport = Carrier()
    made.rung = []
    made._results.rope = SimpleNamespace(
        name="",
        pull=lambda: None,
        close=lambda: None,
        expected=lambda *_: None,
        arrived=lambda name, rank, first_token: made.rung.append(name),
    )
    yield made
    made.close()


def taken(side: Any) -> Commands:
    """Request r's pages are asked for; its step, which is launched behind a closed barrier."""
    take = StartReceive("r", "t", b"k", 31, 0, [1, 2], "h", 1, 1)
    side.before_forward(Commands(before=[take]))
    step = Commands(hold=["r"], ahead=True)
    side.before_forward(step)
    side.hold(step)
    return step


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("in_time", [True, False])
def test_a_workers_report_says_how_its_held_step_went(side: Any, ok: bool, in_time: bool) -> None:
    """In that step's own output; and what runs ahead of it is only that all is well."""
    stream = Stream()
    side._holding.use(stream)
    step = taken(side)
    assert stream.waits
    if not in_time:
        stream.waits = False
    threading.Timer(0.05, side._transport.end, [ok]).start()
    side.after_forward(step)
    assert side.collect() == (set(), {"r"}, set() if ok else {"r"})
    news = side.take_news()
    assert news.void == (set() if in_time else {"r"})
    assert news.held["r"] > 0
    assert side.rung == (["r"] if ok and in_time else [])


def test_a_worker_gives_up_pages_that_do_not_come(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "HOLD_S", 0.05)
    side._holding.use(Stream())
    side.after_forward(taken(side))
    assert side.collect() == (set(), {"r"}, {"r"})
    assert not side.rung


def test_a_worker_that_closes_lets_its_gpu_go_first(side: Any) -> None:
    """What it closes then waits for the GPU."""
    stream = Stream()
    side._holding.use(stream)
    taken(side)
    waited: list[bool] = []
    side._transport.close = lambda: waited.append(stream.waits)
    side.close()
    assert waited == [False]


def test_how_early_to_begin_is_learned_from_steps_that_are_held_as_others_will_be(side: Any) -> None:
    side.held("r", 0.01, void=False, usual=False)
    assert side.take_news() is None
    side.held("r", 0.01, void=False, usual=True)
    assert side.take_news().held == {"r": 0.01}
