"""What all runs showed, in numbers; :mod:`tests.faults.page` makes ``docs/faults.md`` of it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.harness import Result


@dataclass
class Cell:
    runs: int = 0
    struck: int = 0  # runs in which the fault took effect
    failed: int = 0  # runs that broke a promise
    ends: Counter[str] = field(default_factory=Counter)
    took: list[float] = field(default_factory=list)
    told: list[float] = field(default_factory=list)  # these, as in Result
    held: list[float] = field(default_factory=list)
    beyond: list[float] = field(default_factory=list)
    healthy: list[float] = field(default_factory=list)
    mended: list[float] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.runs += 1
        self.struck += bool(result.injected) or bool(result.struck)
        self.failed += bool(result.problems)
        self.ends += result.ended
        self.took += result.took_s
        self.told += result.told_s
        self.held += result.held_s
        self.beyond += result.beyond_s
        self.healthy += result.healthy_s
        if result.mended_s is not None:
            self.mended.append(result.mended_s)

    def merge(self, other: Cell) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Report:
    links: Sequence[str]
    cells: dict[tuple[str, str], Cell] = field(default_factory=lambda: defaultdict(Cell))
    failures: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)  # at the end, of no run in particular
    commands: list[str] = field(default_factory=list)
    note: str = ""  # about the failures

    def add(self, result: Result) -> None:
        self.cells[result.plan.row, result.plan.column].add(result)
        if result.problems:
            self.failures.append(described(result))

    def save(self, path: Path) -> None:
        cells = [[*place, vars(cell)] for place, cell in self.cells.items()]
        known = {"commands": self.commands, "failures": self.failures, "trouble": self.trouble, "cells": cells}
        path.write_text(json.dumps(known), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Add what an earlier invocation saved."""
        known = json.loads(path.read_text(encoding="utf-8"))
        for name in ("commands", "failures", "trouble"):
            setattr(self, name, [*known[name], *getattr(self, name)])
        for row, column, cell in known["cells"]:
            self.cells[row, column].merge(Cell(**{**cell, "ends": Counter(cell["ends"])}))

    @property
    def total(self) -> Cell:
        whole = Cell()
        for cell in self.cells.values():
            whole.merge(cell)
        return whole

    def summary(self, seconds: float) -> str:
        whole = self.total
        ends = ", ".join(f"{code} {count}" for code, count in whole.ends.most_common())
        return (
            f"{whole.runs} runs in {seconds:.1f} s, faults took effect in {whole.struck}, {whole.failed} failed, "
            f"{len(self.trouble)} troubles at the end\n"
            f"transfers by their ends: {ends}\n"
            f"survivors are told of a death after: {spread(whole.told)}; end beyond a healthy request by: "
            f"{spread(whole.beyond)}; kept for nobody: {spread(whole.held)}\n"
            f"goes through again after: {spread(whole.mended)}"
        )


def ends(cell: Cell) -> str:
    return ", ".join(f"{code} {count}" for code, count in cell.ends.most_common())


def runs(cell: Cell) -> str:
    return f"{cell.runs} runs" + ("" if cell.struck == cell.runs else f", {cell.struck} struck")


def described(result: Result) -> str:
    plan = result.plan
    lines = [f"FAILED {plan.row} / {plan.column}: python -m tests.faults {plan.replay}"]
    lines += [f"    {problem}" for problem in result.problems[:8]]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Median and 99th percentile, in seconds."""
    if not values:
        return "-"
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return f"{seconds(ordered[len(ordered) // 2])} / {seconds(p99)} s"


def seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
