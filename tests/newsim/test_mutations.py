"""A simulator that finds nothing proves nothing: each rule of the protocol is broken on purpose, and must be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.newsim.mutants import MUTANTS, Mutant, plans
from tests.newsim.plan import Plan, plan_of
from tests.newsim.run import run

ROGUE_SEEDS = 150


def first_find(accept: Callable[[str], bool] = bool) -> tuple[int, str]:
    """How many plans it took, and what was found; ``(0, "")`` if nothing was."""
    for tried, plan in enumerate(plans(), 1):
        violation = run(plan).violation
        if violation and accept(violation):
            return tried, violation
    return 0, ""


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.rogue is None], ids=lambda m: m.name)
def test_a_broken_rule_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one rule broken, some schedule breaks a promise."""
    mutant.apply(monkeypatch)
    tried, _ = first_find()
    assert tried, f"mutant {mutant.name} survived"


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.rogue is not None], ids=lambda m: m.name)
def test_a_check_against_a_rogue_peer_is_needed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misbehaving prefill worker breaks no promise to decode, unless the check that stops it is taken out."""
    assert mutant.rogue is not None
    mutant.rogue(monkeypatch)
    for seed in range(ROGUE_SEEDS):
        assert not run(unpromised(plan_of(seed))).violation
    mutant.apply(monkeypatch)
    tried, found = first_find(lambda violation: "had to arrive" not in violation)
    assert tried, f"mutant {mutant.name} survived"
    assert "IllegalMove" not in found


def unpromised(plan: Plan) -> Plan:
    """The same schedule, where nothing needs to arrive: one peer is broken."""
    return replace(plan, requests=tuple(replace(request, must_be_ready=False) for request in plan.requests))
