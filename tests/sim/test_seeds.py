"""The promises over thousands of seeded schedules."""

from __future__ import annotations

import os

from tests.sim.__main__ import run_seeds
from tests.sim.plan import plan_of
from tests.sim.run import run

SEEDS = int(os.environ.get("PDTRANSPORT_SIM_SEEDS", "5000"))


def test_no_seed_breaks_a_promise() -> None:
    """No unverified byte, no late write, nothing leaked, nothing silent, and what can arrive arrives; each seed that
    fails is replayed with ``python -m tests.sim --seed N --trace``."""
    counters, failures = run_seeds(0, SEEDS, processes=2)
    assert failures == []
    # The schedules reach what they are for: all ends, all faults and all words came up.
    for name in ("cancelled", "damaged", "link", "mismatch", "overloaded", "peer_lost", "timeout"):
        assert counters[f"failed {name}"] > 0, name
    for name in (
        "crash",
        "shutdown",
        "stall",
        "partition",
        "reload",
        "lost",
        "undecodable",
        "claim",
        "nack",
        "abort",
        "revoke",
        "given back",
        "gave back early",
    ):
        assert counters[name] > 0, name
    assert counters["outcome ready"] > SEEDS


def test_a_seed_is_one_schedule() -> None:
    """The same seed gives the same trace, event by event."""
    for seed in (3, 44):
        first, second = run(plan_of(seed), tracing=True), run(plan_of(seed), tracing=True)
        assert first.log == second.log
        assert len(first.log) > 50
