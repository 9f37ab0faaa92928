"""Chunks prefetched from lower tiers on a hint that a request will load them soon.

Until they are loaded they may take a bounded share of memory. So the hints for a long request queue can't evict all
other chunks, or each other's.
"""

from __future__ import annotations

from collections import Counter

SHARE = 4  # prefetched chunks may take 1/SHARE of memory
FORGOTTEN_S = 60.0  # after this, a chunk that was not loaded counts as unused and no longer against the limit


class Hints:
    """Accounts for the prefetched chunks of one pool.

    Args:
        limit: bytes of prefetched chunks, those still being read included.
        counters: counts ``hint_begun``, and how each ends: ``hint_used`` or ``hint_unused``.
    """

    def __init__(self, limit: int, counters: Counter[str]) -> None:
        self._limit, self._counters = limit, counters
        self._up: dict[int, tuple[int, float]] = {}  # entry -> its bytes, and when its read began; oldest first
        self.nbytes = 0

    def fits(self, nbytes: int) -> bool:
        return self.nbytes + nbytes <= self._limit

    def began(self, entry: int, nbytes: int, now: float) -> None:
        self._up[entry] = nbytes, now
        self.nbytes += nbytes
        self._counters["hint_begun"] += 1

    def loaded(self, entry: int) -> None:
        """A request loads the chunk: it no longer counts against the limit."""
        self._end(entry, "hint_used")

    def left(self, entry: int) -> None:
        """The chunk left memory, or could not be read from its tier."""
        self._end(entry, "hint_unused")

    def tick(self, now: float) -> None:
        while self._up and (oldest := next(iter(self._up.items())))[1][1] + FORGOTTEN_S <= now:
            self._end(oldest[0], "hint_unused")

    def _end(self, entry: int, how: str) -> None:
        found = self._up.pop(entry, None)
        if found is not None:
            self.nbytes -= found[0]
            self._counters[how] += 1
