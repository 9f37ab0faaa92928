"""An on-disk cache of digests of unchanged files, per user and host.

A file is recognised by device, inode, size, modification time and change time. Change times are coarse: a digest of
files that changed just before they were read is not cached, since a later change could have the same time. An entry is
a small JSON file in a folder that only this user may write; entries that are damaged, too large or writable by others
are ignored with one line of log. Processes that need the same digest at the same time compute it once: the others wait
for the first, up to a deadline.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pdtransport.errors import SettingsError
from pdtransport.kv.checkpoint import ALGORITHM, IDENTITY_DIGITS
from pdtransport.system.private_files import make_private_folder

logger = logging.getLogger(__name__)

MAX_ENTRY_BYTES = 4 << 20
MAX_ENTRIES = 256
POLL_S = 0.02  # between tries to take the lock
SETTLED_S = 2.0  # the coarsest timestamps of file systems in use

_IDENTITY = re.compile(rf"[a-z]+:[0-9a-f]{{{IDENTITY_DIGITS}}}")

FileFacts = tuple[int, int, int, int, int]


def default_directory() -> Path:
    """``$XDG_CACHE_HOME/pdtransport/weights``; below ``~/.cache`` if the variable holds no absolute path."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(os.path.expanduser("~"))
    return (Path(base) if os.path.isabs(base) else home / ".cache") / "pdtransport" / "weights"


def facts_of(files: Sequence[Path]) -> list[FileFacts]:
    """Facts that change when ``files`` change: sorted ``(device, inode, size, mtime_ns, ctime_ns)``.

    Raises:
        OSError: a file does not exist.
    """
    found = [file.stat() for file in files]
    return sorted((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found)


class DigestCache:
    """A cache in ``directory``, which is created if missing; None: :func:`default_directory`."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory if directory is not None else default_directory()

    def identity(self, kind: str, files: Sequence[Path], compute: Callable[[], str], wait_s: float) -> str:
        """The digest of ``files``, from the cache or from ``compute``. Also raises what ``compute`` raises.

        Args:
            kind: kind of digest; entries of different kinds are separate.
            wait_s: how long to wait for another process that computes the digest; after that, compute it here too.

        Raises:
            SettingsError: the files changed while they were read.
            OSError: a file does not exist.
        """
        facts = facts_of(files)
        settled = max((each[-1] for each in facts), default=0) + SETTLED_S * 1e9 < time.time_ns()
        key = json.dumps([kind, ALGORITHM, facts])
        name = hashlib.sha256(key.encode()).hexdigest()[:IDENTITY_DIGITS]
        problem = self._prepare()
        if problem:
            logger.warning("digests of weights are not cached: %s", problem)
            return self._computed(facts, files, compute)
        entry = self._directory / f"{name}.json"
        known = self._read(entry, facts)
        if known:
            return known
        with self._lock(self._directory / f"{name}.lock", lambda: self._read(entry, facts), wait_s) as known:
            if known:
                return known
            identity = self._computed(facts, files, compute)
            if settled:
                self._write(entry, facts, identity)
            return identity

    @staticmethod
    def _computed(facts: list[FileFacts], files: Sequence[Path], compute: Callable[[], str]) -> str:
        identity = compute()
        if facts_of(files) != facts:
            raise SettingsError("weight files changed while they were read: restart once they no longer change")
        return identity

    def _prepare(self) -> str:
        """Create and check the folder. Returns why it can't be used, or an empty string."""
        if not self._directory.is_absolute():
            return "this user has no home folder; set XDG_CACHE_HOME to a writable folder"
        try:
            make_private_folder(self._directory)
            found = self._directory.lstat()
        except OSError as error:
            return f"{self._directory}: {error.strerror}; set XDG_CACHE_HOME to a writable folder"
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return f"{self._directory} is writable by other users (needs this user as owner, and mode 0700): remove it"
        return ""

    def _read(self, entry: Path, facts: list[FileFacts]) -> str:
        """The cached identity; empty if there is none that can be trusted."""
        try:
            # O_NONBLOCK: a named pipe in the file's place must not block
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return ""
        except OSError as error:
            return self._ignored(entry, error.strerror or "it can't be read")
        with os.fdopen(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return self._ignored(entry, "it is writable by other users")
            if found.st_size > MAX_ENTRY_BYTES:
                return self._ignored(entry, "it is too large")
            raw = stream.read(MAX_ENTRY_BYTES)
        try:
            value = json.loads(raw)
            files, identity = [tuple(each) for each in value["files"]], value["identity"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return self._ignored(entry, "it is damaged")
        if files != facts or not isinstance(identity, str) or not _IDENTITY.fullmatch(identity):
            return self._ignored(entry, "it is damaged")
        return identity

    @staticmethod
    def _ignored(entry: Path, why: str) -> str:
        logger.warning("cached digest %s is ignored: %s", entry, why)
        return ""

    def _write(self, entry: Path, facts: list[FileFacts], identity: str) -> None:
        """Write an entry atomically: a reader sees a whole entry or none."""
        made = ""
        try:
            descriptor, made = tempfile.mkstemp(dir=self._directory, prefix=".new-")  # mode 0600
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump({"files": facts, "identity": identity}, stream)
            os.replace(made, entry)
            self._forget_oldest()
        except OSError as error:
            logger.warning("a digest of weights is not cached: %s: %s", entry, error.strerror)
            if made:
                with suppress(OSError):
                    os.unlink(made)

    def _forget_oldest(self) -> None:
        entries = sorted(self._directory.glob("*.json"), key=lambda each: each.stat().st_mtime_ns)
        for entry in entries[:-MAX_ENTRIES]:
            entry.unlink(missing_ok=True)
            entry.with_suffix(".lock").unlink(missing_ok=True)

    @contextmanager
    def _lock(self, file: Path, known: Callable[[], str], wait_s: float) -> Iterator[str]:
        """Take the lock of an entry, for at most ``wait_s``.

        Yields the identity if another process has stored it meanwhile. Empty: compute it here, because this process
        has the lock, or the wait timed out, or there is no lock.
        """
        deadline = time.monotonic() + wait_s
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            logger.warning("a digest of weights is computed without a lock: %s: %s", file, error.strerror)
            yield ""
            return
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:  # held
                    if time.monotonic() < deadline:
                        time.sleep(POLL_S)
                        continue
                    logger.warning(
                        "waited %.0f s for another process to compute the weights' digest: computing it here", wait_s
                    )
                break
            yield known()
        finally:
            os.close(descriptor)
