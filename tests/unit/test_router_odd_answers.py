"""A server that answers what no server should: the client has an answer, and nobody a traceback."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from aiohttp import web

from pdtransport.router.first_token import FirstToken
from pdtransport.router.splice import StreamSplice, joined, opening
from tests.unit.router_rig import ask, rigged, run

FIRST = FirstToken(5, "p", {"id": "c", "created": 1, "model": "m"})


@pytest.mark.parametrize("choices", [5, "x", {"a": 1}, [5], [None], ["x"], [{"delta": None}], [{"delta": 5}]])
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_an_event_of_another_form_passes_as_it_is(api: Any, choices: Any) -> None:
    """Decode's events are looked at where prefill's first token stands before them; one that is none of a plain
    server's raises nothing."""
    event = b"data: " + json.dumps({"choices": choices}).encode() + b"\n\n"
    assert StreamSplice(api).feed(event) == event


def test_half_a_surrogate_pair_is_told_as_json_can() -> None:
    """JSON may escape what UTF-8 has no bytes for: what is put together from two answers is JSON and UTF-8."""
    half = FirstToken(5, "\ud800", FIRST.head)
    for said in (
        opening("completions", half, False).removeprefix(b"data: "),
        joined("completions", FIRST, json.dumps({"choices": [{"text": "\ud800"}]}).encode()),
    ):
        assert "\ud800" in json.loads(said.decode())["choices"][0]["text"]


def test_a_reason_that_is_no_text_is_not_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    """Control characters in a server's status line must not cost the client its answer."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 400 Bad\x7f\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        request.transport.close()
        return web.Response()

    async def test() -> None:
        async with rigged() as rig:
            rig.d.script = answer
            reply = await rig.ask(ask())
            assert (reply.status, reply.body) == (400, b"no")

    with caplog.at_level(logging.WARNING, "pdtransport"):
        run(test)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("path", ["/v1/completions", "/no-such-path"])
def test_an_unknown_expectation_is_refused_in_one_line(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its bytes are quoted nowhere: one that is no UTF-8 ended in a traceback of aiohttp's."""

    async def test() -> None:
        async with rigged() as rig:
            for expected in ("100-co\udcc1tinue", "200-ok"):
                reply = await rig.post(b"{}", path, headers={"Expect": expected}).__aenter__()
                assert reply.status == 417
                assert json.loads(await reply.read())["error"]["code"] == "bad_expect"
                reply.close()

    with caplog.at_level(logging.WARNING, "pdtransport"):
        run(test)
    assert not [record for record in caplog.records if record.exc_info]
