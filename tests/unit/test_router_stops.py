"""The router's end: requests under way get ``timeouts.drain_s``, then each client is told why its request ends."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from aiohttp import web

from tests.unit.router_rig import Engine, Rig, ask, event, rigged, run, soon, stream
from tests.unit.test_router_first_token import gives_out

STOPPING = {"type": "server_error", "param": None, "code": "stopping"}
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


def told(error: dict[str, Any]) -> bool:
    """Whether an error says that the router stops, in the API's form."""
    return "stops" in error["message"] and error == {**STOPPING, "message": error["message"]}


async def _hangs(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


async def _begun(rig: Rig, engine: Engine, requests: int) -> None:
    await engine.wait_for(requests)
    await soon(lambda: rig.router.describe()["inflight"] == requests)


def test_open_stream_ends_with_an_error_event_when_the_router_stops() -> None:
    """A client whose stream is cut by the router's end can tell it from a finished one, and the server is told."""

    async def test() -> None:
        async with rigged() as rig:
            rig.d.script = lambda request, body: stream(request, [b"data: 1\n\n", b""], hold=asyncio.Event())
            async with rig.post(ask(stream=True)) as response:
                assert await response.content.readany() == b"data: 1\n\n"
                await rig.router.stop()
                last = await response.read()
            assert last.startswith(b"data: {")
            assert last.endswith(b"\n\n")
            assert told(json.loads(last.removeprefix(b"data: "))["error"])
            await soon(lambda: rig.d.seen[0].cancelled)

    run(test)


def test_half_an_event_is_not_sent_before_the_error_event() -> None:
    """What of an event has come when the router stops would make the error event unreadable."""

    async def test() -> None:
        async with rigged() as rig:
            chunks = [event(1) + b'data: {"half', b""]
            rig.d.script = lambda request, body: stream(request, chunks, hold=asyncio.Event())
            async with rig.post(ask(stream=True)) as response:
                assert await response.content.readany() == event(1)
                await rig.router.stop()
                events = (await response.read()).split(b"\n\n")
            assert len(events) == 2
            assert told(json.loads(events[0].removeprefix(b"data: "))["error"])

    run(test)


def test_pending_requests_get_a_503_when_the_router_stops() -> None:
    """Requests without a byte of an answer, streamed or not, end with a status and a body that say why."""

    async def test() -> None:
        async with rigged() as rig:
            rig.d.script = _hangs
            asked = [asyncio.create_task(rig.ask(ask(stream=number % 2 == 0))) for number in range(6)]
            await _begun(rig, rig.d, 6)
            await rig.router.stop()
            for reply in await asyncio.gather(*asked):
                assert reply.status == 503
                assert told(reply.error)
            await soon(lambda: all(seen.cancelled for seen in rig.d.seen))

    run(test)


def test_request_whose_body_is_still_coming_gets_a_503_when_the_router_stops() -> None:
    """Whoever sends slowly is told, too."""

    async def test() -> None:
        async with rigged() as rig:
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.router.port)
            writer.write(HEAD % 100 + b'{"model"')
            listener = rig.router._main
            assert listener is not None
            await soon(lambda: len(listener._under_way) == 1)
            await rig.router.stop()
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert told(json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"])
            writer.close()

    run(test)


def test_stream_that_began_with_prefills_first_token_ends_with_an_error_event() -> None:
    """The answer has begun although decode has said nothing yet."""

    async def test() -> None:
        async with rigged(first_token="auto") as rig:
            await rig.learn()
            rig.d.script = _hangs

            gives_out(rig.p)
            async with rig.post(ask(stream=True)) as response:
                first = await response.content.readany()
                assert response.headers["x-pd-first-token"] == "prefill", first
                await rig.router.stop()
                last = await response.read()
            assert told(json.loads(last.removeprefix(b"data: "))["error"])

    run(test)


def test_requests_that_end_while_the_router_drains_get_their_answers() -> None:
    """The time that requests under way get is theirs, and the router ends when the last one did."""

    async def test() -> None:
        async with rigged(timeouts={"drain_s": 15}) as rig:
            go = asyncio.Event()

            async def waits(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await go.wait()
                return await rig.d.answer(request, body)

            rig.d.script = waits
            asked = [asyncio.create_task(rig.ask(ask(stream=number % 2 == 0))) for number in range(4)]
            await _begun(rig, rig.d, 4)
            port = rig.router.port
            stopping = asyncio.create_task(rig.router.stop())
            await asyncio.sleep(0.05)
            with pytest.raises(OSError, match="Connect call failed"):
                await asyncio.open_connection("127.0.0.1", port)
            go.set()
            replies = await asyncio.gather(*asked)
            assert [reply.status for reply in replies] == [200] * 4
            assert all(reply.body.endswith(b"data: [DONE]\n\n") for reply in replies[::2])
            await stopping

    run(test)


def test_router_ends_drain_s_after_it_is_told_and_not_twice_as_late() -> None:
    """Whoever stops it (pdlaunch, an orchestrator) has a grace period of his own, after which he kills. A client that
    takes nothing does not put the end off either. (A busy machine may hold one of three tries up.)"""
    drain_s, took = 2.0, []

    async def test() -> None:
        async with rigged(timeouts={"drain_s": drain_s}) as rig:

            async def floods(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                if body["max_tokens"] == 1:
                    return await _hangs(request, body)
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await response.prepare(request)
                while True:
                    await response.write(event("x" * 60_000))

            rig.d.script = floods
            pending = asyncio.create_task(rig.ask(ask(max_tokens=1)))
            _, writer = await asyncio.open_connection("127.0.0.1", rig.router.port, limit=1)
            body = json.dumps(ask(stream=True)).encode()
            writer.write(HEAD % len(body) + body)
            await _begun(rig, rig.d, 2)
            began = time.monotonic()
            await rig.router.stop()
            took.append(time.monotonic() - began)
            assert (await pending).status == 503
            writer.close()

    for _ in range(3):
        run(test)
        if took[-1] < drain_s * 1.9:
            return
    raise AssertionError(f"it ended after {took}, told to end after {drain_s}")
