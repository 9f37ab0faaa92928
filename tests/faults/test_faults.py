"""A short form of ``python -m tests.faults``, and what it has found, kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.lane import Lane
from tests.faults.plan import healthy
from tests.faults.report import Report
from tests.faults.rules import Rule
from tests.faults.runner import FIRST_PORT, LAST_PORT, described, random_plans, run_plans
from tests.faults.steps import step_plans
from tests.rig.ports import Ports

LINKS = ["cma", "ucx"]


@pytest.fixture
def lane() -> Iterator[Lane]:
    """Fresh processes: nobody knows the other yet."""
    it = Lane("ucx", 1, Ports(FIRST_PORT, LAST_PORT), 0)
    try:
        yield it
    finally:
        assert it.close() == []


@pytest.mark.parametrize("side", ["prefill0", "decode0"])
@pytest.mark.parametrize("action", ["duplicate", "delay"])
def test_words_about_links_that_come_twice_or_late_hold_no_slot(lane: Lane, side: str, action: str) -> None:
    """Promise 3: the staging slot of a measurement has an owner and a deadline (seed 415 found one kept for good)."""
    plan = healthy(1, lane.link, lane.prefills)
    plan.rules[side] = [Rule("out", "link", action, count=1000, seconds=0.3)]
    assert lane.run(plan).problems == []
