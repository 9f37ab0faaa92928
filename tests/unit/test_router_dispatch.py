"""Who gets which body in which order, and how prefill's control address is learned and forgotten."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from aiohttp import web

from tests.unit.router_rig import Rig, ask, rigged, run, soon


def test_concurrent_dispatch_sends_both_before_either_answers() -> None:
    async def test() -> None:
        async with rigged() as rig:
            await rig.learn()
            both = asyncio.Event()

            async def hold(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await both.wait()
                return await (rig.p if body["kv_transfer_params"]["do_remote_decode"] else rig.d).answer(request, body)

            rig.p.script = rig.d.script = hold
            asked = asyncio.create_task(rig.ask(ask(temperature=0)))
            p, d = await rig.p.wait_for(1), await rig.d.wait_for(1)
            both.set()
            reply = await asked
            assert reply.status == 200
            transfer = reply.headers["x-pd-transfer-id"]
            assert re.fullmatch(r"[0-9a-f]{32}", transfer)
            both_params = {"transfer_id": transfer, "first_token": True}
            assert p.params == {"do_remote_decode": True, "do_remote_prefill": False, **both_params}
            assert d.params == {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_host": "127.0.0.1",
                "remote_port": 7670,
                "tp_size": 1,
                **both_params,
            }
            assert reply.headers["x-pd-path"] == "disaggregated"
            assert reply.headers["x-pd-prefill"] == rig.p.name
            assert reply.headers["x-pd-decode"] == rig.d.name

    run(test)


def test_first_request_is_serial_and_teaches_the_control_address() -> None:
    async def test() -> None:
        async with rigged() as rig:
            rig.p.control_port, rig.p.tp_size = 9123, 2
            first = await rig.ask()
            assert rig.d.seen[0].params == rig.p.hand_over(first.headers["x-pd-transfer-id"])
            trace = await rig.trace(first)
            assert trace["dispatch"] == "serial"
            assert trace["dispatches"][0]["why_order"] == "prefill's control address is not known yet"
            second = await rig.ask()
            params = rig.d.seen[1].params
            assert params is not None
            assert (params["remote_port"], params["tp_size"], "remote_engine_id" in params) == (9123, 2, False)
            assert (await rig.trace(second))["dispatch"] == "concurrent"

    run(test)


def test_serial_setting_always_hands_prefills_own_params_to_decode() -> None:
    async def test() -> None:
        async with rigged(dispatch="serial") as rig:
            for index in range(2):
                reply = await rig.ask()
                assert rig.d.seen[index].params == rig.p.hand_over(reply.headers["x-pd-transfer-id"])
                assert (await rig.trace(reply))["dispatch"] == "serial"

    run(test)


def test_configured_control_address_stays_and_only_the_number_of_ranks_is_learned() -> None:
    async def test() -> None:
        async with rigged(prefill_as=lambda engine: f"{engine.url}@10.0.0.9:7000/2") as rig:
            rig.p.tp_size = 4
            for ranks in (2, 4):
                assert (await rig.trace(await rig.ask()))["dispatch"] == "concurrent"
                params = rig.d.seen[-1].params
                assert params is not None
                assert (params["remote_host"], params["remote_port"]) == ("10.0.0.9", 7000)
                assert params["tp_size"] == ranks

    run(test)


def test_restarted_prefill_with_a_new_engine_id_gets_its_new_address_used() -> None:
    async def test() -> None:
        async with rigged() as rig:
            await rig.learn()
            rig.p.engine_id, rig.p.control_port = "another", 9999
            await rig.ask()
            await rig.ask()
            params = rig.d.seen[-1].params
            assert params is not None
            assert params["remote_port"] == 9999
            state = (await rig.get("/pd/status")).json()
            assert state["prefill"][0]["restarts"] == 1

    run(test)


def test_prefill_that_went_away_and_came_back_is_asked_serially_again() -> None:
    async def test() -> None:
        async with rigged(health={"interval_s": 0.05}) as rig:
            await rig.learn()
            await rig.p.stop()
            reply = await rig.ask()
            assert (reply.status, reply.headers["x-pd-path"].split(";")[0]) == (200, "decode-only")
            await rig.p.start()
            await soon(lambda: rig.router.fleet.prefill[0].healthy)
            assert (await rig.trace(await rig.ask()))["dispatch"] == "serial"
            assert (await rig.trace(await rig.ask()))["dispatch"] == "concurrent"

    run(test)


def test_control_address_is_forgotten_when_only_health_checks_noticed_a_restart() -> None:
    async def test() -> None:
        async with rigged(health={"interval_s": 0.05}) as rig:
            await rig.learn()
            prefill = rig.router.fleet.prefill[0]
            await rig.p.stop()
            await soon(lambda: not prefill.healthy)
            await rig.p.start()
            await soon(lambda: prefill.healthy)
            assert (await rig.trace(await rig.ask()))["dispatch"] == "serial"

    run(test)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prefill_gets_one_unstreamed_token_and_decode_the_clients_own_bytes(path: str) -> None:
    async def test() -> None:
        async with rigged() as rig:
            await rig.learn()
            chat = "chat" in path
            prompt = {"messages": [{"role": "user", "content": "ü?"}]} if chat else {"prompt": "ü?"}
            body = {
                **prompt, "model": "m", "max_tokens": 9, "min_tokens": 5, "n": 1, "temperature": 0.5, "seed": 7,
                "stream": True, "stream_options": {"include_usage": True}, "logprobs": 1, "return_token_ids": True,
            }  # fmt: skip
            if chat:
                body["max_completion_tokens"] = 9
            reply = await rig.ask(body, path)
            assert reply.status == 200
            p, d = rig.p.seen[0], rig.d.seen[0]
            assert (p.path, d.path) == (path, path)
            wanted = {**prompt, "model": "m", "temperature": 0.5, "seed": 7, "max_tokens": 1, "stream": False, "n": 1}
            if chat:
                wanted["max_completion_tokens"] = 1
            assert p.body == {**wanted, "kv_transfer_params": p.params}
            assert d.body == {**body, "kv_transfer_params": d.params}

    run(test)


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"use_beam_search": True}, "beam_search"),
        ({"echo": True}, "echo"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt_embeds": "abcd"}, "prompt_embeds"),
        ({"prompt": ["a", "b"]}, "batch"),
        ({"prompt": [[1, 2], [3]]}, "batch"),
        ({"prompt": None}, "no_prompt"),
        ({"prompt": []}, "no_prompt"),
    ],
)
def test_what_a_hand_off_cannot_serve_goes_to_decode_alone_untouched_and_says_why(
    more: dict[str, Any], code: str
) -> None:
    async def test() -> None:
        async with rigged() as rig:
            reply = await rig.ask(ask(**more))
            assert reply.status == 200
            assert reply.headers["x-pd-path"].startswith("decode-only; ")
            assert "x-pd-prefill" not in reply.headers
            assert (rig.p.seen, rig.d.seen[0].body) == ([], ask(**more))
            trace = await rig.trace(reply)
            assert (trace["why_code"], trace["dispatch"]) == (code, "alone")
            assert trace["why_not_disaggregated"] == reply.headers["x-pd-path"].removeprefix("decode-only; ")
            assert await rig.metric(f'pdrouter_not_disaggregated_total{{reason="{code}"}}') == 1

    run(test)


@pytest.mark.parametrize("prompt", ["a b c", [1, 2, 3]])
def test_a_list_of_one_prompt_is_handed_over(prompt: Any) -> None:
    """What client libraries send is disaggregated like the prompt by itself; decode gets the client's own bytes."""

    async def test() -> None:
        async with rigged() as rig:
            await rig.learn()
            reply = await rig.ask(ask(prompt=[prompt]))
            assert (reply.status, reply.headers["x-pd-path"]) == (200, "disaggregated")
            assert rig.p.seen[0].body["prompt"] == prompt
            assert rig.d.seen[0].body == {**ask(prompt=[prompt]), "kv_transfer_params": rig.d.seen[0].params}

    run(test)


