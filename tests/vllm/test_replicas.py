"""A prefill server with data-parallel replicas: vLLM picks the replica, and decode finds the one that has the pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.client import Client, Order, to_prefill
from tests.rig.fixtures import pair_spec
from tests.rig.prompts import Prompts
from tests.rig.router import routed
from tests.rig.servers import fleet

pytestmark = pytest.mark.long
REQUESTS = 6


def test_each_replica_hands_over(logs: Path, with_client: Any) -> None:
    """Their answers name different control ports. The router, whichever order it was told, asks such a server first,
    so that each request's pages come from the replica that has them, and answers are decode's own."""
    prompts = Prompts(77)
    replicated = pair_spec("replicated", "kv_producer", cores="0|1", replicas=2)
    decode_alone = pair_spec("decode", "kv_consumer", cores="1")

    async def scenario(client: Client) -> None:
        ports = set()
        for replica in (0, 1):
            headers = {"X-data-parallel-rank": str(replica)}
            prompt, transfer = prompts.one(150), f"replica-{replica}"
            first = await client.complete(prefill, prompt, 1, to_prefill(prefill, transfer), headers=headers)
            assert first.kv_params is not None
            ports.add(first.kv_params["remote_port"])
            answer = await client.complete(decode, prompt, 3, first.kv_params)
            assert answer.tokens == (await client.complete(prefill, prompt, 3)).tokens
        assert ports == {prefill.control_port, prefill.control_port + 1}
        orders: tuple[Order, ...] = ("serial", "concurrent")
        for order in orders:
            with routed([prefill], [decode], logs, order) as router:
                for index in range(REQUESTS):
                    prompt = prompts.one(120 + index)
                    answer = await client.complete(router.url, prompt, 3)
                    assert answer.tokens == (await client.complete(prefill, prompt, 3)).tokens
                    path = answer.headers["x-pd-path"]
                    # Told where replica 0 is and asked at once, decode can't know that replica 1 got the first request.
                    assert path == "disaggregated" or (order == "concurrent" and not index), path
        await watch.settled(client, [decode, prefill])

    with fleet(replicated, decode_alone, logs=logs) as (prefill, decode):
        with_client(scenario)
