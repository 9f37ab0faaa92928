"""Retried, repeated, contradictory and malformed requests: an answer or a clear error, and servers serve on."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.cases import Case, assert_equal, handed_over, plainly
from tests.rig.client import Answer, Client, Handed, Order, RequestFailed, hand_off, new_transfer, to_decode, to_prefill
from tests.rig.fixtures import DEADLINES, Book, Servers, forget
from tests.rig.prompts import BOS
from tests.rig.proof import bytes_equal, crossed, record_of

ORDERS: tuple[Order, ...] = ("concurrent", "serial")
GIVEN_UP_S = DEADLINES["arrival_s"] + 15  # a deadline of ours, and slack for a busy machine


async def serves_on(client: Client, servers: Servers, book: Book) -> None:
    """The servers still hand over, prove it, and hold nothing of what went wrong before."""
    for server in servers.all:
        server.must_live()
    some = book.spare[-8:]
    await forget(client, servers.prefill, servers.decode)
    handed = await handed_over(client, some, lambda _: servers.prefill, servers.decode, "concurrent")
    bytes_equal(await crossed(some, handed, [servers.prefill], servers.decode), servers.audit)
    await watch.settled(client, servers.all)


async def fails(client: Client, servers: Servers, case: Case, params: dict[str, Any]) -> RequestFailed:
    """Decode fails this request, as its ``kv_load_failure_policy`` says, within its deadlines."""
    started = time.monotonic()
    with pytest.raises(RequestFailed) as caught:
        await client.complete(servers.decode, case.prompt, len(case.tokens), params)
    assert time.monotonic() - started < GIVEN_UP_S
    return caught.value


async def refused(servers: Servers, transfer: str, *codes: str) -> str:
    """Assert that decode knows why the transfer failed, and has said so in its log; returns the reason."""
    record = await record_of(servers.decode, transfer, "consumer")
    assert record.get("code") in codes, f"expected {' or '.join(codes)}: {record}"
    assert record["reason"], f"no reason given: {record}"
    assert transfer in servers.decode.log.read_text(errors="replace"), "decode's log does not name the transfer"
    return str(record["reason"])


def test_retry_after_the_client_went_away(servers: Servers, book: Book, with_client: Any) -> None:
    """A retried request (same prompt, new transfer id) is handed over as if nothing had happened."""
    some = [case for case in book.assorted if len(case.prompt) > 300][:12]

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        for delay, case in enumerate(some):
            doomed = asyncio.create_task(hand_off(client, servers.prefill, servers.decode, case.prompt, 16))
            await asyncio.sleep(0.03 * delay)
            doomed.cancel()
            await asyncio.gather(doomed, return_exceptions=True)
            again = await hand_off(client, servers.prefill, servers.decode, case.prompt, len(case.tokens))
            assert_equal([case], [again])
            bytes_equal(await crossed([case], [again], [servers.prefill], servers.decode), servers.audit)
        await watch.settled(client, servers.all)

    with_client(scenario)


def test_a_router_that_copies_only_nixls_own_keys(servers: Servers, book: Book, with_client: Any) -> None:
    """A router made for vLLM's NIXL connector mints no transfer id, and may drop prefill's: pages are handed over all
    the same."""
    some = [case for case in book.assorted if len(case.prompt) > 300][12:16]
    nixls = ("remote_engine_id", "remote_request_id", "remote_block_ids", "remote_host", "remote_port", "tp_size")
    asked = {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(nixls[:5])}

    async def hand(client: Client, case: Case) -> Handed:
        first = await client.complete(servers.prefill, case.prompt, 1, asked)
        assert first.kv_params is not None
        told = {"do_remote_prefill": True, "do_remote_decode": False, **{key: first.kv_params[key] for key in nixls}}
        answer = await client.complete(servers.decode, case.prompt, len(case.tokens), told)
        return Handed(first.kv_params["transfer_id"], first, answer)

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        handed = [await hand(client, case) for case in some]
        assert_equal(some, handed)
        bytes_equal(await crossed(some, handed, [servers.prefill], servers.decode), servers.audit)

    with_client(scenario)


def test_transfer_id_used_again(servers: Servers, book: Book, with_client: Any) -> None:
    """A transfer id that was used before hands nothing over, whatever the prompt: decode fails the request by name of
    the reason, and never with the pages of the first use."""
    first, other = book.spare[0], book.spare[1]

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        transfer = new_transfer()
        handed = await hand_off(
            client, servers.prefill, servers.decode, first.prompt, len(first.tokens), transfer=transfer
        )
        assert_equal([first], [handed])
        refused_before = (await watch.counters(servers.decode)).get("fetches_refused_reused", 0)
        for case in (first, other):
            await forget(client, servers.prefill, servers.decode)
            try:
                again = await hand_off(
                    client, servers.prefill, servers.decode, case.prompt, len(case.tokens), transfer=transfer
                )
            except RequestFailed as error:
                print(f"\nused again: {error}")
            else:
                assert_equal([case], [again])  # served, then it must be right; but not from the old transfer
        refused_now = (await watch.counters(servers.decode)).get("fetches_refused_reused", 0)
        assert refused_now >= refused_before + 2, "it was handed over twice"
        log = servers.decode.log.read_text(errors="replace")
        assert f"transfer {transfer} refused: this transfer id was used before" in log
        await serves_on(client, servers, book)

    with_client(scenario)


def test_transfer_id_used_twice_at_once(servers: Servers, book: Book, with_client: Any) -> None:
    """Two requests under one transfer id: at most one is handed over, none gets the other's answer."""
    one, two = book.spare[2], book.spare[3]

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        transfer = new_transfer()
        jobs = [
            hand_off(client, servers.prefill, servers.decode, case.prompt, len(case.tokens), transfer=transfer)
            for case in (one, two)
        ]
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        for case, outcome in zip((one, two), outcomes, strict=True):
            if isinstance(outcome, Handed):
                assert_equal([case], [outcome])
            else:
                assert isinstance(outcome, RequestFailed), repr(outcome)
        assert any(isinstance(outcome, RequestFailed) for outcome in outcomes), "one id served two requests"
        await serves_on(client, servers, book)

    with_client(scenario)


