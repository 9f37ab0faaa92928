"""What became of each hand-off is in its answer, in the metrics and in the log; no pair fails in silence."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pdtransport.control.curve import make_keys
from pdtransport.protocol.messages import Code, Ended
from pdtransport.router import handoffs, watches
from pdtransport.router.endpoints import Endpoint
from pdtransport.router.handoffs import HandOff, HandOffs
from pdtransport.router.health import MAX_ASKED
from pdtransport.router.metrics import Metrics
from pdtransport.router.settings import EndpointSettings, RouterHandOff
from tests.unit.router_rig import Rig, ask, rigged, run, soon
from tests.unit.router_workers import PLAIN, Workers, info, tells
from tests.unit.test_router_first_token import gives_out, goes_on, text_of

WHY = "block_size differs: 32 here, 64 there"


@asynccontextmanager
async def watched(ranks: int = 1, **settings: Any) -> AsyncIterator[tuple[Rig, Workers]]:
    """A router that watches the workers of one decode server, which its metrics name. It is patient, since the machine
    may be busy."""
    settings["hand_off"] = {"wait_s": 5, **settings.get("hand_off", {})}
    async with Workers(ranks) as workers:

        def before(rig: Rig) -> None:
            rig.p.metrics = info("kv_producer", 7670, engine=rig.p.engine_id)
            rig.d.metrics = info("kv_consumer", workers.port, ranks=ranks)

        async with rigged(before=before, **settings) as rig:
            await soon(lambda: rig.router._watches.stands(rig.router.fleet.decode[0]))
            yield rig, workers


def refuses(rig: Rig, workers: Workers) -> None:
    tells(rig.d, lambda transfer: workers.end(transfer, 0, Code.REFUSED, WHY))


async def became(rig: Rig, outcome: str, code: str = "") -> float:
    return await rig.metric(f'pdrouter_hand_offs_total{{outcome="{outcome}",code="{code}"}}')


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_prompt_that_was_handed_over_says_over_what(ranks: int) -> None:
    """All ranks took their pages: header, trace and metrics name the link, the bytes and the time."""

    async def test() -> None:
        async with watched(ranks) as (rig, workers):
            tells(rig.d, workers.took)
            reply = await rig.ask()
            assert reply.headers["x-pd-path"] == "disaggregated"
            assert reply.headers["x-pd-hand-off"] == "handed_over; cma"
            trace = await rig.trace(reply)
            assert (trace["handed_over"], trace["link"], trace["bytes"]) == (True, "cma", 1000 * ranks)
            assert trace["exposed_s"] == pytest.approx(0.0005 + 1e-6 * (ranks - 1))
            assert trace["rate_bytes_s"] == 500_000 * ranks
            assert trace["hand_off_code"] is None
            assert await became(rig, "handed_over") == 1
            assert await rig.metric('pdrouter_hand_off_links_total{link="cma"}') == 1
            assert await rig.metric('pdrouter_hand_off_bytes_total{link="cma"}') == 1000 * ranks
            health = await rig.get("/health")
            assert (health.status, health.json()["disaggregates"]) == (200, True)

    run(test)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_refused_hand_off_is_told_in_the_first_answers_header(streaming: bool) -> None:
    """Promise 5: a prompt that was computed twice never says disaggregated."""

    async def test() -> None:
        async with watched() as (rig, workers):
            refuses(rig, workers)
            reply = await rig.ask(ask(stream=streaming))
            assert reply.status == 200
            assert reply.headers["x-pd-path"] == f"recomputed; refused: {WHY}"
            assert reply.headers["x-pd-hand-off"] == f"failed; {WHY}"
            trace = await rig.trace(reply)
            assert (trace["path"], trace["handed_over"]) == ("disaggregated", False)
            assert (trace["hand_off_code"], trace["hand_off_reason"]) == ("refused", WHY)
            assert await became(rig, "failed", "refused") == 1
            assert await rig.metric('pdrouter_requests_total{api="completions",path="recomputed",outcome="ok"}') == 1

    run(test)


def test_one_rank_that_failed_is_a_hand_off_that_failed() -> None:
    async def test() -> None:
        async with watched(2) as (rig, workers):

            def half(transfer: str) -> None:
                workers.end(transfer, 0, blocks=2, nbytes=1, link="cma")
                workers.end(transfer, 1, Code.DAMAGED, "checksum")

            tells(rig.d, half)
            assert (await rig.ask()).headers["x-pd-path"] == "recomputed; damaged: checksum"

    run(test)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("last", [None, Code.DAMAGED])
def test_a_verdict_waits_for_all_ranks_in_whatever_order_they_report(order: tuple[int, int], last: Code | None) -> None:
    """One rank's success decides nothing: only all ranks together hand over, all bytes count, and a failure that
    comes last is heard."""
    hand_off = HandOff("t", "p", Endpoint("decode", EndpointSettings(url="http://d:1")), {})
    good = Ended(transfer="t", blocks=2, nbytes=1000, link="cma", exposed_us=500, taken_us=2000)
    assert hand_off.hear(order[0], 2, good) is None
    verdict = hand_off.hear(order[1], 2, good.model_copy(update={"code": last}))
    assert verdict is not None
    assert (verdict.became, verdict.nbytes) == (("handed_over", 2000) if last is None else ("failed", 0))


def test_a_prompt_that_decode_held_was_not_handed_over_and_not_computed_twice() -> None:
    async def test() -> None:
        async with watched() as (rig, workers):
            tells(rig.d, workers.end)
            reply = await rig.ask()
            assert (reply.headers["x-pd-path"], reply.headers["x-pd-hand-off"]) == ("disaggregated", "held")
            assert (await rig.trace(reply))["handed_over"] is None
            assert await became(rig, "held") == 1
            assert (await rig.get("/health")).json()["disaggregates"] is None

    run(test)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_prompt_that_decode_holds_does_not_wait_for_prefills_word(streaming: bool) -> None:
    """With ``first_token``, too: a decode that asks for no pages has promised nothing, so its answer is whole."""

    async def test() -> None:
        async with watched(first_token="auto") as (rig, workers):
            never = asyncio.Event()
            gives_out(rig.p, never)
            goes_on(rig.d, "hel", "lo")
            answers = rig.d.script
            assert answers is not None

            async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                transfer = body["kv_transfer_params"]["transfer_id"]
                workers.end(transfer)
                await soon(lambda: rig.router._hand_offs._live[transfer].verdict is not None)
                return await answers(request, body)

            rig.d.script = script
            reply = await asyncio.wait_for(rig.ask(ask(stream=streaming)), 5)
            assert (text_of(reply) if streaming else reply.json()["choices"][0]["text"]) == "hello"
            assert (reply.headers["x-pd-hand-off"], reply.headers["x-pd-first-token"]) == ("held", "decode; no_promise")
            assert (await rig.trace(reply))["why_first_token_from_decode"] == "no_promise"

    run(test)


def test_a_report_that_comes_a_moment_late_is_waited_for() -> None:
    async def test() -> None:
        async with watched(hand_off={"wait_s": 5}) as (rig, workers):

            async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                transfer = body["kv_transfer_params"]["transfer_id"]
                asyncio.get_running_loop().call_later(0.1, workers.took, transfer)
                return await rig.d.answer(request, body)

            rig.d.script = script
            assert (await rig.ask()).headers["x-pd-hand-off"] == "handed_over; cma"

    run(test)


def test_an_answer_waits_for_a_silent_worker_only_so_long_and_only_so_often() -> None:
    """Promise 8: what is not known is said to be, and soon costs nothing."""

    async def test() -> None:
        async with watched(hand_off={"wait_s": 0.01}) as (rig, workers):
            for _ in range(handoffs.MISSES_IN_ROW + 3):
                reply = await rig.ask()
                assert reply.headers["x-pd-path"] == "disaggregated"
                assert reply.headers["x-pd-hand-off"] == "unknown; no report within hand_off.wait_s (0.01 s)"
            assert rig.router._hand_offs._late[rig.d.name] == handoffs.MISSES_IN_ROW
            assert await became(rig, "unknown") == handoffs.MISSES_IN_ROW + 3
            tells(rig.d, workers.took, first=0.1)
            assert (await rig.ask()).headers["x-pd-hand-off"] == "handed_over; cma"
            assert rig.router._hand_offs._late[rig.d.name] == 0

    run(test)


def test_decode_that_nobody_can_watch_costs_no_wait_and_says_so() -> None:
    async def test() -> None:
        async with rigged(hand_off={"wait_s": 5}) as rig:
            for _ in range(2):  # serial, then concurrent
                reply = await rig.ask()
                assert reply.headers["x-pd-hand-off"].startswith("unknown; its control address is unknown")
            assert await rig.metric(f'pdrouter_server_watched{{role="decode",server="{rig.d.name}"}}') == 0
            assert "control address" in (await rig.get("/pd/status")).json()["decode"][0]["not_watched"]

    run(test)


def test_reports_of_other_routers_transfers_change_nothing() -> None:
    async def test() -> None:
        async with watched() as (rig, workers):
            for index in range(1000):
                workers.end(f"somebody-elses-{index}", 0, Code.TIMEOUT, "x")
            tells(rig.d, workers.took)
            assert (await rig.ask()).headers["x-pd-hand-off"] == "handed_over; cma"
            assert rig.router._hand_offs._live == {}
            assert await became(rig, "failed", "timeout") == 0

    run(test)


def test_a_client_error_is_no_hand_off() -> None:
    """Decode says 400: nobody waits for a transfer, and none is counted."""

    async def test() -> None:
        async with watched(hand_off={"wait_s": 5}) as (rig, _):

            async def no(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                return web.json_response({"error": {"message": "no"}}, status=400)

            rig.d.script = no
            assert (await rig.ask()).status == 400
            assert await became(rig, "unknown") == 0
            assert rig.router._hand_offs._live == {}

    run(test)


def test_a_failed_request_keeps_its_hand_offs_fate_in_the_trace() -> None:
    """kv_load_failure_policy fail: decode answers 500, the next try is decode's alone, and the trace says why."""

    async def test() -> None:
        async with watched() as (rig, workers):

            async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                params = body.get("kv_transfer_params")
                if params is None:
                    return await rig.d.answer(request, body)
                workers.end(params["transfer_id"], 0, Code.DAMAGED, "checksum")
                await asyncio.sleep(0.05)
                return web.json_response({"error": {"message": "load failed"}}, status=500)

            rig.d.script = script
            reply = await rig.ask()
            assert (reply.status, reply.headers["x-pd-path"].split(";")[0]) == (200, "decode-only")
            first, last = (await rig.trace(reply))["dispatches"]
            assert (first["hand_off"], first["hand_off_code"]) == ("failed", "damaged")
            assert "hand_off" not in last
            assert await became(rig, "failed", "damaged") == 1

    run(test)


