"""Prefill's cache is full of finished prompts that decode has no room for, and decode's of room for prompts that
prefill has no room for: prefill gives way. With real vLLM:
``python -m tests.soak.kills --only nothing --cache-tokens 8192``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from pdtransport.engine.commands import ReleaseIfPooled
from pdtransport.engine.crowding import NEXT_S, STILL_S
from pdtransport.vllm.scheduler import SchedulerSide
from tests.unit.test_vllm_scheduler import PRODUCE, Clock, request, scheduler_half, step


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def side(clock: Clock) -> SchedulerSide:
    return scheduler_half(consumer=False, clock=clock)


def prompt(side: SchedulerSide, name: str) -> Any:
    """A request whose prompt is to be handed over arrives."""
    made = request({**PRODUCE, "transfer_id": name}, name=name, status=RequestStatus.FINISHED_LENGTH_CAPPED)
    side.on_new_request(made)
    return made


def finish(side: SchedulerSide, name: str) -> None:
    """It is computed, and its pages are held for decode."""
    made = prompt(side, name)
    step(side, {name: (0, 100)})
    made.num_computed_tokens = 100
    assert side.finished(made, ([1, 2, 3, 4],))[0]
    step(side, {"other": (0, 1)})


def let_go(side: SchedulerSide) -> list[str]:
    return [command.req_id for command in step(side).before if isinstance(command, ReleaseIfPooled)]


def test_prefill_that_stands_still_lets_go_of_the_newest_finished_prompts_one_by_one(
    side: SchedulerSide, clock: Clock
) -> None:
    """Nothing computed for a while although a prompt waits: one goes, then the next, until something is computed. Each
    is named once."""
    for name in ("a", "b", "c"):
        finish(side, name)
    prompt(side, "waits")
    assert let_go(side) == []
    clock.now += STILL_S
    assert let_go(side) == ["c"]
    assert let_go(side) == []
    clock.now += NEXT_S
    assert let_go(side) == ["b"]
    clock.now += NEXT_S
    step(side, {"waits": (0, 10)})
    assert let_go(side) == []
    clock.now += STILL_S
    assert let_go(side) == ["a"]
    clock.now += STILL_S
    assert let_go(side) == []


def test_an_idle_prefill_keeps_what_decode_will_want(side: SchedulerSide, clock: Clock) -> None:
    """Where nobody waits for room, nothing is let go, however long decode takes."""
    finish(side, "a")
    for _ in range(10):
        clock.now += STILL_S
        assert let_go(side) == []


def test_what_decode_took_is_not_let_go(side: SchedulerSide, clock: Clock) -> None:
    """Only prompts whose pages are still held count."""
    for name in ("a", "b"):
        finish(side, name)
    side.update_output(SimpleNamespace(finished_recving=None, finished_sending={"b"}))
    prompt(side, "waits")
    let_go(side)
    clock.now += STILL_S
    assert let_go(side) == ["a"]
