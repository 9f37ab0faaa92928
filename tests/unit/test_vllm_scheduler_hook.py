"""Requests go on as soon as the workers say that their pages arrived, once, and not before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from pdtransport.engine.commands import WorkerReport
from pdtransport.engine.wakeups import WakeupSender
from pdtransport.settings import Settings
from pdtransport.vllm.patches.scheduler_hook import Arrivals, SchedulerHook
from tests.unit.test_vllm_scheduler import CONSUME, blocks, request, scheduler_half, step

WAITING = RequestStatus.WAITING_FOR_REMOTE_KVS


class Engine:
    """vLLM's own scheduler class with what the report of an arrival touches, and our half of the connector."""

    def __init__(self, ranks: int = 1, **settings: Any) -> None:
        self.side = scheduler_half(Settings(**settings), ranks=ranks)
        self.manager = SimpleNamespace(new_step_starts=lambda: "started")
        self.scheduler: Any = object.__new__(Scheduler)
        self.connector = SimpleNamespace(update_connector_output=self.side.update_output)
        vars(self.scheduler).update(
            connector=self.connector, requests={}, running=[], waiting=[], kv_holding_waiting=[],
            finished_recving_kv_req_ids=set(), kv_fetch_stage_trackers=None, log_stats=False,
            update_from_output=lambda output, result: self.answer(),
        )  # fmt: skip
        self.answer: Any = lambda: None  # what the engine does with a step's outcome
        self.scheduler._set_kv_fetch_stage = lambda request, stage: None
        self.side.bind(self.connector, self.manager)
        self.ropes = [WakeupSender() for _ in range(ranks)]
        for rope in self.ropes:
            rope.name = self.side._bell.name

    def load(self, name: str = "r") -> Any:
        """A request whose pages were asked for."""
        loading = request({**CONSUME, "transfer_id": name}, name=name, status=WAITING)
        self.side.on_new_request(loading)
        self.side.matched_tokens(loading, 0)
        self.side.allocated(loading, blocks(1, 2, 3, 4), 100)
        step(self.side)
        self.scheduler.requests[name] = loading
        self.scheduler.kv_holding_waiting.append(loading)
        return loading

    def begin(self) -> set[str]:
        """A step begins; requests that vLLM may schedule in it."""
        assert self.manager.new_step_starts() == "started"
        return set(self.scheduler.finished_recving_kv_req_ids)

    def report(self, *names: str, failed: tuple[str, ...] = ()) -> None:
        """The workers' own report is looked at."""
        output = KVConnectorOutput(finished_recving=set(names), failed_recving=set(failed))
        self.scheduler._update_from_kv_xfer_finished(output)

    def close(self) -> None:
        self.side.close()
        for rope in self.ropes:
            rope.close()


@pytest.fixture
def engine() -> Any:
    made = Engine()
    yield made
    made.close()


def test_a_request_goes_on_in_the_step_that_begins_after_its_arrival(engine: Engine) -> None:
    engine.load()
    assert engine.begin() == set()
    engine.ropes[0].arrived("r", 0)
    assert engine.begin() == {"r"}


def test_the_report_that_comes_later_is_no_news(engine: Engine) -> None:
    """By then the request may be running, or gone, and vLLM's own code asserts that it is not."""
    engine.load()
    engine.ropes[0].arrived("r", 0)
    engine.begin()
    engine.scheduler.finished_recving_kv_req_ids.clear()  # it was scheduled,
    del engine.scheduler.requests["r"]  # and ended
    engine.report("r")
    engine.load("s")
    engine.report("s")
    assert engine.begin() == {"s"}, "one that nobody told takes vLLM's way"


def test_all_ranks_must_have_their_pages() -> None:
    """A tensor-parallel engine computes on all of them."""
    engine = Engine(ranks=2)
    engine.load()
    engine.ropes[0].arrived("r", 0)
    engine.ropes[0].arrived("r", 0)
    assert engine.begin() == set(), "one rank twice is not two"
    engine.ropes[1].arrived("r", 1)
    assert engine.begin() == {"r"}
    engine.close()


