"""Through the router, a client sees one plain OpenAI server; the servers behind it see disaggregated requests."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.cases import BLOCK, Case, assert_equal
from tests.rig.client import Answer, Client, Handed, Order, RequestFailed, in_parallel
from tests.rig.fixtures import Book, Servers, forget
from tests.rig.proof import bytes_equal, crossed
from tests.rig.router import routed
from tests.rig.servers import MODEL_NAME

ROUTED = 40
AT_A_TIME = 8


def as_handed(answers: list[Answer]) -> list[Handed]:
    """Under the transfer id that the router tells."""
    assert all("x-pd-transfer-id" in answer.headers for answer in answers), answers[0].headers
    return [Handed(answer.headers["x-pd-transfer-id"], None, answer) for answer in answers]


@pytest.mark.parametrize("order", ["concurrent", pytest.param("serial", marks=pytest.mark.long)])
def test_completions_through_the_router(
    order: Order, servers: Servers, book: Book, with_client: Any, logs: Path
) -> None:
    """Streamed and not, over two prefill servers: the plain server's tokens, each request proven to have crossed."""
    some: list[Case] = book.parallel[:: max(1, len(book.parallel) // ROUTED)]

    async def scenario(client: Client) -> None:
        with routed([servers.prefill, servers.other_prefill], [servers.decode], logs, order) as router:
            for stream in (False, True):
                await forget(client, *servers.all)
                jobs = [partial(client.complete, router.url, c.prompt, len(c.tokens), stream=stream) for c in some]
                answers = await in_parallel(AT_A_TIME, jobs)
                assert_equal(some, answers)
                handed = as_handed(answers)
                crossings = await crossed(some, handed, [servers.prefill, servers.other_prefill], servers.decode)
                bytes_equal(crossings, servers.audit)
            await watch.settled(client, servers.all)

    with_client(scenario)


def test_a_router_that_is_told_no_addresses_finds_them(
    servers: Servers, book: Book, with_client: Any, logs: Path
) -> None:
    """The servers' metrics tell: the first request is concurrent, and what became of it is in its headers."""
    case = book.parallel[1]

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all)
        # Decode's word may be late on a busy machine; a stream that begins with prefill's token does not wait for it.
        more = ("--hand-off-wait-s", "5", "--first-token", "off")
        with routed([servers.prefill], [servers.decode], logs, "concurrent", *more, told=False) as router:
            answer = await client.complete(router.url, case.prompt, len(case.tokens), stream=True)
            assert_equal([case], [answer])
            assert answer.headers["x-pd-path"] == "disaggregated"
            became, _, link = answer.headers["x-pd-hand-off"].partition("; ")
            trace = router.get_json(f"/pd/trace/{answer.headers['x-pd-transfer-id']}")
            assert trace["dispatch"] == "concurrent"
            assert (became, trace["handed_over"], trace["link"]) == ("handed_over", True, link)
            record = trace["workers"]["decode"]["ranks"][0]["transfers"][0]
            assert (record["link"], record["bytes"]) == (link, trace["bytes"])
            assert router.get_json("/health")["disaggregates"] is True
        await watch.settled(client, servers.all)

    with_client(scenario)


def test_chat_through_the_router(servers: Servers, with_client: Any, logs: Path) -> None:
    """A chat completion equals that of the decode server asked directly and alone."""
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": "import os\nimport sys\n\n\ndef main():\n    for name in " * 12}],
        "max_tokens": 6,
        "temperature": 0,
        "seed": 0,
    }

    async def scenario(client: Client) -> None:
        async def ask(url: str) -> Any:
            async with client.post(f"{url}/v1/chat/completions", body) as response:
                return await response.json(), response.headers.get("x-pd-transfer-id")

        await forget(client, *servers.all)
        with routed([servers.prefill], [servers.decode], logs, "concurrent") as router:
            routed_answer, transfer = await ask(router.url)
        await forget(client, *servers.all)
        plain_answer, _ = await ask(servers.decode.url)
        assert routed_answer["choices"][0]["message"] == plain_answer["choices"][0]["message"]
        records = (await watch.status(servers.decode, transfer))[0]["transfers"]
        assert [record["state"] for record in records] == ["ready"], records

    with_client(scenario)


