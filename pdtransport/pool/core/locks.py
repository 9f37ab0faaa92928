"""Liveness by file locks: the service and each client hold a lock on one byte of the pool's lock file.

The kernel releases the lock when the process that took it is gone, however it ended, and no sooner. So memory that a
client may still write is never reused, and no timeout has to guess whether a client is dead. The locks belong to the
open file description (``F_OFD_SETLK``), work between containers that share the directory, and take a microsecond to
query.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import struct
import weakref
from pathlib import Path

from pdtransport.errors import SettingsError
from pdtransport.system.private_files import closed_to_others, make_private_folder

SERVICE_BYTE = 0
MAX_BYTE = 1 << 62

_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of 64-bit Linux

_open: weakref.WeakSet[LockFile] = weakref.WeakSet()


class LockFile:
    """A pool's lock file, opened; with ``make`` it is created if it is missing.

    Raises:
        SettingsError: the file can't be opened.
    """

    def __init__(self, path: Path, *, make: bool = False) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
        try:
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            remedy = (
                "check that the pool is running with this pool.dir" if error.errno == errno.ENOENT else "set pool.dir"
            )
            raise SettingsError(f"the pool's lock file {path} can't be opened ({error.strerror}): {remedy}") from None
        _open.add(self)

    def take(self, byte: int) -> bool:
        """Lock a byte until :meth:`close` or the end of this process; False if another open file holds it."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def take_any(self) -> int:
        """Lock a random free byte and return its number."""
        for _ in range(16):
            byte = secrets.randbelow(MAX_BYTE - 1) + 1
            if self.take(byte):
                return byte
        raise RuntimeError("no free byte in the pool's lock file")

    def held(self, byte: int) -> bool:
        """Whether another open file holds the byte."""
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Release all locks. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _forget_in_child() -> None:
    """Close all lock files in a forked child, which would else keep its parent's locks held."""
    for lock in list(_open):
        lock.close()


os.register_at_fork(after_in_child=_forget_in_child)


def private_directory(path: Path) -> None:
    """Create the directory ``path`` if it is missing, and check that it is this user's and closed to others.

    Raises:
        SettingsError: it can't be created, or other users could put files into it.
    """
    try:
        make_private_folder(path)
    except OSError as error:
        raise SettingsError(f"pool.dir: {path} can't be created ({error.strerror}): choose another") from None
    check_private(path)


def check_private(path: Path) -> None:
    """Check that a pool's directory is this user's and closed to others, before a client opens anything in it.

    If another user had created the directory, the client would hand its pages to that user's process and load pages
    from it.

    Raises:
        SettingsError: the directory is missing, a symbolic link, not this user's, or open to others.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise SettingsError(
            f"pool.dir: {path} can't be used ({error.strerror}): check that the pool is running"
        ) from None
    if not closed_to_others(found):
        raise SettingsError(
            f"pool.dir: {path} must be a directory of user {os.getuid()} with mode 0700: fix it or choose another"
        )
