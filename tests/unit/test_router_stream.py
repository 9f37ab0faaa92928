"""Answers on their way to the client: the same bytes, at the client's pace, and both servers told when it goes."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from pdtransport.router.events import MAX_HELD_BYTES, WholeEvents
from pdtransport.serving.errors import json_errors
from tests.unit.router_rig import POST, Script, ask, completion, event, rigged, run, soon, stream

DONE = b"data: [DONE]\n\n"


def streams(chunks: list[bytes], **more: Any) -> Script:
    async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await stream(request, chunks, **more)

    return script


def test_stream_passes_byte_for_byte_however_it_is_cut() -> None:
    async def test() -> None:
        sent = b"".join(event(completion("t\u00fc" * (i % 7), index=i)) for i in range(200))
        sent += b": a comment\n\nid: 7\r\nevent: x\r\ndata: y\r\n\r\n" + b"data: [DONE]"  # no blank line after it
        rng = random.Random(5)
        cuts = sorted(rng.sample(range(1, len(sent)), 150))
        chunks = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
        async with rigged() as rig:
            rig.d.script = streams(chunks)
            for _ in range(3):
                reply = await rig.ask(ask(stream=True))
                assert reply.body == sent
                assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"

    run(test)


def test_events_reach_the_client_one_by_one_and_not_at_the_end() -> None:
    async def test() -> None:
        async with rigged() as rig:
            more = asyncio.Event()
            rig.d.script = streams([event(1), event(2) + DONE], hold=more)
            async with rig.post(ask(stream=True)) as response:
                assert await asyncio.wait_for(response.content.readany(), 5) == event(1)
                more.set()
                assert await response.content.read() == event(2) + DONE

    run(test)


def test_unstreamed_answer_keeps_status_body_and_headers_but_hop_by_hop_ones() -> None:
    async def test() -> None:
        async with rigged() as rig:

            async def custom(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                return web.Response(
                    status=201, body=b'{"odd":  1}', content_type="application/json",
                    headers={"X-Request-Id": "r9", "Keep-Alive": "timeout=1", "Connection": "x-drop", "X-Drop": "1"},
                )  # fmt: skip

            rig.d.script = custom
            reply = await rig.ask()
            assert (reply.status, reply.body, reply.headers["Content-Length"]) == (201, b'{"odd":  1}', "11")
            names = {name.lower() for name in reply.headers}
            assert "x-request-id" in names
            assert not names & {"keep-alive", "x-drop"}

    run(test)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("dispatch", ["concurrent", "serial"])
def test_client_that_leaves_before_an_answer_ends_both_requests(streaming: bool, dispatch: str) -> None:
    async def test() -> None:
        async with rigged(dispatch=dispatch) as rig:
            await rig.learn()
            never = asyncio.Event()

            async def wait(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await never.wait()
                raise AssertionError

            rig.p.script = wait
            rig.d.script = wait
            asked = asyncio.create_task(rig.ask(ask(stream=streaming)))
            await rig.p.wait_for(1)
            engines = [rig.p]
            if dispatch == "concurrent":
                await rig.d.wait_for(1)
                engines.append(rig.d)
            asked.cancel()
            for engine in engines:
                await asyncio.wait_for(engine.seen[0].ended.wait(), 5)
                assert engine.seen[0].cancelled
            await soon(lambda: all(one.inflight == 0 for one in rig.router.fleet.all))
            traces = (await rig.get("/pd/traces?limit=1")).json()["traces"]
            assert traces[0]["outcome"] == "client_disconnected"
            assert all(len(engine.seen) == 1 for engine in engines)  # it was not taken for a failure and retried

    run(test)


def test_client_that_leaves_in_the_middle_of_a_stream_ends_both_requests() -> None:
    async def test() -> None:
        async with rigged(first_token="off") as rig:
            await rig.learn()
            never = asyncio.Event()

            async def wait(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await never.wait()
                raise AssertionError

            rig.p.script = wait
            rig.d.script = streams([event(1), event(2)], hold=never)
            response = await rig.post(ask(stream=True))
            assert await response.content.readany() == event(1)
            response.close()
            for engine in (rig.p, rig.d):
                await asyncio.wait_for(engine.seen[0].ended.wait(), 5)
                assert engine.seen[0].cancelled

    run(test)


def test_decode_dying_mid_stream_ends_it_with_an_error_event_of_its_own() -> None:
    async def test() -> None:
        async with rigged(decode=2) as rig:
            for engine in rig.decode:
                engine.script = streams([event(completion("a")), event(completion("b"))[:20]], die=True)
            reply = await rig.ask(ask(stream=True))
            first, last, nothing = reply.body.split(b"\n\n")
            assert (first + b"\n\n", nothing) == (event(completion("a")), b"")
            error = json.loads(last.removeprefix(b"data: "))["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["type"], error["code"]) == ("server_error", "upstream_interrupted")
            assert sum(len(engine.seen) for engine in rig.decode) == 1  # bytes were sent: no retry
            trace = await rig.trace(reply)
            assert trace["outcome"] == "interrupted"

    run(test)


def test_decode_dying_in_an_unstreamed_body_cuts_it_visibly() -> None:
    async def test() -> None:
        async with rigged() as rig:

            async def cut(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                response = web.StreamResponse(headers={"Content-Length": "100", "Content-Type": "application/json"})
                await response.prepare(request)
                await response.write(b'{"a":')
                await asyncio.sleep(0.02)
                assert request.transport is not None
                request.transport.abort()
                return response

            rig.d.script = cut
            with pytest.raises(OSError, match=r".*") as failure:
                await _raw_ask(rig.router.port)
            assert "cut" in str(failure.value)

    async def _raw_ask(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps(ask()).encode()
        writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        data = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        head, _, rest = data.partition(b"\r\n\r\n")
        if b"Content-Length: 100" in head and len(rest) < 100:
            raise OSError("cut")
        return rest

    run(test)


def test_silent_decode_is_given_up_after_stall_s() -> None:
    async def test() -> None:
        async with rigged(timeouts={"stall_s": 0.1}) as rig:
            rig.d.script = streams([event(1), event(2)], hold=asyncio.Event())
            reply = await rig.ask(ask(stream=True))
            assert b"timeouts.stall_s passed" in reply.body
            await asyncio.wait_for(rig.d.seen[0].ended.wait(), 5)
            assert rig.d.seen[0].cancelled

    run(test)


def test_total_timeout_ends_a_stream_that_trickles() -> None:
    async def test() -> None:
        async with rigged(timeouts={"total_s": 0.3}) as rig:

            async def trickle(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await response.prepare(request)
                while True:
                    await response.write(event(1))
                    await asyncio.sleep(0.02)

            rig.d.script = trickle
            assert b"timeouts.total_s passed" in (await rig.ask(ask(stream=True))).body

    run(test)


def _slow_client(port: int) -> socket.socket:
    """A client that asks for a stream and then reads nothing; small kernel buffers make that felt soon."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    body = json.dumps(ask(stream=True)).encode()
    client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    client.setblocking(False)
    return client


