"""A producer that forges KV under right checksums harms the request that asked for it, and no other, where the setting
says that what it hands over is not shared.

The forger is a real server whose weights are made up, under the name (``model_id``) of the real ones: all that it hands
over is wrong, and nothing about it looks so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdtransport.pool.client.pool_client import PoolClient
from tests.processes.pool_rig import status
from tests.rig import watch
from tests.rig.cases import BLOCK
from tests.rig.client import Client, hand_off
from tests.rig.fixtures import pair_spec
from tests.rig.pooled import CHUNK, Service, pooled
from tests.rig.prompts import Prompts
from tests.rig.proof import record_of
from tests.rig.servers import Server, fleet

pytestmark = pytest.mark.long
TOKENS = 16  # of an answer
PROMPT = 4 * CHUNK + 5


@pytest.fixture(scope="module")
def pair(logs: Path, pool: Service) -> Iterator[tuple[Server, Server]]:
    """The forger, which shares what it gets, as by default; and a server with the pool that trusts another producer."""
    forger = pair_spec("forger", "kv_both", cores="0", load_format="dummy", load_failure_policy="recompute")
    apart = pooled(pool.directory, pair_spec("apart", "kv_both", cores="1"))
    named = {"model_id": "the same"}
    trust = {"share_received": "trusted", "trusted_producers": ["127.0.0.1:1"]}
    specs = [
        replace(forger, extra_config={**forger.extra_config, **named}),
        replace(apart, extra_config={**apart.extra_config, **named, **trust}),
    ]
    with fleet(*specs, logs=logs) as (first, second):
        yield first, second


async def found(client: Client, server: Server, prompt: Any) -> tuple[list[int], int]:
    """The answer to another client's request, and how many tokens of its prompt were in the prefix cache."""
    before = await watch.refresh(client, server)
    answer = await client.complete(server, prompt, TOKENS)
    after = await watch.refresh(client, server)
    return list(answer.tokens), int(after.cached_tokens - before.cached_tokens)


def test_forged_kv_reaches_nobody_but_the_request_that_asked_for_it(
    pair: tuple[Server, Server], pool: Service, with_client: Any
) -> None:
    """The pages arrive and are used, twice over: nothing of the first is found by the second. Then somebody else asks:
    the answer is right, computed here, and only that enters prefix cache and pool. Where the setting is not made, what
    was handed over is found by others."""
    forger, apart = pair
    prompts = Prompts(77)
    prompt, other = prompts.one(PROMPT), prompts.one(PROMPT)
    held = (PROMPT - 1) // BLOCK * BLOCK

    async def scenario(client: Client) -> None:
        forged = []
        for _ in range(2):
            handed = await hand_off(client, forger, apart, prompt, TOKENS)
            record = await record_of(apart, handed.transfer, "consumer")
            assert (record["state"], record["skipped_blocks"]) == ("ready", 0), record
            assert record["blocks"] == -(-PROMPT // BLOCK)
            forged.append(list(handed.tokens))
        await watch.settled(client, [forger, apart])
        with PoolClient(directory=pool.directory) as people:
            assert status(people)["chunks"] == 0
            right, cached = await found(client, apart, prompt)
            assert cached == 0
            assert forged[0] == forged[1] != right, "what was handed over was used, and it was wrong"
            again, cached = await found(client, apart, prompt)
            assert (again, cached) == (right, held)
            await watch.settled(client, [apart])
            assert status(people)["chunks"] > 0
        handed = await hand_off(client, apart, forger, other, TOKENS)
        assert (await record_of(forger, handed.transfer, "consumer"))["state"] == "ready"
        _, cached = await found(client, forger, other)
        assert cached == held, "by default it is shared"
        for server in pair:
            server.must_live()

    with_client(scenario)
