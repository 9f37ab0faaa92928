"""A constant has one value."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
MODULES = sorted(path for room in ("pdtransport", "kernels", "launch") for path in (REPO / room).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPO)))
def test_a_modules_constants_are_assigned_once(path: Path) -> None:
    """A second one of the same name would silently replace the first: no linter says so."""
    targets = [
        target.id
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.isupper()
    ]
    assert [name for name, times in Counter(targets).items() if times > 1] == []