def test_a_first_token_from_prefill_is_not_said_to_be_handed_over_before_it_is() -> None:
    """Its header leaves before decode has the pages; metrics and trace get the truth."""

    async def test() -> None:
        async with watched(first_token="auto") as (rig, workers):
            gives_out(rig.p)
            goes_on(rig.d, "ll", "o")
            going_on = rig.d.script
            assert going_on is not None
            early = asyncio.Event()

            async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await early.wait()
                transfer = body["kv_transfer_params"]["transfer_id"]
                workers.took(transfer)  # as in vLLM, some time before the first step: the report is there by then
                await soon(lambda: rig.router._hand_offs._live[transfer].verdict is not None)
                return await going_on(request, body)

            rig.d.script = script
            async with rig.post(ask(stream=True, temperature=0)) as response:
                assert response.headers["x-pd-first-token"] == "prefill"
                assert response.headers["x-pd-hand-off"] == "under way"
                early.set()
                body = await response.read()
                assert b"hello" in body or b"he" in body
                transfer = response.headers["x-pd-transfer-id"]
            trace = (await rig.get(f"/pd/trace/{transfer}")).json()
            assert (trace["handed_over"], trace["link"]) == (True, "cma")
            assert await became(rig, "handed_over") == 1

    run(test)


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_a_pair_that_hands_nothing_over_is_named_once_and_when_it_works_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After warn_after requests: one line with pair, reason and remedy; again after a minute; and one at the end."""

    async def test() -> None:
        async with watched(hand_off={"warn_after": 3}) as (rig, workers):
            refuses(rig, workers)
            for _ in range(2):
                await rig.ask()
            assert (await rig.get("/health")).json()["disaggregates"] is None
            assert not [r for r in caplog.records if "handed over" in r.message]
            for _ in range(5):
                await rig.ask()
            (line,) = [r.message for r in caplog.records if "handed over" in r.message]
            for part in (rig.p.name, rig.d.name, "last 3 requests", WHY, "refused", "equal on both"):
                assert part in line
            health = await rig.get("/health")
            assert health.status == 200
            assert health.json() | {"prefill": 0, "decode": 0} == {
                "status": "degraded", "prefill": 0, "decode": 0, "disaggregates": False, "why_not": "refused",
            }  # fmt: skip
            assert await rig.metric(f'pdrouter_pair_failing{{prefill="{rig.p.name}",decode="{rig.d.name}"}}') == 7
            state = (await rig.get("/pd/status")).json()
            assert (state["disaggregates"], state["why_not"]) == (False, f"refused: {WHY}")
            (pair,) = state["pairs"]
            assert (pair["missed_in_row"], pair["code"]) == (7, "refused")
            monkeypatch.setattr(handoffs, "WARN_EVERY_S", 0.0)
            await rig.ask()
            assert len([r for r in caplog.records if "last 8 requests" in r.message]) == 1
            tells(rig.d, workers.took)
            await rig.ask()
            assert len([r for r in caplog.records if "work again" in r.message]) == 1
            assert (await rig.get("/health")).json()["disaggregates"] is True
            assert (await rig.get("/pd/status")).json()["pairs"][0]["link"] == "cma"

    with caplog.at_level(logging.WARNING, "pdtransport.router"):
        run(test)


def test_clients_that_leave_are_no_fault_of_a_pair(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with watched(hand_off={"warn_after": 1}) as (rig, workers):
            tells(rig.d, lambda transfer: workers.end(transfer, 0, Code.CANCELLED, "aborted"))
            await rig.ask()
            assert (await rig.get("/health")).json()["disaggregates"] is None
            assert not [r for r in caplog.records if "handed over" in r.message]

    run(test)


def test_a_prefill_server_with_nothing_to_hand_over_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Where its metrics are off, so that it can't be told before: after warn_after requests that it computed."""

    async def test() -> None:
        async with rigged(hand_off={"warn_after": 3}) as rig:
            rig.p.hands_over = False
            for _ in range(3):
                reply = await rig.ask()
                assert reply.headers["x-pd-path"].startswith("decode-only; ")
            (line,) = [r.message for r in caplog.records if "handed over" in r.message]
            assert "no_handover" in line
            assert "PDTransportConnector" in line
            assert await became(rig, "failed", "no_handover") == 3
            assert (await rig.get("/health")).json()["disaggregates"] is False

    run(test)


