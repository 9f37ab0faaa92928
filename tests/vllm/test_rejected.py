"""Requests that end before decode has begun, rejected by a server or left by their client: both servers are told what
happened, and nothing waits for a deadline."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.client import Answer, Client, Order, RequestFailed, new_transfer, to_decode, to_prefill
from tests.rig.fixtures import Servers, forget
from tests.rig.prompts import Prompts
from tests.rig.router import routed
from tests.rig.servers import Server

# What a request that only ended early must not be booked as.
FAULTS = (
    "failed_timeout", "failed_mismatch", "failed_unknown", "given_up_timeout", "given_up_mismatch",
    "grants_mismatched", "holds_expired", "early_grants_expired",
)  # fmt: skip
HELD = frozenset({"holds_expired", "given_up_timeout"})
WRONG = {"model": "no-such-model"}
TOO_LONG = [1] * 9000


async def faults(servers: Servers) -> Counter[str]:
    total: Counter[str] = Counter()
    for server in servers.all:
        total.update({name: count for name, count in (await watch.counters(server)).items() if name in FAULTS})
    return total


async def booked(client: Client, server: Server, role: str, outcome: str) -> float:
    """How many transfers vLLM's metric counts with this end; engines tell with their next step."""
    await watch.refresh(client, server)
    text = await client.get_text(f"{server.url}/metrics")
    try:
        return watch.metric(text, "vllm:pdtransport_transfers_total", role=role, outcome=outcome)
    except KeyError:
        return 0.0


async def let_go(servers: Servers) -> None:
    """No worker holds anything for a transfer. Had one waited for a deadline, its counters would say so."""

    async def complaint() -> str:
        replies = [(server, reply) for server in servers.all for reply in await watch.status(server)]
        return "; ".join(f"{server}: {reply['live']}" for server, reply in replies if watch.live([reply]))

    await watch.until("nothing is held", complaint)


def without_faults(
    servers: Servers,
    with_client: Any,
    scenario: Callable[[Client], Awaitable[None]],
    but: frozenset[str] = frozenset(),
) -> None:
    async def checked(client: Client) -> None:
        await forget(client, *servers.all)
        before = await faults(servers)
        await scenario(client)
        await let_go(servers)
        found = await faults(servers) - before
        assert not found.keys() - but, found
        await watch.settled(client, servers.all)

    with_client(checked)


@pytest.mark.parametrize("first", ["prefill", "decode"])
@pytest.mark.parametrize("wrong", ["model", "length"])
def test_decode_rejects_what_prefill_computes(first: str, wrong: str, servers: Servers, with_client: Any) -> None:
    """Whether prefill holds the pages already or gets the request later: it hears that nobody will take them, and both
    book a rejection."""

    async def scenario(client: Client) -> None:
        transfer, prompt = new_transfer(), Prompts(515).one(150)
        ends = ((servers.prefill, "producer"), (servers.decode, "consumer"))
        before = [await booked(client, server, role, "rejected") for server, role in ends]

        async def prefill() -> Answer:
            return await client.complete(servers.prefill, prompt, 1, to_prefill(servers.prefill, transfer))

        if first == "prefill":
            await prefill()
        asked, more = (TOO_LONG, {}) if wrong == "length" else (prompt, WRONG)
        with pytest.raises(RequestFailed) as refused:
            await client.complete(servers.decode, asked, 2, to_decode(servers.prefill, transfer), **more)
        assert refused.value.status == (400 if wrong == "length" else 404)

        async def told() -> str:  # the answer does not wait for it
            return "" if (await watch.status(servers.decode, transfer))[0]["transfers"] else "not yet"

        await watch.until("decode's worker knows", told)
        if first == "decode":
            await prefill()
        (record,) = (await watch.status(servers.decode, transfer))[0]["transfers"]
        assert (record["state"], record["code"]) == ("declined", "rejected")
        await let_go(servers)
        if first == "prefill":
            (record,) = (await watch.status(servers.prefill, transfer))[0]["transfers"]
            assert (record["state"], record["code"]) == ("given up", "rejected")
        after = [await booked(client, server, role, "rejected") for server, role in ends]
        assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]

    without_faults(servers, with_client, scenario)


@pytest.mark.parametrize("order", ["concurrent", "serial"])
def test_the_router_passes_a_rejection_on(order: Order, servers: Servers, with_client: Any, logs: Path) -> None:
    """Both servers reject what is wrong with the request, and neither waits for the other."""

    async def scenario(client: Client) -> None:
        prompt = Prompts(516).one(150)
        with routed([servers.prefill], [servers.decode], logs, order) as router:
            for asked, more, status in ((prompt, WRONG, 404), (TOO_LONG, {}, 400)):
                with pytest.raises(RequestFailed) as refused:
                    await client.complete(router.url, asked, 2, **more)
                assert refused.value.status == status
                await let_go(servers)

    without_faults(servers, with_client, scenario)


def test_a_decode_that_waits_for_a_rejected_request_is_let_go(servers: Servers, with_client: Any) -> None:
    """Prefill's server never let the request in, and the router gives decode's up: decode cancels, and prefill's worker
    forgets the grant."""

    async def scenario(client: Client) -> None:
        transfer = new_transfer()
        params = to_decode(servers.prefill, transfer)
        waiting = asyncio.create_task(client.complete(servers.decode, Prompts(517).one(150), 2, params))

        async def granted() -> str:
            live = (await watch.status(servers.prefill))[0]["live"]
            return "" if live["early_grants"] else f"{live}"

        await watch.until("decode granted", granted)
        with pytest.raises(RequestFailed):
            await client.complete(servers.prefill, TOO_LONG, 1, to_prefill(servers.prefill, transfer))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await let_go(servers)
        (record,) = (await watch.status(servers.decode, transfer))[0]["transfers"]
        assert record["code"] == "cancelled"

    without_faults(servers, with_client, scenario)


@pytest.mark.parametrize("order", ["concurrent", "serial"])
def test_clients_that_leave_are_booked_as_such(order: Order, servers: Servers, with_client: Any, logs: Path) -> None:
    """At any moment: whoever was told first, nothing is called a timeout, a mismatch or the other server's fault.

    In the serial order nobody knows of a transfer whose client leaves after prefill has computed and before decode is
    asked: prefill's hold has to end that one.
    """

    async def scenario(client: Client) -> None:
        prompts = Prompts(518)
        with routed([servers.prefill], [servers.decode], logs, order) as router:
            for index in range(10):
                asked = asyncio.create_task(
                    client.complete(router.url, prompts.one(300 + 60 * index), 60, stream=bool(index % 2))
                )
                await asyncio.sleep(0.03 * index)
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
            await let_go(servers)

    without_faults(servers, with_client, scenario, HELD if order == "serial" else frozenset())
