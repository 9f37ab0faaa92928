"""Limits log lines that clients can cause: one short line per kind per minute.

Otherwise any client that reaches a port could fill the disk, and a traceback or error text could quote what a client
sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

EVERY_S = 60.0
MAX_KINDS = 64  # distinct kinds; all further ones share one


class LogLimiter:
    """Writes to ``log``. Suppressed lines are counted, and the count is added to the next line of their kind."""

    def __init__(
        self, log: logging.Logger, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._every_s = every_s
        self._clock = clock
        self._next: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def line(self, kind: str, text: str) -> str:
        """The line to write for an event of ``kind``; empty if it is too soon for one."""
        if kind not in self._next and len(self._next) >= MAX_KINDS:
            kind = ""
        now = self._clock()
        if now < self._next.get(kind, now):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return ""
        self._next[kind] = now + self._every_s
        before = self._left_out.pop(kind, 0)
        return f"{text} ({before} more since the last line)" if before else text

    def failed(self, text: str, error: BaseException) -> None:
        """Log that ``text`` happened because of ``error``: type and place in one line, traceback at level debug."""
        place = where(error)
        if line := self.line(place, f"{text}: {place}"):
            self._log.error(line)
        self._log.debug("%s", text, exc_info=error)


def where(error: BaseException) -> str:
    """An error's type, and the place where it was raised."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    name = type(error).__name__
    if last is None:
        return name
    return f"{name} at {Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}"
