"""When a step ends is foretold from those before, whatever its shape, and from no fewer than can tell."""

from __future__ import annotations

import pytest

from pdtransport.engine.step_times import ENOUGH, Chunk, StepTimes


def seconds(chunk: Chunk) -> float:
    """An 8B-shaped model's on an H100, about."""
    return 0.004 + 21e-6 * chunk.tokens + 8e-10 * chunk.tokens * (chunk.first + chunk.tokens / 2)


def taught(*chunks: Chunk) -> tuple[StepTimes, float]:
    """These steps one after the other, each launched when the one before it ended."""
    times, now = StepTimes(), 100.0
    for chunk in chunks:
        step = times.begin([chunk], now)
        now += seconds(chunk)
        step.ended(now)
    return times, now


SEEN = (Chunk(0, 1024), Chunk(0, 4096), Chunk(0, 8192), Chunk(8192, 7808), Chunk(0, 300), Chunk(8192, 100))


@pytest.mark.parametrize("chunk", [Chunk(0, 2000), Chunk(8192, 4000), Chunk(8000, 9000), Chunk(0, 8192)])
def test_a_step_of_a_new_shape_is_foretold(chunk: Chunk) -> None:
    times, now = taught(*SEEN)
    due = times.begin([chunk], now).due
    assert due is not None
    assert due - now == pytest.approx(seconds(chunk), rel=0.02)


def test_steps_of_one_shape_alone_foretell_that_shape() -> None:
    times, now = taught(*[Chunk(0, 1000)] * 5)
    due = times.begin([Chunk(0, 1000)], now).due
    assert due is not None
    assert due - now == pytest.approx(seconds(Chunk(0, 1000)), rel=0.02)


def test_nothing_is_foretold_from_too_little() -> None:
    times, now = taught(*[Chunk(0, 1000)] * (ENOUGH - 1))
    assert times.begin([Chunk(0, 1000)], now).due is None


def test_a_step_behind_another_one_ends_after_it() -> None:
    """Asynchronous scheduling launches a step while the one before it is computed."""
    times, now = taught(*SEEN)
    first = times.begin([Chunk(0, 8192)], now)
    second = times.begin([Chunk(8192, 8192)], now + 0.010)
    whole = seconds(Chunk(0, 8192)) + seconds(Chunk(8192, 8192))
    assert second.due == pytest.approx(now + whole, rel=1e-3)
    first.ended(now + seconds(Chunk(0, 8192)))
    second.ended(now + whole)
    assert times.begin([Chunk(0, 8192)], now + whole).due == pytest.approx(
        now + whole + seconds(Chunk(0, 8192)), rel=1e-3
    ), "the time that the second one waited is not counted as its own"


def test_a_slower_machine_is_learned() -> None:
    times, now = taught(*SEEN * 20)
    for _ in range(60):
        step = times.begin([Chunk(0, 4096)], now)
        now += 2 * seconds(Chunk(0, 4096))
        step.ended(now)
    due = times.begin([Chunk(0, 4096)], now).due
    assert due is not None
    assert due - now == pytest.approx(2 * seconds(Chunk(0, 4096)), rel=0.1)


def test_a_step_of_several_requests_is_one_step() -> None:
    """Each of them may say that it ended."""
    times, now = StepTimes(), 100.0
    for _ in range(20):
        step = times.begin([Chunk(0, 2048)] * 4, now)
        now += 0.4
        for _ in range(4):
            step.ended(now)
            now += 1e-5
    due = times.begin([Chunk(0, 2048)] * 4, now).due
    assert due is not None
    assert due - now == pytest.approx(0.4, rel=0.01)


def test_of_much_larger_steps_than_were_seen_nothing_is_foretold() -> None:
    """Decode's engine would stand still for what they take longer."""
    times, now = taught(*[Chunk(0, tokens) for tokens in (90, 100, 110, 95, 105, 100)])
    assert times.begin([Chunk(0, 130)], now).due is not None
    assert times.begin([Chunk(0, 2048)], now).due is None
    assert times.begin([Chunk(8192, 100)], now).due is None


def test_an_overestimate_does_not_put_later_steps_off() -> None:
    times, now = taught(*SEEN)
    times.begin([Chunk(0, 8192)], now).ended(now + 0.01)  # half of it was cached, say
    due = times.begin([Chunk(0, 1024)], now + 0.01).due
    assert due is not None
    assert due < now + 0.01 + 3 * seconds(Chunk(0, 1024))
