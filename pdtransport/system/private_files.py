"""Files and folders that are closed to other users, whatever the umask says."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def make_private_folder(path: Path) -> None:
    """Make ``path``, and what is missing above it, with mode 0700. What is there already stays as it is.

    Raises:
        OSError: it can't be made, or is something else than a folder.
    """
    missing = []
    for folder in (path, *path.parents):
        if folder.is_dir():
            break
        missing.append(folder)
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)


def open_private(path: Path, flags: int) -> int:
    """Open ``path`` with these flags of :func:`os.open`, with mode 0600; make it if it is missing. One that is there
    with a wider mode is closed to others. Never follows a link, nor waits at a named pipe.

    Raises:
        OSError: it can't be opened, or is no file.
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
    """Open a file to read it. Whatever else somebody left in its place, a named pipe or a device, is refused at once.

    Raises:
        OSError: it can't be opened, or is no file.
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
        raise OSError(errno.EINVAL, "it is no file", str(path))
