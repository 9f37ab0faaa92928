"""What decode already holds is not sent, and what only prefill holds is."""

from __future__ import annotations

from typing import Any

from tests.rig import watch
from tests.rig.cases import BLOCK, Case, handed_over
from tests.rig.client import Client
from tests.rig.fixtures import FAMILY_PREFIX, Book, Servers, forget
from tests.rig.proof import Crossing, bytes_equal, crossed

PREFIX_BLOCKS = FAMILY_PREFIX // BLOCK


async def hand(client: Client, servers: Servers, some: list[Case]) -> list[Crossing]:
    """Hand cases over one after another; the crossings, their bytes compared."""
    handed = await handed_over(client, some, lambda _: servers.prefill, servers.decode, "concurrent", at_a_time=1)
    crossings = await crossed(some, handed, [servers.prefill], servers.decode)
    bytes_equal(crossings, servers.audit)
    return crossings


def test_partial_hit_on_decode_skips_what_it_holds(servers: Servers, book: Book, with_client: Any) -> None:
    """After the first of a family, only what lies beyond the shared prefix crosses."""

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        first, *others = await hand(client, servers, book.family)
        assert first.skipped == 0
        for crossing in others:
            assert crossing.skipped == PREFIX_BLOCKS, f"{crossing} although decode held {PREFIX_BLOCKS} blocks"
            assert crossing.blocks > 0

    assert len(book.family) >= 3
    with_client(scenario)


def test_full_hit_on_decode_sends_at_most_the_last_block(servers: Servers, book: Book, with_client: Any) -> None:
    """A repeated request finds its whole blocks on decode; prefill's pages are freed all the same."""

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        some = [*book.family, *[case for case in book.assorted if len(case.prompt) % BLOCK in (0, 1)][:12]]
        await hand(client, servers, some)
        for crossing in await hand(client, servers, some):
            # vLLM computes a prompt's last token itself, so a hit never covers the block that holds it.
            held = (len(crossing.case.prompt) - 1) // BLOCK
            assert crossing.skipped >= held, f"{crossing} although decode held {held} blocks"
            assert crossing.blocks <= 1
        await watch.settled(client, [servers.prefill, servers.decode])

    with_client(scenario)


def test_hit_on_prefill_only_still_sends_everything(servers: Servers, book: Book, with_client: Any) -> None:
    """Blocks that prefill had cached, and computed for nobody now, cross as well."""

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        await hand(client, servers, book.family)
        await forget(client, servers.decode)
        before = await watch.engine_state(client, servers.prefill)
        for crossing in await hand(client, servers, book.family[:1]):
            assert crossing.skipped == 0
        after = await watch.engine_state(client, servers.prefill)
        assert after.local_hit_tokens - before.local_hit_tokens >= FAMILY_PREFIX, "prefill had nothing cached"

    with_client(scenario)
