"""Engines whose cache is too small for what they are asked: preempted requests still get the right tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.cases import assert_equal, handed_over
from tests.rig.client import Client, hand_off
from tests.rig.fixtures import Book, Servers, forget, tiny_spec
from tests.rig.prompts import Prompts
from tests.rig.proof import bytes_equal, crossed
from tests.rig.servers import Server, fleet

BACKGROUND = 4  # plain requests that grow on the tiny server meanwhile
BACKGROUND_TOKENS = 320


@pytest.fixture(scope="module")
def tiny(servers: Servers, logs: Path, standing: dict[str, Server]) -> Iterator[Server]:
    if standing:
        yield standing["tiny"]
        return
    with fleet(tiny_spec(servers.audit), logs=logs) as (server,):
        yield server


async def preemptions(client: Client, server: Server) -> float:
    return (await watch.engine_state(client, server)).preemptions


def test_preemption_on_decode(tiny: Server, servers: Servers, book: Book, with_client: Any) -> None:
    """Requests that decode took over and had to preempt for want of blocks continue with the right tokens."""
    some = book.long[:16]

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, tiny)
        before = await preemptions(client, tiny)
        handed = await handed_over(client, some, lambda _: servers.prefill, tiny, "concurrent", at_a_time=12)
        assert await preemptions(client, tiny) > before, "nothing was preempted: nothing was shown"
        bytes_equal(await crossed(some, handed, [servers.prefill], tiny), servers.audit)
        await watch.settled(client, [servers.prefill, tiny])

    with_client(scenario)


def test_preemption_on_prefill(tiny: Server, servers: Servers, book: Book, with_client: Any) -> None:
    """A prompt that prefill had to preempt half-way, pages already sent, is computed again and handed over whole."""
    some = [case for case in book.assorted if 256 < len(case.prompt) < 704][:24]
    prompts = Prompts(9)

    async def scenario(client: Client) -> None:
        await forget(client, servers.decode, tiny)
        before = await preemptions(client, tiny)
        background = [
            asyncio.create_task(client.complete(tiny, prompts.one(40), BACKGROUND_TOKENS)) for _ in range(BACKGROUND)
        ]
        handed = []
        for first in range(0, len(some), 3):
            group = some[first : first + 3]
            jobs = [hand_off(client, tiny, servers.decode, case.prompt, len(case.tokens)) for case in group]
            handed += await asyncio.gather(*jobs)
        await asyncio.gather(*background)
        assert_equal(some, handed)
        assert await preemptions(client, tiny) > before, "nothing was preempted: nothing was shown"
        bytes_equal(await crossed(some, handed, [tiny], servers.decode), servers.audit)
        await watch.settled(client, [tiny, servers.decode])

    assert len(some) >= 12
    with_client(scenario)


def test_more_requests_than_blocks_on_both_sides(tiny: Server, servers: Servers, book: Book, with_client: Any) -> None:
    """The tiny server prefills for the big one and decodes for it at the same time: nobody waits for ever."""
    some = [case for case in book.assorted if len(case.prompt) < 512][-40:]

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all, tiny)
        there = handed_over(client, some[::2], lambda _: tiny, servers.decode, "concurrent", at_a_time=8)
        back = handed_over(client, some[1::2], lambda _: servers.prefill, tiny, "concurrent", at_a_time=8)
        to_big, to_tiny = await asyncio.gather(there, back)
        await crossed(some[::2], to_big, [tiny], servers.decode)
        await crossed(some[1::2], to_tiny, [servers.prefill], tiny)
        await watch.settled(client, [*servers.all, tiny])

    with_client(scenario)
