"""Tensor-parallel sizes that differ: pages are split and joined by heads. And what is left when prefill dies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.cases import Case, handed_over
from tests.rig.client import Client, Order, RequestFailed, hand_off, new_transfer, to_decode, to_prefill
from tests.rig.device import PLACE
from tests.rig.fixtures import TINY_LEN, Book, Servers, forget
from tests.rig.pooled import CHUNK, Service, ask, reusable, storable, wide_spec
from tests.rig.prompts import Prompts
from tests.rig.proof import bytes_equal, crossed, record_of
from tests.rig.servers import Server, fleet

GIVEN_UP_S = 40.0


@pytest.fixture(scope="module")
def wide(servers: Servers, pool: Service, logs: Path, standing: dict[str, Server]) -> Iterator[Server]:
    """A server of both roles with two tensor-parallel ranks, and a pool."""
    spec = wide_spec(servers.audit, pool)
    if spec.name in standing:
        yield standing[spec.name]
        return
    if PLACE.gpu:
        pytest.skip("two tensor-parallel ranks need two GPUs: name them in PDT_CARDS")
    with fleet(spec, logs=logs) as (server,):
        yield server


@pytest.fixture(scope="module")
def doomed(request: pytest.FixtureRequest, standing: dict[str, Server]) -> Server:
    """A server that may be killed: one with two ranks where there can be one."""
    return standing["doomed"] if standing else request.getfixturevalue("wide")


def pool_cases(book: Book) -> list[Case]:
    return [case for case in book.parallel if 2 * CHUNK < len(case.prompt) < TINY_LEN - 64][:8]


@pytest.mark.parametrize("order", ["concurrent", pytest.param("serial", marks=pytest.mark.long)])
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
    some = pool_cases(book)

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


def test_the_pool_takes_what_decode_does_not_ask_for(
    wide: Server, reader: Server, book: Book, with_client: Any
) -> None:
    """Prefill's memory is free before its deadline; decode comes late and loads what prefill stored."""
    (case, *_), salt = pool_cases(book), "late"

    async def scenario(client: Client) -> None:
        await forget(client, reader, wide)
        transfer = new_transfer()
        handed = await client.complete(reader, case.prompt, 1, to_prefill(reader, transfer), cache_salt=salt)
        assert handed.kv_params
        assert watch.live(await watch.status(reader)), "prefill holds nothing"
        await watch.settled(client, [reader])
        assert (await record_of(reader, transfer, "producer"))["reason"] == "the pool has its pages"
        grown = await ask(client, wide, [case], kv=handed.kv_params, cache_salt=salt)
        assert grown["hit"] == reusable([case]), grown

    with_client(scenario)


def test_prefill_killed_in_the_middle_of_transfers(
    doomed: Server, servers: Servers, book: Book, with_client: Any
) -> None:
    """SIGKILL of a prefill server with transfers under way: their requests fail within the deadlines, nothing leaks,
    and decode goes on with other prefill servers. It costs the server: only a test of what is left comes after it."""
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


def test_decode_finds_in_the_pool_what_a_dead_prefill_cannot_hand_over(
    wide: Server, reader: Server, book: Book, with_client: Any
) -> None:
    """Its transfer fails, and what it had stored is loaded instead of computed, from the other tensor-parallel size."""
    some = pool_cases(book)[:3]

    async def scenario(client: Client) -> None:
        await forget(client, reader)
        for case in some:
            kv = to_decode(wide, new_transfer())
            grown = await ask(client, reader, [case], kv=kv, cache_salt="2 to 1")
            assert grown["hit"] == reusable([case]), grown

    if wide.process.poll() is None:  # alone, this test finds it alive, and nothing stored
        pytest.skip("the tests before this one store the prompts and kill their server")
    with_client(scenario)
