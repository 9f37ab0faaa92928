"""The folder of a run: its logs, its lock, and what `pdlaunch status` needs to find it.

One folder a topology name: below ``$XDG_STATE_HOME/pdlaunch`` (``~/.local/state/pdlaunch``), or where ``--run-dir``
says.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from pdtransport.errors import PDTransportError

LOCK = "lock"
RECORD = "run.json"
MAX_RECORD = 4 << 20


class RunError(PDTransportError):
    """The run's folder can't be used."""


def default_folder(name: str) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "pdlaunch" / name


class RunFolder:
    """Holds the run's lock while it is open; the lock goes when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise RunError(f"{self.path}: {error.strerror}; set --run-dir to a folder that can be written") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            owner = (read_record(self.path) or {}).get("pid", "unknown")
            raise RunError(
                f"a run is up already (pid {owner}, {self.path}): stop it, change the topology's name, "
                "or give another --run-dir"
            ) from None
        (self.path / RECORD).unlink(missing_ok=True)  # of a run that is no more
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            (self.path / RECORD).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def record(self, data: dict[str, Any]) -> None:
        """Publish ``data`` for `pdlaunch status`, in one step."""
        draft = self.path / f"{RECORD}.new"
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(data, file)
        draft.replace(self.path / RECORD)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What the run in ``folder`` published; None where none is up."""
    try:
        with (folder / RECORD).open("rb") as file:
            data = json.loads(file.read(MAX_RECORD))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def is_up(folder: Path) -> bool:
    """Whether a pdlaunch holds the lock of ``folder``."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
