"""Kills and halts at each step of the protocol, on each side."""

from __future__ import annotations

from tests.faults.plan import Plan, Transfer
from tests.faults.rules import Rule
from tests.faults.worker import BLOCK_SIZE

BLOCKS = 40  # five batches
HALTS_S = (1.0, 4.0)  # below and above the default control.liveness_s

# step -> side -> where the process dies: (point, kind, first, after)
STEPS: dict[str, dict[str, tuple[str, str, int, bool]]] = {
    "before grant": {"prefill": ("in", "grant", 0, False), "decode": ("out", "grant", 0, False)},
    "after grant": {"prefill": ("out", "accept", 0, True), "decode": ("out", "grant", 0, True)},
    "mid-batch": {"prefill": ("out", "batch", 1, True), "decode": ("receive", "any", 1, True)},
    "before commit": {"prefill": ("out", "commit", 0, False), "decode": ("placed", "any", 4, False)},
    "after commit, before ack": {"prefill": ("out", "commit", 0, True), "decode": ("out", "ack", 0, False)},
    "mid-revoke": {"prefill": ("in", "revoke", 0, False), "decode": ("out", "revoke", 0, True)},
}


def step_plan(step: str, side: str, action: str, seconds: float, number: int, link: str) -> Plan:
    """``action`` (kill or stop) strikes ``side`` at ``step``; ``number`` tells repetitions apart."""
    point, kind, first, after = STEPS[step][side]
    tokens = BLOCKS * BLOCK_SIZE
    prefills = 2 if number % 4 == 3 else 1
    column = f"{action} {side}" + (f" for {seconds:g} s" if seconds else "")
    replay = f"--links {link} --step '{step}' --side {side} --action {action} --halt {seconds:g} --number {number}"
    plan = Plan(hash_of(step, side, number), link, prefills, step, column, replay, stopped_s=seconds)
    ready = [(0.01, tokens // 4), (0.02, tokens // 2), (0.03, tokens)]
    each = Transfer(plan.seed, tokens, 0, 0.0, 0.0, ready, 0.03)
    if step == "mid-revoke":
        each.ready[-1] = (0.5, tokens)
        each.finish_at = 0.5
        each.cancel_side, each.cancel_at = "decode", 0.08
    plan.transfers.append(each)
    plan.rules[f"{side}0"] = [Rule(point, kind, action, first=first, after=after)]
    return plan


def step_plans(times: int, links: list[str]) -> list[Plan]:
    """Each side killed ``times`` times at each step over each link, and halted a quarter as often."""
    plans = []
    for number in range(times):
        for link in links:
            for step, sides in STEPS.items():
                for side in sides:
                    plans.append(step_plan(step, side, "kill", 0.0, number, link))
                    if number % 4 == 0:
                        plans += [step_plan(step, side, "stop", halt, number, link) for halt in HALTS_S]
    return plans


def hash_of(step: str, side: str, number: int) -> int:
    return 1_000_000 + (list(STEPS).index(step) * 2 + (side == "decode")) * 1000 + number
