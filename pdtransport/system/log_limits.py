"""Limits log lines that others can cause: one short line per kind and pause.

Otherwise anyone who reaches a port could fill the disk, and a traceback or error text could quote what a client sent.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PAUSE_S = 60.0
MAX_KINDS = 64  # distinct kinds; all further ones share one


@dataclass
class _Kind:
    at: float = -math.inf  # of its last line
    pause_s: float = 0.0
    left_out: int = 0


class LogLimiter:
    """Writes to ``log``. Suppressed lines are counted, and the count is added to the next line of their kind.

    Args:
        pause_s: seconds between two lines of a kind.
        longest_s: the pause doubles up to this while a kind persists, and is reset once the kind was silent for a
        pause. None: it does not grow.
    """

    def __init__(
        self,
        log: logging.Logger,
        pause_s: float = PAUSE_S,
        longest_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._pause_s, self._longest_s, self._clock = log, pause_s, longest_s or pause_s, clock
        self._kinds: dict[str, _Kind] = {}

    def line(self, text: str, kind: str = "", now: float | None = None) -> str:
        """The line to write for an event of ``kind`` (never taken from input); empty if it is too soon for one."""
        now = self._clock() if now is None else now
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            kind = ""
        its = self._kinds.setdefault(kind, _Kind())
        if now < its.at + its.pause_s:
            its.left_out += 1
            return ""
        silent = now >= its.at + 2 * its.pause_s
        its.pause_s = self._pause_s if silent else min(self._longest_s, 2 * its.pause_s)
        its.at, before, its.left_out = now, its.left_out, 0
        return f"{text} (and {before} more like it)" if before else text

    def warn(self, text: str, kind: str = "", now: float | None = None) -> None:
        """Log ``text`` as a warning, or at level debug if it is too soon for another one of its kind."""
        if line := self.line(text, kind, now):
            self._log.warning("%s", line)
        else:
            self._log.debug("%s", text)

    def failed(self, text: str, error: BaseException) -> None:
        """Log that ``text`` happened because of ``error``: type and place in one line, traceback at level debug."""
        place = where(error)
        if line := self.line(f"{text}: {place}", place):
            self._log.error("%s", line)
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
