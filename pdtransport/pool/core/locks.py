"""Who is alive: every client, and the service, holds one byte of the pool's lock file.

The kernel lets go of the byte when the process that took it is gone, whatever way it went, and not before: so memory
that a client may still write is never given out again, and nobody has to guess from silence. Locks belong to the open
file (``F_OFD_SETLK``), work between containers that share the directory, and cost a microsecond to look at.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import struct
import weakref
from pathlib import Path

from pdtransport.errors import SettingsError
from pdtransport.system.private_files import make_private_folder

SERVICE_BYTE = 0
MAX_BYTE = 1 << 62

_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of 64-bit Linux

_open: weakref.WeakSet[LockFile] = weakref.WeakSet()


class LockFile:
    """One opening of a pool's lock file, which is made if ``make`` is set and it is missing.

    Raises:
        SettingsError: it can't be opened.
    """

    def __init__(self, path: Path, *, make: bool = False) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
        try:
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            remedy = (
                "is the pool running, and its dir the same here?" if error.errno == errno.ENOENT else "set pool.dir"
            )
            raise SettingsError(f"the pool's lock file {path} can't be opened ({error.strerror}): {remedy}") from None
        _open.add(self)

    def take(self, byte: int) -> bool:
        """Hold a byte until :meth:`close` or the end of this process; False if another opening holds it."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def take_any(self) -> int:
        """Hold a byte that no one else does, and return its number."""
        for _ in range(16):
            byte = secrets.randbelow(MAX_BYTE - 1) + 1
            if self.take(byte):
                return byte
        raise RuntimeError("no free byte in the pool's lock file")

    def held(self, byte: int) -> bool:
        """Whether another opening holds the byte."""
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Let go of everything. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _forget_in_child() -> None:
    """A forked child must not keep its parent's locks alive."""
    for lock in list(_open):
        lock.close()


os.register_at_fork(after_in_child=_forget_in_child)


def private_directory(path: Path) -> None:
    """Make ``path`` unless it is there; either way it must be ours, and closed to others.

    Raises:
        SettingsError: it can't be made, or someone else could put files into it.
    """
    try:
        make_private_folder(path)
    except OSError as error:
        raise SettingsError(f"pool.dir: {path} can't be made ({error.strerror}): choose another") from None
    check_private(path)


def is_private(path: Path) -> bool:
    """Whether ``path`` is a directory of this user's that is closed to others, or one that is still to be made."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return closed_to_others(found)


def closed_to_others(found: os.stat_result) -> bool:
    """Whether this is a directory into which nobody but this user can put files."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def check_private(path: Path) -> None:
    """Whoever uses a pool asks this before it opens anything there: in a directory that somebody else made under this
    name, it would hand its pages to them, and take theirs.

    Raises:
        SettingsError: there is no such directory, it is a symbolic link, not ours, or open to others.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise SettingsError(f"pool.dir: {path} can't be used ({error.strerror}): is the pool running?") from None
    if not closed_to_others(found):
        raise SettingsError(
            f"pool.dir: {path} must be a directory of user {os.getuid()} with mode 0700: mend it or choose another"
        )
