"""The pool's benchmark on CPU: that it runs, small, so that a figure can be had when one is wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import pool
from tests.rig.ports import Ports


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("bytes", {"store", "load", "store / memcpy", "load / memcpy"}),
        ("disk", {"disk write", "disk read"}),
        ("remote", {"store", "load"}),
    ],
)
def test_each_part_gives_its_figures(part: str, expected: set[str], tmp_path: Path) -> None:
    """Through a pool in a process of its own."""
    port = str(Ports().take(2))
    options = ["--parts", part, "--bytes", "8388608", "--chunk", "1048576", "--rounds", "1", "--disk", str(tmp_path)]
    assert pool.main([*options, "--port", port, "--json", str(tmp_path / "found.json")]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert expected <= set(found)
    assert all(found[what] > 0 for what in expected)