def test_pairs_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoffs, "MAX_PAIRS", 5)

    async def test() -> None:
        made = HandOffs(RouterHandOff(), Metrics())
        decode = Endpoint("decode", EndpointSettings(url="http://d:1"))
        for index in range(50):
            prefill = Endpoint("prefill", EndpointSettings(url=f"http://p:{index + 1}"))
            hand_off = made.begin(f"t{index}", prefill, decode, {})
            made.nothing(hand_off, "nothing")
            made.end(hand_off, answered=False)
        assert len(made._pairs) == 5
        assert made._live == {}
        assert len(made.describe(3)) == 3

    asyncio.run(test())


def test_a_server_tells_of_its_own_transfers_only() -> None:
    """A report names a transfer by its id, which its watchers may learn: only the server that took it can end it."""

    async def test() -> None:
        made = HandOffs(RouterHandOff(), Metrics())
        one, other = (Endpoint("decode", EndpointSettings(url=f"http://d:{port}")) for port in (1, 2))
        hand_off = made.begin("t", Endpoint("prefill", EndpointSettings(url="http://p:1")), one, {})
        made.hear(other, 0, 1, Ended(transfer="t", code=Code.REFUSED, reason="not its transfer"))
        assert hand_off.verdict is None
        made.hear(one, 0, 1, Ended(transfer="t", blocks=1))
        assert hand_off.verdict is not None
        assert hand_off.verdict.became == "handed_over"

    asyncio.run(test())


