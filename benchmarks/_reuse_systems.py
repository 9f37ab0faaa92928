"""What `benchmarks.reuse` compares: a server without a pool, and with pools that keep chunks in different places."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks._needs import SHARED_MEMORY, VLLM, Need, cores, package, program, room
from pdtransport.pool.tiers.keyed_digest import keep_key
from tests.processes.pool_rig import daemon
from tests.rig.device import DTYPES, PLACE
from tests.rig.proof import KV_ELEMENTS_PER_TOKEN
from tests.rig.servers import Server, ServerSpec, fleet

SYSTEMS = ("no pool", "memory", "disk", "redis")
BLOCK = 128  # tokens; vLLM's default on CPU, and a chunk
CACHE_TOKENS = 10_240  # of the engine's own cache: two documents and a bit
TOKEN_BYTES = KV_ELEMENTS_PER_TOKEN * DTYPES[PLACE.dtype]
POOL_BYTES = 2 << 30  # all that a run stores
PASSING_BYTES = 96 << 20  # memory of a pool whose chunks are to come from below it: less than three documents
REDIS_S = 10.0


class NoSuchSystem(Exception):
    """What a system needs does not start; the text names it."""


def needs_of(systems: Sequence[str], disk: Path) -> list[Need]:
    """What must be here. ``disk``: where a pool's disk may be."""
    needs = [cores(1), package("vllm", VLLM)]
    if set(systems) - {"no pool"}:
        needs.append(room(SHARED_MEMORY, POOL_BYTES if "memory" in systems else PASSING_BYTES, "or choose --systems"))
    if "disk" in systems:
        needs.append(room(disk, POOL_BYTES, "or choose --disk"))
    if "redis" in systems:
        needs += [
            program("redis-server", "apt-get install redis-server, or leave redis out of --systems"),
            package("redis", "pip install 'pdtransport[pool]', or leave redis out of --systems"),
        ]
    return needs


def spec(directory: Path | None) -> ServerSpec:
    """The server; with the pool in ``directory`` if there is one."""
    made = ServerSpec(
        "pooled" if directory else "plain",
        connector="pdtransport" if directory else "none",
        cores="0",
        block_size=BLOCK,
        max_batched_tokens=None,
        kv_cache_bytes=CACHE_TOKENS * TOKEN_BYTES,
        load_failure_policy="recompute",
    )
    return replace(made, extra_config={"pool": {"dir": str(directory)}}) if directory else made


@contextmanager
def running(system: str, folder: Path) -> Iterator[Server]:
    """The server of a system, and what belongs to it.

    Args:
        folder: where a pool's disk may be.

    Raises:
        NoSuchSystem: ``redis-server`` does not start.
        ServerFailed: it did not start.
    """
    with ExitStack() as stack:
        directory = None
        if system != "no pool":
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdpool-", dir="/dev/shm")))
            memory = POOL_BYTES if system == "memory" else PASSING_BYTES
            stack.enter_context(daemon(directory, *_tier(system, stack, folder), memory=str(memory)))
        (server,) = stack.enter_context(fleet(spec(directory)))
        yield server


def _tier(system: str, stack: ExitStack, folder: Path) -> list[str]:
    """The pool's options."""
    if system == "disk":
        path = stack.enter_context(tempfile.TemporaryDirectory(prefix="pdpool-disk-", dir=folder))
        return ["--disk", path, "--disk-bytes", str(POOL_BYTES)]
    if system == "redis":
        key = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdpool-key-")), "digest.key")
        keep_key(key)
        told = ["--redis", stack.enter_context(_redis()), "--redis-bytes", str(POOL_BYTES)]
        return [*told, "--digest-key-file", str(key)]
    return []


@contextmanager
def _redis() -> Iterator[str]:
    """URL of a redis-server of our own, on a Unix socket, without persistence."""
    server = shutil.which("redis-server")
    if server is None:
        raise NoSuchSystem("redis-server is gone")
    with tempfile.TemporaryDirectory(prefix="pdredis-") as folder:
        socket = Path(folder, "redis.sock")
        command = [server, "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)
        try:
            ends = time.monotonic() + REDIS_S
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > ends:
                    raise NoSuchSystem(f"redis-server did not start: status {process.returncode}")
                time.sleep(0.02)
            yield f"unix://{socket}"
        finally:
            process.kill()
            process.wait()
