"""The router's own answers: keys, limits, errors in OpenAI's form, state and its borders."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr

from pdtransport.errors import SettingsError
from pdtransport.router import Router, RouterSettings
from tests.unit.router_rig import POST, ask, rigged, run, soon


def test_unusable_bodies_get_a_400_in_openais_form_and_reach_no_server() -> None:
    async def test() -> None:
        async with rigged() as rig:
            for body, code in (
                (b"", "invalid_json"),
                (b"{", "invalid_json"),
                (b'{"prompt": "a",}', "invalid_json"),
                (b'{"prompt": "a"} x', "invalid_json"),
                (b"[1]", "not_an_object"),
                (b'"text"', "not_an_object"),
                (b'{"prompt": "\xff"}', "invalid_json"),
                (b'{"prompt": ' + b"[" * 200_000, "invalid_json"),
                (b'{"prompt": ' + b"9" * 5000 + b"}", "invalid_json"),
                (b'{"n": 1, "prompt": "a", "n": 2}', "invalid_json"),
            ):
                reply = await rig.ask(body)
                assert (reply.status, reply.error["code"]) == (400, code), body[:40]
                assert reply.error["type"] == "invalid_request_error"
            assert rig.p.seen == rig.d.seen == []
            assert await rig.metric('pdrouter_refused_total{reason="invalid_json"}') == 8

    run(test)


def test_clients_own_kv_transfer_params_are_refused_by_name() -> None:
    async def test() -> None:
        async with rigged() as rig:
            for more in (
                {"kv_transfer_params": {"do_remote_prefill": True}},
                {"vllm_xargs": {"kv_transfer_params": "x"}},
            ):
                reply = await rig.ask(ask(**more))
                assert (reply.status, reply.error["param"]) == (400, "kv_transfer_params")
            reply = await rig.ask(ask(kv_transfer_params=None))  # what some clients send for "unset"
            assert reply.status == 200
            assert rig.d.seen[0].raw.count(b'"kv_transfer_params"') == 1

    run(test)


def test_body_limit_is_exact_with_and_without_a_declared_length() -> None:
    async def test() -> None:
        async with rigged(max_body_bytes=2048) as rig:
            body = ask(prompt="")
            fits = ask(prompt="x" * (2048 - len(json.dumps(body))))
            for extra, status in (("", 200), ("x", 413)):
                data = json.dumps({**fits, "prompt": fits["prompt"] + extra}).encode()
                assert len(data) == 2048 + len(extra)
                assert (await rig.ask(data)).status == status

                async def pieces(data: bytes = data) -> Any:
                    yield data[:100]
                    yield data[100:]

                headers = {"Content-Type": "application/json"}
                async with rig.client.post(f"{rig.router.url}/v1/completions", data=pieces(), headers=headers) as reply:
                    assert reply.status == status
            await soon(lambda: rig.router.describe()["buffered_bytes"] == 0)

    run(test)


def test_too_many_requests_get_a_503_with_retry_after_and_the_rest_go_on() -> None:
    async def test() -> None:
        async with rigged(max_inflight=2, retry_after_s=7) as rig:
            more = asyncio.Event()

            async def wait(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await more.wait()
                return await rig.d.answer(request, body)

            rig.d.script = wait
            first = [asyncio.create_task(rig.ask()) for _ in range(2)]
            await rig.d.wait_for(2)
            over = await rig.ask()
            assert (over.status, over.error["code"], over.headers["Retry-After"]) == (503, "overloaded", "7")
            more.set()
            assert [(await task).status for task in first] == [200, 200]
            assert (await rig.ask()).status == 200

    run(test)


def test_bodies_under_way_are_bounded_in_bytes() -> None:
    async def test() -> None:
        async with rigged(max_buffered_bytes=4096) as rig:
            more = asyncio.Event()

            async def wait(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await more.wait()
                return await rig.d.answer(request, body)

            rig.d.script = wait
            first = asyncio.create_task(rig.ask(ask(prompt="x" * 3000)))
            await rig.d.wait_for(1)
            over = await rig.ask(ask(prompt="x" * 3000))
            assert (over.status, "max_buffered_bytes" in over.error["message"]) == (503, True)
            more.set()
            assert (await first).status == 200
            assert (await rig.ask(ask(prompt="x" * 3000))).status == 200

    run(test)


def test_clients_that_are_slow_to_send_take_nobodys_place() -> None:
    """A request counts against max_inflight from the end of its body on, and gives way like an idle one before."""

    async def test() -> None:
        async with rigged(max_inflight=1, max_connections=4) as rig:
            head = POST + b"Content-Length: 99\r\n\r\n{"
            slow = []
            for _ in range(4):
                slow.append(await asyncio.open_connection("127.0.0.1", rig.router.port))
                slow[-1][1].write(head)
            await asyncio.sleep(0.05)
            assert (await rig.ask()).status == 200
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(slow[0][0].readexactly(1), 5)
            for _, writer in slow:
                writer.close()

    run(test)


def test_body_that_does_not_arrive_is_given_up() -> None:
    async def test() -> None:
        async with rigged(timeouts={"client_body_s": 0.1}) as rig:
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.router.port)
            writer.write(POST + b'Content-Length: 100\r\n\r\n{"a"')
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert b" 408 " in head
            writer.close()

    run(test)


def test_connections_beyond_the_bound_are_closed_and_room_is_reused() -> None:
    """max_connections holds: where all are at work the new one goes, and room that was left is used again."""

    async def test() -> None:
        async with rigged(max_connections=3) as rig:
            more = asyncio.Event()

            async def wait(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await more.wait()
                return await rig.d.answer(request, body)

            rig.d.script = wait
            busy = [asyncio.create_task(rig.ask()) for _ in range(3)]
            await rig.d.wait_for(3)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.router.port)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 5)
            writer.close()
            more.set()
            assert [(await one).status for one in busy] == [200, 200, 200]
            assert (await rig.get("/health")).status == 200

    run(test)


@pytest.mark.parametrize("bound", ["max_connections", "max_idle_per_client"])
def test_the_longest_idle_connection_gives_way(bound: str) -> None:
    """Connections that say nothing can't keep others out: the oldest of them is closed for the next one."""

    async def test() -> None:
        async with rigged(**{bound: 3}) as rig:
            opened = [await asyncio.open_connection("127.0.0.1", rig.router.port) for _ in range(3)]
            await asyncio.sleep(0.05)
            assert (await rig.get("/health")).status == 200  # a fourth
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(opened[0][0].readexactly(1), 5)
            for reader, writer in opened[1:]:
                writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            for _, writer in opened:
                writer.close()

    run(test)


