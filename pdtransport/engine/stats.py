"""Statistics of a worker's transfers, stores and loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pdtransport.transfer.outcome import Outcome

MAX_OBSERVATIONS = 4096  # values kept per reporting interval; further transfers count in the totals only


@dataclass
class TransferStats:
    """Statistics of one reporting interval.

    Keys of ``data``:
        ended: number of transfers by ``role/outcome``.
        bytes: bytes by role.
        exposed_s: seconds between commit and the last verified page (what a request waited for beyond prefill).
        chunks: number of pool chunks by outcome; each part of a chunk counts separately.
    """

    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data: dict[str, Any] = {"ended": {}, "bytes": {}, "exposed_s": [], "chunks": {}}

    def record(self, role: str, outcome: Outcome) -> None:
        key = f"{role}/{'ok' if outcome.ok else outcome.code}"
        self.data["ended"][key] = self.data["ended"].get(key, 0) + 1
        self.data["bytes"][role] = self.data["bytes"].get(role, 0) + outcome.nbytes
        times = outcome.events
        if role == "consumer" and "verified" in times and "committed" in times:
            self._observe([max(0.0, times["verified"] - times["committed"])])

    def count_chunks(self, counts: Mapping[str, int], role: str = "", nbytes: int = 0) -> None:
        """Add counts of chunks by outcome, and the bytes copied."""
        for what, count in counts.items():
            if count:
                self.data["chunks"][what] = self.data["chunks"].get(what, 0) + count
        if nbytes:
            self.data["bytes"][role] = self.data["bytes"].get(role, 0) + nbytes

    def _observe(self, exposed_s: list[float]) -> None:
        room = MAX_OBSERVATIONS - len(self.data["exposed_s"])
        self.data["exposed_s"] += exposed_s[:room]

    def aggregate(self, other: TransferStats) -> TransferStats:
        for name in ("ended", "bytes", "chunks"):
            self.data[name] = dict(Counter(self.data[name]) + Counter(other.data[name]))
        self._observe(other.data["exposed_s"])
        return self

    def reduce(self) -> dict[str, int | float]:
        values: dict[str, int | float] = {f"transfers {key}": count for key, count in self.data["ended"].items()}
        values.update({f"pool chunks {what}": count for what, count in self.data["chunks"].items()})
        values.update({f"MB {role}": round(count / 1e6, 1) for role, count in self.data["bytes"].items()})
        seconds = sorted(self.data["exposed_s"])
        if seconds:
            values["exposed ms, median"] = round(1000 * seconds[len(seconds) // 2], 2)
        return values

    def is_empty(self) -> bool:
        return not self.data["ended"] and not self.data["chunks"]
