"""How much memory the pool's index takes, and how fast it is: the part ``index`` of `benchmarks.pool`."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np

from pdtransport.pool.core.eviction import Links, make_policy
from pdtransport.pool.core.index import Index, key_rows

BATCH = 64  # keys in one lookup: a prompt of 4096 tokens in chunks of 64


def sizes(largest: int) -> list[int]:
    return [size for size in (largest // 100, largest // 10, largest) if size]


def index_of(entries: int) -> dict[str, float]:
    """An index and an LRU order of so many chunks: resident bytes a chunk, and lookups a second in batches."""
    chance = np.random.default_rng(1)
    before = _resident()
    index, policy = Index(entries), make_policy("lru", Links(entries))
    begin = time.perf_counter()
    for first in range(0, entries, 100_000):
        raw = chance.bytes(32 * min(100_000, entries - first))
        for at in range(0, len(raw), 32):
            entry = index.add(raw[at : at + 32])
            index.nbytes[entry] = index.tiers[entry] = index.state[entry] = 1
            index.checksum[entry] = index.refs[entry] = index.pin[entry] = index.group[entry] = 0
            policy.add(entry, 0)
    filled = time.perf_counter() - begin
    resident = _resident() - before
    batches = [
        key_rows(b"".join(index.key(entry) for entry in chance.integers(0, entries, BATCH).tolist()))
        for _ in range(2000)
    ]
    begin = time.perf_counter()
    for batch in batches:
        assert (index.find(batch) >= 0).all()
    return {
        "chunks": entries,
        "bytes a chunk": resident / entries,
        "adds a second": entries / filled,
        "lookups a second": len(batches) * BATCH / (time.perf_counter() - begin),
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
