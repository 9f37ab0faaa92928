"""Safe callbacks for links: an exception in a callback must not break the link."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def call(callback: Callable[..., Any], *arguments: Any) -> None:
    """Call ``callback``; log any exception it raises."""
    try:
        callback(*arguments)
    except Exception:
        logger.exception("error in a link's callback")


class Callbacks:
    """Queue of due callbacks. :meth:`run` calls them later, so that none runs in the middle of the link's bookkeeping.

    Bounded: at most one callback waits for each batch in flight.
    """

    def __init__(self) -> None:
        self._due: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()

    @property
    def waiting(self) -> bool:
        return bool(self._due)

    def add(self, callback: Callable[..., Any], *arguments: Any) -> None:
        self._due.append((callback, arguments))

    def run(self) -> bool:
        """Run the callbacks that are due now; True if there were any."""
        due = len(self._due)
        for _ in range(due):
            callback, arguments = self._due.popleft()
            call(callback, *arguments)
        return due > 0
