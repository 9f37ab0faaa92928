"""Servers that share a pool, the pool itself, and what the servers' counters say of its chunks."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import zmq

from pdtransport.pool.client.pool_client import PoolClient
from tests.processes.pool_rig import Daemon, status, until
from tests.rig import watch
from tests.rig.cases import BLOCK, Case, assert_equal
from tests.rig.client import Client, in_parallel
from tests.rig.device import PLACE
from tests.rig.fixtures import TINY_CHUNK, TINY_LEN, TINY_TOKENS, pair_spec
from tests.rig.ports import HOST
from tests.rig.servers import PORTS, Server, ServerSpec

CHUNK_BLOCKS = 2
CHUNK = CHUNK_BLOCKS * BLOCK
SHARDS = 2  # so that servers of TP 1 and of TP 2 share chunks; each part counts for itself
MEMORY = "512MiB"
HAND_OFF_S = 4.0  # what decode does not ask for within this is left to the pool; less than DEADLINES' hold_s
OUTCOMES = ("hit", "miss", "stored", "present", "skipped", "failed")


class Service:
    """A pool that can end and start again in the same directory; at most one at a time."""

    def __init__(self, folder: Path) -> None:
        # CUDA registers no memory of a disk's file system.
        self._short = Path(tempfile.mkdtemp(prefix="pdt-pool-", dir="/dev/shm")) if PLACE.gpu else None
        self.directory = (self._short or folder) / "pool"
        port = PORTS.take(2)
        self.address = f"tcp://{HOST}:{port}"
        self._door = ("--listen", f"{HOST}:{port}")
        self.disk = ("--disk", str(folder / "disk"), "--disk-bytes", "1GiB", "--disk-codec", "zstd")
        self._daemon: Daemon | None = None

    def start(self, *options: str, memory: str = MEMORY) -> None:
        self.kill()
        self._daemon = Daemon(self.directory, *self._door, *options, memory=memory)

    @property
    def pid(self) -> int:
        assert self._daemon is not None
        return self._daemon.process.pid

    def url(self) -> str:
        """Of its HTTP API, once after a start with one."""
        assert self._daemon is not None
        return self._daemon.url()

    def signal(self, number: int) -> None:
        assert self._daemon is not None
        self._daemon.kill(number)

    def kill(self) -> None:
        if self._daemon is not None:
            self._daemon.close()
            self._daemon = None

    def close(self) -> None:
        """End it for good."""
        self.kill()
        if self._short is not None:
            shutil.rmtree(self._short, ignore_errors=True)

    def written(self) -> int:
        """Chunks on disk, once all that memory holds is there."""
        with PoolClient(directory=self.directory) as client:

            def done() -> int:
                found = status(client)
                return 0 if found["writeback_bytes"] else int(found["tiers"]["disk"]["chunks"])

            return int(until(done, "chunks were not written to disk"))

    def found(self, chunks: int) -> None:
        """Wait until the index of a restarted pool has this many."""
        with PoolClient(directory=self.directory) as client:
            until(lambda: status(client)["chunks"] == chunks, "the index was not rebuilt")

    def at_rest(self) -> dict[str, int]:
        """Its counters.

        Raises:
            AssertionError: somebody still holds a chunk or fills one.
        """
        with PoolClient(directory=self.directory) as client:
            found = status(client)
        held = [each for each in found["clients"] if each["held_bytes"]]
        assert not held, held
        assert not found["being_filled"], found
        counters: dict[str, int] = found["counters"]
        return counters


def pooled(directory: Path, spec: ServerSpec, address: str = "", **more: Any) -> ServerSpec:
    """``spec`` with the pool in ``directory``, or at ``address``. It publishes its KV events in ``directory``, too."""
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": events_of(directory, spec.name)}
    where = {"address": address} if address else {"dir": str(directory)}
    use = {**where, "chunk_blocks": CHUNK_BLOCKS, "shards": SHARDS, "store_s": 2.0, **more}
    return replace(
        spec,
        extra_config={**spec.extra_config, "pool": use},
        load_failure_policy="recompute",
        args=(*spec.args, "--kv-events-config", json.dumps(events)),
    )


def events_of(directory: Path, name: str) -> str:
    """Where the server ``name`` publishes its KV events."""
    return f"ipc://{directory}/{name}.events"


class Events:
    """What a server publishes from now on."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set(zmq.SUBSCRIBE, b"")
        self._socket.connect(endpoint)
        self.heard: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """All so far."""
        while self._socket.poll(0):
            _topic, _number, payload = self._socket.recv_multipart()
            self.heard += msgpack.unpackb(payload)[1]
        return self.heard

    def blocks(self, kind: str, owner: str | None) -> set[Any]:
        """Hashes of blocks in events of this kind."""
        chosen = [each for each in self.read() if each["type"] == kind and each.get("ownership") == owner]
        return {block for each in chosen for block in each["block_hashes"]}

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


