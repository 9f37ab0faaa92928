"""What tests of several modules here begin with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def directory() -> Iterator[Path]:
    """A place for one pool, with a short path: a socket's has at most 107 bytes."""
    path = Path(f"/dev/shm/pdt-test-{os.getpid()}")
    yield path
    for left in path.glob("*"):
        left.unlink()
    if path.exists():
        path.rmdir()
