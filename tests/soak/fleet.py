"""The servers of a soak: a pair with router and pool, and a plain server that is given the same prompts."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.rig.answers import Answers
from tests.rig.cases import BLOCK, Case, cases
from tests.rig.fixtures import SPARING, pair_spec, plain_spec
from tests.rig.pooled import Service, pooled
from tests.rig.prompts import Prompts
from tests.rig.router import RunningRouter, routed
from tests.rig.servers import REPOSITORY, Server, fleet

ANSWERS = REPOSITORY / ".pytest_cache" / "d" / "pdtransport-answers"  # where pytest keeps them, too
CASE_SEED = 15
# Prompts of all lengths: within a block, a few blocks, several steps of prefill.
LENGTHS = ((2, 40, 20), (40, 300, 70), (300, 900, 50), (900, 2000, 15))
CACHE_TOKENS = 8192  # of each server: what is asked again later is gone by then, and comes out of the pool
MAX_LEN = 4096
POOL_MEMORY = "128MiB"  # full within minutes
# What the router remembers of past requests is bounded, and full within minutes with these.
ROUTER = ("--traces", "128", "--placement-affinity-entries", "512")
LOOKUP_S = 2.0  # a busy machine's pool may answer late; what comes too late is not found


@dataclass
class Fleet:
    """What runs. All servers compute on the same settings, and wait without spinning (``tests.rig.fork_server``)."""

    prefill: Server
    decode: Server
    plain: Server | None
    router: RunningRouter
    pool: Service
    book: list[Case]

    @property
    def servers(self) -> dict[str, Server]:
        plain = {} if self.plain is None else {"plain": self.plain}
        return {"prefill": self.prefill, "decode": self.decode, **plain}

    def start_pool(self) -> None:
        """Start the pool, again if it was killed."""
        self.pool.start(memory=POOL_MEMORY)

    def processes(self) -> dict[str, int]:
        """Ids of all processes, by name."""
        found = {"router": self.router.pid, "pool": self.pool.pid}
        for name, server in self.servers.items():
            found[f"{name} api"] = server.process.pid
            (found[f"{name} core"],) = server.engines()
            (found[f"{name} worker"],) = server.workers()
        return found


async def make_book(logs: Path) -> list[Case]:
    """Prompts of mixed lengths with answers that a plain server is sure of."""
    prompts = Prompts(CASE_SEED)
    tried = [prompts.one(prompts.below(low, high)) for low, high, count in LENGTHS for _ in range(count)]
    answers = Answers(plain_spec(), logs, ANSWERS)
    try:
        found = await cases(answers, tried, least=4, longest=24)
    finally:
        answers.close()
    assert len(found) > len(tried) / 3, f"the plain server is sure of {len(found)} of {len(tried)} prompts only"
    return found


@asynccontextmanager
async def running(logs: Path, *, beside_plain: bool, cache_tokens: int = CACHE_TOKENS) -> AsyncIterator[Fleet]:
    """The fleet for the length of an ``async with`` block.

    Args:
        cache_tokens: that each server's cache holds.

    Raises:
        ServerFailed: one did not start or did not end.
    """
    book = await make_book(logs)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdt-")))  # short: sockets lie there
        pool = Service(folder)
        stack.callback(pool.close)
        pool.start(memory=POOL_MEMORY)
        more = {"blocks": cache_tokens // BLOCK, "max_model_len": MAX_LEN}
        pair = [
            pooled(pool.directory, pair_spec("prefill", "kv_producer", cores="0", **more), lookup_s=LOOKUP_S),
            pooled(pool.directory, pair_spec("decode", "kv_consumer", cores="1", **more), lookup_s=LOOKUP_S),
        ]
        if beside_plain:
            pair.append(replace(pair_spec("plain", "kv_both", cores="0", **more), connector="none", extra_config={}))
        # No KV events (flags of ``pooled``): vLLM keeps the last 10,000 of them, and the plain server has none.
        specs = [replace(spec, script=SPARING, args=()) for spec in pair]
        servers = stack.enter_context(fleet(*specs, logs=logs))
        router = stack.enter_context(routed(servers[:1], servers[1:2], logs, "concurrent", *ROUTER))
        plain = servers[2] if beside_plain else None
        yield Fleet(servers[0], servers[1], plain, router, pool, book)
