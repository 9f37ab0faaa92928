"""A step that began before its pages is held until these have found their end, whichever, and not for ever."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from pdtransport.settings import Settings
from pdtransport.vllm import worker
from pdtransport.vllm.metadata import Commands
from pdtransport.vllm.worker import WorkerSide

STEP = Commands(hold=["r"])
WAIT_S = 30.0


@pytest.fixture
def side() -> Any:
    made: Any = WorkerSide(Settings(), SimpleNamespace(), "kv_consumer")  # type: ignore[arg-type]
    yield made
    made.close()


def test_a_step_is_held_until_the_end_of_its_transfer_was_noted(side: Any) -> None:
    noted = side._arriving["r"] = threading.Event()
    held = threading.Thread(target=side.hold, args=[STEP])
    held.start()
    held.join(0.1)
    assert held.is_alive()
    noted.set()
    held.join(WAIT_S)
    assert not held.is_alive()
    (seconds,) = side.take_stats().data["held_s"]
    assert seconds >= 0.1


def test_a_transfer_that_has_ended_holds_nothing(side: Any) -> None:
    side.hold(STEP)
    side.hold(Commands())
    assert side.take_stats() is None


def test_pages_that_do_not_come_are_given_up(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits behind the step waits for no peer that fell silent."""
    monkeypatch.setattr(worker, "HOLD_S", 0.05)
    noted = side._arriving["r"] = threading.Event()
    reasons: list[str] = []
    side._receipts["r"] = SimpleNamespace(cancel=lambda reason: (reasons.append(reason), noted.set()))
    side.hold(STEP)
    assert len(reasons) == 1


def test_a_forward_pass_never_runs_over_pages_that_may_still_be_written(
    side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "HOLD_S", 0.01)
    monkeypatch.setattr(worker, "REWIND_S", 0.01)
    side._arriving["r"] = threading.Event()
    side._receipts["r"] = SimpleNamespace(cancel=lambda reason: None)
    with pytest.raises(RuntimeError, match="did not let go"):
        side.hold(STEP)
