"""Engines that store prompts in a shared pool and load them from it: the same tokens, whoever computed them and when.

On the CPU two servers start here, one after the other. What came from the pool is proved by the workers' counters.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdtransport.pool.admin.pool_admin import Chosen, PoolAdmin
from pdtransport.pool.admin.prompts import PoolPrompt, find
from pdtransport.pool.client.pool_client import PoolClient
from tests.rig import watch
from tests.rig.cases import BLOCK, Case, handed_over, plainly
from tests.rig.client import Client
from tests.rig.fixtures import FAMILY_PREFIX, Book, Servers, forget
from tests.rig.pooled import (
    CHUNK,
    SHARDS,
    Events,
    Service,
    ask,
    counters,
    events_of,
    next_turns,
    rested,
    reusable,
    storable,
    surely_stored,
    tiny_pooled_spec,
    writer_spec,
)
from tests.rig.ports import HOST
from tests.rig.router import RunningRouter, routed
from tests.rig.servers import MODEL_NAME, TINY_LM, Server, fleet

OWNER = "pdpool"  # of blocks in the pool, in KV events
LONGEST = 700  # tokens of a prompt
GIVEN_UP_S = 40.0
HINTS = "pdrouter_pool_hints_total"


@pytest.fixture(scope="module")
def writer(pool: Service, book: Book, logs: Path, standing: dict[str, Server]) -> Iterator[Server]:
    """The first server. A test of this module kills it."""
    if standing:
        yield standing["writer"]
        return
    with fleet(writer_spec(pool), logs=logs) as (server,):
        yield server


@pytest.fixture(scope="module")
def chosen(book: Book) -> list[Case]:
    """Prompts of at least two chunks, of all lengths around a chunk's boundary."""
    long_enough = [case for case in book.assorted if 2 * CHUNK < len(case.prompt) <= LONGEST]
    even = [case for case in long_enough if len(case.prompt) % BLOCK in (0, 1, BLOCK - 1)]
    return [*even[:8], *[case for case in long_enough if case not in even][:8]]


def test_a_prompt_is_found_after_the_engine_forgot_it(writer: Server, chosen: list[Case], with_client: Any) -> None:
    """What the engine computed is in the pool, and comes from there once its own cache is empty."""
    some = chosen

    async def scenario(client: Client) -> None:
        grown = await ask(client, writer, some)
        assert surely_stored(some) <= grown["stored"] + grown["present"] <= storable(some), grown
        assert not grown["failed"] + grown["skipped"], grown
        await forget(client, writer)
        grown = await ask(client, writer, some, at_a_time=1)
        assert grown["hit"] == reusable(some), grown
        assert not grown["stored"] + grown["miss"] + grown["failed"], grown

    assert len(some) >= 12
    with_client(scenario)


