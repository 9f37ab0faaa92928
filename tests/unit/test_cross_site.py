"""Web pages and the router: what a page can make its visitor's browser send to 127.0.0.1, and what it may read."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from aiohttp import web

from tests.unit.router_rig import Rig, ask, completion, event, rigged, run, stream

PAGE, OTHER = "https://chat.example", "https://evil.example"
OPEN_PATHS = ("/health", "/live", "/openapi.json", "/v1/models", "/pd/traces", "/pd/status", "/metrics")


def own_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("192.0.2.255", 9))  # sends nothing
        except OSError:
            return ""
        return str(one.getsockname()[0])


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx",
     "text/plain; application/json", "application/ld+json"],
)  # fmt: skip
def test_a_body_that_any_page_may_send_is_refused(kind: str) -> None:
    """A page can send text and forms without asking; with any of these types a request reaches no server."""

    async def test() -> None:
        async with rigged() as rig:
            reply = await rig.ask(headers={"Content-Type": kind})
            assert (reply.status, reply.error["code"]) == (415, "bad_content_type")
            assert reply.headers["Accept-Post"] == "application/json"
            assert rig.p.seen == rig.d.seen == []

    run(test)


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON", "application/json; charset=utf-8"])
def test_json_is_taken_however_it_is_written(kind: str) -> None:
    async def test() -> None:
        async with rigged() as rig:
            assert (await rig.ask(headers={"Content-Type": kind})).status == 200

    run(test)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "", "[", "a b"]
)
def test_a_name_that_was_made_to_point_here_is_refused(host: str) -> None:
    """DNS rebinding: whatever the path, a request over loopback that calls the router by somebody else's name gets a
    403 and reaches no handler."""

    async def test() -> None:
        async with rigged() as rig:
            for path in (*OPEN_PATHS, "/nowhere"):
                assert await _status(rig, path, host) == (403, "host_not_allowed"), path
            reply = await rig.ask(headers={"Host": host})
            assert (reply.status, reply.error["code"]) == (403, "host_not_allowed")
            assert rig.d.seen == []

    run(test)


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "localhost.", "x.localhost:80", "127.0.0.1", "127.9.9.9:1", "[::1]:8000", "10.1.2.3:8",
     "[fd00::1]", socket.gethostname(), "router.example", "ROUTER.example.:443"],
)  # fmt: skip
def test_names_of_this_machine_and_allowed_ones_are_taken(host: str) -> None:
    """Nobody can rebind an address, localhost or this machine's name; a local proxy's name is a setting."""

    async def test() -> None:
        async with rigged(allowed_hosts=["router.example"]) as rig:
            assert await _status(rig, "/pd/traces", host) == (200, None)

    run(test)


def test_host_is_free_where_it_is_switched_off_and_off_loopback() -> None:
    """allowed_hosts: * takes any name; so does a connection that did not come over loopback, since others' names are
    how it is reached."""
    address = own_address()

    async def test() -> None:
        async with rigged(allowed_hosts=["*"]) as rig:
            assert await _status(rig, "/pd/traces", "evil.example") == (200, None)
        async with rigged(host="0.0.0.0") as rig:
            assert (await _status(rig, "/live", "evil.example"))[0] == 403
            if address:
                async with rig.client.get(
                    f"http://{address}:{rig.router.port}/live", headers={"Host": "pods.example"}
                ) as response:
                    assert response.status == 200

    run(test)


def test_a_request_without_host_is_no_browsers() -> None:
    """HTTP/1.0 has no Host: simple health checks send none."""

    async def test() -> None:
        async with rigged() as rig:
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.router.port)
            writer.write(b"GET /live HTTP/1.0\r\n\r\n")
            assert b" 200 " in await asyncio.wait_for(reader.readline(), 5)
            writer.close()

    run(test)


async def _preflight(rig: Rig, path: str, origin: str, **more: str) -> tuple[int, dict[str, str]]:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST", **more}
    async with rig.client.options(rig.router.url + path, headers=headers) as response:
        return response.status, _cors(response.headers)


def _cors(headers: Any) -> dict[str, str]:
    return {k.lower().removeprefix("access-control-"): v for k, v in headers.items() if k.lower().startswith("access-")}


def test_no_page_may_read_or_ask_unless_it_is_allowed() -> None:
    """By default no answer has a header of CORS, also where the servers behind send their own, and preflights fail."""

    async def test() -> None:
        async with rigged() as rig:

            async def lax(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                response = await rig.d.answer(request, body)
                assert isinstance(response, web.Response)
                response.headers.update(
                    {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Credentials": "true"}
                )
                return response

            rig.d.script = lax
            reply = await rig.ask(headers={"Origin": OTHER})
            assert (reply.status, _cors(reply.headers)) == (200, {})
            assert "origin" not in rig.d.seen[0].headers
            for path in ("/v1/completions", *OPEN_PATHS):
                assert await _preflight(rig, path, OTHER) == (405, {})
            for path in OPEN_PATHS:
                assert _cors((await rig.get(path, headers={"Origin": OTHER})).headers) == {}

    run(test)


def test_allowed_pages_may_use_v1_and_nothing_else() -> None:
    """Preflight, whole answers, streams and refusals carry the allowance for the page that was named and for no other;
    administrators' paths never do."""

    async def test() -> None:
        async with rigged(allowed_origins=[PAGE]) as rig:
            wanted = {"Access-Control-Request-Headers": "authorization, content-type,x-stainless-os"}
            status, allowed = await _preflight(rig, "/v1/chat/completions", PAGE, **wanted)
            assert (status, allowed["allow-origin"], allowed["allow-methods"]) == (204, PAGE, "GET, POST")
            assert allowed["allow-headers"] == wanted["Access-Control-Request-Headers"]
            assert "allow-credentials" not in allowed
            rig.d.script = lambda request, body: stream(request, [event(completion("a")), b"data: [DONE]\n\n"])
            for reply in (
                await rig.ask(ask(stream=True), headers={"Origin": PAGE}),
                await rig.ask(b"{", headers={"Origin": PAGE}),
                await rig.ask(headers={"Origin": PAGE, "Content-Type": "text/plain"}),
                await rig.ask(headers={"Origin": PAGE, "Expect": "nothing"}),
                await rig.get("/v1/models", headers={"Origin": PAGE}),
            ):
                allowed = _cors(reply.headers)
                assert (allowed["allow-origin"], reply.headers["Vary"]) == (PAGE, "Origin"), reply.status
                assert "x-pd-path" in allowed["expose-headers"]
            for origin in (OTHER, PAGE + ".evil.example", PAGE.replace("https", "http"), "null"):
                assert await _preflight(rig, "/v1/completions", origin) == (405, {})
                assert _cors((await rig.ask(headers={"Origin": origin})).headers) == {}
            for path in ("/pd/status", "/pd/traces", "/metrics"):
                assert await _preflight(rig, path, PAGE) == (405, {})
                assert _cors((await rig.get(path, headers={"Origin": PAGE})).headers) == {}
        async with rigged(allowed_origins=["*"]) as rig:
            assert _cors((await rig.get("/v1/models", headers={"Origin": OTHER})).headers)["allow-origin"] == "*"

    run(test)


def test_a_preflight_names_no_headers_that_are_none() -> None:
    """What a page asks for is echoed only if it is a list of header names."""

    async def test() -> None:
        async with rigged(allowed_origins=[PAGE]) as rig:
            for bad in ("a b", "x;y", "a,,b", "a" * 5000, "é"):
                status, allowed = await _preflight(rig, "/v1/models", PAGE, **{"Access-Control-Request-Headers": bad})
                assert (status, "allow-headers" in allowed) == (204, False), bad

    run(test)


async def _status(rig: Rig, path: str, host: str) -> tuple[int, Any]:
    """Status and code of a GET; by hand, since client libraries mend what they send as Host."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.router.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    code = "host_not_allowed" if b'"host_not_allowed"' in answer else None
    return int(answer.split()[1]), code
