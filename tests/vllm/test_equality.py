"""A disaggregated request gets the tokens that a plain server gives, from pages that are equal byte for byte."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from pdtransport.vllm.patches.engine_probe import PATH
from pdtransport.vllm.patches.listed import PATCHES
from tests.rig import watch
from tests.rig.cases import BLOCK, Case, handed_over, plainly
from tests.rig.client import Client, Order
from tests.rig.fixtures import ASSORTED, Book, Servers, forget
from tests.rig.proof import Crossing, Recomputed, bytes_equal, crossed

MIXED = 40


def prove_crossed_whole(crossings: list[Crossing]) -> None:
    """Everything that a fresh decode server can be sent was sent: all but one-token prompts, which need nothing."""
    for crossing in crossings:
        assert crossing.skipped == 0 or len(crossing.case.prompt) == 1, f"decode held some already: {crossing}"


@pytest.mark.parametrize(
    ("order", "every"), [("concurrent", 1), ("serial", 3), pytest.param("serial", 1, marks=pytest.mark.long)]
)
def test_tokens_and_pages_equal(order: Order, every: int, servers: Servers, book: Book, with_client: Any) -> None:
    """At least 200 prompts of all sizes (or a third of them), 16 at a time: same tokens as plain, every page proven to
    have crossed whole, byte for byte, and nothing computed again on decode but each prompt's last token."""
    assert len(book.assorted) >= ASSORTED
    some = book.assorted[::every]

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        computed = Recomputed(client, servers.decode)
        await computed.begin()
        handed = await handed_over(client, some, lambda _: servers.prefill, servers.decode, order)
        own, external = await computed.end()
        crossings = await crossed(some, handed, [servers.prefill], servers.decode)
        prove_crossed_whole(crossings)
        blocks = bytes_equal(crossings, servers.audit)
        links = {peer["link"] for reply in await watch.status(servers.decode) for peer in reply["peers"]}
        links.discard("")  # a peer that was not asked for anything yet
        assert links in ({"cuda_ipc"}, {"cma"}), f"not the best link of one host: {links}"
        tokens = sum(len(case.prompt) for case in some)
        print(f"\n{len(handed)} requests, {blocks} blocks over {links}")
        print(f"decode computed {own} prompt tokens, {external} came")
        assert own <= len(handed), "decode computed more than each prompt's last token"
        assert external >= tokens - len(handed), f"of {tokens} prompt tokens only {external} came from prefill"

    with_client(scenario)


def test_every_hook_into_vllm_is_active(servers: Servers, book: Book, with_client: Any) -> None:
    """The workers' status lists them all, those of other processes too, before and after the scheduler told of its own.
    None is off by mistake in a real server."""

    async def scenario(client: Client) -> None:
        for _ in range(2):
            for server in servers.all:
                for reply in await watch.status(server):
                    assert {patch["name"] for patch in reply["patches"]} == set(PATCHES)
                    off = [patch for patch in reply["patches"] if patch["state"] not in ("active", "unneeded")]
                    assert not off, off
                assert '"answers"' in await client.get_text(f"{server.url}{PATH}")
            await handed_over(client, book.assorted[:4], lambda _: servers.prefill, servers.decode, "concurrent")

    with_client(scenario)


def test_two_prefill_servers_feed_one_decode_server(servers: Servers, book: Book, with_client: Any) -> None:
    """2P1D: requests alternate between two prefill servers, in both orders at the same time."""
    some = book.assorted[:: max(1, len(book.assorted) // MIXED)]

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all)
        sources = [servers.prefill, servers.other_prefill]
        half = len(some) // 2
        parts: list[tuple[list[Case], Order]] = [(some[:half], "concurrent"), (some[half:], "serial")]
        for part, order in parts:
            handed = await handed_over(client, part, lambda i: sources[i % 2], servers.decode, order)
            crossings = await crossed(part, handed, sources, servers.decode)
            prove_crossed_whole(crossings)
            bytes_equal(crossings, servers.audit)

    with_client(scenario)


def test_long_answers_follow_a_hand_off(servers: Servers, book: Book, with_client: Any) -> None:
    """Decode continues over several blocks from pages that it did not compute."""

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        handed = await handed_over(client, book.long, lambda _: servers.prefill, servers.decode, "concurrent")
        await crossed(book.long, handed, [servers.prefill], servers.decode)

    assert len(book.long) >= 4
    assert max(len(case.tokens) for case in book.long) > BLOCK
    with_client(scenario)


def test_same_servers_still_answer_plain_requests(servers: Servers, book: Book, with_client: Any) -> None:
    """A server with the connector is a plain server to requests without transfer parameters."""

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all)
        for server in servers.all:
            await plainly(client, server, book.spare[:12])

    with_client(scenario)


def test_answers_depend_on_every_part_of_the_context(book: Book) -> None:
    """What makes token equality a test: another text in any one block of 32 tokens shows in the answer often enough
    that damaged pages could not hide among 200 prompts."""
    changed = [0, 0, 0]
    for case, variants in book.altered:
        for place, tokens in enumerate(variants):
            changed[place] += tokens != case.tokens
    shares = [count / len(book.altered) for count in changed]
    print("\nanswers changed by another first, middle, last block:", [f"{share:.0%}" for share in shares])
    assert len(book.altered) >= 16
    assert shares[2] >= 0.5, "answers hardly depend on the last block"
    # With a tenth, one damaged block in each of 200 prompts would stay hidden once in a billion times.
    assert min(shares) >= 0.1, "answers hardly depend on some part of the context"


def test_a_case_needs_all_tokens() -> None:
    """The comparison itself fails on one wrong token, on a missing one and on one too many."""
    from types import SimpleNamespace

    from tests.rig.cases import assert_equal

    case = Case((1, 5, 6), (7, 8))
    assert_equal([case], [SimpleNamespace(tokens=[7, 8])])  # type: ignore[list-item]
    for wrong in ([7, 9], [7], [7, 8, 9], []):
        with pytest.raises(AssertionError, match="1 of 1 answers differ"):
            assert_equal([case], [SimpleNamespace(tokens=wrong)])  # type: ignore[list-item]
