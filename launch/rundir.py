"""The folder of a run: its logs, its lock, the record for `pdlaunch status`, and files that live as long as the run.

There is one folder per topology name: below ``$XDG_STATE_HOME/pdlaunch`` (``~/.local/state/pdlaunch``), or at
``--run-dir``. Only its owner can access it. Nothing in it is written before the lock is held, so a second `up` changes
nothing of the first.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pdtransport.errors import PDTransportError
from pdtransport.system.private_files import make_private_folder, open_private, open_regular

LOCK = "lock"
RECORD = "run.json"
POOL_KEY = "pool.key"  # key of the pool's HTTP API, valid for one run
SOCKETS = "sockets"  # link to the folder of the servers' sockets
SOCKETS_PREFIX = "pdlaunch-"
MAX_RECORD = 4 << 20


class RunError(PDTransportError):
    """The run's folder can't be used."""


def default_folder(name: str) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "pdlaunch" / name


class RunFolder:
    """Holds the run's lock while it is open; the kernel releases the lock when the process ends for any reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        try:
            make_private_folder(self.path)
            self._lock = open_private(self.path / LOCK, os.O_RDWR)
        except OSError as error:
            raise RunError(f"{self.path}: {error.strerror}; set --run-dir to a writable folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
            self.close()
            raise RunError(
                f"a run is up already (pid {owner}, {self.path}): stop it, change the topology's name, "
                "or give another --run-dir"
            ) from None
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self.close()
            raise RunError(f"{self.path}: {error.strerror}; set --run-dir to a folder that has room") from None
        self._clear()  # files of a run that was killed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._clear()
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def record(self, data: dict[str, Any]) -> None:
        """Publish ``data`` for `pdlaunch status`, atomically.

        Raises:
            RunError: the folder can't be written.
        """
        self._write(RECORD, json.dumps(data))

    def make_pool_key(self) -> None:
        """Write a new key to :data:`POOL_KEY`.

        Raises:
            RunError: the folder can't be written.
        """
        self._write(POOL_KEY, secrets.token_urlsafe(32))

    def make_socket_folder(self) -> Path:
        """Make a folder for sockets that vLLM's processes create and leave behind; it is removed with the run.

        It is outside the run's folder, whose path may be too long for a socket.

        Raises:
            RunError: it can't be made.
        """
        made = None
        try:
            made = Path(tempfile.mkdtemp(prefix=SOCKETS_PREFIX))
            (self.path / SOCKETS).symlink_to(made)
        except OSError as error:
            if made is not None:
                made.rmdir()
            raise RunError(
                f"the folder for the servers' sockets can't be created: {error.strerror}; set TMPDIR"
            ) from None
        return made

    def _write(self, name: str, text: str) -> None:
        draft = self.path / f"{name}.new"
        try:
            with open(open_private(draft, os.O_WRONLY | os.O_TRUNC), "w", encoding="utf-8") as file:
                file.write(text)
            draft.replace(self.path / name)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise RunError(f"{self.path / name}: {error.strerror}; set --run-dir to a folder that has room") from None

    def _clear(self) -> None:
        """Remove the files that live only as long as a run."""
        with suppress(OSError):
            link = self.path / SOCKETS
            made = Path(os.readlink(link))
            if made.name.startswith(SOCKETS_PREFIX) and not made.is_symlink():
                shutil.rmtree(made, ignore_errors=True)
            link.unlink()
        for name in (RECORD, POOL_KEY):
            with suppress(OSError):
                (self.path / name).unlink()


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record that the run in ``folder`` published; None if there is none."""
    try:
        with open(open_regular(folder / RECORD), "rb") as file:
            data = json.loads(file.read(MAX_RECORD))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def is_up(folder: Path) -> bool:
    """True if a pdlaunch holds the lock of ``folder``."""
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
