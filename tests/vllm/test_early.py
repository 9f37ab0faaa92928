"""A lone request's first step begins before its last pages are there, and nobody can tell from the answer."""

from __future__ import annotations

from typing import Any

from tests.rig import watch
from tests.rig.cases import handed_over
from tests.rig.client import Client
from tests.rig.fixtures import Book, Servers, forget
from tests.rig.proof import bytes_equal, crossed

HELD = "vllm:pdtransport_held_seconds_count"
LONE, LONGEST = 10, 1500  # requests, and tokens: enough to take a millisecond to cross


async def held(client: Client, servers: Servers) -> float:
    """Steps that decode's worker held."""
    await watch.refresh(client, servers.decode)
    text = await client.get_text(f"{servers.decode.url}/metrics")
    return watch.metric(text, HELD) if HELD in text else 0.0  # vLLM makes it with the first one


def test_first_steps_begin_early_and_answers_are_the_plain_servers(
    servers: Servers, book: Book, with_client: Any
) -> None:
    short = [case for case in book.assorted if len(case.prompt) <= LONGEST]
    some = sorted(short, key=lambda case: len(case.prompt))[-LONE:]

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all)
        before = await held(client, servers)
        handed = await handed_over(client, some, lambda _: servers.prefill, servers.decode, "concurrent", at_a_time=1)
        bytes_equal(await crossed(some, handed, [servers.prefill], servers.decode), servers.audit)
        early = await held(client, servers) - before
        print(f"\n{early:.0f} of {len(some)} first steps began early")
        assert early >= 1
        # They are in the prefix cache: the same again takes nothing from prefill.
        await handed_over(client, some[-2:], lambda _: servers.prefill, servers.decode, "concurrent", at_a_time=1)

    with_client(scenario)