def test_blocks_that_the_engine_holds_are_not_loaded_over(writer: Server, book: Book, with_client: Any) -> None:
    """The engine holds a chunk's first block, in use by others; the pool brings the rest of the chunk."""
    prefix = FAMILY_PREFIX // CHUNK * CHUNK - BLOCK  # ends in the middle of a chunk
    some = book.family

    async def scenario(client: Client) -> None:
        await ask(client, writer, some)
        await forget(client, writer)
        await client.complete(writer, some[0].prompt[: prefix + 1], 1)
        state = await watch.engine_state(client, writer)
        grown = await ask(client, writer, some[1:2])
        after = await watch.engine_state(client, writer)
        chunks = SHARDS * ((len(some[1].prompt) - 1) // CHUNK - prefix // CHUNK)
        assert grown["hit"] == chunks > 0, grown
        assert after.local_hit_tokens - state.local_hit_tokens >= prefix
        await plainly(client, writer, some)

    with_client(scenario)


def test_the_next_turn_finds_the_answer(writer: Server, book: Book, with_client: Any) -> None:
    """KV that was computed while answering is found by a prompt that has the answer in it."""
    some = book.long[:8]
    turns = next_turns(some)
    assert reusable(turns) > reusable(some)

    async def scenario(client: Client) -> None:
        await ask(client, writer, some)
        await forget(client, writer)
        grown = await ask(client, writer, turns, at_a_time=1)
        assert grown["hit"] == reusable(turns), grown

    with_client(scenario)


def test_another_salt_does_not_hit(writer: Server, chosen: list[Case], with_client: Any) -> None:
    """One tenant's prompts are not found by another, and are by itself."""
    some = chosen[:4]

    async def scenario(client: Client) -> None:
        await forget(client, writer)
        grown = await ask(client, writer, some, cache_salt="another tenant")
        assert grown["hit"] == 0 < grown["stored"], grown
        await forget(client, writer)
        assert (await ask(client, writer, some, cache_salt="another tenant"))["hit"] == reusable(some)
        await forget(client, writer)
        assert (await ask(client, writer, some, cache_salt="a third"))["hit"] == 0

    with_client(scenario)


def test_people_find_a_prompt_that_an_engine_stored(
    writer: Server, pool: Service, chosen: list[Case], with_client: Any
) -> None:
    """What the engine told the pool of its keys is enough to find its chunks: all whole ones of a prompt, under the
    request's salt too, and none of another's."""
    some = chosen[:3]

    async def scenario(client: Client) -> None:
        await ask(client, writer, some[:2])
        await ask(client, writer, some[2:], cache_salt="whose")
        with PoolClient(directory=pool.directory) as people:
            admin = PoolAdmin(people)
            for case, salt in zip(some, ("", "", "whose"), strict=True):
                (found,) = find(admin, PoolPrompt(case.prompt, cache_salt=salt))
                assert (found.there, set(found.tiers)) == (len(case.prompt) // CHUNK, {"memory"})
            (found,) = find(admin, PoolPrompt(some[0].prompt, cache_salt="another's"))
            assert found.there == 0
            (space,) = admin.spaces()
            assert Path(space.tokenizer) == TINY_LM
            assert len(space.shards) == SHARDS

    with_client(scenario)


def test_kv_events_tell_what_the_pool_holds(
    writer: Server, pool: Service, chosen: list[Case], with_client: Any
) -> None:
    """Routers that follow vLLM's KV events learn which blocks can be had from the pool, under vLLM's own hashes, and
    when they are gone from it; an engine that finds what others stored tells of that, too."""
    some = chosen[:3]
    events = Events(events_of(pool.directory, writer.spec.name))

    async def scenario(client: Client) -> None:
        for prompt in (chosen[3].prompt[:8], chosen[3].prompt[8:16]):  # too short to be stored
            await client.complete(writer, prompt, 4)  # it subscribes in the background
        with PoolClient(directory=pool.directory) as people:
            PoolAdmin(people).clear()
            await forget(client, writer)
            await ask(client, writer, some)
            stored = events.blocks("BlockStored", OWNER)
            whole = sum(len(case.prompt) // CHUNK for case in some) * CHUNK // BLOCK
            assert len(stored) >= whole
            assert stored <= events.blocks("BlockStored", None), "vLLM knows these blocks by other hashes"
            told = [each for each in events.heard if each.get("ownership") == OWNER and each["type"] == "BlockStored"]
            assert {each["medium"] for each in told} == {"CPU"}
            assert all(len(each["token_ids"]) == BLOCK * len(each["block_hashes"]) for each in told)
            begun = {tuple(each["token_ids"][:CHUNK]) for each in told if each["parent_block_hash"] is None}
            assert begun >= {tuple(case.prompt[:CHUNK]) for case in some}
            PoolAdmin(people).clear()
            await ask(client, writer, chosen[3:4])
            assert events.blocks("BlockRemoved", OWNER) >= stored

    try:
        with_client(scenario)
    finally:
        events.close()


def test_damaged_chunks_are_computed_again(writer: Server, pool: Service, chosen: list[Case], with_client: Any) -> None:
    """Not a byte of a chunk that is not what was stored gets into an answer; the chunk is stored afresh."""
    some = chosen[:6]

    async def scenario(client: Client) -> None:
        await ask(client, writer, some)
        (memory,) = pool.directory.glob("*.memory")
        with memory.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            for at in range(0, size, 1 << 15):
                file.seek(at)
                file.write(b"\xff")
        await forget(client, writer)
        grown = await ask(client, writer, some, at_a_time=1)
        assert grown["failed"] > 0, grown
        assert grown["hit"] == 0 < grown["stored"], grown
        await forget(client, writer)
        await ask(client, writer, some)  # a damaged chunk that was still being let go of is stored now
        await forget(client, writer)
        assert (await ask(client, writer, some, at_a_time=1))["hit"] == reusable(some)

    with_client(scenario)


def test_another_server_finds_what_a_dead_one_stored(
    writer: Server, pool: Service, chosen: list[Case], with_client: Any, request: pytest.FixtureRequest
) -> None:
    """Server and pool are killed. A server and a pool that start afterwards find what was on disk, where it was
    compressed; and then it is in memory again."""
    some = chosen
    pool.start(*pool.disk)

    async def scenario(client: Client) -> None:
        await forget(client, writer)
        await ask(client, writer, some[:1])  # it notices that the pool is another one
        await forget(client, writer)
        grown = await ask(client, writer, some)
        assert grown["stored"] + grown["present"] + grown["hit"] >= reusable(some), grown
        assert not grown["failed"] + grown["skipped"], grown

    with_client(scenario)
    chunks = pool.written()
    assert chunks >= reusable(some)
    writer.kill()
    pool.start(*pool.disk)
    pool.found(chunks)
    reader: Server = request.getfixturevalue("reader")

    async def go_on(client: Client) -> None:
        grown = await ask(client, reader, some, at_a_time=1)
        assert grown["hit"] == reusable(some), grown
        assert not grown["stored"] + grown["miss"] + grown["failed"], grown
        read = pool.at_rest()["disk_read_bytes"]
        assert read > 0
        await forget(client, reader)
        assert (await ask(client, reader, some, at_a_time=1))["hit"] == reusable(some)
        assert pool.at_rest()["disk_read_bytes"] == read

    with_client(go_on)


def test_prefill_hands_over_what_came_from_the_pool(
    reader: Server, servers: Servers, chosen: list[Case], with_client: Any
) -> None:
    """A prefill request loads its prompt from the pool, stores the rest, and hands all of it over."""
    some = chosen[:8]

    async def scenario(client: Client) -> None:
        await forget(client, reader, servers.decode)
        before = await rested(client, reader)
        await handed_over(client, some, lambda _: reader, servers.decode, "concurrent", at_a_time=1)
        await watch.settled(client, [reader, servers.decode])
        grown = await counters(client, reader)
        grown.subtract(before)
        assert grown["hit"] == reusable(some), grown

    with_client(scenario)


TEXT = "import os\nimport sys\n\n\ndef main():\n    for name in " * 12
BODIES = {
    "completions": {"prompt": TEXT},
    "chat/completions": {"messages": [{"role": "system", "content": "Go on."}, {"role": "user", "content": TEXT}]},
}


def test_chunks_of_text_come_up_on_the_routers_hint(
    reader: Server, servers: Servers, pool: Service, with_client: Any, logs: Path, tmp_path: Path
) -> None:
    """The token ids that a prefill server's /tokenize tells of a prompt or a chat are those that it computes with: the
    chunks that the router hints at are those that prefill loads."""
    (tmp_path / "keys").write_text("open-sesame\n")
    (tmp_path / "keys").chmod(0o600)
    pool.start(*pool.disk, "--http", f"{HOST}:0", "--http-key-file", str(tmp_path / "keys"))
    hint = ("--pool-hint-url", pool.url(), "--pool-hint-key-file", str(tmp_path / "keys"))

    async def scenario(client: Client) -> None:
        async def answered(url: str, body: dict[str, Any]) -> None:
            async with client.post(url, body) as response:
                assert response.status == 200, await response.text()

        async def hinted(router: RunningRouter, outcome: str, times: int) -> None:
            while f'{HINTS}{{outcome="{outcome}"}} {times}\n' not in await client.get_text(f"{router.url}/metrics"):
                await asyncio.sleep(0.02)

        with (
            PoolClient(directory=pool.directory) as people,
            routed([reader], [servers.decode], logs, "concurrent", *hint, "--pool-hint-text", "tokenize") as router,
        ):
            hits = 0
            for number, (path, prompt) in enumerate(BODIES.items(), 1):
                body = {"model": MODEL_NAME, "max_tokens": 4, "temperature": 0, **prompt}
                await answered(f"{router.url}/v1/{path}", body)
                await asyncio.wait_for(hinted(router, "nothing", number), GIVEN_UP_S)
                await rested(client, reader)
                pool.written()
                PoolAdmin(people).move(Chosen(), "disk")
                await forget(client, reader, servers.decode)
                before = await rested(client, reader)
                reader.pause_engine()  # a long step: the request waits for its end
                try:
                    asked = asyncio.create_task(answered(f"{router.url}/v1/{path}", body))
                    await asyncio.wait_for(hinted(router, "begun", number), GIVEN_UP_S)
                finally:
                    reader.pause_engine(False)
                await asked
                grown = await rested(client, reader)
                grown.subtract(before)
                assert grown["hit"] > 0 == grown["failed"], grown
                hits += grown["hit"]
            counted = pool.at_rest()
            assert counted["hint_used"] == hits, counted

    with_client(scenario)


def test_chunks_of_requests_that_wait_come_up(
    reader: Server, pool: Service, chosen: list[Case], with_client: Any
) -> None:
    """The engine tells the pool of those that it has no room for yet: they load from memory what was on disk."""
    pool.start(*pool.disk)

    async def scenario(client: Client) -> None:
        await ask(client, reader, chosen[:1])  # it notices that the pool is another one
        await forget(client, reader)
        await ask(client, reader, chosen)
        pool.written()
        with PoolClient(directory=pool.directory) as people:
            PoolAdmin(people).move(Chosen(), "disk")
        await forget(client, reader)
        before = pool.at_rest()
        await ask(client, reader, chosen, at_a_time=len(chosen))
        after = pool.at_rest()
        assert after.get("hint_used", 0) > before.get("hint_used", 0), after

    with_client(scenario)


def test_what_decode_generates_flows_back(reader: Server, servers: Servers, book: Book, with_client: Any) -> None:
    """A decode server stores the prompt that it was handed and the answer that it gave: the next turn's prefill, on
    whatever server, finds both."""
    some = book.long[8:16]
    turns = next_turns(some)

    async def scenario(client: Client) -> None:
        await forget(client, reader, servers.prefill)
        before = await rested(client, reader)
        await handed_over(client, some, lambda _: servers.prefill, reader, "concurrent", at_a_time=3)
        await watch.settled(client, [reader, servers.prefill])
        grown = await counters(client, reader)
        grown.subtract(before)
        assert grown["stored"] + grown["present"] >= surely_stored(some), grown
        await forget(client, reader)
        grown = await ask(client, reader, turns, at_a_time=1)
        assert grown["hit"] == reusable(turns), grown

    with_client(scenario)


def test_preempted_requests_store_no_page_that_was_given_away(reader: Server, book: Book, with_client: Any) -> None:
    """Requests that lose their pages while these are stored and loaded: their answers are right, and so are those of
    whoever finds what they stored."""
    some = book.long[:16]

    async def scenario(client: Client) -> None:
        before = await watch.engine_state(client, reader)
        await ask(client, reader, some, at_a_time=12)
        assert (await watch.engine_state(client, reader)).preemptions > before.preemptions, "nothing was shown"
        await forget(client, reader)
        grown = await ask(client, reader, some, at_a_time=1)
        assert grown["hit"] > 0 == grown["failed"], grown

    with_client(scenario)


def test_aborts_while_pages_are_loaded_leave_nothing(reader: Server, chosen: list[Case], with_client: Any) -> None:
    """Clients that hang up at any moment of a load or store: every block is free again, and answers are right."""
    some = chosen[:16]

    async def scenario(client: Client) -> None:
        await forget(client, reader)
        asked = [asyncio.create_task(client.complete(reader, case.prompt, 64)) for case in some]
        for number, task in enumerate(asked):
            await asyncio.sleep(0.002 * (number % 5))
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await ask(client, reader, some[:4])

    with_client(scenario)


@pytest.mark.long
def test_a_codec_with_loss_is_for_those_who_ask_for_it(
    reader: Server, pool: Service, chosen: list[Case], with_client: Any, logs: Path
) -> None:
    """An engine with fp8 gets its prompts back from disk, where they are shorter; it never finds exact chunks, and an
    engine without a codec never finds its. What it answers then may differ, so nothing is said of that here."""
    some = chosen[:4]
    pool.start(*pool.disk)
    spec = tiny_pooled_spec("lossy", pool.directory, codec="fp8", lookup_s=2.0)
    with fleet(spec, logs=logs) as (lossy,), PoolClient(directory=pool.directory) as people:
        admin = PoolAdmin(people)

        async def fresh(client: Client, server: Server) -> None:
            await forget(client, server)
            grown = await ask(client, server, some)
            assert grown["hit"] == 0 < grown["stored"], grown

        async def scenario(client: Client) -> None:
            await ask(client, reader, some[:1])  # it notices that the pool is another one
            admin.drop(Chosen())
            sizes = []
            for server in (reader, lossy):
                await fresh(client, server)
                pool.written()
                disk = admin.status()["tiers"]["disk"]
                sizes.append((disk["used_bytes"], disk["chunks"]))
            (exact, chunks), (both, all_chunks) = sizes
            assert (both - exact) / (all_chunks - chunks) < 0.9 * exact / chunks, sizes  # the tier's own codec is zstd
            admin.move(Chosen(), "disk")
            await forget(client, lossy)
            before = await rested(client, lossy)
            for case in some:
                assert (await client.complete(lossy, case.prompt, len(case.tokens))).tokens
            grown = await rested(client, lossy)
            grown.subtract(before)
            assert grown["hit"] == reusable(some), grown
            assert not grown["miss"] + grown["failed"], grown
            admin.drop(Chosen())
            await fresh(client, lossy)
            await fresh(client, reader)  # lossy chunks are there, and are not its

        with_client(scenario)


def test_a_pool_that_hangs_or_dies_costs_hits_and_nothing_else(
    reader: Server, pool: Service, chosen: list[Case], with_client: Any
) -> None:
    """Stopped, killed in the middle of loads and stores, gone, and back again: right answers, and it is used again."""
    some = chosen

    async def scenario(client: Client) -> None:
        await forget(client, reader)
        pool.signal(signal.SIGSTOP)
        grown = await ask(client, reader, some[:4])
        assert grown["failed"] > 0 == grown["hit"], grown
        pool.signal(signal.SIGCONT)
        await ask(client, reader, some)
        await forget(client, reader)
        asked = asyncio.create_task(ask(client, reader, some, at_a_time=8))
        await asyncio.sleep(0.3)
        pool.kill()
        await asked
        await forget(client, reader)
        grown = await ask(client, reader, some[:8])
        assert grown["failed"] > 0 == grown["hit"], grown
        pool.start()
        await forget(client, reader)
        assert (await ask(client, reader, some[:8]))["stored"] > 0
        await forget(client, reader)
        assert (await ask(client, reader, some[:8], at_a_time=1))["hit"] == reusable(some[:8])
        pool.at_rest()

    with_client(scenario)
    reader.must_live()