def test_prefill_address_where_nobody_listens(servers: Servers, book: Book, with_client: Any) -> None:
    """A wrong prefill address fails the request after the connect deadline."""

    async def scenario(client: Client) -> None:
        transfer = new_transfer()
        params = {**to_decode(servers.prefill, transfer), "remote_port": 1}
        await fails(client, servers, book.spare[5], params)
        record = await record_of(servers.decode, transfer, "consumer")
        assert record["code"] in ("peer_lost", "refused", "timeout"), record
        await serves_on(client, servers, book)

    with_client(scenario)


def test_prefill_of_another_prompt_is_never_used(servers: Servers, book: Book, with_client: Any) -> None:
    """Where prefill computed another prompt than decode was asked for, decode fails: another prompt's pages never
    answer."""
    asked, computed = sorted(book.spare[6:8], key=lambda case: len(case.prompt))

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        for other in (computed.prompt, computed.prompt[: len(asked.prompt)]):
            transfer = new_transfer()
            _, error = await asyncio.gather(
                client.complete(servers.prefill, other, 1, to_prefill(servers.prefill, transfer)),
                fails(client, servers, asked, to_decode(servers.prefill, transfer)),
            )
            print(f"\n{error}: {await refused(servers, transfer, 'mismatch')}")
        await serves_on(client, servers, book)

    with_client(scenario)


def test_roles_are_kept(servers: Servers, book: Book, with_client: Any) -> None:
    """Asked to do the other role's part, a server answers the request itself and hands nothing over."""
    case = book.spare[8]

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all)
        transfer = new_transfer()
        swapped = await client.complete(
            servers.prefill, case.prompt, len(case.tokens), to_decode(servers.other_prefill, transfer)
        )
        assert_equal([case], [swapped])
        on_decode = await client.complete(
            servers.decode, case.prompt, len(case.tokens), to_prefill(servers.decode, transfer)
        )
        assert_equal([case], [on_decode])
        assert not on_decode.kv_params, "a consumer offered pages"
        await serves_on(client, servers, book)

    with_client(scenario)


