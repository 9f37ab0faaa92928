"""Lines of log about what others may cause as often as they like."""

from __future__ import annotations

import logging

EVERY_S = 10.0


class Seldom:
    """A line now and then, with how many more there were; the others are for debugging."""

    def __init__(self, logger: logging.Logger, every_s: float = EVERY_S) -> None:
        self._logger, self._every_s = logger, every_s
        self._next, self._unsaid = float("-inf"), 0

    def warn(self, text: str, now: float) -> None:
        if now < self._next:
            self._unsaid += 1
            self._logger.debug("%s", text)
            return
        more = f" (and {self._unsaid} more such lines since the last one)" if self._unsaid else ""
        self._logger.warning("%s%s", text, more)
        self._next, self._unsaid = now + self._every_s, 0
