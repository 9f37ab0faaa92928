"""Medians, ratios and tables of `benchmarks.handoff`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks._handoff_systems import Sample

BASE = "aggregated"
STAGES = ("P start", "compute", "tail", "D step", "hand-off")


def summarise(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row per length and system, by length: medians in milliseconds, and ratios to the aggregated server."""
    rows = []
    names = list(dict.fromkeys(sample.system for sample in samples))
    for length in sorted({sample.length for sample in samples}):
        base = _median(s.ttft_s for s in samples if (s.system, s.length) == (BASE, length))
        nixl = _median(s.handoff_s for s in samples if (s.system, s.length) == ("nixl", length))
        for name in names:
            chosen = [s for s in samples if (s.system, s.length) == (name, length)]
            if not chosen:
                continue
            ttft, handoff = _median(s.ttft_s for s in chosen), _median(s.handoff_s for s in chosen)
            prefill = _median(s.prefill_s for s in chosen)
            rows.append(
                {
                    "tokens": length,
                    "system": name,
                    "runs": len(chosen),
                    "failed": sum(bool(s.failed) for s in chosen),
                    "prefill_ms": _ms(prefill),
                    "handoff_ms": _ms(handoff),
                    "ttft_ms": _ms(ttft),
                    "ttft_best_ms": _ms(min((s.ttft_s for s in chosen if s.ttft_s is not None), default=None)),
                    "prefill_x": _ratio(prefill, base),
                    "ttft_x": _ratio(ttft, base),
                    "handoff_of_nixl": _ratio(handoff, nixl),
                    "decode_cpu": _round(_median(s.decode_cpu for s in chosen), 2),
                    "foreign_cpu": _round(_median(s.foreign_cpu for s in chosen), 2),
                }
            )
    return rows


COLUMNS = {
    "tokens": "tokens",
    "system": "system",
    "prefill_ms": "prefill ms",
    "handoff_ms": "hand-off ms",
    "ttft_ms": "TTFT ms",
    "ttft_best_ms": "(best)",
    "failed": "failed",
    "prefill_x": "prefill x",
    "ttft_x": "TTFT x",
    "handoff_of_nixl": "hand-off / NIXL's",
    "decode_cpu": "D cpu",
    "foreign_cpu": "others' cpu",
}


def summary_table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown(list(COLUMNS.values()), [[_cell(row[key]) for key in COLUMNS] for row in rows])


def breakdown_table(samples: Sequence[Sample]) -> str:
    """Where the time of each kind of hand-off went, in milliseconds; "" without any."""
    lines = []
    staged = [sample for sample in samples if sample.stages]
    for length in sorted({sample.length for sample in staged}):
        for name in dict.fromkeys(sample.system for sample in staged):
            chosen = [s.stages for s in staged if (s.system, s.length) == (name, length)]
            if chosen:
                medians = [_cell(_ms(median(stages[stage] for stages in chosen))) for stage in STAGES]
                lines.append([str(length), name, *medians])
    return markdown(["tokens", "system", *(f"{stage} ms" for stage in STAGES)], lines) if lines else ""


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with columns padded to equal width, so that it reads well as text too."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    text = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [head, *lines]]
    text.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in text)


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _ms(seconds: float | None) -> float | None:
    return _round(seconds * 1e3 if seconds is not None else None, 1)


def _ratio(value: float | None, base: float | None) -> float | None:
    return _round(value / base, 2) if value is not None and base else None


def _round(value: float | None, digits: int) -> float | None:
    return round(value, digits) if value is not None else None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(round(value)) if isinstance(value, float) and abs(value) >= 100 else str(value)
