"""Chunks that came up into memory on a hint: a request will want them soon, says whoever saw it arrive.

They may take a share of memory until they are loaded, so that hints for a long queue don't push out what others use,
nor each other.
"""

from __future__ import annotations

from collections import Counter

SHARE = 4  # of memory, one part may hold such chunks
FORGOTTEN_S = 60.0  # a request that has not loaded them by then is not counted on any more


class Hints:
    """Of one pool.

    Args:
        limit: bytes that may be up, or on their way, on hints.
        counters: ``hint_begun``, and of these ``hint_used`` and ``hint_unused``.
    """

    def __init__(self, limit: int, counters: Counter[str]) -> None:
        self._limit, self._counters = limit, counters
        self._up: dict[int, tuple[int, float]] = {}  # entry -> its bytes, and when it began, oldest first
        self.nbytes = 0

    def fits(self, nbytes: int) -> bool:
        return self.nbytes + nbytes <= self._limit

    def began(self, entry: int, nbytes: int, now: float) -> None:
        self._up[entry] = nbytes, now
        self.nbytes += nbytes
        self._counters["hint_begun"] += 1

    def loaded(self, entry: int) -> None:
        """Somebody reads it: it is like any other now."""
        self._end(entry, "hint_used")

    def left(self, entry: int) -> None:
        """It is not in memory any more, or could not be read."""
        self._end(entry, "hint_unused")

    def tick(self, now: float) -> None:
        while self._up and (oldest := next(iter(self._up.items())))[1][1] + FORGOTTEN_S <= now:
            self._end(oldest[0], "hint_unused")

    def _end(self, entry: int, how: str) -> None:
        found = self._up.pop(entry, None)
        if found is not None:
            self.nbytes -= found[0]
            self._counters[how] += 1