@pytest.mark.parametrize(("setting", "bound"), [("min_disagg_tokens", 65), ("min_disagg_bytes", 400)])
def test_short_prompts_may_go_to_decode_alone(setting: str, bound: int) -> None:
    settings: dict[str, Any] = {setting: bound}

    async def test() -> None:
        async with rigged(**settings) as rig:
            short = await rig.ask()
            assert setting in short.headers["x-pd-path"]
            longer = await rig.ask(ask(prompt=list(range(1000, 1100))))
            assert longer.headers["x-pd-path"] == "disaggregated"

    run(test)


def test_no_healthy_prefill_server_means_decode_alone_and_says_so() -> None:
    async def test() -> None:
        async with rigged() as rig:
            rig.router.fleet.prefill[0].set_healthy(False, "test")
            reply = await rig.ask()
            assert reply.headers["x-pd-path"] == "decode-only; no prefill server is healthy"
            assert rig.d.seen[0].body == ask()

    run(test)


def test_no_two_dispatches_share_a_transfer_id() -> None:
    async def test() -> None:
        async with rigged(prefill=2, decode=2) as rig:
            replies = await asyncio.gather(*(rig.ask(ask(prompt=[i] * 40)) for i in range(20)))
            assert {reply.status for reply in replies} == {200}
            sent = [seen.params for engine in rig.prefill for seen in engine.seen]
            ids = [params["transfer_id"] for params in sent if params]
            assert len(set(ids)) == len(ids) == 20

    run(test)


