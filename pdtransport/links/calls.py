"""Callbacks of links: one that fails must not take the link along."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def call(callback: Callable[..., Any], *arguments: Any) -> None:
    """Call ``callback``; log what it raises."""
    try:
        callback(*arguments)
    except Exception:
        logger.exception("error in a link's callback")


class Callbacks:
    """Calls that are due, kept for :meth:`run` so that none runs inside the link's own bookkeeping. At most one waits
    for each batch under way, which bounds them."""

    def __init__(self) -> None:
        self._due: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()

    @property
    def waiting(self) -> bool:
        return bool(self._due)

    def add(self, callback: Callable[..., Any], *arguments: Any) -> None:
        self._due.append((callback, arguments))

    def run(self) -> bool:
        """Run what is due now; True if anything was."""
        due = len(self._due)
        for _ in range(due):
            callback, arguments = self._due.popleft()
            call(callback, *arguments)
        return due > 0