def test_a_client_that_leaves_the_router_frees_both_servers(
    servers: Servers, with_client: Any, book: Book, logs: Path
) -> None:
    """The router passes a disconnect on to prefill and decode."""

    async def scenario(client: Client) -> None:
        with routed([servers.prefill], [servers.decode], logs, "concurrent") as router:
            longest = max(book.assorted, key=lambda case: len(case.prompt))
            await forget(client, *servers.all)
            tasks = [
                asyncio.create_task(client.complete(router.url, longest.prompt, 100, stream=bool(i % 2)))
                for i in range(4)
            ]
            await asyncio.sleep(0.7)
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(o, asyncio.CancelledError) for o in outcomes), "they ended before they were dropped"
            await watch.settled(client, servers.all)

    with_client(scenario)


def test_errors_come_through_as_openai_errors(servers: Servers, with_client: Any, logs: Path) -> None:
    """A request that vLLM refuses is refused with vLLM's status and an OpenAI error object."""

    async def scenario(client: Client) -> None:
        with routed([servers.prefill], [servers.decode], logs, "concurrent") as router:
            with pytest.raises(RequestFailed) as caught:
                await client.complete(router.url, [1] * 9000, 4)
            assert caught.value.status == 400
            assert '"error"' in caught.value.text
            await watch.settled(client, servers.all)

    with_client(scenario)


def test_a_tenants_prefixes_are_nobody_elses(
    servers: Servers, with_client: Any, book: Book, logs: Path, tmp_path: Path
) -> None:
    """What one tenant's request left in the caches of both engines is found by its own next one, and by no other's."""
    (tmp_path / "keys").write_text("one acme\ntwo acme\nthree rival\n")
    (tmp_path / "secret").write_text("0123456789abcdef" * 2)
    keys = ("--api-key-file", str(tmp_path / "keys"), "--tenant-secret-file", str(tmp_path / "secret"))
    case = min((each for each in book.assorted if len(each.prompt) > 4 * BLOCK), key=lambda each: len(each.prompt))
    held = (len(case.prompt) - 1) // BLOCK

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all)
        with routed([servers.prefill], [servers.decode], logs, "concurrent", *keys) as router:
            for key, again in (("one", False), ("two", True), ("three", False), ("three", True), ("one", True)):
                before = await watch.refresh(client, servers.prefill)
                shown = {"Authorization": f"Bearer {key}"}
                answer = await client.complete(router.url, case.prompt, len(case.tokens), headers=shown)
                assert_equal([case], [answer])
                (crossing,) = await crossed([case], as_handed([answer]), [servers.prefill], servers.decode)
                assert crossing.skipped >= held if again else crossing.skipped == 0, key
                after = await watch.refresh(client, servers.prefill)  # decode may have been the first to answer
                assert bool(after.cached_tokens - before.cached_tokens) == again, key

    with_client(scenario)


def test_a_stopped_engine_is_found_out_and_that_it_goes_on(
    servers: Servers, book: Book, with_client: Any, logs: Path
) -> None:
    """vLLM's own /health says 200 while its engine's core is stopped. The router's says 503 then, new requests get a
    clear error, and a request under way is answered once the engine goes on."""
    case, quick = book.spare[0], ("--health-engine-s", "1", "--health-interval-s", "0.2")

    async def scenario(client: Client) -> None:
        with routed([servers.prefill], [servers.decode], logs, "concurrent", *quick) as router:

            async def says(status: int) -> str:
                try:
                    await client.get_text(f"{router.url}/health")
                except RequestFailed as error:
                    return "" if error.status == status else str(error)
                return "" if status == 200 else "200"

            servers.decode.pause_engine()
            try:
                waiting = asyncio.create_task(client.complete(router.url, case.prompt, len(case.tokens)))
                await watch.until("the router finds it out", partial(says, 503))
                assert await asyncio.to_thread(servers.decode.healthy)
                with pytest.raises(RequestFailed, match="no decode server is healthy") as failed:
                    await client.complete(router.url, case.prompt, 1)
                assert failed.value.status == 503
            finally:
                servers.decode.pause_engine(False)
            assert_equal([case], [await waiting])
            await watch.until("the router uses it again", partial(says, 200))
            assert_equal([case], [await client.complete(router.url, case.prompt, len(case.tokens))])
            await watch.settled(client, servers.all)

    with_client(scenario)
