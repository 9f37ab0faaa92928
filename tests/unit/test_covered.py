"""scripts/covered.py: what ``make coverage`` prints."""

from __future__ import annotations

from typing import Any

from scripts import covered


def measured(lines: int, covered_lines: int, branches: int = 0, taken: int = 0) -> dict[str, Any]:
    names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    return {"summary": dict(zip(names, (lines, covered_lines, branches, taken), strict=True))}


def test_each_room_has_one_line_and_the_least_covered_comes_first() -> None:
    """Files of a room are added up, lines and branches alike; the last line is all of it."""
    shown = covered.table(
        {
            "pdtransport/router/call.py": measured(60, 60, 20, 10),
            "pdtransport/pool/core/store.py": measured(10, 2),
            "pdtransport/pool/cli.py": measured(10, 4),
            "kernels/pages.py": measured(20, 20),
            "pdtransport/settings.py": measured(40, 30),
        }
    )
    assert [line.split() for line in shown[1:]] == [
        ["pool/", "20", "0", "30.0%"],
        ["(top)", "40", "0", "75.0%"],
        ["router/", "60", "20", "87.5%"],
        ["kernels/", "20", "0", "100.0%"],
        ["all", "140", "20", "78.8%"],
    ]
