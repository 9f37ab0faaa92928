"""The page of model families is what the command writes."""

from __future__ import annotations

import json
from typing import Any

from tests.layouts.__main__ import RESULTS
from tests.layouts.table import render
from tests.rig.servers import REPOSITORY

ROW: dict[str, Any] = {
    "family": "Gemma 3",
    "plain": "yes",
    "refused": "",
    "groups": [{"kind": "SlidingWindowSpec:64", "layers": 3, "block_size": 32, "page_bytes": 16384}],
    "pages": [3],
    "tokens": "30 of 30",
    "logprobs": "2.0e-06",
    "prefix": "288 of 300",
    "preemption": "equal after 2",
    "pool": "no: a | reason",
    "control": [0.8],
    "failed": [],
    "date": "2026-01-02",
    "vllm": "0.0",
    "void": True,
}


def line(**facts: Any) -> str:
    page = render({"Gemma 3": {**ROW, **facts}})
    (found,) = [each for each in page.splitlines() if each.startswith("| Gemma 3 ")]
    return found


def test_the_page_is_what_the_command_writes() -> None:
    """docs/models.md was not edited by hand, and is not older than the results."""
    assert (REPOSITORY / "docs" / "models.md").read_text() == render(json.loads(RESULTS.read_text()))


def test_a_row_says_what_does_not_count() -> None:
    """A row whose control changed too few answers is void; what was not run says so; a refusal stands in its words."""
    assert line().startswith("| Gemma 3 (**void**) | yes | window 64 (3 layers, 32): 3 | 30 of 30 | yes: 2.0e-06 |")
    assert line().endswith("| no: a \\| reason | 80% |")
    assert line(void=False, control=[1.0]).startswith("| Gemma 3 | yes ")
    assert "| no: 2.0e-02 |" in line(logprobs="2.0e-02")
    assert "| refused: no such thing |" in line(refused="no such thing")
    assert "| plain server does not run here: KeyError |" in line(plain="KeyError")
    assert "| Llama | not run |" in render({"Gemma 3": ROW})
    assert "| not run |" in line(preemption="")
