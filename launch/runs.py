"""Finds the running runs of a topology's name, so that `pdlaunch status` also finds runs with their own `--run-dir`.

The default folder of a name has a link to each such run (``elsewhere/``). A link alone proves nothing: a run is up
while a pdlaunch holds the lock in its folder, and belongs to the user who owns the lock file. Links left by a killed
pdlaunch are ignored, and the next `up` removes them.
"""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

from pdtransport.errors import PDTransportError
from pdtransport.launch.rundir import LOCK, default_folder, is_up, read_record
from pdtransport.system.private_files import make_private_folder

ELSEWHERE = "elsewhere"
MAX_LINKS = 64  # per name; older ones are removed


class NotUp(PDTransportError):
    """No run of that name is up."""


class Starting(NotUp):
    """The run is still starting."""


class Ambiguous(PDTransportError):
    """Several runs match, or ``--run-dir`` has a run of another name."""


def remember(name: str, folder: Path) -> None:
    """Make a run in ``folder`` known to :func:`find`.

    Raises:
        OSError: the default folder can't be written.
    """
    if folder == default_folder(name):
        return
    place = default_folder(name) / ELSEWHERE
    make_private_folder(place)
    for number, (link, target) in enumerate(_links(name)):
        if number >= MAX_LINKS - 1 or (target != folder and not is_up(target)):
            link.unlink(missing_ok=True)
    link = place / _key(folder)
    draft = link.with_suffix(f".{os.getpid()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(folder)
    draft.replace(link)


def forget(name: str, folder: Path) -> None:
    """The run in ``folder`` has ended; never raises."""
    try:
        (default_folder(name) / ELSEWHERE / _key(folder)).unlink(missing_ok=True)
    except OSError:
        pass


def find(name: str, run_dir: Path | None) -> Path:
    """The folder of the one run of ``name`` that is up; with ``run_dir``, only that folder is searched.

    Raises:
        NotUp: there is none; the text says what is known of the last one.
        Starting: it does not serve yet.
        Ambiguous: there are several, or ``run_dir`` has a run of another name.
    """
    known = [run_dir.absolute()] if run_dir is not None else _known(name)
    up = [folder for folder in known if is_up(folder)]
    if len(up) > 1:
        raise Ambiguous(f"{len(up)} runs of {name} are up: choose one with --run-dir: {', '.join(map(str, up))}")
    if not up:
        raise NotUp(f"{name} is not up{_last(known)}")
    record = read_record(up[0])
    if record is None:
        raise Starting(f"{name} is starting (logs in {up[0]})")
    if record.get("name") != name:
        raise Ambiguous(
            f"{up[0]} holds the run of {record.get('name')!r}, not of {name!r}: give the other run's --run-dir"
        )
    return up[0]


def _last(known: list[Path]) -> str:
    """What is known of a run that was killed; a run that ends in order removes its record."""
    for folder in known:
        record = read_record(folder)
        if record is not None:
            return f" (its pdlaunch, pid {record.get('pid')}, was killed; logs in {folder})"
    return ""


def _known(name: str) -> list[Path]:
    """Folders of this user that may hold runs of ``name``."""
    folders = [default_folder(name), *(target for _, target in _links(name)[:MAX_LINKS])]
    return [folder for folder in dict.fromkeys(folders) if _is_ours(folder / LOCK)]


def _links(name: str) -> list[tuple[Path, Path]]:
    """Links and their targets, newest first."""
    found = []
    try:
        for link in (default_folder(name) / ELSEWHERE).iterdir():
            if link.is_symlink() and not link.suffix and _is_ours(link):
                found.append((link.lstat().st_mtime, link, Path(os.readlink(link))))
    except OSError:
        return []
    return [(link, target) for _, link, target in sorted(found, reverse=True)]


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except OSError:
        return False


def _key(folder: Path) -> str:
    return sha256(os.fsencode(folder)).hexdigest()[:24]
