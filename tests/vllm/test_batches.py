"""Several prompts in one body under one transfer: each is answered from its own pages, whoever sends them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.cases import Case, assert_equal
from tests.rig.client import (
    Answer,
    Client,
    Handed,
    Order,
    RequestFailed,
    new_transfer,
    request_body,
    to_decode,
    to_prefill,
)
from tests.rig.fixtures import Book, Servers, forget, pair_spec
from tests.rig.proof import bytes_equal, crossed
from tests.rig.router import routed
from tests.rig.servers import Server, fleet

LONGEST = 700


async def ask(
    client: Client, url: str, prompts: Any, tokens: int, kv: Any = None, **more: Any
) -> tuple[Any, Mapping[str, str]]:
    """The answer's JSON, and its headers."""
    body = {**request_body([], tokens, kv, **more), "prompt": prompts}
    async with client.post(f"{url}/v1/completions", body) as response:
        return await response.json(), response.headers.copy()


def as_answers(data: Any, wanted: Sequence[Case]) -> list[Answer]:
    """One for each prompt, in order, cut to the tokens that are known for it."""
    assert [choice["index"] for choice in data["choices"]] == list(range(len(wanted)))
    tokens = [choice["token_ids"][: len(case.tokens)] for choice, case in zip(data["choices"], wanted, strict=True)]
    return [Answer(each, None, None, 0, 0, 0) for each in tokens]


def some_of(book: Book) -> list[Case]:
    """Of different lengths; one of them twice, as a client may send it."""
    some = [case for case in book.spare if len(case.prompt) <= LONGEST][10:15]
    return [*some, some[1]]


@pytest.mark.parametrize("order", ["concurrent", "serial"])
def test_a_batch_sent_to_the_servers_has_a_transfer_for_each_prompt(
    order: Order, servers: Servers, book: Book, with_client: Any
) -> None:
    """Without a router, or with one that passes batches on as they are (vLLM's own do): prefill answers with the
    parameters of the first prompt, and decode's requests all get those."""
    some = some_of(book)
    prompts, longest = [list(case.prompt) for case in some], max(len(case.tokens) for case in some)

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        transfer = new_transfer()
        prefilling = asyncio.create_task(
            ask(client, servers.prefill.url, prompts, 1, to_prefill(servers.prefill, transfer))
        )
        params = to_decode(servers.prefill, transfer)
        if order == "serial":
            params = (await prefilling)[0]["kv_transfer_params"]
        data, _ = await ask(client, servers.decode.url, prompts, longest, params)
        await prefilling
        answers = as_answers(data, some)
        assert_equal(some, answers)
        names = [transfer, *(f"{transfer}.{place}" for place in range(1, len(some)))]
        handed = [Handed(name, None, answer) for name, answer in zip(names, answers, strict=True)]
        bytes_equal(await crossed(some, handed, [servers.prefill], servers.decode), servers.audit)
        await watch.settled(client, servers.all)

    with_client(scenario)


def test_a_batch_without_a_transfer_id_is_handed_over_by_what_prefill_answers(
    servers: Servers, book: Book, with_client: Any
) -> None:
    """Routers that know NIXL's keys alone mint nothing: all transfers are named after the one in prefill's answer."""
    some = some_of(book)[:3]
    prompts, longest = [list(case.prompt) for case in some], max(len(case.tokens) for case in some)

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        asked = {"do_remote_decode": True, "do_remote_prefill": False}
        params = (await ask(client, servers.prefill.url, prompts, 1, asked))[0]["kv_transfer_params"]
        data, _ = await ask(client, servers.decode.url, prompts, longest, params)
        answers = as_answers(data, some)
        assert_equal(some, answers)
        transfer = params["transfer_id"]
        names = [transfer, f"{transfer}.1", f"{transfer}.2"]
        handed = [Handed(name, None, answer) for name, answer in zip(names, answers, strict=True)]
        await crossed(some, handed, [servers.prefill], servers.decode)

    with_client(scenario)


