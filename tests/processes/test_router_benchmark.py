"""`benchmarks.router` with a real router process."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import router

WHOLE = ["--requests", "6", "--rounds", "1", "--tokens", "3", "--chars", "40", "--clients", "1,3"]


def test_each_way_answers_all_requests_and_the_router_asks_prefill(tmp_path: Path) -> None:
    """Streams of both ways are whole, and routed requests are dispatched to prefill as well: the benchmark checks that
    by itself and would leave no figures."""
    file = tmp_path / "found.json"
    assert router.main([*WHOLE, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["clients"], row["system"], row["requests"], row["failed"]) for row in rows] == [
        (1, "direct", 6, 0),
        (1, "router", 6, 0),
        (3, "direct", 6, 0),
        (3, "router", 6, 0),
    ]
    assert all({"added_p50_ms", "added_p99_ms", "cpu_ms"} <= set(row) for row in rows if row["system"] == "router")
