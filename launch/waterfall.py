"""Shows where the time of one request went, as text bars, from the router's trace and decode's workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 36  # width of a bar in columns

# Milestones in order, and the name of the interval that ends at each.
_STRETCHES: tuple[tuple[str, str], ...] = (
    ("dispatched", "router chooses and dispatches"),
    ("first_batch", "prefill queues and computes its first pages"),
    ("last_batch", "pages are transferred while prefill computes the rest"),
    ("verified", "commit, and decode verifies"),
    ("first_token", "decode schedules and computes its first token"),
    ("done", "decode writes the rest"),
)
# The same if prefill gave out the first token.
_EARLY: tuple[tuple[str, str], ...] = (
    ("dispatched", "router chooses and dispatches"),
    ("first_batch", "prefill queues and computes its first pages"),
    ("first_token", "prefill computes the rest and answers with the first token"),
    ("verified", "commit, and decode verifies"),
    ("done", "decode continues from the first token"),
)


def milestones(trace: Mapping[str, Any], total_s: float) -> dict[str, float]:
    """Seconds from the request's arrival to each milestone; milestones that were not reached are left out.

    ``total_s`` is the client's own measurement of the whole request.
    """
    events = trace.get("events", {})
    found = {"done": total_s}
    for name in ("dispatched", "first_token"):
        if name in events:
            found[name] = events[name]
    for record in records(trace, "decode"):
        for name in ("first_batch", "last_batch", "verified"):
            if name in record.get("events", {}):
                since = record["events"][name] - trace["at"]
                # With several workers, take the earliest first batch, and the latest of the others.
                pick = min if name == "first_batch" else max
                found[name] = pick(found.get(name, since), since)
    return found


def records(trace: Mapping[str, Any], role: str) -> list[dict[str, Any]]:
    """The workers' records of the transfer, for all ranks of ``role``."""
    ranks = (trace.get("workers", {}).get(role) or {}).get("ranks") or ()
    return [record for rank in ranks if rank for record in rank.get("transfers", ())]


def bars(passed: Mapping[str, float]) -> list[str]:
    """One line per interval: a bar on the scale of the whole request, its duration, its name."""
    total = max(passed["done"], 1e-6)
    lines, at = [], 0.0
    whole = "first_token" not in passed  # the router can't see the first token of an answer that is not streamed
    early = passed.get("first_token", total) < passed.get("verified", 0.0)
    for name, text in _EARLY if early else _STRETCHES:
        if name not in passed:
            continue
        until = min(max(passed[name], at), total)  # the clocks of two processes differ slightly
        told = "decode writes the answer" if name == "done" and whole else text
        lines.append(f"|{_bar(at, until, total)}| {(until - at) * 1e3:8.1f} ms  {told}")
        at = until
    return lines


def _bar(start: float, end: float, total: float) -> str:
    first = min(int(start / total * WIDTH), WIDTH - 1)
    last = max(first + 1, round(end / total * WIDTH))
    return " " * first + "=" * (last - first) + " " * (WIDTH - last)


def moved(trace: Mapping[str, Any]) -> str:
    """What was transferred, or why nothing was."""
    found: Sequence[dict[str, Any]] = records(trace, "decode")
    total = sum(int(record.get("bytes", 0)) for record in found)
    if total:
        pages = sum(int(record.get("blocks", 0)) for record in found)
        held = sum(int(record.get("skipped_blocks", 0)) for record in found)
        skipped = f", {held} already cached" if held else ""
        return f"{pages} pages, {total / 1e6:.2f} MB over {found[0].get('link') or 'an unnamed link'}{skipped}"
    reasons = [record["reason"] for record in found if record.get("reason")]
    why = reasons[0] if reasons else trace.get("why_not_disaggregated")
    return (
        "no page was transferred: "
        f"{why or 'decode asked for none (the prompt is shorter than a page, or already cached)'}"
    )
