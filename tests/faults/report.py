"""What all runs showed, as a summary and as the page ``docs/faults.md``."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.lane import Result
from tests.faults.steps import STEPS


@dataclass
class Cell:
    runs: int = 0
    struck: int = 0  # runs in which the fault took effect
    failed: int = 0  # runs that broke a promise
    ends: Counter[str] = field(default_factory=Counter)
    took: list[float] = field(default_factory=list)
    noticed: list[float] = field(default_factory=list)
    mended: list[float] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.runs += 1
        self.struck += bool(result.injected) or bool(result.struck)
        self.failed += bool(result.problems)
        self.ends += result.ended
        self.took += result.took_s
        if result.noticed_s is not None:
            self.noticed.append(result.noticed_s)
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
            f"death noticed after: {spread(whole.noticed)}; transfers go through again after: {spread(whole.mended)}"
        )

    # -- the page ------------------------------------------------------------------------------------------------

    def markdown(self, machine: str, date: str) -> str:
        whole = self.total
        parts = [
            HEAD.format(
                runs=whole.runs,
                struck=whole.struck,
                failed=whole.failed,
                ends=sum(whole.ends.values()),
                links=" and ".join(self.links),
                commands="`, `".join(self.commands),
                machine=machine,
                date=date,
            ),
            self._failures(),
            STEPS_HEAD,
            self._table(),
            REST_HEAD,
            self._list(),
        ]
        return "\n".join(parts)

    def vllm_section(self, machine: str, date: str) -> str:
        """What the vLLM rig showed, for the same page."""
        whole, killed = self.total, Cell()
        for (_, column), cell in self.cells.items():
            if column == "kill":
                killed.merge(cell)
        head = VLLM_HEAD.format(
            runs=whole.runs,
            struck=whole.struck,
            failed=whole.failed,
            commands="`, `".join(self.commands),
            machine=machine,
            date=date,
            ends=sum(whole.ends.values()),
            told=spread(killed.noticed),
        )
        return "\n".join([head, self._failures("### Broken promises with vLLM\n"), self._list()])

    def write(self, path: Path, machine: str, date: str, *, vllm: bool) -> None:
        """Put this rig's part into the page; the other rig's stays as it is."""
        page = path.read_text(encoding="utf-8") if path.exists() else ""
        page = page.partition(TAIL_TITLE)[0]
        free, _, section = page.partition(VLLM_TITLE)
        section = VLLM_TITLE + section if section else ""
        if vllm:
            section = self.vllm_section(machine, date)
        else:
            free = self.markdown(machine, date)
        parts = [part.rstrip("\n") + "\n" for part in (free, section, TAIL) if part]
        path.write_text("\n".join(parts), encoding="utf-8")

    def _failures(self, title: str = "## Broken promises\n") -> str:
        if not self.failures and not self.trouble:
            return "No run broke a promise.\n"
        lines = [title]
        for text in self.failures:
            head, *problems = text.splitlines()
            lines.append(f"* {head}" + "".join(f"<br>`{problem.strip()[:300]}`" for problem in problems[:1]))
        if self.note:
            lines.insert(1, f"{self.note}\n")
        lines += [f"* at the end: {text}" for text in self.trouble]
        return "\n".join(lines) + "\n"

    def _table(self) -> str:
        columns = sorted({column for row, column in self.cells if row in STEPS})
        lines = ["| " + " | ".join(["protocol step", *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
        for row in STEPS:
            cells = [self._cell(self.cells.get((row, column))) for column in columns]
            lines.append("| " + " | ".join([row, *cells]) + " |")
        return "\n".join(lines) + "\n"

    @staticmethod
    def _cell(cell: Cell | None) -> str:
        if cell is None:
            return ""
        parts = [ends(cell)]
        if cell.noticed:
            parts.append(f"told after {spread(cell.noticed)}")
        parts.append(f"again after {spread(cell.mended)}")
        if cell.failed:
            parts.append(f"**{cell.failed} FAILED**")
        return "<br>".join([*parts, runs(cell)])

    def _list(self) -> str:
        lines = ["| where | what | transfers ended | took | again after | runs |", "|---|---|---|---|---|---|"]
        for (row, column), cell in sorted(self.cells.items()):
            if row not in STEPS:
                failed = f", **{cell.failed} FAILED**" if cell.failed else ""
                told = [row, column, ends(cell), spread(cell.took), spread(cell.mended), runs(cell) + failed]
                lines.append("| " + " | ".join(told) + " |")
        return "\n".join(lines) + "\n"


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


HEAD = """# Faults

