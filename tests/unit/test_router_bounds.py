"""What the router remembers of a server that failed, and what it does not hold against one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientSession, web

from pdtransport.router import hints
from pdtransport.router.admission import Admission
from pdtransport.router.call import Call, parse
from pdtransport.router.endpoints import Fleet
from pdtransport.router.hints import Hinter
from pdtransport.router.settings import RouterPoolHint, RouterSettings
from pdtransport.serving.errors import ApiError
from tests.unit.router_rig import ask, rigged, run, soon
from tests.unit.test_router_failures import fails, learned

LONG = ask(prompt=list(range(2000)))  # the router sends it where its beginning was before


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_retry_goes_to_another_server_though_the_prefix_is_on_the_one_that_failed(role: str) -> None:
    """What draws a request to a server (its cache) must not draw the retry there, too: the one that was tried is
    avoided as long as there is another."""

    async def test() -> None:
        async with rigged(prefill=2, decode=2, dispatch="serial") as rig:
            await learned(rig)
            assert (await rig.ask(LONG)).status == 200
            servers = rig.prefill if role == "prefill" else rig.decode
            (home,) = [engine for engine in servers if engine.seen]
            (other,) = [engine for engine in servers if not engine.seen]
            home.script = fails(503)
            reply = await rig.ask(LONG)
            assert (reply.status, reply.headers["x-pd-path"]) == (200, "disaggregated")
            assert reply.headers[f"x-pd-{role}"] == other.name
            assert (len(home.seen), len(other.seen)) == (2, 1)

    run(test)


def test_a_clients_own_fault_counts_against_no_server() -> None:
    """Requests that every server would refuse must not take one of them out of service for others."""

    async def test() -> None:
        async with rigged(health={"eject_after": 1, "eject_s": 60}) as rig:
            await learned(rig)
            (prefill,) = rig.router.fleet.prefill
            for status in (401, 404, 422):
                rig.p.script = fails(status, kind="NotFoundError")
                await rig.ask()
            assert (prefill.failures, prefill.describe()["spared"]) == (0, False)
            rig.p.script = fails(500)
            await rig.ask()
            assert (prefill.failures, prefill.describe()["spared"]) == (1, True)

    run(test)


@pytest.mark.parametrize("status", [204, 301, 307, 404, 503])
def test_only_200_says_that_a_server_is_healthy(status: int) -> None:
    """A redirect is what a proxy says while the server behind it is away."""

    async def test() -> None:
        async with rigged(decode=2, health={"interval_s": 0.02}) as rig:
            checked = rig.decode[0].health_checks
            rig.decode[0].health_status = status
            await soon(lambda: rig.decode[0].health_checks >= checked + 3)  # the second was asked with it
            assert not rig.router.fleet.decode[0].healthy
            assert rig.router.fleet.decode[0].last_error == f"GET /health answers {status}"
            rig.decode[0].health_status = 200
            await soon(lambda: rig.router.fleet.decode[0].healthy)

    run(test)


def test_bodies_under_way_hold_no_more_bytes_than_their_bound() -> None:
    """The next one is told to come again, and comes in when others have gone."""
    raw = {
        "prefill": ["http://h:1"],
        "decode": ["http://h:2"],
        "max_buffered_bytes": 1 << 20,
        "max_body_bytes": 1 << 20,
    }
    admission = Admission(RouterSettings.build(raw))
    admission.reserve(1 << 19)
    admission.reserve(1 << 19)
    with pytest.raises(ApiError, match="max_buffered_bytes") as refused:
        admission.reserve(1)
    assert refused.value.status == 503
    assert admission.buffered == 1 << 20


def call(tokens: int) -> Call:
    return parse(json.dumps(ask(prompt=[1] * tokens)).encode(), "completions", chunk_chars=64, chunks=1)


def test_hints_that_wait_hold_no_more_bytes_than_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that answers slowly costs the router a bounded number of prompts, whatever their length; hints beyond it
    are dropped, and counted."""

    async def test() -> None:
        counted: list[str] = []
        metrics: Any = SimpleNamespace(hints=SimpleNamespace(add=counted.append))
        arrived, go_on = asyncio.Event(), asyncio.Event()

        async def slow(request: web.Request) -> web.Response:
            arrived.set()
            await go_on.wait()
            return web.json_response({"done": 1, "of": 1})

        app = web.Application(client_max_size=1 << 30)
        app.add_routes([web.post("/pool/hint", slow)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        fleet = Fleet(RouterSettings.build({"prefill": ["http://h:1"], "decode": ["http://h:2"]}))
        async with ClientSession() as http:
            hint = RouterPoolHint(url=url, key_file=Path("key"), timeout_s=30)
            hinter = Hinter(hint, "key", "", fleet, http, metrics)
            one = call(1000)
            nbytes = len(one.prompt_json())
            monkeypatch.setattr(hints, "MAX_QUEUED_BYTES", 3 * nbytes)
            for _ in range(5):
                hinter.offer(one, [])
            assert counted == ["dropped"] * 2
            await asyncio.wait_for(arrived.wait(), 20)
            go_on.set()
            await asyncio.gather(*hinter._tasks)
            await asyncio.sleep(0)
            assert counted == ["dropped"] * 2 + ["begun"] * 3
            hinter.offer(one, [])
            await asyncio.gather(*hinter._tasks)
            assert counted[5:] == ["begun"]
            await hinter.stop()
        await runner.cleanup()

    run(test)
