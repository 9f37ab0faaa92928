"""The scheduler's half when the workers' weights change: what is on its way fails, what is here stays here."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from pdtransport.engine.commands import Drop, Open, StartReceive, StoreChunks
from pdtransport.kv.keys import KeySpace
from pdtransport.settings import Settings
from pdtransport.vllm.pool_space import Shard
from pdtransport.vllm.scheduler import SchedulerSide
from tests.unit.test_vllm_generation import Manager
from tests.unit.test_vllm_pool import PROMPT, Half
from tests.unit.test_vllm_scheduler import BLOCK, CONSUME, PRODUCE, Clock, request, scheduler_half, step, take
from tests.unit.test_vllm_scheduler_hook import WAITING, Engine

REASON = "weights: reload_weights changed them here"
NEW = KeySpace(model="m", revision="other", dtype="d", layout="l", shard="heads 0-2 of 4", chunk_tokens=2 * BLOCK)


@pytest.fixture
def side() -> Iterator[SchedulerSide]:
    made = scheduler_half(Settings(step_ahead=False), clock=Clock())  # fmt: skip
    made.bind(None, Manager())
    yield made
    made.close()


def began(side: SchedulerSide, *names: str) -> None:
    """A step in which these requests are computed for the first time."""
    side.build(
        SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=0) for name in names],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens=dict.fromkeys(names, BLOCK),
            total_num_scheduled_tokens=BLOCK * len(names),
            preempted_req_ids=set(),
            kv_connector_block_state=None,
        )
    )


def reported(name: str = "r", failed: set[str] | None = None) -> Any:
    return SimpleNamespace(finished_recving={name}, finished_sending=None, failed_recving=failed)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """With as much of vLLM's own scheduler as decides whether a request's pages are computed anew."""
    made = Engine()
    made.kept, made.freed = [], []  # type: ignore[attr-defined]
    vars(made.manager).update(
        block_pool=SimpleNamespace(blocks=list(range(10))),
        evict_blocks=lambda blocks: None,
        cache_blocks=lambda request, tokens: made.kept.append(request.request_id),  # type: ignore[attr-defined]
        free=lambda request: made.freed.append(request.request_id),  # type: ignore[attr-defined]
    )
    vars(made.scheduler).update(
        kv_cache_manager=made.manager, failed_recving_kv_req_ids=set(), recompute_kv_load_failures=True,
        _mark_prefix_replay=lambda *args, **more: 0, _load_restores_replay_window=lambda request: False,
    )  # fmt: skip
    yield made
    made.close()


def outcome(engine: Engine, *names: str, failed: tuple[str, ...] = ()) -> None:
    """A step's outcome, looked at in vLLM's order: failures first, then arrivals, which the connector hears of."""
    engine.scheduler._handle_failed_recving(set(failed))
    engine.report(*names, failed=failed)


def promote(engine: Engine, loading: Any) -> None:
    """vLLM comes to a request whose pages were reported."""
    loading.num_tokens = loading.num_prompt_tokens
    assert loading.request_id in engine.scheduler.finished_recving_kv_req_ids
    engine.scheduler._update_waiting_for_remote_kv(loading)


@pytest.mark.parametrize("reported_before", [True, False], ids=["waits for room", "not reported yet"])
def test_pages_that_came_before_the_change_are_computed_anew(engine: Engine, reported_before: bool) -> None:
    """A request of decode's whose pages are there, and which was not computed yet, perhaps for long since the engine is
    full: its KV is of weights that are gone. It is computed from its first token, and its blocks never come into the
    prefix cache, from where later prompts would be computed, handed over and stored."""
    loading = engine.load()
    loading.num_computed_tokens = 100
    if reported_before:
        outcome(engine, "r")
    engine.side.weights_changed({}, REASON)
    if not reported_before:
        outcome(engine, "r")
    promote(engine, loading)
    assert loading.num_computed_tokens == 0
    assert (engine.kept, engine.freed) == ([], ["r"])  # type: ignore[attr-defined]
    assert engine.side.matched_tokens(loading, 0) == (0, False), "it is not asked for again"


def test_pages_that_went_on_before_their_report_are_computed_anew(engine: Engine) -> None:
    """The bell told that they are there; the report that comes after the change is no news, and the request is not
    loading any more when it does."""
    loading = engine.load()
    loading.num_computed_tokens = 100
    engine.ropes[0].arrived("r", 0)
    assert engine.begin() == {"r"}
    engine.side.weights_changed({}, REASON)
    promote(engine, loading)
    assert (loading.num_computed_tokens, engine.freed) == (0, ["r"])  # type: ignore[attr-defined]
    outcome(engine, "r")
    assert "r" not in engine.scheduler.failed_recving_kv_req_ids


def test_a_load_that_the_workers_ended_fails_once(engine: Engine) -> None:
    """A transfer that was under way at the change is reported as failed afterwards: nothing more comes of that."""
    loading = engine.load()
    engine.side.weights_changed({}, REASON)
    outcome(engine, "r", failed=("r",))
    promote(engine, loading)
    assert engine.freed == ["r"]  # type: ignore[attr-defined]
    assert engine.scheduler.failed_recving_kv_req_ids == set()


def test_requests_that_compute_go_on(engine: Engine) -> None:
    """As vLLM would have it."""
    running = engine.load()
    outcome(engine, "r")
    promote(engine, running)
    running.status = None
    engine.side.weights_changed({}, REASON)
    assert engine.scheduler.failed_recving_kv_req_ids == set()
    assert WAITING is not running.status


def test_pages_that_come_after_the_change_are_good(side: SchedulerSide) -> None:
    """The next request is of the new weights on both sides, or was refused."""
    side.weights_changed({}, REASON)
    made = request(CONSUME)
    side.on_new_request(made)
    (command,) = take(side, made, 0, 1, 2, 3, 4)
    assert isinstance(command, StartReceive)
    output = reported(failed=set())
    side.update_output(output)
    assert not output.failed_recving


def test_a_prefix_of_the_old_weights_is_not_handed_over(side: SchedulerSide) -> None:
    """A request that runs through the change may leave blocks of both in the prefix cache: who begins on them computes
    here, and is withdrawn for that reason; who begins on nothing is handed over."""
    began(side, "runs")
    side.weights_changed({}, REASON)
    for name in ("on-old", "fresh"):
        side.on_new_request(request({**PRODUCE, "transfer_id": name}, name=name))
    side.matched_tokens(request(None, name="on-old"), 32)
    side.matched_tokens(request(None, name="fresh"), 0)
    commands = step(side).before
    assert [type(each) for each in commands] == [Open, Open, Drop]
    assert (commands[2].req_id, commands[2].report) == ("on-old", False)
    assert "weights" in commands[2].reason


@pytest.fixture
def half() -> Iterator[Half]:
    made = Half()
    made.pool.introduce = lambda told: made.introduced.append(told)  # type: ignore[attr-defined]
    made.introduced = []  # type: ignore[attr-defined]
    yield made
    made.side.close()


def test_chunks_of_the_old_weights_are_neither_loaded_nor_stored(half: Half) -> None:
    """Requests that are here when the weights change store nothing more and load nothing; later ones use keys of the
    new weights, of which the pool is told."""
    waiting, running = half.arrive(name="waiting"), half.arrive(name="running")
    half.admit(running, 0)
    half.side.weights_changed({0: Shard([NEW])}, REASON)
    half.pool.asked.clear()
    assert half.side.matched_tokens(waiting, 0) == (0, False)
    assert step(half.side, {"running": (0, PROMPT)}).after == []
    later = half.arrive(name="later")
    ((keys, _),) = half.pool.asked
    old = half.side._pool._prompts["running"].keys  # type: ignore[union-attr]
    assert not set(keys) & {key for some in old.values() for key in some}
    half.admit(later, 0)
    (keep,) = step(half.side, {"later": (0, PROMPT)}).after
    assert isinstance(keep, StoreChunks)
    assert len(half.introduced) == 1  # type: ignore[attr-defined]


def test_a_load_of_the_old_weights_that_fails_is_not_stored_as_theirs(half: Half) -> None:
    """The workers end loads at a change; what is computed instead is of the new weights, and its keys are not."""
    loading = half.arrive(name="r")
    half.admit(loading, 2)
    half.side.weights_changed({0: Shard([NEW])}, REASON)
    output = reported(failed={"r"})
    half.side.update_output(output)
    assert step(half.side, {"r": (0, PROMPT)}).after == []
