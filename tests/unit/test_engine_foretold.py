"""Prefill's worker says when its steps will end before they are launched, and learns from when they did."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from pdtransport.engine import worker
from pdtransport.engine.commands import Commands, Pages
from pdtransport.engine.worker import EngineWorker
from pdtransport.settings import Settings


class Offer:
    blocks = 1 << 20

    def __init__(self) -> None:
        self.expected: list[tuple[int, float]] = []
        self.passed: Any = None

    def expect(self, tokens: int, due: float) -> None:
        self.expected.append((tokens, due))

    def ready(self, pages: list[int], tokens: int, after: Any, passed: Any) -> None:
        self.passed = passed


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Any:
    made: Any = EngineWorker(Settings())
    made._transport = SimpleNamespace(geometry=SimpleNamespace(device=0), close=lambda: None)
    monkeypatch.setattr(made, "_mark", lambda: "event")
    made._offers["r"] = Offer()
    yield made
    made.close()


def step(side: Any, seconds: float, *pages: Pages) -> None:
    """One step as vLLM's newer model runner takes it, computed within so many seconds."""
    commands = Commands(after=list(pages))
    side._times.last_end = side._times.busy_until = 0.0  # those before it are long over
    began = time.monotonic()
    side.before_forward(commands)
    side.before_forward(commands)
    side.launched(commands)
    side.after_forward(commands)
    for offer in side._offers.values():
        if offer.passed is not None:
            offer.passed(began + seconds)


def test_decode_is_told_before_the_launch_once_enough_steps_were_seen(side: Any) -> None:
    offer = side._offers["r"]
    for _ in range(3):
        step(side, 0.1, Pages("r", [1, 2], 64))
    assert offer.expected == []
    now = time.monotonic()
    step(side, 0.1, Pages("r", [1, 2], 64))
    ((tokens, due),) = offer.expected
    assert tokens == 64
    assert due - now == pytest.approx(0.1, abs=0.02)


def test_what_lay_in_the_prefix_cache_takes_no_time(side: Any) -> None:
    """Of 64 tokens 63 lay there: as long as a step of one token."""
    for _ in range(30):
        step(side, 0.064, Pages("r", [1, 2], 64))
        step(side, 0.001, Pages("r", [1], 1))
    side._times.busy_until = 0.0
    now = time.monotonic()
    side.before_forward(Commands(after=[Pages("r", [1, 2], 64, 63)]))
    assert side._offers["r"].expected[-1][1] - now < 0.02


def test_steps_without_our_pages_and_kv_in_host_memory_foretell_nothing(side: Any, monkeypatch: Any) -> None:
    for _ in range(5):
        step(side, 0.1, Pages("stranger", [1], 32))
    side._transport.geometry.device = worker.HOST
    for _ in range(5):
        step(side, 0.1, Pages("r", [1], 32))
    assert side._offers["r"].expected == []
