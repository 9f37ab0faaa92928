"""Files and folders that are closed to other users, whatever the umask says."""

from __future__ import annotations

import os
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
    with a wider mode is closed to others. Never follows a link.

    Raises:
        OSError: it can't be opened.
    """
    fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if os.fstat(fd).st_mode & 0o077:
            os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd
