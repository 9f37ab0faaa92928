"""Nobody who can write to a tier of the pool gets a chunk of theirs served, or holds up those who load from it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.siege import attacks_caches as attacks
from tests.siege.bystander import Effect, in_the_suite

REDIS = shutil.which("redis-server") is not None and importlib.util.find_spec("redis") is not None


@pytest.mark.parametrize("attack", attacks.attacks_on_disk())
def test_a_disk_that_others_can_write_to(attack: Callable[[Path], Effect], tmp_path: Path) -> None:
    """What is planted there is a miss and is removed, one line says so, and an engine's lookups wait for nothing; what
    each attack must not bring about is asserted where it stands."""
    in_the_suite(attack, tmp_path)


@pytest.mark.skipif(not REDIS, reason="no redis-server here")
@pytest.mark.parametrize("attack", [attacks.forged_chunks_in_redis, attacks.names_of_no_chunks_in_redis])
def test_a_redis_that_others_can_write_to(attack: Callable[[Path], Effect], tmp_path: Path) -> None:
    """Likewise; and names that tell of nonsense are passed over."""
    in_the_suite(attack, tmp_path)


def test_without_a_key_the_pool_does_not_trust_such_a_disk(tmp_path: Path) -> None:
    """It says why in one line, what to do, and ends."""
    tier = tmp_path / "tier"
    tier.mkdir()
    tier.chmod(0o777)
    command = [sys.executable, "-m", "pdtransport.pool.cli", "--dir", f"/dev/shm/pdt-siege-{os.getpid()}"]
    tried = subprocess.run(
        [*command, "--memory-bytes", "1MiB", "--disk", str(tier), "--disk-bytes", "1MiB"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    shutil.rmtree(f"/dev/shm/pdt-siege-{os.getpid()}", ignore_errors=True)
    assert tried.returncode == 2
    (line,) = [line for line in tried.stderr.splitlines() if line.startswith("pdpool: ")]
    assert "mode 0777" in line
    assert "pool.digest_key_file" in line
