"""Returns freed memory to the system after a flood of connections: the C library would keep what libzmq has freed."""

from __future__ import annotations

import ctypes

from pdtransport.control.limits import ENDS_BEFORE_TRIM, TRIM_AFTER_S


class Reclaim:
    """Calls ``malloc_trim`` once ``ENDS_BEFORE_TRIM`` connections have ended, ``TRIM_AFTER_S`` after the last end."""

    def __init__(self) -> None:
        self._ended, self._due = 0, 0.0
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's

    def gone(self, now: float) -> None:
        self._ended += 1
        self._due = now + TRIM_AFTER_S

    def tick(self, now: float) -> None:
        due = self.next_deadline()
        if due is not None and now >= due and self._trim is not None:
            self._ended = 0
            self._trim(0)

    def next_deadline(self) -> float | None:
        return self._due if self._trim is not None and self._ended >= ENDS_BEFORE_TRIM else None
