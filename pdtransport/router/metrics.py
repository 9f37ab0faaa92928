"""The router's counters and histograms as Prometheus text. Every label takes values from a fixed set."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FAST_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_SLOW_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def sample(name: str, labels: Iterable[tuple[str, str]], value: float) -> str:
    """One line of the Prometheus text."""
    inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels)
    return f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


class Counter:
    def __init__(self, name: str, text: str, *labels: str) -> None:
        self.name, self.text, self.labels = name, text, labels
        self._values: dict[tuple[str, ...], int] = {} if labels else {(): 0}

    def add(self, *values: str, by: int = 1) -> None:
        self._values[values] = self._values.get(values, 0) + by

    def value(self, *values: str) -> int:
        return self._values.get(values, 0)

    def lines(self) -> list[str]:
        rows = [
            sample(self.name, zip(self.labels, values, strict=True), count)
            for values, count in sorted(self._values.items())
        ]
        return _head(self.name, "counter", self.text) + rows


class Histogram:
    def __init__(self, name: str, text: str, bounds: tuple[float, ...], label: str) -> None:
        self.name, self.text, self.bounds, self.label = name, text, bounds, label
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, value: float, label: str) -> None:
        counts = self._counts.setdefault(label, [0] * (len(self.bounds) + 1))
        counts[bisect_left(self.bounds, value)] += 1
        self._sums[label] = self._sums.get(label, 0.0) + value

    def lines(self) -> list[str]:
        rows = _head(self.name, "histogram", self.text)
        for label, counts in sorted(self._counts.items()):
            total = 0
            for bound, count in zip((*self.bounds, float("inf")), counts, strict=True):
                total += count
                le = "+Inf" if bound == float("inf") else f"{bound:g}"
                rows.append(sample(f"{self.name}_bucket", ((self.label, label), ("le", le)), total))
            rows.append(sample(f"{self.name}_sum", ((self.label, label),), self._sums[label]))
            rows.append(sample(f"{self.name}_count", ((self.label, label),), total))
        return rows


class Metrics:
    """All series of one router."""

    def __init__(self) -> None:
        self.requests = Counter("pdrouter_requests_total", "Requests that ended, by outcome.", "api", "path", "outcome")
        self.decode_only = Counter(
            "pdrouter_not_disaggregated_total", "Requests that decode served alone, by reason.", "reason"
        )
        self.retries = Counter(
            "pdrouter_retries_total", "Abandoned dispatches, by which server failed and how.", "role", "failure"
        )
        self.first_tokens = Counter(
            "pdrouter_first_tokens_total",
            "Disaggregated requests that were answered, by which server sampled their first token, and why decode did.",
            "server",
            "reason",
        )
        self.hand_offs = Counter(
            "pdrouter_hand_offs_total",
            "Hand-offs by outcome: handed_over, held (decode had the prompt), failed (with its code), unknown "
            "(decode's workers did not report).",
            "outcome",
            "code",
        )
        self.hand_off_links = Counter("pdrouter_hand_off_links_total", "Prompts handed over, by link.", "link")
        self.hand_off_bytes = Counter("pdrouter_hand_off_bytes_total", "Bytes handed over, by link.", "link")
        self.hand_off_exposed = Histogram(
            "pdrouter_hand_off_exposed_seconds",
            "From prefill's end to the last verified page on decode.",
            _FAST_S,
            "link",
        )
        self.hints = Counter("pdrouter_pool_hints_total", "Hints to the shared pool, by outcome.", "outcome")
        self.refused = Counter("pdrouter_refused_total", "Requests that the router itself refused.", "reason")
        self.placement_failures = Counter(
            "pdrouter_placement_failures_total",
            "Choices that least_loaded made because placement.policy failed to, by reason.",
            "reason",
        )
        self.routing = Histogram(
            "pdrouter_routing_seconds",
            "From a request's last body byte to its dispatch: the router's own work.",
            _FAST_S,
            "path",
        )
        self.prefill = Histogram("pdrouter_prefill_seconds", "From dispatch to prefill's answer.", _SLOW_S, "order")
        self.first_token = Histogram(
            "pdrouter_first_token_seconds",
            "From arrival to the first bytes of a streamed answer.",
            _SLOW_S,
            "path",
        )
        self.duration = Histogram("pdrouter_request_seconds", "From arrival to the last byte.", _SLOW_S, "path")

    def lines(self) -> list[str]:
        series = (
            self.requests, self.decode_only, self.retries, self.first_tokens, self.hand_offs, self.hand_off_links,
            self.hand_off_bytes, self.hand_off_exposed, self.hints, self.refused,
            self.placement_failures, self.routing, self.prefill, self.first_token, self.duration,
        )  # fmt: skip
        return [line for one in series for line in one.lines()]


def gauge(name: str, text: str, rows: Iterable[tuple[Iterable[tuple[str, str]], float]]) -> list[str]:
    """A gauge whose value is read at scrape time."""
    return _head(name, "gauge", text) + [sample(name, labels, value) for labels, value in rows]
