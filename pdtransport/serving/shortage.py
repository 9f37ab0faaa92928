"""Logs one line when the process is out of file descriptors."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

SAY_S = 60.0  # between two lines
OUT_OF_THEM = "socket.accept() out of system resource"  # asyncio's message


class ShortageLog:
    """Exception handler of an asyncio loop: logs a lack of file descriptors once a minute.

    By default asyncio logs a traceback every second for each connection in the backlog.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._say_at = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if context.get("message") != OUT_OF_THEM:
            loop.default_exception_handler(context)
            return
        now = time.monotonic()
        if now >= self._say_at:
            self._say_at = now + SAY_S
            error = context.get("exception")
            why = error.strerror if isinstance(error, OSError) else error
            self._log.warning("new connections wait: %s; raise the limit of open files (ulimit -n)", why)