def test_end_to_end_headers_reach_both_servers_and_hop_by_hop_ones_neither() -> None:
    async def test() -> None:
        async with rigged() as rig:
            await rig.ask(
                headers={
                    "X-Request-Id": "r1", "Authorization": "Bearer mine", "TE": "trailers", "Connection": "x-private",
                    "X-Private": "1", "Accept-Encoding": "gzip",
                }
            )  # fmt: skip
            for seen in (rig.p.seen[0], rig.d.seen[0]):
                assert (seen.headers["x-request-id"], seen.headers["authorization"]) == ("r1", "Bearer mine")
                assert seen.headers["accept-encoding"] == "identity"
                assert not {"te", "x-private"} & set(seen.headers)

    run(test)


def replica_answers(rig: Rig, index: int) -> None:
    """Prefill's vLLM has data-parallel replicas, and this one gets the requests."""
    rig.p.engine_id, rig.p.control_port = f"prefill-engine_dp{index}", 7670 + index


def test_a_prefill_with_replicas_is_asked_first() -> None:
    """vLLM picks the replica, and only its answer tells decode which: no request waits at another one's door. Replicas
    that take turns are no restarts."""

    async def test() -> None:
        async with rigged(dispatch="concurrent") as rig:
            for index in (1, 0, 1):
                replica_answers(rig, index)
                reply = await rig.ask()
                assert (reply.status, reply.headers["x-pd-path"]) == (200, "disaggregated")
                assert rig.d.seen[-1].params is not None
                assert rig.d.seen[-1].params["remote_port"] == 7670 + index
            assert (await rig.trace(reply))["dispatches"][-1]["why_order"].startswith(
                "prefill has data-parallel replicas"
            )
            assert rig.router.fleet.prefill[0].restarts == 0

    run(test)


def test_a_decode_that_was_sent_to_the_wrong_replica_does_not_wait_there() -> None:
    """The address is configured, and nobody has learned yet that there are replicas: decode answers alone, and the
    header says why."""

    async def test() -> None:
        async with rigged(prefill_as=lambda engine: f"{engine.url}@127.0.0.1:7670", dispatch="concurrent") as rig:
            replica_answers(rig, 1)

            async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                if (body.get("kv_transfer_params") or {}).get("remote_port") == 7670:
                    await asyncio.Event().wait()
                return await rig.d.answer(request, body)

            rig.d.script = script
            reply = await rig.ask()
            assert reply.status == 200
            assert "data-parallel replica" in reply.headers["x-pd-path"]
            assert (await rig.ask()).headers["x-pd-path"] == "disaggregated"

    run(test)