def test_prompt_of_one_token(servers: Servers, book: Book, with_client: Any) -> None:
    """A prompt that leaves nothing to hand over is answered, in both orders, and holds nothing."""

    async def scenario(client: Client) -> None:
        alone = await client.complete(servers.decode, [BOS], 1)
        for order in ORDERS:
            handed = await hand_off(client, servers.prefill, servers.decode, [BOS], 1, order)
            assert handed.tokens == alone.tokens
        await watch.settled(client, servers.all)

    with_client(scenario)


WRONG_TO_DECODE: list[dict[str, Any]] = [
    {},
    {"transfer_id": None},
    {"transfer_id": 17},
    {"transfer_id": ""},
    {"transfer_id": "x" * 10_000},
    {"transfer_id": "Ünïcode \x00 and spaces"},
    {"transfer_id": ["a"]},
    {"remote_host": None},
    {"remote_host": 5},
    {"remote_host": "a b\n"},
    {"remote_host": "no.such.host.invalid"},
    {"remote_port": "7670"},
    {"remote_port": -1},
    {"remote_port": 1 << 40},
    {"remote_port": 1.5},
    {"remote_port": True},
    {"tp_size": 0},
    {"tp_size": -3},
    {"tp_size": 10**9},
    {"tp_size": "two"},
    {"do_remote_prefill": "yes"},
    {"do_remote_prefill": 1},
    {"do_remote_prefill": [[]]},
    {"do_remote_decode": True},
    {"remote_engine_id": {"a": {"b": [1, 2, {"c": None}]}}},
    {"remote_block_ids": "everything"},
    {"remote_block_ids": [[-1, 1 << 70]]},
    {"remote_request_id": 5, "anything": "else"},
]
NOT_OBJECTS: list[Any] = ["text", 5, [1, 2], True]


def test_malformed_transfer_parameters_never_crash_an_engine(servers: Servers, book: Book, with_client: Any) -> None:
    """Whatever ``kv_transfer_params`` hold: an error, or the right tokens; and both servers live."""
    case = book.spare[9]

    async def send(client: Client, server: Any, params: Any) -> Answer | RequestFailed:
        try:
            return await client.complete(server, case.prompt, len(case.tokens), None, kv_transfer_params=params)
        except RequestFailed as error:
            return error

    async def scenario(client: Client) -> None:
        tries: list[tuple[Any, Any]] = []
        for wrong in WRONG_TO_DECODE:
            base = to_decode(servers.prefill, new_transfer())
            tries.append((servers.decode, {**base, **wrong} if wrong else {"do_remote_prefill": True}))
            tries.append((servers.prefill, {**to_prefill(servers.prefill, new_transfer()), **wrong}))
        tries += [(server, value) for value in NOT_OBJECTS for server in (servers.decode, servers.prefill)]
        started = time.monotonic()
        outcomes = await asyncio.gather(*(send(client, server, params) for server, params in tries))
        for (server, params), outcome in zip(tries, outcomes, strict=True):
            if isinstance(outcome, Answer):
                assert tuple(outcome.tokens) == case.tokens, f"{server} answered {outcome.tokens} to {params}"
        refusals = [outcome for outcome in outcomes if isinstance(outcome, RequestFailed)]
        print(f"\n{len(tries)} tries, {len(refusals)} refused, {time.monotonic() - started:.1f} s")
        await serves_on(client, servers, book)

    with_client(scenario)


def test_transfer_id_that_nobody_knows(servers: Servers, book: Book, with_client: Any) -> None:
    """Decode gives up on a transfer that prefill never hears of, after its deadline, and says so. While it waits in
    vain, other requests are handed over and answered."""

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, servers.decode)
        transfer = new_transfer()
        stuck = asyncio.create_task(fails(client, servers, book.spare[10], to_decode(servers.prefill, transfer)))
        await asyncio.sleep(0.2)
        await handed_over(client, book.spare[11:17], lambda _: servers.prefill, servers.decode, "concurrent")
        assert not stuck.done(), "the hopeless request ended before the others: nothing was shown"
        await plainly(client, servers.decode, book.spare[17:19])
        error = await stuck
        reason = await refused(servers, transfer, "unknown", "timeout")
        assert "prefill" in reason
        print(f"\nHTTP said: {error}\ndecode's worker said: {reason}")
        await serves_on(client, servers, book)

    with_client(scenario)
