"""What still uses a request's pages: its hand-off, its stores. vLLM frees them on one report, and wants no second."""

from __future__ import annotations

from collections import Counter


class Held:
    """Counts users by request; a request that is through is reported once, by whichever call finds its last user gone.

    Not thread-safe: its owner has a lock.
    """

    def __init__(self) -> None:
        self._users: Counter[str] = Counter()
        self._through: set[str] = set()

    def use(self, req_id: str) -> None:
        """One user more."""
        self._users[req_id] += 1

    def leave(self, req_id: str) -> bool:
        """One user less; True if the request is through and this was the last one."""
        self._users[req_id] -= 1
        if self._users[req_id] > 0:
            return False
        del self._users[req_id]
        free = req_id in self._through
        self._through.discard(req_id)
        return free

    def end(self, req_id: str) -> bool:
        """The request is through; True if nobody uses its pages."""
        if req_id not in self._users:
            return True
        self._through.add(req_id)
        return False
