"""What the log says of faults of ours while an input is tried."""

from __future__ import annotations

import logging

MAX_LINE = 2000


class Faults(logging.Handler):
    """Collects records that tell of exceptions that nobody expected, and lines that are none."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger().addHandler(self)
        logging.getLogger("pdtransport").setLevel(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if record.exc_info or record.levelno >= logging.ERROR:
            self.texts.append(logging.Formatter().format(record))
        elif len(said) > MAX_LINE or "\n" in said:
            self.texts.append(f"a record of {len(said)} characters, or of several lines: {said[:300]!r}")

    def begin(self) -> None:
        self.texts.clear()

    def check(self) -> None:
        """
        Raises:
            AssertionError: there is such a record since the beginning.
        """
        assert not self.texts, self.texts[0]
