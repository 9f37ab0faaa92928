"""A short form of ``python -m tests.faults``, and what it has found, kept."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.faults.harness import Harness
from tests.faults.network import NoNamespaces
from tests.faults.plan import BLOCK_SIZE, Plan, Transfer, healthy
from tests.faults.report import Report
from tests.faults.rules import Rule
from tests.faults.runner import FIRST_PORT, LAST_PORT, pool_plans, random_plans, run_network, run_plans
from tests.faults.steps import step_plans
from tests.rig.ports import Ports

LINKS = ["cma", "ucx"]
SEEDS, LANES, SECONDS = 150, 6, 10.0
POOL_SEEDS, POOL_LANES, POOL_SECONDS = 60, 3, 5.0


@pytest.fixture
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    """Fresh processes: nobody knows the other yet."""
    it = Harness(getattr(request, "param", "cma"), 1, Ports(FIRST_PORT, LAST_PORT), 0)
    try:
        yield it
    finally:
        assert it.close() == []


@pytest.mark.parametrize("harness", ["ucx"], indirect=True)
@pytest.mark.parametrize("side", ["prefill0", "decode0"])
@pytest.mark.parametrize("action", ["duplicate", "delay"])
def test_words_about_links_that_come_twice_or_late_hold_no_slot(harness: Harness, side: str, action: str) -> None:
    """Promise 3: the staging slot of a measurement has an owner and a deadline (seed 415 found one kept for good)."""
    plan = healthy(1, harness.link, harness.prefills)
    plan.rules[side] = [Rule("out", "link", action, count=1000, seconds=0.3)]
    assert harness.run(plan).problems == []


@pytest.mark.parametrize("kind", ["accept", "batch", "commit", "abort"])
@pytest.mark.parametrize("action", ["replay", "foreign"])
def test_old_and_foreign_messages_change_nothing_and_are_counted(harness: Harness, kind: str, action: str) -> None:
    """Promise 2: a recorded message of a transfer that is over, of another generation, or of another transfer."""
    for seed in (1, 2, 3):
        assert harness.run(cancelled(seed, harness)).problems == []
    plan = cancelled(4, harness)
    plan.row, plan.column = kind, action
    plan.rules["prefill0"] = [Rule("out", kind, action, count=1000, seed=5)]
    result = harness.run(plan)
    assert result.problems == []
    assert result.injected[action] > 0


def cancelled(seed: int, harness: Harness) -> Plan:
    """One transfer that ends well, and one that prefill aborts."""
    plan, other = healthy(seed, harness.link, harness.prefills), healthy(seed + 100, harness.link, harness.prefills)
    (aborted,) = other.transfers
    aborted.ready, aborted.finish_at = [(0.05, 32)], 0.2
    aborted.cancel_side, aborted.cancel_at = "prefill", 0.2
    plan.transfers.append(aborted)
    plan.drops_rest = False
    return plan


@pytest.mark.parametrize("harness", [pytest.param("cma", marks=pytest.mark.more), "ucx"], indirect=True)
def test_a_flipped_bit_in_a_thousand_batches_is_found_and_mended(harness: Harness) -> None:
    """Promise 1: damage that is rare is found, too, and costs a resend: every transfer has the right bytes."""
    plan = healthy(11, harness.link, harness.prefills)
    plan.drops_rest = False
    plan.transfers.clear()
    for number in range(200):
        at = 0.04 * number
        steps = [(at + 0.002 * step, 4 * BLOCK_SIZE * (step + 1)) for step in range(6)]
        plan.transfers.append(Transfer(1000 + number, 24 * BLOCK_SIZE, 0, at, at, steps, at + 0.012))
    flips = random.Random(7).sample(range(400), 2)  # a busy machine announces what is there in fewer batches
    plan.rules["prefill0"] = [Rule("send", "any", "flip", first=first, seed=first) for first in flips]
    result = harness.run(plan)
    assert result.problems == []
    assert result.injected["flip"] == len(flips)
    # On a busy machine some may miss their deadlines, which harms nothing; none may end as damaged.
    assert set(result.ended) <= {"ok", "timeout", "no_pages"}
    assert result.ended["ok"] >= 0.9 * 2 * len(plan.transfers)


def test_faults_break_no_promise() -> None:
    """Right bytes or a clear end within the deadlines, nothing written or kept that should not be, and everything goes
    on afterwards: random faults, and each side killed at each protocol step. Seeds are printed; one replays."""
    report = Report(LINKS)
    run_plans(random_plans(range(SEEDS), LINKS) + step_plans(1, ["cma"]), LANES, report, seconds=SECONDS)
    assert report.failures == []
    assert report.trouble == []
    assert report.total.struck > report.total.runs / 3
    assert report.total.ends["ok"] > report.total.runs


def test_faults_of_the_pool_break_no_promise() -> None:
    """What is loaded is what was stored, every call ends by its deadline, nothing stored is lost while the pool lives,
    and neither pool nor clients keep anything: processes die and stand still in the middle of copies, disks fill up."""
    report = Report([])
    run_plans(pool_plans(range(POOL_SEEDS)), POOL_LANES, report, seconds=POOL_SECONDS)
    assert report.failures == []
    assert report.trouble == []
    assert report.total.struck > report.total.runs / 2
    assert report.total.ends["READ"] > report.total.runs


@pytest.mark.netns
def test_a_network_that_was_cut_carries_transfers_again() -> None:
    """Requests end within their deadlines while nothing gets through, and go through again afterwards."""
    report = Report(LINKS)
    try:
        run_network(1, ["cut 1 s"], report)
    except NoNamespaces as why:
        pytest.skip(str(why))
    assert report.failures + report.trouble == []
    assert report.total.mended != []


def test_a_link_that_could_not_be_agreed_on_is_tried_again(harness: Harness) -> None:
    """A word about links that got lost once must not part two peers for as long as they live (seed 519)."""
    plan = healthy(1, harness.link, harness.prefills)
    plan.rules["prefill0"] = [Rule("out", "link", "drop", count=1)]
    result = harness.run(plan)
    assert result.problems == []
    assert result.ended["refused"] == 1
