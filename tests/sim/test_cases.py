"""Hand-made schedules in which one thing goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.sim import cases
from tests.sim.plan import BLOCK_SIZE, LINK_KINDS, Fault, Plan
from tests.sim.run import run


@pytest.mark.parametrize(
    "group",
    [
        "lost_once",
        "lost_anywhere",
        "copied",
        "windows",
        "shapes",
        "foretold",
        "set_up",
        "claimed",
        "overtaken",
        "of_groups",
    ],
)
def test_every_transfer_arrives_though_one_thing_goes_wrong(group: str) -> None:
    """One lost message of any kind at any place, copies, small windows, held prefixes, preemptions: still Ready, in
    seconds, and prefill hears that it was delivered."""
    plans: Iterator[tuple[str, Plan]] = getattr(cases, group)()
    bad = {name: violation for name, plan in plans if (violation := run(plan).violation)}
    assert not bad


def test_lost_anywhere_reaches_past_the_last_message() -> None:
    """The sweep loses every message there is: the longest hand-off says fewer than it tries."""
    for link in LINK_KINDS:
        for tp in ((1, 1), (2, 1), (1, 2)):
            counters = run(cases.plain(link, tp=tp)).counters
            assert 0 < sum(counters[kind] for kind in cases.DELIVERY_KINDS) < cases.MAX_MESSAGES


def test_aborts_end_both_sides_and_say_why() -> None:
    """An abort ends both sides with the right code, even if the words about it get lost."""
    bad = {}
    for name, plan, code in cases.endings():
        result = run(plan)
        ended = result.outcomes.get("t")
        if result.violation or ended not in ("ready", "failed") or (ended == "failed" and not result.counters[code]):
            bad[name] = (result.violation, ended, {k: v for k, v in result.counters.items() if k.startswith("failed")})
    assert not bad


def test_a_request_that_decode_rejects_is_let_go() -> None:
    """Prefill is told, and books what it was; if the word gets lost, its own deadline ends the wait."""
    for name, plan, code in cases.declined():
        result = run(plan)
        released = {key: count for key, count in result.counters.items() if key.startswith("released")}
        workers = plan.producers["p0"]
        assert (result.violation, released) == ("", {f"released {code}": workers}), name


def test_everything_ends_where_one_side_is_gone() -> None:
    """Whoever dies for good, or is taken for dead, at whatever moment: the other side ends what it had with it."""
    bad = {name: violation for name, plan in cases.gone() if (violation := run(plan).violation)}
    assert not bad


def test_a_dead_prefill_server_is_not_waited_for() -> None:
    """After a crash of prefill decode fails with peer_lost, and its pages are free."""
    for link in LINK_KINDS:
        slow = cases.plain(link, must_be_ready=False, step_s=0.3, step_tokens=BLOCK_SIZE)
        result = run(replace(slow, faults=(Fault(0.8, "crash", "p0", seconds=2.0),)))
        assert not result.violation
        assert result.counters["failed peer_lost"] == 1


def test_a_block_that_prefill_gave_back_too_early_is_a_mismatch() -> None:
    """Decode is granted no page for a block that is gone: both sides say mismatch, and no page is used."""
    bad = {}
    for name, plan in cases.given_back_early():
        result = run(plan)
        said = {key: count for key, count in result.counters.items() if key.startswith("failed")}
        if result.violation or result.outcomes != {"t": "failed"} or not said.get("failed mismatch"):
            bad[name] = (result.violation, result.outcomes, said)
    assert not bad


def test_prefill_gives_back_what_lies_behind_a_window() -> None:
    """The cases of several groups are what they say: with 20 tokens to hand over and a window of 9, two blocks of 4 are
    gone before the prompt is computed, and decode receives the last two of that group, beside all five of the other."""
    groups = cases.MODELS["window behind full attention"]
    result = run(cases.with_groups(cases.plain(step_tokens=3), groups))
    assert (result.violation, result.counters["given back"]) == ("", 2)
    assert result.counters["batch"] == 5 + 2


def test_a_prompt_that_differs_never_arrives() -> None:
    """Prefill that computed another prompt under the same transfer id is refused as a mismatch."""
    result = run(cases.plain(must_be_ready=False, producer_prompt=11))
    assert not result.violation
    assert result.counters["failed mismatch"] == 1
