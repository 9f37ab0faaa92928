"""Returns freed memory to the system after a flood: the C library would keep what connections and bodies took."""

from __future__ import annotations

import ctypes

ENOUGH = 64  # ended connections, or request bodies, after which a trim is worthwhile
AFTER_S = 1.0  # seconds after the last of them: a trim takes a few milliseconds
LATEST_S = 10.0  # seconds after the first of them, if they keep coming


class Reclaim:
    """Calls ``malloc_trim`` when ``ENOUGH`` connections or bodies have ended: once no more end, or at ``LATEST_S``."""

    def __init__(self) -> None:
        self._ended, self._due, self._latest = 0, 0.0, 0.0
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's

    def freed(self, now: float, amount: int = 1) -> None:
        """``amount``: connections, or 64 KiB of a body each."""
        if not self._ended:
            self._latest = now + LATEST_S
        self._ended += amount
        self._due = min(now + AFTER_S, self._latest)

    def tick(self, now: float) -> None:
        due = self.next_deadline()
        if due is not None and now >= due and self._trim is not None:
            self._ended = 0
            self._trim(0)

    def next_deadline(self) -> float | None:
        return self._due if self._trim is not None and self._ended >= ENOUGH else None