def test_the_first_token_that_one_rank_told_is_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is told none must not let decode sample another one."""
    engine = Engine(ranks=2)
    engine.load()
    told: list[int | None] = []
    monkeypatch.setattr(engine.side._reader, "go_on", lambda request, token: told.append(token))
    engine.ropes[0].arrived("r", 0, 7)
    engine.ropes[0].arrived("stranger", 0, 8)
    assert engine.begin() == set()
    engine.ropes[1].arrived("r", 1)
    assert engine.begin() == {"r"}
    assert told == [7]
    assert not engine.side._tokens
    engine.close()


@pytest.mark.parametrize("word", [("stranger", 0), ("r", 9), ("", 0), ("r\udcff".encode(errors="replace").decode(), 0)])
def test_words_of_what_nobody_awaits_change_nothing(engine: Engine, word: tuple[str, int]) -> None:
    engine.load()
    engine.ropes[0].arrived(*word)
    assert engine.begin() == set()


def test_an_aborted_request_is_left_to_vllm(engine: Engine) -> None:
    """vLLM frees its pages when the workers report the transfer's end, and waits for that report."""
    loading = engine.load()
    loading.status = RequestStatus.FINISHED_ABORTED
    engine.ropes[0].arrived("r", 0)
    assert engine.begin() == set()
    freed: list[Any] = []
    engine.scheduler._free_blocks = freed.append
    engine.report("r")
    assert freed == [loading]


def test_a_failed_load_takes_its_own_way(engine: Engine) -> None:
    engine.load()
    engine.report("r", failed=("r",))
    assert engine.begin() == {"r"}
    assert engine.side._arrivals.reported({"r"}) == set()


def waits(engine: Engine) -> list[float]:
    """How long steps are asked to wait for the bell, from now on; nobody rings."""
    waited: list[float] = []
    engine.side._bell.wait = lambda seconds, _unless: bool(waited.append(seconds))  # type: ignore[method-assign]
    engine.side._look_again = 0
    return waited


def test_an_idle_step_waits_for_the_bell_and_a_busy_one_does_not(engine: Engine) -> None:
    engine.load()
    waited = waits(engine)
    engine.scheduler.running.append(object())
    engine.begin()
    assert not waited, "nobody else's tokens wait"
    engine.scheduler.running.clear()
    engine.begin()
    assert len(waited) == 1


def test_no_step_waits_that_has_a_request_to_go_on_with(engine: Engine) -> None:
    """vLLM keeps those that hold blocks apart from those that don't: a failed load must not wait for the next bell."""
    engine.load("r")
    engine.load("s")
    engine.report("r", failed=("r",))
    waited = waits(engine)
    engine.begin()
    assert not waited


def test_switched_off_nothing_is_taken_hold_of() -> None:
    engine = Engine(step_ahead=False)
    engine.load()
    engine.ropes[0].arrived("r", 0)
    assert engine.begin() == set()
    engine.close()


def test_another_scheduler_leaves_requests_to_their_reports(engine: Engine) -> None:
    """A scheduler class of somebody's own, or a vLLM that changed."""
    manager = SimpleNamespace(new_step_starts=lambda: None)
    starts = manager.new_step_starts
    assert SchedulerHook.of(object(), manager, lambda step: None, Settings()) is None
    del engine.scheduler.waiting
    assert SchedulerHook.of(engine.connector, manager, lambda step: None, Settings()) is None
    assert manager.new_step_starts is starts


def test_nothing_is_kept_of_requests_that_ended() -> None:
    arrivals = Arrivals(ranks=2)
    assert arrivals.hear({("r", 0), ("r", 1)}, {"r"}) == {"r"}
    arrivals.went_on({"r"})
    assert arrivals.reported({"r", "other"}) == {"r"}
    assert arrivals.reported({"r"}) == set()
    assert not arrivals._there


def test_what_prefill_found_is_known_before_a_request_that_went_on_ahead_is_answered(engine: Engine) -> None:
    """vLLM makes a step's outputs, and the usage in them, before it looks at the workers' report of that step."""
    loading = engine.load()
    loading.prefill_stats = PrefillStats()
    loading.prefill_stats.set(100, 0, 100)
    engine.ropes[0].arrived("r", 0)
    assert engine.begin() == {"r"}
    answered: list[int] = []
    engine.answer = lambda: answered.append(loading.prefill_stats.num_cached_tokens)
    result = SimpleNamespace(
        kv_connector_output=KVConnectorOutput(kv_connector_worker_meta=WorkerReport(cached={"r": 32}))
    )
    engine.scheduler.update_from_output(None, result)
    engine.scheduler.update_from_output(None, SimpleNamespace(kv_connector_output=None))
    assert answered == [32, 32]
