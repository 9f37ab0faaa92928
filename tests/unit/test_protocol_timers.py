"""The agenda against a model that is a plain dictionary."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from pdtransport.protocol.timers import TimerQueue

KEYS = st.integers(0, 8)
TIMES = st.integers(0, 40).map(float)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), KEYS, TIMES | st.none()),
        st.tuples(st.just("due"), TIMES, st.none()),
        st.tuples(st.just("next"), st.none(), st.none()),
    ),
    max_size=120,
)


@given(STEPS)
def test_agenda_wakes_each_key_once_at_its_latest_time(steps: list[tuple[str, int, float | None]]) -> None:
    """Whatever is set and unset: what is due comes out once, in order of time, and nothing else does."""
    timers: TimerQueue[int] = TimerQueue()
    model: dict[int, float] = {}
    for verb, first, when in steps:
        if verb == "set":
            timers.set(first, when)
            if when is None:
                model.pop(first, None)
            else:
                model[first] = when
        elif verb == "due":
            out = list(timers.due(first))
            expected = {key: model.pop(key) for key in [k for k, at in model.items() if at <= first]}
            assert sorted(out) == sorted(expected)
            assert [expected[key] for key in out] == sorted(expected.values())
        else:
            assert timers.next() == (min(model.values()) if model else None)
    assert sorted(timers.due(float("inf"))) == sorted(model)
    assert timers.next() is None


@given(st.lists(st.tuples(KEYS, TIMES), min_size=1, max_size=400))
def test_agenda_stays_small(settings: list[tuple[int, float]]) -> None:
    """Setting one key again and again does not grow the heap without bound."""
    timers: TimerQueue[int] = TimerQueue()
    for key, when in settings * 3:
        timers.set(key, when)
        assert len(timers._heap) <= 64 + 4 * len(timers._when) + 1
        assert timers.next() == min(timers._when.values())


def test_forgetting_what_is_outdated_delays_nobody() -> None:
    """After thousands of changed deadlines, each key still wakes at its own, the soonest first."""
    for seed in range(20):
        chance = random.Random(seed)
        timers: TimerQueue[int] = TimerQueue()
        for _ in range(400):
            timers.set(chance.randrange(16), chance.random())
            assert timers.next() == min(timers._when.values())
        when = dict(timers._when)
        assert list(timers.due(1.0)) == sorted(when, key=lambda key: when[key])


def test_keys_may_be_set_again_while_what_is_due_comes_out() -> None:
    """A key that is set while others are handed out is found by the same round if it is due, as a machine's next
    deadline may be."""
    timers: TimerQueue[str] = TimerQueue()
    timers.set("a", 1.0)
    timers.set("b", 2.0)
    seen = []
    for key in timers.due(5.0):
        seen.append(key)
        if len(seen) == 1:
            timers.set("c", 4.0)
            timers.set("b", None)
    assert seen == ["a", "c"]
    assert timers.next() is None


def test_keys_are_never_compared() -> None:
    """Two keys that can't be ordered may share a time."""
    timers: TimerQueue[object] = TimerQueue()
    timers.set(("t", "hold"), 1.0)
    timers.set(("t", 7), 1.0)
    timers.set(("t", None), 1.0)
    assert len(list(timers.due(1.0))) == 3
