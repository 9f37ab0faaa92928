"""A request goes on in the first step after its pages arrived, in vLLM's own scheduler and engine step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from tests.unit.engine_rig import PROMPT, TOKEN, Engine


@pytest.fixture(params=[AsyncScheduler, Scheduler], ids=["async", "sync"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = Engine(request.param)
    yield made
    made.close()


def test_a_request_is_computed_in_the_step_that_begins_after_its_pages_arrived(engine: Engine) -> None:
    """The report that comes with that step is no news; the answer is complete, and the next step finds its prompt."""
    made = engine.waiting()
    engine.arrives()
    engine.step()
    assert engine.launched[-1] == {"r": 1}
    engine.step()
    assert engine.cached() == PROMPT
    engine.step(14)
    assert made.is_finished()
    assert engine.tokens_of("r") == [TOKEN] * 8


def test_a_request_that_is_aborted_in_its_first_step_leaves_nothing_behind(engine: Engine) -> None:
    engine.waiting()
    engine.arrives()
    engine.core.aborts_queue.put(["r"])  # a client left: looked at before the step's outcome
    engine.step(4)
    assert engine.tokens_of("r") == []
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 63
    assert not engine.scheduler.requests


def test_a_second_step_is_launched_at_once_where_launches_are_quick() -> None:
    engine = Engine()
    engine.waiting()
    engine.arrives()
    engine.step(2)
    assert engine.launched[-2:] == [{"r": 1}, {"r": 1}]
    engine.close()


def test_where_launches_are_slow_the_first_token_is_looked_at_before_the_second_launch() -> None:
    engine = Engine(graphs=CUDAGraphMode.NONE)
    engine.waiting()
    engine.arrives()
    engine.step(2)
    assert engine.launched[-2:] == [{"r": 1}, {}]
    assert engine.tokens_of("r") == [TOKEN]
    engine.step(2)
    assert {"r": 1} in engine.launched[-2:]
    engine.close()
