"""The pool's Redis tier with a real server: shared between pools, and no harm when it stops, is full, or lies."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdtransport.pool.admin.pool_admin import PoolAdmin
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import PoolSettings
from tests.processes.pool_rig import CHUNK, Redis, key, load, names, status, store, until

pytest.importorskip("redis")
pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server here")


@pytest.fixture
def server() -> Iterator[Redis]:
    folder = Path(f"/dev/shm/pdt-redis-{os.getpid()}")
    folder.mkdir()
    made = Redis(folder)
    yield made
    made.kill()
    shutil.rmtree(folder)


def pool(directory: Path, server: Redis, chunks: int = 4, name: str = "default", **options: Any) -> Pool:
    raw = {"dir": directory, "name": name, "memory_bytes": chunks * CHUNK, "redis": server.settings(**options)}
    return Pool(PoolSettings.parse({**raw, "digest_key_file": server.digest_key}))


def flood(client: PoolClient, first: int) -> None:
    """Push everything else out of memory."""
    for number in range(first, first + 4):
        assert names(store(client, [number])) == ["WRITE"]
        until(lambda: status(client)["writeback_bytes"] == 0, "write-back hangs")


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_chunks_come_back_after_a_restart_and_reach_other_pools(directory: Path, server: Redis, codec: str) -> None:
    """What one pool stored, a restarted one finds, and another one that runs already."""
    if codec == "zstd":
        pytest.importorskip("zstandard")
    with PoolClient(directory=directory) as client, PoolClient("b", directory) as other:
        with pool(directory, server, name="b", codec=codec, rescan_s=0.2):
            assert other.lookup([key(1)]).result().there == 0
            with pool(directory, server, codec=codec):
                store(client, [1, 2])
                until(lambda: server.client.dbsize() == 2, "chunks were not written back")
            until(lambda: other.lookup([key(1), key(2)]).result().there == 2, "the other pool did not find them")
            assert names(load(other, [1, 2, 3])) == ["READ", "READ", "MISS"]
        with pool(directory, server, codec=codec):
            until(lambda: client.lookup([key(1), key(2)]).result().there == 2, "they were not found again")
            assert names(load(client, [1, 2])) == ["READ", "READ"]
            assert PoolAdmin(client).clear().done == 2
            until(lambda: server.client.dbsize() == 0, "they were not deleted")


def test_a_server_that_is_killed_and_starts_empty(directory: Path, server: Redis) -> None:
    """Memory serves on; what was in Redis alone is no hit, then and later; new chunks are written once it is back."""
    with pool(directory, server), PoolClient(directory=directory) as client:
        store(client, [1])
        flood(client, 10)
        server.kill()
        assert names(load(client, [1])) == ["MISS"]
        assert client.lookup([key(1)]).result().there == 0
        assert names(load(client, range(11, 14))) == ["READ"] * 3
        assert names(store(client, [2])) == ["WRITE"]
        server.start()
        until(lambda: status(client)["tiers"]["redis"]["up"], "the server's return was not noticed")
        assert names(load(client, [1])) == ["MISS"]
        assert names(store(client, [1])) == ["WRITE"]
        until(lambda: server.client.dbsize() >= 1, "nothing was written after its return")
        assert names(load(client, [1])) == ["READ"]


def test_a_server_that_hangs(directory: Path, server: Redis) -> None:
    """SIGSTOP: loads from it end soon as misses, all else goes on; after SIGCONT its chunks are hits again."""
    with pool(directory, server), PoolClient(directory=directory) as client:
        store(client, [1])
        flood(client, 10)
        server.process.send_signal(signal.SIGSTOP)
        assert names(load(client, [1])) == ["MISS"]
        assert names(load(client, [11, 1])) == ["READ", "MISS"]
        server.process.send_signal(signal.SIGCONT)
        until(lambda: client.lookup([key(1)]).result().there, "its return was not noticed")
        assert names(load(client, [1])) == ["READ"]
        assert status(client)["counters"]["redis_went_down"] >= 1


def test_a_full_server_costs_its_tier_only(directory: Path, server: Redis) -> None:
    """Redis refuses for want of memory: counted, and memory serves on."""
    server.client.config_set("maxmemory", "2mb")
    with pool(directory, server, chunks=16), PoolClient(directory=directory) as client:
        assert store(client, range(16)).prefix == 16
        until(lambda: status(client)["counters"].get("redis_write_failed", 0) > 4, "it took more than it has")
        assert names(load(client, range(16))) == ["READ"] * 16


def test_values_that_are_not_what_was_stored_are_misses(directory: Path, server: Redis) -> None:
    """A flipped bit, a cut value, another chunk's value, none at all: never served, and stored anew."""
    with pool(directory, server), PoolClient(directory=directory) as client:
        for first in (0, 4):
            store(client, range(first, first + 4))
            until(lambda: status(client)["writeback_bytes"] == 0, "write-back hangs")
        found = {name.split(b":")[2].decode(): name for name in server.client.keys("pdtkv:*")}
        by_number = [found[key(number).hex()] for number in range(4)]
        server.client.setrange(by_number[0], 5000, b"\x00" * 8)
        server.client.set(by_number[1], server.client.get(by_number[1])[:-8])
        server.client.set(by_number[2], server.client.get(by_number[3]))
        server.client.delete(by_number[3])
        assert names(load(client, range(4))) == ["MISS"] * 4
        assert client.lookup([key(0)]).result().there == 0
        assert store(client, range(4)).prefix == 4
        assert names(load(client, range(4))) == ["READ"] * 4
