"""Fifty requests under way while the router is told to end, or while it or a server is killed or stopped: none hangs,
and each ends with an answer or an error in the API's form. With real vLLM: ``python -m tests.soak.kills``."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeAlias

import pytest
from aiohttp import ClientError, ClientSession

from pdtransport.serving.errors import is_openai_error
from tests.processes.test_router import FAST_CHECKS, PATIENCE_S, Child, body, path_of, router, run, server, until

REQUESTS = 50
BROKEN = "broken connection"
Pair: TypeAlias = tuple[tuple[str, Child], tuple[str, Child]]


async def ended(client: ClientSession, url: str, **more: Any) -> str:
    """How a request ends: ``ok``, ``HTTP ...`` with an error in the API's form, ``error event``, or what must not
    be."""
    try:
        async with client.post(f"{url}/v1/completions", json=body(**more)) as response:
            raw = await response.read()
    except (ClientError, OSError):
        return BROKEN
    if response.status != 200:
        return f"HTTP {response.status}" if is_openai_error(raw) else f"HTTP {response.status} without an error body"
    if not more.get("stream"):
        return "ok" if "choices" in json.loads(raw) else "no answer"
    last = raw.removesuffix(b"\n\n").rsplit(b"\n\n", 1)[-1].removeprefix(b"data: ")
    return "ok" if last == b"[DONE]" else "error event" if is_openai_error(last) else "ended without a word"


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """A prefill and a decode server, for tests that leave them as they were."""
    with server("prefill") as p, server("decode") as d:
        yield p, d


def fifty(client: ClientSession, url: str, user: str) -> list[asyncio.Task[str]]:
    """Half of them streamed."""
    return [
        asyncio.create_task(ended(client, url, user=user, stream=number % 2 == 0, n=1)) for number in range(REQUESTS)
    ]


async def says(client: ClientSession, url: str, status: int) -> bool:
    """Whether the router's readiness has this status."""
    async with client.get(f"{url}/health") as response:
        return response.status == status


async def under_way(client: ClientSession, url: str, role: str) -> None:
    """Wait until the server of this role has all of them."""

    async def has_all() -> bool:
        async with client.get(f"{url}/pd/status") as response:
            return sum(each["inflight"] for each in (await response.json())[role]) >= REQUESTS

    await until(has_all)


def test_told_to_end_the_router_gives_each_of_fifty_clients_an_error_and_is_gone_after_drain_s(pair: Pair) -> None:
    """Open streams get an error event, pending requests a 503, not before the time is up that requests under way get;
    the router ends by itself, with status 0. (That it ends in time: ``tests/unit/test_router_stops.py``.)"""
    drain_s = 1.5
    (p, _), (d, _) = pair
    with router("--prefill", p, "--decode", d, "--timeouts-drain-s", str(drain_s)) as (url, child):

        async def test(client: ClientSession) -> None:
            assert await path_of(client, url) == "disaggregated"
            streams = [asyncio.create_task(ended(client, url, user="hang", stream=True)) for _ in range(REQUESTS // 2)]
            pending = [asyncio.create_task(ended(client, url, user="mute")) for _ in range(REQUESTS // 2)]
            await under_way(client, url, "decode")
            child.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert await asyncio.to_thread(child.process.wait, PATIENCE_S) == 0
            assert time.monotonic() - began >= drain_s
            assert Counter(await asyncio.gather(*streams)) == {"error event": REQUESTS // 2}
            assert Counter(await asyncio.gather(*pending)) == {"HTTP 503": REQUESTS // 2}

        run(test)


def test_prefill_killed_under_fifty_requests_costs_no_answer() -> None:
    """Decode computes the prompts itself."""
    with (
        server("prefill") as (p, victim),
        server("decode") as (d, _),
        router("--prefill", p, "--decode", d, *FAST_CHECKS) as (url, _),
    ):

        async def test(client: ClientSession) -> None:
            assert await path_of(client, url) == "disaggregated"
            asked = fifty(client, url, "prefill-hangs")
            await under_way(client, url, "prefill")
            victim.process.kill()
            assert Counter(await asyncio.gather(*asked)) == {"ok": REQUESTS}

        run(test)


@pytest.mark.parametrize("user", ["mute", "hang"])
def test_only_decode_killed_under_fifty_requests_ends_each_with_a_clear_error(user: str) -> None:
    """Without a byte of an answer that is a 502 or 503, in a stream an error event."""
    with (
        server("prefill") as (p, _),
        server("decode") as (d, victim),
        router("--prefill", p, "--decode", d, *FAST_CHECKS) as (url, _),
    ):

        async def test(client: ClientSession) -> None:
            assert await path_of(client, url) == "disaggregated"
            streams = user == "hang"
            asked = [asyncio.create_task(ended(client, url, user=user, stream=streams)) for _ in range(REQUESTS)]
            await under_way(client, url, "decode")
            await asyncio.sleep(0.3)  # so that streams have begun
            victim.process.kill()
            ends = Counter(await asyncio.gather(*asked))
            assert set(ends) <= ({"error event"} if streams else {"HTTP 502", "HTTP 503"}), ends
            await until(lambda: says(client, url, 503))

        run(test)


def test_decode_stopped_under_fifty_requests_costs_no_answer_once_it_goes_on(pair: Pair) -> None:
    """Meanwhile /health says that nothing is answered."""
    (p, _), (d, stopped) = pair
    with router("--prefill", p, "--decode", d, *FAST_CHECKS) as (url, _):

        async def test(client: ClientSession) -> None:
            assert await path_of(client, url) == "disaggregated"
            asked = fifty(client, url, "after-a-stop")
            await under_way(client, url, "decode")
            stopped.process.send_signal(signal.SIGSTOP)
            await until(lambda: says(client, url, 503))
            stopped.process.send_signal(signal.SIGCONT)
            assert Counter(await asyncio.gather(*asked)) == {"ok": REQUESTS}
            await until(lambda: says(client, url, 200))

        run(test)


def test_killed_router_leaves_no_request_in_its_servers(pair: Pair) -> None:
    """Its clients see broken connections; the servers abort what it had sent them, and serve its successor."""
    (p, _), (d, _) = pair
    with router("--prefill", p, "--decode", d) as (url, child):

        async def killed(client: ClientSession) -> None:
            assert await path_of(client, url) == "disaggregated"
            asked = [asyncio.create_task(ended(client, url, user="mute")) for _ in range(REQUESTS)]
            await under_way(client, url, "decode")
            child.process.kill()
            assert Counter(await asyncio.gather(*asked)) == {BROKEN: REQUESTS}

            async def aborted() -> bool:
                async with client.get(f"{d}/under_way") as response:
                    return int(await response.text()) == 0

            await until(aborted)

        run(killed)
    with router("--prefill", p, "--decode", d) as (url, _):

        async def served(client: ClientSession) -> None:
            assert await path_of(client, url) == "disaggregated"

        run(served)
