"""Files and folders that other users can't open, whatever the umask."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def make_private_folder(path: Path) -> None:
    """Create ``path`` and its missing parents with mode 0700. Existing folders are not changed.

    Raises:
        OSError: ``path`` can't be created, or is not a folder.
    """
    missing = []
    for folder in (path, *path.parents):
        if folder.is_dir():
            break
        missing.append(folder)
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)


def open_private(path: Path, flags: int) -> int:
    """Open a file with mode 0600, creating it if missing; restricts an existing file to its owner.

    Never follows a symbolic link, and never blocks on a named pipe.

    Args:
        flags: flags of :func:`os.open`.

    Raises:
        OSError: ``path`` can't be opened, or is not a regular file.
    """
    fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        _refuse_other_than_files(fd, path)
        if os.fstat(fd).st_mode & 0o077:
            os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_regular(path: Path) -> int:
    """Open a regular file for reading. Refuses anything else, such as a named pipe or a device, without blocking.

    Raises:
        OSError: ``path`` can't be opened, or is not a regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _refuse_other_than_files(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_other_than_files(fd: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def is_private(path: Path) -> bool:
    """Whether ``path`` is a directory of this user that is closed to others, or does not exist yet."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return closed_to_others(found)


def closed_to_others(found: os.stat_result) -> bool:
    """Whether this is a directory of this user's that no other user can access."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
