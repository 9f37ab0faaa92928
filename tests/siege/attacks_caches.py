"""What those who can write to a tier of the pool can do to those who load from it: forge chunks, plant what is none.

Each attack runs a real ``pdpool``; the bystander is an engine that looks prefixes up meanwhile. What must hold exactly
is asserted here, so that the table of ``python -m tests.siege`` is worth something, too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pdtransport.kernels import pages
from pdtransport.kernels.runs import run
from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool.client.pool_client import Copied, PoolClient
from pdtransport.pool.tiers.envelope import seal
from tests.processes.pool_rig import (
    CHUNK,
    Bytes,
    Pages,
    Redis,
    content,
    key,
    load,
    names,
    status,
    store,
    until,
)
from tests.siege.bystander import Effect, idle, processor_s, resident, settled, watched

BLOCK = 4096  # the payload's place in a file of the disk tier
FORGED = 48  # chunks
NAMES = 4000  # that are planted, of chunks that are none
EVIL = 1 << 20  # contents of forged chunks are counted from here
DISK = ("--disk-bytes", "64MiB", "--disk-threads", "1")  # one, which is as soon held up as four


class Served:
    """A ``pdpool`` with memory for eight chunks, its log in a file."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.directory = Path(f"/dev/shm/pdt-siege-{secrets.token_hex(4)}")
        self._log = folder / "pool.log"
        self._seen = 0
        command = [sys.executable, "-m", "pdtransport.pool.cli", "--dir", str(self.directory), *options]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--memory-bytes", str(8 * CHUNK)], stdout=log, stderr=subprocess.STDOUT
            )
        until(lambda: " serves " in self._log.read_text() or self.process.poll() is not None, "the pool does not start")

    def lines(self) -> list[str]:
        """Of its log, since the last call."""
        found = self._log.read_text().splitlines()
        new, self._seen = found[self._seen :], len(found)
        return new

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[Served, PoolClient]]:
    """With a key for digests, which stays in the folder."""
    file = folder / "digest.key"
    if not file.exists():
        file.write_text(secrets.token_hex(32))
        file.chmod(0o600)
    made = Served(folder, "--digest-key-file", str(file), *options)
    try:
        with PoolClient(directory=made.directory) as client:
            yield made, client
    finally:
        made.close()


@contextlib.contextmanager
def redis_server() -> Iterator[Redis]:
    folder = Path(f"/dev/shm/pdt-siege-{secrets.token_hex(4)}")
    folder.mkdir(mode=0o700)
    made = Redis(folder)
    try:
        yield made
    finally:
        made.kill()
        shutil.rmtree(folder)


@contextlib.contextmanager
def beside(effect: Effect, made: Served, client: PoolClient) -> Iterator[None]:
    """The block is the attack; the bystander looks up a prefix of 16 keys."""
    prefix = [key(number) for number in range(10_000, 10_016)]

    def look_up() -> object:
        return client.lookup(prefix).result()

    pid = made.process.pid
    idle(effect, look_up)
    made.lines()
    effect.memory_before, busy = resident(pid), processor_s(pid)
    with watched(effect, look_up):
        yield
    effect.processor_s = processor_s(pid) - busy
    effect.memory_after = settled(pid, effect.memory_before)
    effect.lines = made.lines()


def forged(number: int) -> bytes:
    """A sealed chunk under the key of ``number``, its checksums right, its content the attacker's."""
    evil = content(EVIL + number)
    checksum = int(pages.checksum(run(evil.ctypes.data, CHUNK), 1)[0])
    return b"".join(seal(key(number), [evil.data], checksum, None))


def taken(client: PoolClient, numbers: range) -> tuple[Copied, list[Bytes]]:
    """What a load gets, whatever it is."""
    memory = Pages(len(numbers))
    done = client.load([key(n) for n in numbers], [memory.runs(place) for place in range(len(numbers))]).result()
    return done, [memory.get(place).copy() for place in range(len(numbers))]


def is_evil(client: PoolClient, numbers: range) -> list[int]:
    """Chunks of which a load got the attacker's content."""
    done, got = taken(client, numbers)
    read = [place for place, verdict in enumerate(done.verdicts) if verdict.name == "READ"]
    return [numbers[place] for place in read if np.array_equal(got[place], content(EVIL + numbers[place]))]


def pushed_out(client: PoolClient, numbers: range) -> None:
    """Store these, and eight more that take their place in memory."""
    for first in (numbers, range(numbers.stop + 5000, numbers.stop + 5008)):
        for number in first:
            assert names(store(client, [number])) == ["WRITE"]
            until(lambda: status(client)["writeback_bytes"] == 0, "write-back hangs")


def shared_folder(folder: Path) -> Path:
    """One that others may write to."""
    made = folder / "tier"
    made.mkdir()
    made.chmod(0o777)
    return made


def on_disk(folder: Path, number: int) -> Path:
    name = key(number).hex()
    return folder / "t-" / name[:3] / f"{name}.{CHUNK}"


