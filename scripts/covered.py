"""Prints how much of each room the tests covered: ``python -m scripts.covered``, after those of ``make coverage``.

A room is a folder of docs/architecture.md; modules at the top of the package are one together. A figure counts lines
and branches, as coverage's own total does.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path, PurePath
from typing import Any

from coverage import Coverage

COUNTS = ("num_statements", "covered_lines", "num_branches", "covered_branches")


def room_of(path: str) -> str:
    """``router/`` of pdtransport/router/call.py, ``kernels/`` of kernels/pages.py."""
    folders = [part for part in PurePath(path).parts[:-1] if part != "pdtransport"]
    return f"{folders[0]}/" if folders else "(top)"


def measured() -> dict[str, Any]:
    """Coverage's own report of what ``.coverage`` holds, by file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        found = Coverage()
        found.load()
        found.json_report(outfile=str(report))
        files: dict[str, Any] = json.loads(report.read_text())["files"]
    return files


def table(files: dict[str, Any]) -> list[str]:
    """A line for each room, the least covered first, and one for all."""
    rooms: dict[str, Counter[str]] = defaultdict(Counter)
    for path, about in files.items():
        for room in (room_of(path), "all"):
            rooms[room].update({name: about["summary"][name] for name in COUNTS})
    lines = [f"{'room':<12} {'lines':>6} {'branches':>8} {'covered':>8}"]
    for room, counts in sorted(rooms.items(), key=lambda item: (item[0] == "all", share(item[1]))):
        lines.append(f"{room:<12} {counts[COUNTS[0]]:>6} {counts[COUNTS[2]]:>8} {share(counts):>7.1%}")
    return lines


def share(counts: Counter[str]) -> float:
    lines, covered, branches, taken = (counts[name] for name in COUNTS)
    return (covered + taken) / max(lines + branches, 1)


if __name__ == "__main__":
    print("\n".join(table(measured())))
