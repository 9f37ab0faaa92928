"""The tables of :mod:`pdtransport.protocol.states`: nothing moves that is not listed, and nothing is listed in vain."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pdtransport.protocol import consumer, producer
from pdtransport.protocol.states import (
    CONSUMER_ENDS,
    CONSUMER_MOVES,
    PRODUCER_ENDS,
    PRODUCER_MOVES,
    ConsumerState,
    IllegalMove,
    ProducerState,
    check_consumer_move,
    check_producer_move,
)
from tests.sim import cases
from tests.sim.plan import Plan, plan_of
from tests.sim.run import run

SEEDS = 600


def schedules() -> Iterator[Plan]:
    for group in (cases.lost_once, cases.shapes):
        for _, plan in group():
            yield plan
    for _, plan, _ in cases.endings():
        yield plan
    for seed in range(SEEDS):
        yield plan_of(seed)


def test_every_listed_move_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each move of both tables happens in some schedule: a move that nothing reaches is a claim without a check."""
    seen: set[tuple[object, object]] = set()

    def record(check: object) -> object:
        def checked(old: object, new: object) -> None:
            seen.add((old, new))
            check(old, new)  # type: ignore[operator]

        return checked

    monkeypatch.setattr(consumer, "check_consumer_move", record(check_consumer_move))
    monkeypatch.setattr(producer, "check_producer_move", record(check_producer_move))
    listed = {(old, new) for table in (CONSUMER_MOVES, PRODUCER_MOVES) for old, moves in table.items() for new in moves}
    for plan in schedules():
        run(plan)
        if seen == listed:
            break
    assert listed - seen == set()
    assert seen - listed == set()


@pytest.mark.parametrize("old", ConsumerState)
@pytest.mark.parametrize("new", ConsumerState)
def test_unlisted_consumer_moves_are_refused(old: ConsumerState, new: ConsumerState) -> None:
    """A decode-side move that the table does not list raises, and one that it lists does not."""
    if new in CONSUMER_MOVES[old]:
        check_consumer_move(old, new)
    else:
        with pytest.raises(IllegalMove, match=f"{old.value} -> {new.value}"):
            check_consumer_move(old, new)


@pytest.mark.parametrize("old", ProducerState)
@pytest.mark.parametrize("new", ProducerState)
def test_unlisted_producer_moves_are_refused(old: ProducerState, new: ProducerState) -> None:
    """A prefill-side move that the table does not list raises, and one that it lists does not."""
    if new in PRODUCER_MOVES[old]:
        check_producer_move(old, new)
    else:
        with pytest.raises(IllegalMove, match=f"{old.value} -> {new.value}"):
            check_producer_move(old, new)


def test_tables_are_whole() -> None:
    """Each state has its row, every row can be reached from the first one, and ends can be reached from every row."""
    for states, table, ends, first in (
        (ConsumerState, CONSUMER_MOVES, CONSUMER_ENDS, ConsumerState.GRANTING),
        (ProducerState, PRODUCER_MOVES, PRODUCER_ENDS, ProducerState.STREAMING),
    ):
        assert set(table) == set(states)
        reached, todo = {first}, [first]
        while todo:
            for new in table[todo.pop()]:  # type: ignore[index]
                if new not in reached:
                    reached.add(new)
                    todo.append(new)
        assert reached == set(states)
        assert ends
        for state in states:
            assert state in ends or table[state]  # type: ignore[index]


def test_a_failure_always_fences() -> None:
    """Decode reaches FAILED through FENCING alone: no page is given back without a fence."""
    assert [old for old, moves in CONSUMER_MOVES.items() if ConsumerState.FAILED in moves] == [ConsumerState.FENCING]
    assert [old for old, moves in CONSUMER_MOVES.items() if ConsumerState.READY in moves] == [ConsumerState.VERIFYING]