def test_slow_client_slows_decode_down_instead_of_filling_the_routers_memory() -> None:
    async def test() -> None:
        async with rigged(stream_buffer_bytes=16384) as rig:
            written = 0
            piece = event("x" * 8000)

            async def flood(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                nonlocal written
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await response.prepare(request)
                for _ in range(8000):  # 64 MB
                    await response.write(piece)
                    written += len(piece)
                return response

            rig.d.script = flood
            client = _slow_client(rig.router.port)
            await rig.d.wait_for(1)
            before = -1
            while before != written:  # until the flood stands still
                before = written
                await asyncio.sleep(0.3)
            assert written < 16 << 20  # what kernel buffers of three sockets and ours hold
            client.close()
            await asyncio.wait_for(rig.d.seen[0].ended.wait(), 5)
            assert rig.d.seen[0].cancelled

    run(test)


def test_client_that_takes_nothing_is_disconnected_after_client_stall_s() -> None:
    async def test() -> None:
        async with rigged(timeouts={"client_stall_s": 0.2}) as rig:
            rig.d.script = streams([event("x" * 100_000)] * 400)
            client = _slow_client(rig.router.port)
            seen = await rig.d.wait_for(1)
            await asyncio.wait_for(seen.ended.wait(), 10)
            assert seen.cancelled
            client.close()

    run(test)


def test_http_1_0_client_gets_the_stream_without_chunks() -> None:
    async def test() -> None:
        async with rigged() as rig:
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.router.port)
            body = json.dumps(ask(stream=True)).encode()
            head = POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: %d\r\n\r\n" % len(body)
            writer.write(head + body)
            data = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            assert data.partition(b"\r\n\r\n")[2].endswith(b"\n\ndata: [DONE]\n\n")
            assert b"chunked" not in data

    run(test)