Written by `{commands}` on {date} ({machine}); change the rig, not this page.

{runs} runs over the links {links}: real processes (one or two prefill workers, one decode worker), real sockets and
links, {ends} transfers. In {struck} of them the fault took effect; **{failed} broke a promise**. A run fails if
a transfer that was reported ok has other bytes than its prompt's, a byte is written that nobody granted, a transfer has
not ended by its deadlines, an error is raised in an I/O thread, a page, slot, ticket, descriptor or thread is not given
back, the counters do not add up, or transfers do not go through again afterwards.
"""
STEPS_HEAD = """## A process dies, or stands still, at a step of the protocol

The process strikes itself (SIGKILL, SIGSTOP) at exactly that step, in the middle of a transfer of five batches. A cell
says how the handles ended that the surviving and the stopped workers held (`ok`, or the outcome's code), how long
after the death a survivor's transfers had ended (*told after*: median / p99), and when a transfer went
through again, the restart of what died included (*again after*; the rig begins to try once all of the run's handles
have ended, so that an offer which nobody had claimed yet, kept for `deadlines.hold_s`, adds its 3 s here).
"""
REST_HEAD = """## Messages, batches and processes

One fault a run, unless it says otherwise, on two to five transfers at once; many strike only some of them, or none
(*struck*: runs in which the fault took effect). *took*: from the last word that the engines said about a transfer until
decode's handle ended; *again after*: until a transfer went through once the fault was over, or from a process' death
(median / p99 each). Deadlines are shortened here (`tests/faults/plan.py`); heartbeats and liveness are the defaults.
"""
VLLM_TITLE = "## Real vLLM\n"
VLLM_TEXT = """
Written by `{commands}` on {date} ({machine}).

{runs} runs, {ends} requests: vLLM servers with `tiny-lm` (two that prefill, two that decode) behind `pdrouter`. A run
is a round of two to seven requests, streamed or not, three of five through the router and the others straight to two
servers, while one thing goes wrong; or, where it says so, one request. In {struck} the fault took effect; **{failed}
broke a promise**. A run fails if status 200 comes with other tokens than a plain server's, a request has not ended by
its deadline, the router breaks a stream off without an error event, no request is answered afterwards, or one fails
without a fault. Every 25 rounds and in the end: all blocks free, no transfer, descriptors, threads and memory of
workers and router as at the start; servers that died, started again, are used again, while nobody else was started; no
stack trace in a log; no process left; the counters of servers none of which died agree with each other. Now and then
vLLM loses the word that wakes an idle process of its own and looks again after 5 s, with or without a KV connector; the
rig shortens that, so as to measure the faults.

*transfers ended*: `ok` (disaggregated), `ok from decode alone` (the end of the router's ladder), `left` (the client),
or the error. *took*: the whole request. *again after*: until a new request was answered once the fault was over, or
from a process' death. Requests that were under way through the router when a server was killed had ended {told} after
it (median / p99 of the rounds' last).
"""
VLLM_HEAD = VLLM_TITLE + VLLM_TEXT
TAIL_TITLE = "## What is not here yet\n"
TAIL = f"""{TAIL_TITLE}
Faults of the router itself, and of the shared pool.
"""
