"""Figures of two builds, paired run by run: differences, their 95 % intervals, and whether these are within bounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from benchmarks._handoff_report import markdown

LEAST_PAIRS = 4  # with fewer there is no interval: two that agree by chance would have a narrow one
SHARE = 0.03  # of the old median
LEAST_MS = 1.0  # of a client's times
# Student's t, 95 % two-sided, for 3, 4, ... degrees of freedom; more than these count as the last.
T95 = (3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)


@dataclass(frozen=True)
class Unit:
    """``scale``: what the JSON's numbers are divided by. ``least``: bound below which a difference never counts."""

    name: str
    scale: float = 1.0
    more_is_better: bool = False
    least: float = 0.0


MS = Unit("ms", least=LEAST_MS)
CPU_MS = Unit("ms")
GB_S = Unit("GB/s", 1e9, more_is_better=True)
PER_S = Unit("/s", more_is_better=True)

# What names a row in the JSON of a benchmark, and which of its numbers are compared.
LABELS = ("mode", "workload", "rate", "what", "how", "page_kib", "tokens", "clients", "system")
FIGURES = {
    **dict.fromkeys(("ttft_ms", "handoff_ms", "prefill_ms"), MS),  # handoff
    **dict.fromkeys(("TTFT", "hand-off", "prefill", "exposed", "commit"), MS),  # handoff --gpu
    **dict.fromkeys(("first p50", "again p50"), MS),  # reuse
    **dict.fromkeys(("TTFT p50", "2nd p50", "ITL p50", "exposed p50"), MS),  # load
    **dict.fromkeys(("ttft_p50_ms", "ttft_p99_ms", "added_p50_ms", "added_p99_ms"), MS),  # router
    "cpu_ms": CPU_MS,
    "requests_s": PER_S,
    "bytes_s": GB_S,  # links
}

Run = dict[str, float]  # figure -> its value in one run, in its unit
Pair = tuple[Run, Run]  # of the old build, of the new one


def figures_of(document: Mapping[str, Any]) -> tuple[Run, dict[str, Unit]]:
    """Each figure of a benchmark's JSON by name (the row's labels, then the column), and its unit."""
    values: Run = {}
    units: dict[str, Unit] = {}
    for row in document.get("rows", ()):
        label = ", ".join(_told(name, row[name]) for name in LABELS if row.get(name) not in (None, "", 0))
        for column, unit in FIGURES.items():
            value = row.get(column)
            if isinstance(value, (int, float)):
                name = f"{label}: {column.removesuffix('_ms').removesuffix('_s')}"
                values[name], units[name] = value / unit.scale, unit
    return values, units


def _told(label: str, value: Any) -> str:
    if label == "page_kib":
        return f"{value} KiB"
    return f"{value:g} {label}" if isinstance(value, (int, float)) else str(value)


@dataclass(frozen=True)
class Row:
    """One figure of both builds. ``interval``: of the mean difference, new less old; None with too few pairs."""

    name: str
    unit: Unit
    pairs: int
    old: float
    new: float
    difference: float
    interval: tuple[float, float] | None

    @property
    def bound(self) -> float:
        return max(SHARE * abs(self.old), self.unit.least)

    @property
    def verdict(self) -> str:
        """``within``: the whole interval; ``better`` or ``worse``: it lies on one side of 0 and leaves the bound there;
        ``open``: too wide to tell, or unknown."""
        if self.interval is None:
            return "open"
        low, high = self.interval
        if -self.bound <= low and high <= self.bound:
            return "within"
        if low <= 0 <= high:
            return "open"
        return "better" if (low > 0) == self.unit.more_is_better else "worse"


def compare(pairs: Sequence[Pair], units: Mapping[str, Unit]) -> list[Row]:
    """A row for each figure that both builds have in at least one pair, in the order of the new build's."""
    rows = []
    for name in dict.fromkeys(name for _, new in pairs for name in new):
        both = [(old[name], new[name]) for old, new in pairs if name in old and name in new]
        if both:
            differences = [new - old for old, new in both]
            old, new = (median(values) for values in zip(*both, strict=True))
            rows.append(Row(name, units[name], len(both), old, new, median(differences), interval_of_mean(differences)))
    return rows


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """Where the mean lies with 95 % confidence (Student's t); None with fewer than ``LEAST_PAIRS``."""
    if len(values) < LEAST_PAIRS:
        return None
    reach = T95[min(len(values) - LEAST_PAIRS, len(T95) - 1)] * stdev(values) / len(values) ** 0.5
    return fmean(values) - reach, fmean(values) + reach


def unpaired(pairs: Sequence[Pair]) -> list[str]:
    """A line for each figure that a build lacks in some pair or in all of them."""
    lines = []
    names = dict.fromkeys(name for pair in pairs for run in pair for name in run)
    for name in names:
        lacking = [sum(name not in pair[side] for pair in pairs) for side in (0, 1)]
        for build, missing in zip(("old", "new"), lacking, strict=True):
            if missing:
                lines.append(f"{name}: missing in {missing} of {len(pairs)} runs of the {build} build")
    return lines


def table(rows: Iterable[Row]) -> str:
    """Figures, and differences in the figure's unit and in percent of the old median."""
    head = ["figure", "unit", "pairs", "old", "new", "difference", "95 % interval", "bound", "verdict"]
    return markdown(head, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    share = f" ({100 * row.difference / row.old:+.1f} %)" if row.old else ""
    interval = "too few pairs" if row.interval is None else " to ".join(f"{end:+.3g}" for end in row.interval)
    values = [f"{row.old:.4g}", f"{row.new:.4g}", f"{row.difference:+.3g}{share}", interval, f"{row.bound:.3g}"]
    return [row.name, row.unit.name, str(row.pairs), *values, row.verdict]