# -- what servers are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "why"),
    [(PLAIN, "runs vLLM without PDTransportConnector"), (info("kv_consumer", 7670), "has kv_role kv_consumer")],
)
def test_a_prefill_server_that_can_not_hand_over_is_found_out_before_it_computes(
    metrics: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log, decode alone with the reason, no prompt computed twice; asked anew when it restarts."""

    def before(rig: Rig) -> None:
        rig.p.metrics = metrics

    async def test() -> None:
        async with rigged(before=before, health={"interval_s": 0.05, "backoff_max_s": 0.1}) as rig:
            for _ in range(2):
                reply = await rig.ask()
                assert reply.status == 200
                assert reply.headers["x-pd-path"].startswith(f"decode-only; prefill server {rig.p.name} {why}")
            assert rig.p.seen == []
            assert await rig.metric('pdrouter_not_disaggregated_total{reason="prefill_not_a_producer"}') == 2
            assert len([r for r in caplog.records if why in r.message]) == 1
            health = (await rig.get("/health")).json()
            assert (health["status"], health["disaggregates"]) == ("degraded", False)
            assert health["why_not"] == "prefill_not_a_producer"
            assert why in (await rig.get("/pd/status")).json()["why_not"]
            await rig.p.stop()
            await soon(lambda: not rig.router.fleet.prefill[0].healthy)
            rig.p.metrics = info("kv_producer", 7670)
            await rig.p.start()
            await soon(lambda: rig.router.fleet.prefill[0].healthy)
            assert (await rig.ask()).headers["x-pd-path"] == "disaggregated"

    run(test)


def test_decode_that_can_take_nothing_serves_alone() -> None:
    def before(rig: Rig) -> None:
        rig.d.metrics = info("kv_producer", 7680)

    async def test() -> None:
        async with rigged(before=before) as rig:
            reply = await rig.ask()
            assert "has kv_role kv_producer" in reply.headers["x-pd-path"]
            assert await rig.metric('pdrouter_not_disaggregated_total{reason="decode_not_a_consumer"}') == 1
            assert rig.p.seen == []

    run(test)


@pytest.mark.parametrize("metrics", [None, "", "other_metric 1\n", "x" * 100])
def test_nothing_is_concluded_from_metrics_that_say_nothing(metrics: str | None) -> None:
    """--disable-log-stats: prefill's first answer teaches its address, as ever."""

    def before(rig: Rig) -> None:
        rig.p.metrics = rig.d.metrics = metrics

    async def test() -> None:
        async with rigged(before=before) as rig:
            assert [(await rig.trace(await rig.ask()))["dispatch"] for _ in range(2)] == ["serial", "concurrent"]
            assert rig.p.metrics_read == 1  # not at every check

    run(test)


def test_other_connectors_may_hand_over_in_the_serial_order() -> None:
    """They say nothing of us in their metrics; what prefill answers tells."""

    def before(rig: Rig) -> None:
        rig.p.metrics = rig.d.metrics = PLAIN

    async def test() -> None:
        async with rigged(before=before, dispatch="serial") as rig:
            assert (await rig.ask()).headers["x-pd-path"] == "disaggregated"

    run(test)


def test_the_first_request_is_concurrent_where_metrics_tell_the_address() -> None:
    """An address that stands for all of the host's is that of the URL."""

    def before(rig: Rig) -> None:
        rig.p.metrics = info("kv_producer", 9123, host="0.0.0.0", ranks=2, engine=rig.p.engine_id)

    async def test() -> None:
        async with rigged(before=before) as rig:
            for _ in range(2):  # prefill's own answer changes nothing
                reply = await rig.ask()
                assert (await rig.trace(reply))["dispatch"] == "concurrent"
                params = rig.d.seen[-1].params
                assert params is not None
                assert (params["remote_host"], params["remote_port"], params["tp_size"]) == ("127.0.0.1", 9123, 2)

    run(test)


def test_of_several_engines_only_the_answer_says_which_has_the_pages() -> None:
    """Data parallelism: the order stays serial, and both engines' workers are watched on decode."""

    async def test() -> None:
        async with Workers(engine="d0") as first, Workers(engine="d1") as second:
            configured: dict[str, Any] = {"prefill_as": lambda p: f"{p.url}@127.0.0.1:7670"}

            def before(rig: Rig) -> None:
                rig.p.metrics = info("kv_both", 7670, engine="e_dp0") + info("kv_both", 7671, engine="e_dp1", index=1)
                rig.d.metrics = info("kv_both", first.port) + info("kv_both", second.port, engine="f", index=1)

            async with rigged(before=before, hand_off={"wait_s": 5}, **configured) as rig:
                await soon(lambda: rig.router._watches.stands(rig.router.fleet.decode[0]))
                for index in range(4):
                    rig.p.engine_id = f"e_dp{index % 2}"
                    tells(rig.d, (first if index % 2 else second).took)
                    reply = await rig.ask()
                    assert (await rig.trace(reply))["dispatch"] == "serial"
                    assert reply.headers["x-pd-hand-off"] == "handed_over; cma"
                assert rig.router.fleet.prefill[0].restarts == 0

    run(test)


# -- watches ----------------------------------------------------------------------------------------------------------


def test_the_true_number_of_ranks_is_learned_from_a_worker() -> None:
    """Configured addresses may say less."""

    async def test() -> None:
        told: dict[str, Any] = {"prefill_as": lambda p: f"{p.url}@127.0.0.1:7670", "hand_off": {"wait_s": 5}}
        async with Workers(2) as workers, rigged(**told) as rig:
            decode = rig.router.fleet.decode[0]
            decode.settings = EndpointSettings.parse(f"{rig.d.url}@127.0.0.1:{workers.port}")
            rig.router._watches.follow(decode)
            await soon(lambda: rig.router._watches.stands(decode))
            tells(rig.d, workers.took)
            assert (await rig.trace(await rig.ask()))["bytes"] == 2000

    run(test)


def test_a_decode_server_that_comes_back_is_watched_where_it_is_now() -> None:
    async def test() -> None:
        async with watched(health={"interval_s": 0.05, "backoff_max_s": 0.1}) as (rig, workers):
            tells(rig.d, workers.took)
            assert (await rig.ask()).headers["x-pd-hand-off"] == "handed_over; cma"
            await rig.d.stop()
            await soon(lambda: not rig.router.fleet.decode[0].healthy)
            async with Workers(engine="after") as others:
                rig.d.metrics = info("kv_consumer", others.port, engine="after")
                await rig.d.start()
                await soon(lambda: rig.router.fleet.decode[0].healthy)
                tells(rig.d, others.took)
                await soon(lambda: rig.router._watches.stands(rig.router.fleet.decode[0]))
                assert (await rig.ask()).headers["x-pd-hand-off"] == "handed_over; cma"

    run(test)


def test_what_can_not_be_watched_is_said_once_and_requests_are_served(caplog: pytest.LogCaptureFixture) -> None:
    """Promise 7: no watch leaves this machine without keys."""

    def before(rig: Rig) -> None:
        rig.d.metrics = info("kv_consumer", 7670, host="192.0.2.7")

    async def test() -> None:
        async with rigged(before=before, health={"interval_s": 0.02}) as rig:
            reply = await rig.ask()
            assert reply.status == 200
            assert "not this machine" in reply.headers["x-pd-hand-off"]
            await soon(lambda: rig.d.health_checks > 5)
            assert len([r for r in caplog.records if "not this machine" in r.message]) == 1

    run(test)


def test_workers_with_keys_are_watched_with_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the right pair all is known; without one the log says so once, and requests are served."""
    public, secret = make_keys(tmp_path / "ours")
    keys = {"curve_public_key_file": public, "curve_secret_key_file": secret}
    monkeypatch.setattr(watches, "SILENT_S", 0.2)
    monkeypatch.setattr(watches, "WATCH_AGAIN_S", 0.05)
    monkeypatch.setattr(watches, "FIRST_ANSWER_S", 0.2)

    async def test() -> None:
        async with Workers(**keys) as workers:

            def before(rig: Rig) -> None:
                rig.d.metrics = info("kv_consumer", workers.port)

            for settings, said in (({}, "unknown; its worker at "), (keys, "handed_over; cma")):
                async with rigged(before=before, hand_off={"wait_s": 5}, **settings) as rig:
                    if settings:
                        await soon(lambda rig=rig: rig.router._watches.stands(rig.router.fleet.decode[0]))
                    tells(rig.d, workers.took)
                    reply = await rig.ask()
                    assert (reply.status, reply.headers["x-pd-hand-off"][: len(said)]) == (200, said)
                    if not settings:
                        await soon(lambda: any("curve_*_key_file" in r.message for r in caplog.records))
            assert len([r for r in caplog.records if "curve_*_key_file" in r.message]) == 1

    run(test)


@pytest.mark.parametrize("hangs", [True, False])
def test_metrics_that_do_not_come_are_asked_for_a_few_times(hangs: bool) -> None:
    """A server that is up serves, whatever its metrics do; nothing is concluded from an endless answer either."""

    async def test() -> None:
        async with rigged(health={"interval_s": 0.05, "timeout_s": 0.1 if hangs else 5.0}) as rig:
            asked = 0

            async def metrics(request: web.Request) -> web.StreamResponse:
                nonlocal asked
                asked += 1
                if hangs:
                    await asyncio.sleep(20)
                response = web.StreamResponse()
                await response.prepare(request)
                while True:
                    await response.write(b"x" * (1 << 20))

            rig.p.metrics_script = metrics
            rig.router.fleet.prefill[0].forget()
            await soon(lambda: rig.router.fleet.prefill[0].facts is not None)
            assert asked == (MAX_ASKED if hangs else 1)
            checks = rig.p.health_checks
            await soon(lambda: rig.p.health_checks > checks + 2)
            assert asked == (MAX_ASKED if hangs else 1)
            assert (await rig.ask()).headers["x-pd-path"] == "disaggregated"

    run(test)


def test_watching_another_rank_than_meant_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with Workers(2) as workers:

            def before(rig: Rig) -> None:
                rig.d.metrics = info("kv_consumer", workers.port + 1)

            async with rigged(before=before) as rig:
                assert "is rank 1, not 0" in (await rig.ask()).headers["x-pd-hand-off"]
                assert [r for r in caplog.records if "check control_port" in r.message]

    run(test)
