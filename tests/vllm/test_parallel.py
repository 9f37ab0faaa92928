"""Tensor-parallel sizes that differ: pages are split and joined by heads. And what is left when prefill dies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.cases import handed_over
from tests.rig.client import Client, Order, RequestFailed, hand_off
from tests.rig.device import PLACE
from tests.rig.fixtures import TINY_LEN, Book, Servers, forget, pair_spec
from tests.rig.pooled import CHUNK, Service, ask, pooled, reusable, storable
from tests.rig.prompts import Prompts
from tests.rig.proof import bytes_equal, crossed
from tests.rig.servers import Server, fleet

GIVEN_UP_S = 40.0


@pytest.fixture(scope="module")
def wide(servers: Servers, pool: Service, logs: Path) -> Iterator[Server]:
    """A server of both roles with two tensor-parallel ranks, and a pool."""
    if PLACE.gpu:
        pytest.skip("two tensor-parallel ranks need two GPUs")
    spec = pair_spec("tp2", "kv_both", servers.audit, cores="0|1", tp=2)
    with fleet(pooled(pool.directory, spec), logs=logs) as (server,):
        yield server


@pytest.fixture(scope="module")
def doomed(request: pytest.FixtureRequest, standing: dict[str, Server]) -> Server:
    """A server that may be killed: one with two ranks where there can be one."""
    return standing["doomed"] if standing else request.getfixturevalue("wide")


@pytest.mark.parametrize("order", ["concurrent", "serial"])
@pytest.mark.parametrize("way", ["1 to 2", "2 to 1"])
def test_other_tensor_parallel_size(
    way: str, order: Order, wide: Server, servers: Servers, book: Book, with_client: Any
) -> None:
    """TP 1 -> 2 and 2 -> 1: tokens as from a plain server with TP 1, bytes equal head by head."""
    prefill, decode = (servers.prefill, wide) if way == "1 to 2" else (wide, servers.decode)
    some = book.parallel[:: 3 if order == "concurrent" else 8]

    async def scenario(client: Client) -> None:
        await forget(client, prefill, decode)
        handed = await handed_over(client, some, lambda _: prefill, decode, order)
        crossings = await crossed(some, handed, [prefill], decode)
        print(f"\n{len(some)} prompts, {bytes_equal(crossings, servers.audit)} blocks")
        await watch.settled(client, [prefill, decode])

    assert len(some) >= 16
    with_client(scenario)


@pytest.mark.parametrize("way", ["1 to 2", "2 to 1"])
def test_chunks_are_shared_between_tensor_parallel_sizes(
    way: str, wide: Server, reader: Server, book: Book, with_client: Any
) -> None:
    """What a server of TP 1 stored, by parts, one of TP 2 finds, and the other way round."""
    first, second = (reader, wide) if way == "1 to 2" else (wide, reader)
    some = [case for case in book.parallel if 2 * CHUNK < len(case.prompt) < TINY_LEN - 64][:8]

    async def scenario(client: Client) -> None:
        await forget(client, first, second)
        fresh = await ask(client, first, some, cache_salt=way)
        assert fresh["hit"] == 0, fresh
        assert fresh["stored"] + fresh["present"] == storable(some), fresh
        found = await ask(client, second, some, at_a_time=1, cache_salt=way)
        assert found["hit"] == reusable(some), found
        assert not found["stored"] + found["miss"] + found["failed"], found

    assert len(some) == 8
    with_client(scenario)


def test_prefill_killed_in_the_middle_of_transfers(
    doomed: Server, servers: Servers, book: Book, with_client: Any
) -> None:
    """SIGKILL of a prefill server with transfers under way: their requests fail within the deadlines, nothing leaks,
    and decode goes on with other prefill servers. Last in this module: it costs the server."""
    prompts = Prompts(5)

    async def bytes_flow(before: int) -> None:
        while (await watch.counters(servers.decode))["bytes_received"] <= before:
            await asyncio.sleep(0.05)

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all)
        dropped = [
            asyncio.create_task(hand_off(client, doomed, servers.decode, prompts.one(n), 8))
            for n in (8000, 6000, 3000, 1000)
        ]
        before = await watch.counters(servers.decode)
        await asyncio.wait_for(bytes_flow(before["bytes_received"]), GIVEN_UP_S)
        doomed.kill()
        outcomes = await asyncio.wait_for(asyncio.gather(*dropped, return_exceptions=True), GIVEN_UP_S)
        failed = [outcome for outcome in outcomes if isinstance(outcome, RequestFailed)]
        print(f"\n{len(failed)} of {len(dropped)} failed: {failed[0] if failed else ''}")
        assert failed, "no transfer was under way"
        some = book.spare[28:40]
        handed = await handed_over(client, some, lambda _: servers.prefill, servers.decode, "concurrent")
        bytes_equal(await crossed(some, handed, [servers.prefill], servers.decode), servers.audit)
        await watch.settled(client, servers.all)

    with_client(scenario)