def test_further_sequences_of_one_prompt_are_computed_by_decode(servers: Servers, book: Book, with_client: Any) -> None:
    """``n`` answers to one prompt under one transfer: the first has it, all are right."""
    case = book.spare[16]

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        transfer, prompt = new_transfer(), list(case.prompt)
        kv = to_prefill(servers.prefill, transfer)
        prefilling = asyncio.create_task(ask(client, servers.prefill.url, prompt, 1, kv))
        # vLLM takes no n with greedy sampling (this is near enough), and its CPU build no seed without.
        more = {"n": 2, "temperature": 0.01, "seed": None}
        data, _ = await ask(
            client, servers.decode.url, prompt, len(case.tokens), to_decode(servers.prefill, transfer), **more
        )
        await prefilling
        assert_equal([case, case], as_answers(data, [case, case]))
        await watch.settled(client, servers.all)

    with_client(scenario)


def test_a_list_of_one_prompt_crosses_through_the_router(
    servers: Servers, book: Book, with_client: Any, logs: Path
) -> None:
    """``[[ids]]`` is what client libraries send; a batch of several goes to decode alone and says so."""
    some = some_of(book)[:3]

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        with routed([servers.prefill], [servers.decode], logs, "concurrent") as router:
            for case in some:
                data, told = await ask(client, router.url, [list(case.prompt)], len(case.tokens))
                assert told["x-pd-path"] == "disaggregated"
                (answer,) = as_answers(data, [case])
                assert_equal([case], [answer])
                handed = [Handed(told["x-pd-transfer-id"], None, answer)]
                bytes_equal(await crossed([case], handed, [servers.prefill], servers.decode), servers.audit)
            prompts, longest = [list(case.prompt) for case in some], max(len(case.tokens) for case in some)
            data, told = await ask(client, router.url, prompts, longest)
            assert_equal(some, as_answers(data, some))
            assert told["x-pd-path"].startswith("decode-only; the body has a batch of 3 prompts")
            for wrong in ([], [[]], [["a"]], [[1], "a"], [None], {"a": 1}):
                plain = await refusal(client, servers.decode, wrong)
                assert await refusal(client, router.url, wrong) == plain, wrong
            await watch.settled(client, servers.all)

    with_client(scenario)


async def refusal(client: Client, to: Server | str, prompt: Any) -> int:
    """The status of what is no prompt; 200 if it is one after all."""
    try:
        await ask(client, to if isinstance(to, str) else to.url, prompt, 2)
    except RequestFailed as error:
        return error.status
    return 200


@pytest.fixture(scope="module")
def short(logs: Path, audit: Path) -> Any:
    """A prefill server that takes half as long prompts as decode does."""
    with fleet(pair_spec("short", "kv_producer", audit, cores="0", max_model_len=512), logs=logs) as (server,):
        yield server


@pytest.mark.parametrize("order", ["concurrent", "serial"])
def test_what_prefill_refuses_decode_answers(
    order: Order, short: Server, servers: Servers, book: Book, with_client: Any, logs: Path
) -> None:
    """A prompt that is too long for prefill alone, streamed and not: decode's own answer, without a wait for a
    deadline, and the reason is told. What decode refuses too is refused in its words."""
    long = next(case for case in book.spare + book.assorted if 512 < len(case.prompt) <= 1500)
    fits = next(case for case in book.spare if len(case.prompt) < 400)

    async def scenario(client: Client) -> None:
        await forget(client, short, servers.decode)
        with routed([short], [servers.decode], logs, order) as router:
            for stream in (False, True):
                await forget(client, servers.decode)  # it would answer from its cache before prefill refuses
                answer = await client.complete(router.url, long.prompt, len(long.tokens), stream=stream)
                assert_equal([long], [answer])
                assert answer.headers["x-pd-path"] == f"decode-only; prefill server 127.0.0.1:{short.port} answers 400"
            answer = await client.complete(router.url, fits.prompt, len(fits.tokens))
            assert_equal([fits], [answer])
            assert answer.headers["x-pd-path"].startswith("disaggregated")
            with pytest.raises(RequestFailed) as plain:
                await client.complete(servers.decode, [1] * 9000, 4)
            with pytest.raises(RequestFailed) as caught:
                await client.complete(router.url, [1] * 9000, 4)
            assert (caught.value.status, caught.value.text) == (plain.value.status, plain.value.text)
            await watch.settled(client, [short, servers.decode])

    with_client(scenario)