def wide_spec(audit: Path, service: Service) -> ServerSpec:
    """A server of both roles with two tensor-parallel ranks, and a pool."""
    return pooled(service.directory, pair_spec("tp2", "kv_both", audit, cores="0|1", tp=2))


def writer_spec(service: Service) -> ServerSpec:
    """The first server with the pool, which a test kills. On the CPU it uses the pool as one on another host, others
    as one on theirs."""
    spec = pair_spec("writer", "kv_both", cores="0")
    if PLACE.gpu:
        return pooled(service.directory, spec)
    # Two more threads answer, on cores that compute: the tests count answers that came too late as failed.
    return pooled(service.directory, spec, service.address, lookup_s=2.0)


def tiny_pooled_spec(name: str, directory: Path, **use: Any) -> ServerSpec:
    """Its cache is too small for what it is asked."""
    tiny: dict[str, Any] = {"blocks": TINY_TOKENS // BLOCK, "max_model_len": TINY_LEN}
    spec = pair_spec(name, "kv_both", cores="0", max_batched_tokens=TINY_CHUNK, **tiny)
    return pooled(directory, spec, hand_off_s=HAND_OFF_S, **use)


def reusable(cases: Sequence[Case]) -> int:
    """Parts of chunks that a server can load of them: the last token of a prompt is computed in any case."""
    return SHARDS * sum((len(case.prompt) - 1) // CHUNK for case in cases)


def storable(cases: Sequence[Case]) -> int:
    """Parts of chunks that a server stores of them: an answer's last token is not computed, and what the last step
    completes is not stored."""
    return SHARDS * sum(max(len(case.prompt), len(case.prompt) + len(case.tokens) - 2) // CHUNK for case in cases)


def surely_stored(cases: Sequence[Case]) -> int:
    """As :func:`storable`; with asynchronous scheduling (the GPU's default) the scheduler knows an answer's tokens one
    step later, so that what its last two steps complete may be left out."""
    late = 1 if PLACE.gpu else 0
    return SHARDS * sum(
        max(len(case.prompt), len(case.prompt) + len(case.tokens) - 2 - late) // CHUNK for case in cases
    )


def next_turns(cases: Sequence[Case]) -> list[Case]:
    """Prompts that go on where an answer's middle was."""
    halves = [(case, len(case.tokens) // 2 + 1) for case in cases]
    return [Case((*case.prompt, *case.tokens[:half]), case.tokens[half:]) for case, half in halves]


async def counters(client: Client, server: Server) -> Counter[str]:
    """Parts of chunks by what became of them, as the server's workers and scheduler tell it."""
    text = await client.get_text(f"{server.url}/metrics")
    found: Counter[str] = Counter()
    for outcome in OUTCOMES:
        try:
            found[outcome] = int(watch.metric(text, "vllm:pdtransport_pool_chunks_total", outcome=outcome))
        except KeyError:
            continue
    return found


async def rested(client: Client, server: Server) -> Counter[str]:
    """The counters once nothing is under way: every block is free again."""
    await watch.settled(client, [server])
    return await counters(client, server)


async def ask(client: Client, server: Server, some: Sequence[Case], at_a_time: int = 4, **more: Any) -> Counter[str]:
    """Assert right answers; what the counters grew by."""
    before = await rested(client, server)
    jobs = [partial(client.complete, server, case.prompt, len(case.tokens), **more) for case in some]
    assert_equal(some, await in_parallel(at_a_time, jobs))
    grown = await rested(client, server)
    grown.subtract(before)
    return grown
