"""Counts what still uses a request's pages (hand-off, stores), so that they are reported free exactly once.

vLLM frees blocks on the first ``finished_sending`` report; never report a request twice.
"""

from __future__ import annotations

from collections import Counter


class BlockRefCounts:
    """Reference counts by request. The first call that finds a finished request without users returns True.

    Not thread-safe: callers hold a lock.
    """

    def __init__(self) -> None:
        self._users: Counter[str] = Counter()
        self._through: set[str] = set()

    def use(self, req_id: str) -> None:
        """Add a user of the request's pages."""
        self._users[req_id] += 1

    def leave(self, req_id: str) -> bool:
        """Remove a user; True if it was the last one and the request is finished."""
        self._users[req_id] -= 1
        if self._users[req_id] > 0:
            return False
        del self._users[req_id]
        free = req_id in self._through
        self._through.discard(req_id)
        return free

    def end(self, req_id: str) -> bool:
        """Mark the request as finished; True if nothing uses its pages."""
        if req_id not in self._users:
            return True
        self._through.add(req_id)
        return False