def test_whole_events_hold_half_an_event_back_but_never_more_than_the_bound() -> None:
    events = WholeEvents()
    assert events.feed(b"data: 1\n\ndata: ") == b"data: 1\n\n"
    assert events.feed(b"2\n") == b""
    assert events.feed(b"\ndata: 3\r\n\r\nx") == b"data: 2\n\ndata: 3\r\n\r\n"
    long = b"y" * MAX_HELD_BYTES
    assert events.feed(long) == b"x" + long
    assert events.rest() is None


@pytest.mark.parametrize("end", [b"data: [DONE]\n\n", b"data: [DONE]\r\n\r\n", b"data: [DONE]\n", b"data: [DONE]"])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_stream_is_whole_if_its_last_event_says_so(end: bytes, size: int) -> None:
    """Whatever the pieces it comes in, and with or without the blank line."""
    for sent, whole in ((event(1) + end, True), (event(1), False), (end + event(2), False), (b"", False)):
        events = WholeEvents()
        passed = b"".join(events.feed(sent[at : at + size]) for at in range(0, len(sent), size))
        rest = events.rest()
        assert (rest is not None) == whole, sent
        assert not whole or passed + (rest or b"") == sent


def test_a_stream_that_ends_without_an_event_is_no_success() -> None:
    """A decode that ends its answer before the first byte has failed: another one is asked; where there is none, the
    client gets a 502 and no empty stream."""

    async def test() -> None:
        async with rigged(decode=2) as rig:
            rig.decode[0].script = rig.decode[1].script = streams([b""])
            reply = await rig.ask(ask(stream=True))
            assert (reply.status, reply.error["code"]) == (502, "upstream_error")
            assert "ended its answer before its first byte" in reply.error["message"]
            assert {len(engine.seen) > 0 for engine in rig.decode} == {True}
            rig.decode[0].script = None
            assert (await rig.ask(ask(stream=True))).status == 200

    run(test)


@pytest.mark.parametrize("sent", [[event(1)], [event(1), b"data: half an ev"], [b": a comment\n\n"], [b"data: x"]])
def test_a_stream_that_ends_without_its_last_event_is_interrupted(sent: list[bytes]) -> None:
    """What came is passed on, half an event is not, and an error event says that the rest is missing."""

    async def test() -> None:
        async with rigged() as rig:
            rig.d.script = streams(sent)
            reply = await rig.ask(ask(stream=True))
            passed, _, last = reply.body.removesuffix(b"\n\n").rpartition(b"data: ")
            assert passed == b"".join(one for one in sent if one.endswith(b"\n\n"))
            error = json.loads(last)["error"]
            assert (error["code"], error["message"].endswith("ended without [DONE]")) == ("upstream_interrupted", True)
            trace = await rig.trace(reply)
            assert trace["outcome"] == "interrupted"

    run(test)


def test_timeline_has_the_events_in_their_order() -> None:
    async def test() -> None:
        async with rigged() as rig:
            await rig.learn()
            for order in ("concurrent", "alone"):
                reply = await rig.ask(ask(stream=True, n=1 if order == "concurrent" else 2))
                trace = await rig.trace(reply)
                names = ["received", "route", "dispatched", "decode_first_byte", "first_token", "done"]
                times = [trace["events"][name] for name in names]
                assert times == sorted(times)
                assert ("prefill_response" in trace["events"]) == (order == "concurrent")
                assert (trace["dispatch"], trace["outcome"], trace["status"]) == (order, "ok", 200)

    run(test)


def test_a_client_that_leaves_as_its_answer_begins_is_no_error_of_the_router(caplog: pytest.LogCaptureFixture) -> None:
    """Clients leave all the time: a log full of stack traces hides what matters."""

    async def leaving(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"too late")
        return response

    async def test() -> None:
        app = web.Application(middlewares=[json_errors("router", logging.getLogger("pdtransport.router"))])
        app.router.add_get("/", leaving)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"http://127.0.0.1:{runner.addresses[0][1]}/")
        await asyncio.sleep(0.05)
        await runner.cleanup()

    with caplog.at_level("WARNING"):
        run(test)
    assert [record.message for record in caplog.records] == []
