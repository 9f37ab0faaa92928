"""What a benchmark has measured so far is kept: after each system, and when a later one fails or Ctrl-C ends it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FAILED, INTERRUPTED = 1, 130


def say(text: str) -> None:
    """Progress; figures go to standard output."""
    print(text, file=sys.stderr, flush=True)


def keep(file: Path | None, text: str) -> None:
    """Write ``text`` into ``file``, whole or not at all; nothing where none was asked for."""
    if file is None:
        return
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)


@dataclass
class Ending:
    """``status``: exit status of the benchmark."""

    status: int = 0


@contextmanager
def measuring(*expected: type[Exception]) -> Iterator[Ending]:
    """Around all that is measured: an error or Ctrl-C ends it and is told, and the caller still reports what was
    measured before. ``expected``: errors whose text says enough; of others there is a traceback."""
    ending = Ending()
    try:
        yield ending
    except KeyboardInterrupt:
        say("interrupted: what follows was measured before")
        ending.status = INTERRUPTED
    except expected as error:
        say(str(error))
        ending.status = FAILED
    except Exception:  # noqa: BLE001 - whatever it was, hours of figures may have come before it
        traceback.print_exc()
        ending.status = FAILED