def test_a_head_that_trickles_in_is_cut_off() -> None:
    """Slowloris: a request line and headers have client_head_s in all, on a new connection and on a used one."""

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def say() -> None:
            writer.write(b"GET /health HTTP/1.1\r\n")
            while True:
                writer.write(b"X: y\r\n")
                await writer.drain()
                await asyncio.sleep(0.02)

        saying = asyncio.create_task(say())
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        saying.cancel()
        await asyncio.gather(saying, return_exceptions=True)
        writer.close()

    async def test() -> None:
        async with rigged(timeouts={"client_head_s": 0.2}) as rig:
            await trickle(*await asyncio.open_connection("127.0.0.1", rig.router.port))
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.router.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            await reader.readexactly(length)
            await asyncio.sleep(0.5)  # idle after a request: keep_alive_s holds, not client_head_s
            await trickle(reader, writer)
            assert (await rig.get("/health")).status == 200

    run(test)


def test_a_request_that_takes_long_is_not_taken_for_an_idle_one() -> None:
    async def test() -> None:
        async with rigged(timeouts={"client_head_s": 0.1}, max_connections=2) as rig:

            async def slow(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await asyncio.sleep(0.6)
                return await rig.d.answer(request, body)

            rig.d.script = slow
            asked = asyncio.create_task(rig.ask())
            await rig.d.wait_for(1)
            for _ in range(5):
                _, writer = await asyncio.open_connection("127.0.0.1", rig.router.port)
                await asyncio.sleep(0.01)
                writer.close()
            assert (await asked).status == 200

    run(test)


def test_long_header_lines_are_refused() -> None:
    async def test() -> None:
        async with rigged(max_header_bytes=2048) as rig:
            assert (await rig.get("/health", headers={"X-Long": "x" * 1000})).status == 200
            assert (await rig.get("/health", headers={"X-Long": "x" * 5000})).status == 400

    run(test)


def test_keys_are_asked_for_on_v1_and_never_passed_on(tmp_path: Path) -> None:
    async def test() -> None:
        keys = tmp_path / "keys"
        keys.write_text("key-one\n\n key-two \n")
        async with rigged(api_key_file=str(keys)) as rig:
            for wrong in ("", "Bearer no", "key-one", "Basic key-one", "Bearer key-one key-two"):
                headers = {"Authorization": wrong} if wrong else {}
                reply = await rig.ask(headers=headers)
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
                assert (await rig.get("/v1/models", headers=headers)).status == 401
            for key in ("key-one", "key-two"):
                assert (await rig.ask(headers={"Authorization": f"Bearer {key}"})).status == 200
            assert "authorization" not in rig.d.seen[0].headers
            assert (await rig.get("/health")).status == 200
            everything = [(await rig.get(path)).body for path in ("/pd/status", "/pd/traces", "/metrics", "/health")]
            assert not any(key in b"".join(everything) for key in (b"key-one", b"key-two", b"Bearer"))

    run(test)


def test_servers_get_their_own_key() -> None:
    async def test() -> None:
        async with rigged(upstream_api_key="inner") as rig:
            await rig.ask(headers={"Authorization": "Bearer outer"})
            sent = {rig.p.seen[0].headers["authorization"], rig.d.seen[0].headers["authorization"]}
            assert sent == {"Bearer inner"}

    run(test)


def test_nothing_of_a_body_or_a_key_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        caplog.set_level(logging.DEBUG)
        logging.getLogger("asyncio").setLevel(logging.INFO)
        async with rigged(api_key="sesame-open") as rig:
            await rig.p.stop()
            headers = {"Authorization": "Bearer sesame-open"}
            assert (await rig.ask(ask(prompt="prompt-secret"), headers=headers)).status == 200
            await rig.d.stop()
            assert (await rig.ask(ask(prompt="prompt-secret"), headers=headers)).status == 502
        assert "unhealthy" in caplog.text
        assert "prompt-secret" not in caplog.text
        assert "sesame-open" not in caplog.text

    run(test)


def test_unknown_paths_and_methods_get_openais_form() -> None:
    async def test() -> None:
        async with rigged() as rig:
            missing = await rig.get("/v1/embeddings")
            assert (missing.status, missing.error["code"]) == (404, "not_found")
            wrong = await rig.get("/v1/completions")
            assert (wrong.status, wrong.headers["Allow"], wrong.error["code"]) == (405, "POST", "method_not_allowed")

    run(test)


def test_models_come_from_a_decode_server_that_answers() -> None:
    async def test() -> None:
        async with rigged(decode=2, health={"interval_s": 60}) as rig:
            await rig.decode[0].stop()
            reply = await rig.get("/v1/models")
            assert (reply.status, reply.json()["data"][0]["id"]) == (200, "model-of-decode")
            await rig.decode[1].stop()
            assert (await rig.get("/v1/models")).error["code"] == "no_decode_server"

    run(test)


def test_health_follows_the_servers_without_any_request() -> None:
    async def test() -> None:
        async with rigged(health={"interval_s": 0.05, "backoff_max_s": 0.1}) as rig:
            assert (await rig.get("/health")).json() == {
                "status": "ok",
                "prefill": {"healthy": 1, "of": 1},
                "decode": {"healthy": 1, "of": 1},
                "disaggregates": None,
                "why_not": "untried",
            }
            rig.d.health_status = 503
            await soon(lambda: not rig.router.fleet.decode[0].healthy)
            reply = await rig.get("/health")
            assert (reply.status, reply.json()["decode"]["healthy"]) == (503, 0)
            assert (reply.json()["status"], reply.json()["disaggregates"]) == ("unavailable", False)
            assert (await rig.get("/live")).status == 200
            rig.d.health_status = 200
            await soon(lambda: rig.router.fleet.decode[0].healthy)
            await rig.p.stop()
            await soon(lambda: not rig.router.fleet.prefill[0].healthy)
            await rig.p.start()
            await soon(lambda: rig.router.fleet.prefill[0].healthy)
            assert (await rig.get("/health")).status == 200

    run(test)


def test_checks_of_an_unhealthy_server_become_rarer() -> None:
    async def test() -> None:
        async with rigged(health={"interval_s": 0.02, "backoff_max_s": 30}) as rig:
            rig.d.health_status = 500
            await soon(lambda: not rig.router.fleet.decode[0].healthy)
            begun = rig.d.health_checks
            await asyncio.sleep(0.7)
            assert 1 <= rig.d.health_checks - begun <= 6  # doubling: after 0.02, 0.06, 0.14, 0.3, 0.62 s

    run(test)


def test_one_slow_check_is_forgiven_and_two_in_a_row_are_not(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with rigged(health={"interval_s": 0.02, "timeout_s": 0.1, "failures": 2}) as rig:
            rig.d.slow_health_checks = 1
            seen = rig.d.health_checks
            await soon(lambda: rig.d.health_checks >= seen + 4)
            assert rig.router.fleet.decode[0].healthy
            assert "unhealthy" not in caplog.text
            rig.d.slow_health_checks = 2
            await soon(lambda: not rig.router.fleet.decode[0].healthy)

    run(test)


def test_pd_is_served_to_loopback_only_and_not_through_a_proxy() -> None:
    async def test() -> None:
        async with rigged() as rig:
            assert (await rig.get("/pd/status")).status == 200
            for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP"):
                for path in ("/pd/status", "/pd/traces", "/pd/trace/x", "/metrics"):
                    reply = await rig.get(path, headers={name: "1.2.3.4"})
                    assert (reply.status, reply.error["code"]) == (403, "loopback_only")

    run(test)


def test_admin_port_takes_pd_off_the_main_port() -> None:
    async def test() -> None:
        async with rigged(admin_port=0) as rig:
            reply = await rig.ask()
            assert (await rig.get("/pd/status")).status == (await rig.get("/metrics")).status == 404
            assert rig.router.admin_url != rig.router.url
            path = f"{rig.router.admin_url}/pd/trace/{reply.headers['x-pd-transfer-id']}"
            async with rig.client.get(path) as response:
                assert (await response.json())["outcome"] == "ok"

    run(test)


def test_each_port_describes_what_it_serves_and_which_keys_it_wants() -> None:
    async def test() -> None:
        async with rigged(admin_port=0, api_key="outside") as rig:
            outside = (await rig.get("/openapi.json")).json()
            async with rig.client.get(f"{rig.router.admin_url}/openapi.json") as response:
                inside = await response.json()
            assert {"/v1/completions", "/health"} < set(outside["paths"])
            assert {"/metrics", "/pd/status"} < set(inside["paths"])
            assert set(outside["paths"]) & set(inside["paths"]) == {"/openapi.json"}
            assert outside["paths"]["/v1/completions"]["post"]["security"] == [{"clientKey": []}]
            assert not any("security" in one["get"] for one in inside["paths"].values())

    run(test)


@pytest.mark.parametrize("own_port", [False, True])
def test_an_admin_key_is_asked_for_by_admin_paths_and_no_others(own_port: bool, tmp_path: Path) -> None:
    """With an admin key nothing of the router's inside is shown without it, to loopback and clients' keys either."""

    async def test() -> None:
        keys = tmp_path / "admin"
        keys.write_text("inside\n")
        settings: dict[str, Any] = {"admin_port": 0} if own_port else {}
        async with rigged(api_key="outside", admin_api_key_file=str(keys), **settings) as rig:
            for path in ("/pd/status", "/pd/traces", "/pd/trace/x", "/metrics"):
                url = rig.router.admin_url + path
                for wrong in ({}, {"Authorization": "Bearer outside"}, {"Authorization": "Bearer insid"}):
                    async with rig.client.get(url, headers=wrong) as response:
                        answer = await response.json()
                        assert (response.status, answer["error"]["code"]) == (401, "invalid_api_key")
                shown = {"Authorization": "Bearer inside", "X-Forwarded-For": "1.2.3.4"}
                async with rig.client.get(url, headers=shown) as response:
                    assert response.status == (404 if path.endswith("x") else 200)
            assert (await rig.ask(headers={"Authorization": "Bearer inside"})).status == 401
            assert (await rig.ask(headers={"Authorization": "Bearer outside"})).status == 200

    run(test)


def test_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDROUTER_API_KEY", "outside")
    monkeypatch.setenv("PDROUTER_ADMIN_API_KEY", "inside")
    monkeypatch.setenv("PDROUTER_UPSTREAM_API_KEY", "server")

    async def test() -> None:
        async with rigged() as rig:
            assert (await rig.ask()).status == (await rig.get("/pd/status")).status == 401
            assert (await rig.ask(headers={"Authorization": "Bearer outside"})).status == 200
            assert (await rig.get("/pd/status", headers={"Authorization": "Bearer inside"})).status == 200
            assert rig.d.seen[0].headers["authorization"] == "Bearer server"

    run(test)


def test_a_key_for_clients_is_none_for_administrators(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\nboth\n")
    settings = RouterSettings(
        prefill=("http://h:1",), decode=("http://h:2",), api_key_file=keys, admin_api_key=SecretStr("both")
    )
    with pytest.raises(SettingsError, match="admin_api_key_file share a key") as caught:
        Router(settings)
    assert "both" not in str(caught.value)


def test_traces_are_a_bounded_ring_found_by_every_transfer_id() -> None:
    async def test() -> None:
        async with rigged(traces=3) as rig:
            replies = [await rig.ask() for _ in range(5)]
            listed = (await rig.get("/pd/traces")).json()["traces"]
            ids = [reply.headers["x-pd-transfer-id"] for reply in replies]
            assert [trace["transfer_id"] for trace in listed] == ids[:1:-1]
            assert (await rig.get(f"/pd/trace/{ids[0]}")).error["code"] == "unknown_transfer"
            assert len((await rig.get("/pd/traces?limit=2")).json()["traces"]) == 2
            assert (await rig.get("/pd/traces?limit=-1")).status == 400

    run(test)


def test_trace_says_why_it_has_no_word_from_the_workers() -> None:
    async def test() -> None:
        async with rigged(timeouts={"worker_status_s": 0.2}) as rig:
            trace = await rig.trace(await rig.ask())
            assert trace["workers"]["decode"]["ranks"] is None
            assert "is unknown" in trace["workers"]["decode"]["why"]
            assert trace["workers"]["prefill"]["why"]  # nobody listens on the control port of this rig
            state = (await rig.get("/pd/status?workers=1")).json()
            assert len(state["workers"]) == 2

    run(test)


def test_metrics_are_prometheus_text_with_complete_histograms() -> None:
    async def test() -> None:
        async with rigged() as rig:
            for stream_it in (False, True, True):
                await rig.ask(ask(stream=stream_it))
            await soon(lambda: rig.router.describe()["inflight"] == 0)
            reply = await rig.get("/metrics")
            assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            rows = dict(row.rsplit(" ", 1) for row in reply.body.decode().splitlines() if not row.startswith("#"))
            done = 'pdrouter_requests_total{api="completions",path="disaggregated",outcome="ok"}'
            assert rows[done] == "3"
            assert rows['pdrouter_first_token_seconds_count{path="disaggregated"}'] == "2"
            assert rows['pdrouter_first_token_seconds_bucket{path="disaggregated",le="+Inf"}'] == "2"
            assert rows['pdrouter_routing_seconds_count{path="disaggregated"}'] == "3"
            assert rows[f'pdrouter_server_healthy{{role="decode",server="{rig.d.name}"}}'] == "1"
            assert rows["pdrouter_inflight"] == "0"

    run(test)


def test_port_in_use_is_one_clear_line() -> None:
    async def test() -> None:
        async with rigged() as rig:
            again = Router(
                RouterSettings.build({"prefill": [rig.p.url], "decode": [rig.d.url], "port": rig.router.port})
            )
            with pytest.raises(SettingsError, match=r"^port: can't listen on 127\.0\.0\.1:\d+: .*choose another port$"):
                await again.start()

    run(test)


def test_clients_cookies_and_connections_are_not_shared_with_other_clients() -> None:
    async def test() -> None:
        async with rigged() as rig:

            async def cookie(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                response = await rig.d.answer(request, body)
                assert isinstance(response, web.Response)
                response.set_cookie("who", "me")
                return response

            rig.d.script = cookie
            await rig.ask()
            rig.client.cookie_jar.clear()
            await rig.ask()
            assert "cookie" not in rig.d.seen[1].headers

    run(test)
