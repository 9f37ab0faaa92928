"""The pool's memory file: whoever finds one without a service removes it, and nobody takes a new one for such."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from pdtransport.pool.core.shared_memory import make_memory, remove_if_stale, remove_stale
from pdtransport.pool.settings import PoolSettings


def test_a_new_file_is_not_taken_for_a_dead_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client or launcher that tidies up between the file's making and its lock removes it: the service makes another,
    and does not serve memory that no client can find."""
    lock, tidied = fcntl.flock, []

    def late(fd: int, how: int) -> Any:
        if how == fcntl.LOCK_EX and len(tidied) < 3:
            tidied.extend(tmp_path.glob("*.memory"))
            for path in tmp_path.glob("*.memory"):
                path.unlink()  # as remove_stale does, which holds the lock then
        return lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    path, fd, nbytes = make_memory(PoolSettings(dir=tmp_path, memory_bytes=1 << 20))
    assert len(tidied) == 3
    assert path not in tidied
    assert os.path.samestat(path.stat(), os.fstat(fd))
    assert nbytes == 1 << 20
    os.close(fd)


def test_only_what_nobody_serves_is_removed(tmp_path: Path) -> None:
    """A file is in use as long as its service lives; of other names, and what is gone already, nothing is touched."""
    settings = PoolSettings(dir=tmp_path, memory_bytes=1 << 20)
    path, fd, _ = make_memory(settings)
    remove_if_stale(path)
    remove_stale(tmp_path, settings.name)
    assert path.exists()
    os.close(fd)
    remove_stale(tmp_path, "another")
    assert path.exists()
    remove_if_stale(path)
    assert not path.exists()
    remove_if_stale(path)
