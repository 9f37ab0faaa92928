"""Rate-limited log warnings, for events that others can cause as often as they like."""

from __future__ import annotations

import logging

EVERY_S = 10.0


class Seldom:
    """Logs one warning per interval, with the number of suppressed ones; those are logged at debug level."""

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