def plant(path: Path, value: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = len(value) - CHUNK
    path.write_bytes(value[:header].ljust(BLOCK, b"\0") + value[header:])


def forged_chunks_on_a_shared_disk(folder: Path) -> Effect:
    """Files with right checksums, in place of chunks that the pool wrote and of others."""
    effect = Effect("48 forged chunks on a disk that others can write to")
    tier = shared_folder(folder)
    for number in range(FORGED):
        plant(on_disk(tier, number), forged(number))
    with served(folder, "--disk", str(tier), *DISK) as (made, client):
        until(lambda: client.lookup([key(n) for n in range(FORGED)]).result().there == FORGED, "they were not found")
        pushed_out(client, range(1000, 1004))
        for number in range(1000, 1004):
            plant(on_disk(tier, number), forged(number))
        with beside(effect, made, client):
            assert names(load(client, range(1000, 1004))) == ["MISS"] * 4
            evil = [number for first in range(0, FORGED, 8) for number in is_evil(client, range(first, first + 8))]
        counted = status(client)["counters"]
        until(lambda: not any(on_disk(tier, number).exists() for number in range(FORGED)), "forged files are left")
    assert evil == [], f"chunks {evil} were served with the attacker's bytes"
    assert counted["disk_digest_missing"] == counted["disk_read_failed"] == FORGED + 4
    return effect


def forged_chunks_in_redis(folder: Path) -> Effect:
    """Values with right checksums under names that engines ask for, signed by a key of the attacker's or not at all;
    and one of 64 MiB under the name of a small chunk."""
    effect = Effect("48 forged chunks in Redis, and a value of 64 MiB")
    with redis_server() as server:
        options = ("--redis", f"unix://{server.socket}", "--redis-bytes", "256MiB", "--redis-rescan-s", "0.2")
        with served(folder, *options) as (made, client):
            pushed_out(client, range(4))
            for number in range(FORGED):
                server.client.set(f"pdtkv::{key(number).hex()}:{CHUNK}", forged(number))
            server.client.set(f"pdtkv::{key(FORGED).hex()}:{CHUNK}", bytes(64 << 20))
            everything = [key(n) for n in range(FORGED + 1)]
            until(lambda: client.lookup(everything).result().there == FORGED + 1, "they were not found")
            with beside(effect, made, client):
                evil = [number for first in range(0, FORGED, 8) for number in is_evil(client, range(first, first + 8))]
                giant = names(load(client, [FORGED]))
            counted = status(client)["counters"]
            left = [n for n in range(FORGED + 1) if server.client.exists(f"pdtkv::{key(n).hex()}:{CHUNK}")]
    assert evil == [], f"chunks {evil} were served with the attacker's bytes"
    assert giant == ["MISS"]
    assert counted["redis_digest_missing"] == FORGED
    assert left == [], "forged values are left"
    return effect


def names_of_no_chunks_in_redis(folder: Path) -> Effect:
    """Thousands of names of chunks that are none, of all sizes that a name can tell."""
    effect = Effect("4000 names of no chunks in Redis")
    sizes = (8, CHUNK, 1 << 30, 1 << 31, 1 << 32, 9_999_999_999, 0)
    with redis_server() as server:
        options = ("--redis", f"unix://{server.socket}", "--redis-bytes", "1GiB", "--redis-rescan-s", "0.2")
        with served(folder, *options) as (made, client), beside(effect, made, client):
            pipeline = server.client.pipeline(transaction=False)
            for number in range(NAMES):
                pipeline.set(f"pdtkv::{secrets.token_hex(KEY_BYTES)}:{sizes[number % len(sizes)]}", b"x")
            pipeline.execute()
            server.client.set(f"pdtkv::{key(1).hex()}:{CHUNK}", b"x")  # is found with or behind them
            until(lambda: client.lookup([key(1)]).result().there, "a scan does not get past them")
            assert names(load(client, [1])) == ["MISS"]
    return effect


def a_directory_in_place_of_the_pools(folder: Path) -> Effect:
    """Whoever can write above the disk tier's directory moves it away, and makes another one there."""
    effect = Effect("another directory in place of the disk tier's")
    above = folder / "above"
    above.mkdir()
    above.chmod(0o777)
    tier = above / "tier"
    with served(folder, "--disk", str(tier), *DISK) as (made, client):
        pushed_out(client, range(4))
        with beside(effect, made, client):
            tier.rename(above / "moved")
            for number in range(4):
                plant(on_disk(tier, number), forged(number))
            assert names(load(client, range(4))) == ["READ"] * 4  # of what was stored: load() compares
            assert names(store(client, [5])) == ["WRITE"]
            until(lambda: status(client)["writeback_bytes"] == 0, "write-back hangs")
        assert not on_disk(tier, 5).exists()
    return effect


def pipes_and_links_in_place_of_chunks(folder: Path) -> Effect:
    """A pipe that nobody writes to holds up whoever opens it; a link leads out of the directory."""
    effect = Effect("pipes and links in place of chunks' files")
    tier, elsewhere = shared_folder(folder), folder / "elsewhere"
    elsewhere.mkdir()
    with served(folder, "--disk", str(tier), *DISK) as (made, client):
        pushed_out(client, range(4))
        for number in range(3):
            on_disk(tier, number).unlink()
        os.mkfifo(on_disk(tier, 0))
        plant(elsewhere / "chunk", forged(1))
        on_disk(tier, 1).symlink_to(elsewhere / "chunk")
        on_disk(tier, 2).symlink_to("/dev/zero")
        with beside(effect, made, client):
            assert names(load(client, range(4))) == ["MISS"] * 3 + ["READ"]
    return effect


def attacks_on_disk() -> Any:
    """Those that need no Redis."""
    return [
        forged_chunks_on_a_shared_disk,
        a_directory_in_place_of_the_pools,
        pipes_and_links_in_place_of_chunks,
    ]
