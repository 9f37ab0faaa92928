"""Every state of small hand-offs is explored, and bugs made on purpose are found (all: ``python -m tests.model``)."""

from __future__ import annotations

import pytest

from pdtransport.protocol import consumer as consumer_module
from pdtransport.protocol import producer as producer_module
from pdtransport.protocol.states import CONSUMER_MOVES, PRODUCER_MOVES
from tests.model.bugs import BUGS, Bug
from tests.model.case import Broken, Case
from tests.model.cases import FULL, SHORT
from tests.model.explore import Explorer
from tests.model.frozen import freeze, thaw


def test_no_order_of_events_breaks_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is lost, copied, overtaken, aborted or late: no write into pages that are not granted now, no page
    believed that was not verified for this generation, one end on each side, nothing held for ever. And what is
    explored is the protocol's own tables: every move in them is taken."""
    taken: set[tuple[object, object]] = set()
    for module, check in ((consumer_module, "check_consumer_move"), (producer_module, "check_producer_move")):
        original = getattr(module, check)

        def noted(old: object, new: object, original: object = original) -> None:
            original(old, new)  # type: ignore[operator]
            taken.add((old, new))

        monkeypatch.setattr(module, check, noted)
    for case in SHORT:
        found = Explorer(case).explore()
        assert found.complete, "\n".join([case.name, found.broken, *found.trace])
    for table in (CONSUMER_MOVES, PRODUCER_MOVES):
        assert {(old, new) for old, moves in table.items() for new in moves} - taken == set()


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in FULL if case not in SHORT], ids=lambda case: case.name)
@pytest.mark.timeout(1800)
def test_no_order_of_events_breaks_a_promise_with_more_of_everything(case: Case) -> None:
    """The same with two producers, two generations, restarts, losses and two batches."""
    found = Explorer(case).explore()
    assert found.complete, "\n".join([found.broken, *found.trace])


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_found_with_the_way_to_it(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exploration that finds nothing proves nothing: each bug made on purpose breaks the promise that it should, and
    the trace that is shown leads there, step by step, from the first state."""
    bug.apply(monkeypatch)
    found = Explorer(bug.case).explore()
    assert bug.says in found.broken, found.broken or "not found"
    assert found.trace
    explorer = Explorer(bug.case)
    state = explorer.first()
    for said in found.trace[:-1]:
        state = next(then for label, then in explorer.nexts(state) if explorer.said(label) == said)
    with pytest.raises((Broken, AssertionError, LookupError)):
        list(explorer.nexts(state))


def test_a_snapshot_is_whole() -> None:
    """What is made from a snapshot has the same snapshot, and does the same with the next event: the explorer's states
    are those of the code that runs in production."""
    explorer = Explorer(SHORT[0])
    explorer.explore(seconds=2.0)
    for number, frozen in enumerate(explorer._frozen):
        assert freeze(thaw(frozen)) == frozen
        for (at, event), (then, _) in list(explorer._steps.items())[:50]:
            if at == number and event[0] != "deliver":
                process = thaw(frozen)
                process.do(event)
                process.out = []
                assert freeze(process) == explorer._frozen[then]
