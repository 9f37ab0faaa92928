"""What prefill refuses: decode's verdict is the client's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from tests.unit.router_rig import Script, ask, completion, error, fails, learned, rigged, run, waits_if_remote

REFUSALS = (400, 401, 404, 413, 422)


@pytest.mark.parametrize("dispatch", ["concurrent", "serial"])
@pytest.mark.parametrize("status", REFUSALS)
def test_what_prefill_refuses_decode_serves_alone_and_says_why(status: int, dispatch: str) -> None:
    """Decode makes the answer, so whether a request is wrong is for decode to say: prefill may lack a flag, an adapter,
    or the room for so long a prompt. Nothing waits for the pages that will not come."""

    async def test() -> None:
        async with rigged(prefill=2, dispatch=dispatch) as rig:
            await learned(rig)
            rig.prefill[0].script = rig.prefill[1].script = fails(status, kind="BadRequestError")
            rig.d.script = waits_if_remote(rig.d)
            for stream_it in (False, True):
                reply = await rig.ask(ask(stream=stream_it))
                assert (reply.status, b"decoded" in reply.body) == (200, not stream_it)
                assert reply.headers["x-pd-path"].startswith("decode-only; prefill server ")
                assert f"answers {status}" in reply.headers["x-pd-path"]
                trace = await rig.trace(reply)
                assert (trace["path"], trace["why_code"], trace["retries"]) == ("decode-only", "prefill_refused", 1)
            assert await rig.metric('pdrouter_not_disaggregated_total{reason="prefill_refused"}') == 2
            assert sum(len(engine.seen) for engine in rig.prefill) == 2  # another one's flags are the same, as a rule
            assert all(endpoint.failures == 0 for endpoint in rig.router.fleet.prefill)

    run(test)


@pytest.mark.parametrize("dispatch", ["concurrent", "serial"])
@pytest.mark.parametrize("status", REFUSALS)
def test_what_both_refuse_the_client_hears_from_decode(status: int, dispatch: str) -> None:
    """A client's error is decode's to word, and counts as none of prefill's."""

    async def test() -> None:
        async with rigged(dispatch=dispatch) as rig:
            await learned(rig)
            rig.p.script = fails(status, kind="PrefillSaysSo")
            rig.d.script = fails(status, kind="DecodeSaysSo")
            reply = await rig.ask()
            assert (reply.status, reply.error["type"]) == (status, "DecodeSaysSo")
            assert len(rig.p.seen) == 1
            assert len(rig.d.seen) <= 2
            assert await rig.metric('pdrouter_not_disaggregated_total{reason="prefill_refused"}') == 0

    run(test)


@pytest.mark.parametrize("first_token", ["off", "auto"])
@pytest.mark.parametrize("later", ["prefill", "decode"])
def test_an_error_that_both_servers_share_is_asked_for_once(later: str, first_token: str) -> None:
    """Decode looks at the same body at the same time: its verdict is the answer, whether it comes before prefill's or
    soon after, and decode is not asked again."""

    async def test() -> None:
        async with rigged(first_token=first_token) as rig:
            await learned(rig)
            told = {"prefill": asyncio.Event(), "decode": asyncio.Event()}

            def says_no(role: str) -> Script:
                async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                    await rig.p.wait_for(1)
                    await rig.d.wait_for(1)
                    await asyncio.sleep(0.2)  # reads the prompt
                    if role == later:
                        await told["decode" if role == "prefill" else "prefill"].wait()
                    told[role].set()
                    return error(400, "no", f"{role} says so")

                return script

            rig.p.script, rig.d.script = says_no("prefill"), says_no("decode")
            reply = await rig.ask()
            assert (reply.status, reply.error["type"]) == (400, "decode says so")
            assert (len(rig.d.seen), len(rig.p.seen)) == (1, 1)

    run(test)


def test_decodes_answer_that_is_there_when_prefill_refuses_is_used_and_its_path_told() -> None:
    """Decode, which has the whole prompt in its cache, answers before prefill's refusal comes: with ``first_token`` the
    router waits for prefill's word, and then says that decode served the request alone."""

    async def test() -> None:
        async with rigged(first_token="auto") as rig:
            await learned(rig)

            async def refuses_late(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                seen = await rig.d.wait_for(1)
                await asyncio.wait_for(seen.ended.wait(), 5)
                return error(422)

            rig.p.script = refuses_late
            reply = await rig.ask()
            assert (reply.status, reply.json(), len(rig.d.seen)) == (200, completion("decoded"), 1)
            assert reply.headers["x-pd-path"] == f"decode-only; prefill server {rig.p.name} answers 422"
            assert (await rig.trace(reply))["why_code"] == "prefill_refused"

    run(test)


def test_refusing_prefill_does_not_stand_in_for_decodes_that_are_gone() -> None:
    """Where no decode server is left to say whether a request is wrong, the answer is that none is there."""

    async def test() -> None:
        async with rigged(dispatch="serial") as rig:
            await learned(rig)

            async def refuses(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                rig.router.fleet.decode[0].healthy = False
                return error(400)

            rig.p.script = refuses
            reply = await rig.ask()
            assert (reply.status, reply.error["code"]) == (503, "no_decode_server")

    run(test)


@pytest.mark.parametrize("dispatch", ["concurrent", "serial"])
def test_a_prefill_that_refuses_whatever_decode_takes_is_told_of(
    dispatch: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise 5: after some requests in a row the log and /health say so; a client's own errors count for nothing."""

    async def test() -> None:
        async with rigged(dispatch=dispatch, hand_off={"warn_after": 3}) as rig:
            await learned(rig)
            rig.p.script = fails(422)
            rig.d.script = fails(422)
            for _ in range(5):
                assert (await rig.ask()).status == 422
            assert (await rig.get("/health")).json()["disaggregates"] is None
            rig.d.script = waits_if_remote(rig.d)
            for _ in range(3):
                assert (await rig.ask()).status == 200
            health = (await rig.get("/health")).json()
            assert (health["disaggregates"], health["why_not"]) == (False, "prefill_refused")
            assert await rig.metric('pdrouter_hand_offs_total{outcome="failed",code="prefill_refused"}') == 3
            (line,) = [record.getMessage() for record in caplog.records if "none of the last 3" in record.getMessage()]
            assert "answers 422" in line
            assert "twice" not in line

    run(test)
