"""When a server fails before the client got a byte: who is tried next, and that it is said."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from tests.unit.router_rig import (
    Engine,
    Rig,
    Script,
    ask,
    completion,
    error,
    event,
    fails,
    learned,
    rigged,
    run,
    soon,
    stream,
    waits,
    waits_if_remote,
)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_failing_prefill_is_replaced_by_another_with_a_new_transfer_id(status: int) -> None:
    async def test() -> None:
        async with rigged(prefill=2) as rig:
            await learned(rig)
            rig.prefill[0].script = fails(status)
            rig.d.script = decode_waiting_for(rig, good=rig.prefill[1])
            reply = await rig.ask(ask(stream=True))
            assert (reply.status, reply.headers["x-pd-path"]) == (200, "disaggregated")
            assert reply.headers["x-pd-prefill"] == rig.prefill[1].name
            first, second = rig.d.seen
            await asyncio.wait_for(first.ended.wait(), 5)
            assert first.cancelled
            assert first.params
            assert second.params
            assert first.params["transfer_id"] != second.params["transfer_id"]
            trace = await rig.trace(reply)
            assert trace["retries"] == 1
            assert f"answers {status}" in trace["dispatches"][0]["failure"]
            assert await rig.metric('pdrouter_retries_total{role="prefill",failure="status"}') == 1

    run(test)


def decode_waiting_for(rig: Rig, good: Engine) -> Script:
    """A decode server that answers only once prefill server ``good`` has the same transfer."""

    async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        transfer = (body.get("kv_transfer_params") or {}).get("transfer_id")
        while not any(seen.params and seen.params["transfer_id"] == transfer for seen in good.seen):
            await asyncio.sleep(0.005)
        return await rig.d.answer(request, body)

    return script


def test_when_all_prefill_servers_fail_decode_serves_alone_and_says_why() -> None:
    async def test() -> None:
        async with rigged(prefill=2) as rig:
            await learned(rig)
            rig.prefill[0].script = rig.prefill[1].script = fails(500)
            rig.d.script = waits_if_remote(rig.d)
            reply = await rig.ask()
            assert (reply.status, reply.json()) == (200, completion("decoded"))
            assert reply.headers["x-pd-path"].startswith("decode-only; prefill server ")
            assert rig.d.seen[-1].body == ask()
            assert [len(engine.seen) for engine in rig.prefill] == [1, 1]
            trace = await rig.trace(reply)
            assert (trace["why_code"], trace["retries"]) == ("prefill_failed", 2)
            await asyncio.wait_for(asyncio.gather(*(seen.ended.wait() for seen in rig.d.seen)), 5)
            assert [seen.cancelled for seen in rig.d.seen] == [True, True, False]

    run(test)


@pytest.mark.parametrize("dispatch", ["concurrent", "serial"])
def test_unreachable_prefill_is_marked_and_does_not_cost_the_request(dispatch: str) -> None:
    async def test() -> None:
        async with rigged(dispatch=dispatch, health={"interval_s": 60}) as rig:
            await rig.learn()
            rig.d.script = waits_if_remote(rig.d) if dispatch == "concurrent" else None
            await rig.p.stop()
            reply = await rig.ask()
            assert reply.status == 200
            assert reply.headers["x-pd-path"].startswith("decode-only; prefill server ")
            assert not rig.router.fleet.prefill[0].healthy
            assert rig.router.fleet.prefill[0].control is None
            health = await rig.get("/health")  # completions are answered
            assert (health.status, health.json()["disaggregates"]) == (200, False)

    run(test)


def test_prefill_dying_under_a_request_falls_back() -> None:
    async def test() -> None:
        async with rigged() as rig:
            await learned(rig)
            rig.d.script = waits_if_remote(rig.d)
            rig.p.script = waits(asyncio.Event())
            asked = asyncio.create_task(rig.ask())
            await rig.p.wait_for(1)
            await rig.p.stop()
            reply = await asked
            assert reply.status == 200
            assert reply.headers["x-pd-path"].startswith("decode-only; prefill server ")

    run(test)


def test_decodes_4xx_ends_the_request_and_prefills_work() -> None:
    async def test() -> None:
        async with rigged() as rig:
            await learned(rig)
            rig.p.script = waits(asyncio.Event())
            rig.d.script = fails(400, kind="BadRequestError")
            reply = await rig.ask()
            assert (reply.status, reply.error["type"], len(rig.d.seen)) == (400, "BadRequestError", 1)
            seen = await rig.p.wait_for(1)
            await asyncio.wait_for(seen.ended.wait(), 5)
            assert seen.cancelled

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_decodes_4xx_does_not_wait_for_prefills_first_token(stream: bool) -> None:
    """A request that decode rejects is over, also where prefill is asked for its first token."""

    async def test() -> None:
        async with rigged(first_token="auto") as rig:
            await rig.learn()
            rig.p.script = waits(asyncio.Event())
            rig.d.script = fails(404, kind="NotFoundError")
            reply = await rig.ask(ask(stream=stream, temperature=0))
            assert (reply.status, reply.error["type"]) == (404, "NotFoundError")
            seen = await rig.p.wait_for(1)
            await asyncio.wait_for(seen.ended.wait(), 5)
            assert seen.cancelled

    run(test)


@pytest.mark.parametrize("dispatch", ["concurrent", "serial"])
def test_prefill_with_nothing_to_hand_over_means_decode_alone_and_says_so(dispatch: str) -> None:
    async def test() -> None:
        async with rigged(dispatch=dispatch) as rig:
            await rig.learn()
            rig.p.hands_over = False
            rig.d.script = waits_if_remote(rig.d)
            reply = await rig.ask()
            assert reply.status == 200
            assert reply.headers["x-pd-path"] == (f"decode-only; prefill server {rig.p.name} had nothing to hand over")
            assert rig.d.seen[-1].body == ask()

    run(test)


@pytest.mark.parametrize(
    "answer", [b"no json", b"[]", b'{"kv_transfer_params": 3}', b'{"kv_transfer_params": {"transfer_id": "other"}}']
)
def test_nonsense_from_prefill_never_reaches_decode(answer: bytes) -> None:
    async def test() -> None:
        async with rigged() as rig:

            async def nonsense(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                return web.Response(body=answer, content_type="application/json")

            rig.p.script = nonsense
            reply = await rig.ask()
            assert (reply.status, [seen.params for seen in rig.d.seen]) == (200, [None])
            assert reply.headers["x-pd-path"].startswith("decode-only; prefill server ")

    run(test)


def test_prefills_answer_has_a_bound() -> None:
    async def test() -> None:
        async with rigged(max_prefill_response_bytes=4096) as rig:

            async def endless(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                return await stream(request, [b"x" * 4096] * 1000)

            rig.p.script = endless
            reply = await rig.ask()
            assert "max_prefill_response_bytes" in reply.headers["x-pd-path"]

    run(test)


def test_slow_prefill_is_given_up_after_its_own_timeout() -> None:
    async def test() -> None:
        for dispatch in ("serial", "concurrent"):
            async with rigged(dispatch=dispatch, timeouts={"prefill_s": 0.05}) as rig:
                await learned(rig)
                rig.p.script = waits(asyncio.Event())
                rig.d.script = waits_if_remote(rig.d)
                reply = await rig.ask()
                assert reply.status == 200
                assert "timeouts.prefill_s (0.05 s)" in reply.headers["x-pd-path"]
                await asyncio.wait_for(rig.p.seen[0].ended.wait(), 5)
                assert rig.p.seen[0].cancelled

    run(test)


def test_failing_decode_is_replaced_by_another_in_a_new_dispatch() -> None:
    async def test() -> None:
        async with rigged(decode=2) as rig:
            await learned(rig)
            rig.decode[0].script = fails(500)
            reply = await rig.ask(ask(stream=True))
            assert (reply.status, reply.headers["x-pd-path"]) == (200, "disaggregated")
            assert reply.headers["x-pd-decode"] == rig.decode[1].name
            ids = [engine.seen[0].params["transfer_id"] for engine in rig.decode if engine.seen[0].params]
            assert len(set(ids)) == 2
            assert [seen.params["transfer_id"] for seen in rig.p.seen if seen.params] == ids

    run(test)


def fails_with(bad: Engine, engine: Engine) -> Script:
    """A decode server that gets no pages from prefill server ``bad``, and says so."""

    async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        params = body.get("kv_transfer_params") or {}
        if params.get("remote_port") == bad.control_port:
            return error(500, "the pages did not come", "InternalServerError")
        return await engine.answer(request, body)

    return script


def test_decode_that_gets_no_pages_is_tried_again_with_another_prefill() -> None:
    """Decode's error may be prefill's doing (it died, or stands still), which looks well to the router and whose cache
    draws the request: the next dispatch takes another one of both roles."""

    async def test() -> None:
        async with rigged(prefill=2, decode=2) as rig:
            await learned(rig)
            long = ask(prompt=list(range(2000)))
            assert (await rig.ask(long)).status == 200
            (bad,) = [engine for engine in rig.prefill if engine.seen]
            for engine in rig.decode:
                engine.script = fails_with(bad, engine)
            reply = await rig.ask(long)
            assert (reply.status, reply.headers["x-pd-path"]) == (200, "disaggregated")

    run(test)


def test_when_two_disaggregated_dispatches_fail_the_last_one_goes_to_decode_alone() -> None:
    """All pages get lost, and each decode server could have served the request by itself."""

    async def test() -> None:
        async with rigged(prefill=1, decode=2) as rig:
            await learned(rig)
            for engine in rig.decode:
                engine.script = fails_with(rig.p, engine)
            reply = await rig.ask()
            assert reply.status == 200
            assert reply.headers["x-pd-path"].startswith("decode-only; decode server ")
            assert sum(len(engine.seen) for engine in rig.decode) == 3

    run(test)


def test_unreachable_decode_is_replaced_and_without_another_it_is_a_502() -> None:
    async def test() -> None:
        async with rigged(decode=2, health={"interval_s": 60}) as rig:
            await learned(rig)
            await rig.decode[0].stop()
            reply = await rig.ask()
            assert (reply.status, reply.headers["x-pd-decode"]) == (200, rig.decode[1].name)
            await rig.decode[1].stop()
            last = await rig.ask()
            assert (last.status, last.error["type"]) == (502, "server_error")
            after = await rig.ask()
            assert (after.status, after.error["code"]) == (503, "no_decode_server")
            assert after.headers["Retry-After"] == "1"

    run(test)


def test_only_decode_server_failing_a_disaggregated_request_serves_it_alone() -> None:
    async def test() -> None:
        async with rigged() as rig:
            await learned(rig)
            rig.d.script = fails(500, times=1, engine=rig.d)
            reply = await rig.ask()
            assert reply.status == 200
            assert reply.headers["x-pd-path"].startswith("decode-only; decode server ")
            assert [seen.params is None for seen in rig.d.seen] == [False, True]

    run(test)


def test_stream_that_begins_with_a_servers_error_is_retried_as_an_error() -> None:
    async def test() -> None:
        async with rigged() as rig:
            await learned(rig)

            async def fail_remote(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                if not body.get("kv_transfer_params"):
                    return await rig.d.answer(request, body)
                failure = {"error": {"message": "load failed", "type": "x", "param": None, "code": 500}}
                return await stream(request, [event(failure), b"data: [DONE]\n\n"])

            rig.d.script = fail_remote
            reply = await rig.ask(ask(stream=True))
            assert b"load failed" not in reply.body
            assert (reply.status, reply.body.endswith(b"data: [DONE]\n\n")) == (200, True)
            assert reply.headers["x-pd-path"].startswith("decode-only; decode server ")

    run(test)


def test_decodes_own_error_is_the_clients_when_nothing_else_is_left() -> None:
    async def test() -> None:
        async with rigged() as rig:
            rig.d.script = fails(503, kind="ServiceUnavailable")
            reply = await rig.ask()
            assert (reply.status, reply.error["type"]) == (503, "ServiceUnavailable")
            assert len(rig.d.seen) == 2

            async def plain(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                return web.Response(status=500, text="Internal Server Error")

            rig.d.script = plain
            assert (await rig.ask()).error["code"] == "upstream_error"
            assert (await rig.ask()).status == 502

    run(test)


def test_first_byte_timeout_is_a_504_and_ends_both_requests() -> None:
    async def test() -> None:
        async with rigged(timeouts={"first_byte_s": 0.1}) as rig:
            await learned(rig)
            rig.p.script = rig.d.script = waits(asyncio.Event())
            reply = await rig.ask(ask(stream=True))
            assert reply.status == 504
            assert "timeouts.first_byte_s" in reply.error["message"]
            for engine in (rig.p, rig.d):
                await asyncio.wait_for(engine.seen[0].ended.wait(), 5)
                assert engine.seen[0].cancelled

    run(test)


def test_total_timeout_bounds_an_unstreamed_request() -> None:
    async def test() -> None:
        async with rigged(timeouts={"total_s": 0.1, "first_byte_s": 0.01}) as rig:
            await learned(rig)
            rig.d.script = waits(asyncio.Event())
            reply = await rig.ask()
            assert (reply.status, "timeouts.total_s" in reply.error["message"]) == (504, True)

    run(test)


def test_prefill_failing_after_decode_began_changes_nothing_for_the_client() -> None:
    async def test() -> None:
        async with rigged(first_token="off") as rig:
            await learned(rig)
            began, more = asyncio.Event(), asyncio.Event()
            rest_of_it = event(completion("b")) + b"data: [DONE]\n\n"

            async def late_failure(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await began.wait()
                return error(500)

            async def slow_stream(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                return await stream(request, [event(completion("a")), rest_of_it], hold=more)

            rig.p.script, rig.d.script = late_failure, slow_stream
            async with rig.post(ask(stream=True)) as response:
                first = await response.content.readany()
                began.set()
                await soon(lambda: rig.router.fleet.prefill[0].failures == 1)
                more.set()
                rest = await response.read()
                transfer = response.headers["x-pd-transfer-id"]
            assert first + rest == event(completion("a")) + rest_of_it
            trace = (await rig.get(f"/pd/trace/{transfer}")).json()
            assert trace["note"].startswith("decode began before prefill failed: ")

    run(test)


def test_server_that_keeps_failing_is_spared_while_another_serves() -> None:
    async def test() -> None:
        async with rigged(prefill=2, health={"eject_after": 2, "eject_s": 60, "interval_s": 60}) as rig:
            await learned(rig)
            rig.prefill[0].script = fails(500)
            for index in range(12):
                assert (await rig.ask(ask(prompt=[index] * 64))).headers["x-pd-path"] == "disaggregated"
            assert len(rig.prefill[0].seen) == 2
            state = json.loads((await rig.get("/pd/status")).body)
            assert [one["spared"] for one in state["prefill"]] == [True, False]

    run(test)


def test_retry_counts_are_settings() -> None:
    async def test() -> None:
        async with rigged(prefill=3, decode=2, prefill_retries=0, decode_retries=0) as rig:
            await learned(rig)
            for engine in rig.prefill:
                engine.script = fails(500)
            for engine in rig.decode:
                engine.script = waits_if_remote(engine)
            assert (await rig.ask()).headers["x-pd-path"].startswith("decode-only; ")
            assert sum(len(engine.seen) for engine in rig.prefill) == 1
            for engine in rig.prefill:
                engine.script = None
            for engine in rig.decode:
                engine.script = fails(500)
                engine.seen.clear()
            assert (await rig.ask()).status == 500
            assert sum(len(engine.seen) for engine in rig.decode) == 1

    run(test)


def test_nothing_stays_counted_after_failures() -> None:
    async def test() -> None:
        async with rigged(prefill=2, decode=2) as rig:
            await learned(rig)
            rig.prefill[0].script = rig.decode[1].script = fails(500)
            await asyncio.gather(*(rig.ask(ask(prompt=[i] * 64, stream=i % 2 == 0)) for i in range(30)))
            await soon(lambda: all(one.inflight == one.inflight_tokens == 0 for one in rig.router.fleet.all))
            state = (await rig.get("/pd/status")).json()
            assert (state["inflight"], state["buffered_bytes"]) == (0, 0)

    run(test)
