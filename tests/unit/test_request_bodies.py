"""What becomes of request bodies: compressed ones, unwanted ones, other encodings of text; and of the log."""

from __future__ import annotations

import asyncio
import codecs
import gzip
import json
import logging
import zlib
from typing import Any

import aiohttp
import pytest

from pdtransport.serving.request_filter import MAX_LINGERING
from pdtransport.system.log_limits import MAX_KINDS, LogLimiter
from tests.unit.router_rig import POST, Rig, ask, rigged, run

BODY = json.dumps(ask()).encode()
KEY = {"Authorization": "Bearer sesame"}


class CountingZlib:
    """zlib for aiohttp; counts the bytes that come out of it."""

    MAX_WBITS, Z_SYNC_FLUSH, Z_FULL_FLUSH, Z_FINISH = (
        zlib.MAX_WBITS,
        zlib.Z_SYNC_FLUSH,
        zlib.Z_FULL_FLUSH,
        zlib.Z_FINISH,
    )
    compress, decompress, compressobj = zlib.compress, zlib.decompress, zlib.compressobj

    def __init__(self) -> None:
        self.inflated = 0

    def decompressobj(self, *args: Any, **named: Any) -> Any:
        outer, inner = self, zlib.decompressobj(*args, **named)

        class Counting:
            def decompress(self, data: bytes, *more: Any) -> bytes:
                found = inner.decompress(data, *more)
                outer.inflated += len(found)
                return found

            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

        return Counting()


async def _raw(rig: Rig, *sent: bytes) -> bytes:
    """All that comes back on a connection, to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.router.port)
    for part in sent:
        writer.write(part)
        await asyncio.sleep(0.02)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


def test_nothing_is_ever_inflated() -> None:
    """Not one byte comes out of a decompressor, whoever sends a compressed body wherever; with a key the answer says
    what to do."""
    counting, body = CountingZlib(), gzip.compress(bytes(1 << 20))
    aiohttp.set_zlib_backend(counting)  # type: ignore[arg-type]

    async def test() -> None:
        async with rigged(api_key="sesame") as rig:
            gzipped = {"Content-Encoding": "gzip"}
            assert (await rig.ask(body, headers=gzipped)).status == 401
            assert (await rig.ask(body, path="/nowhere", headers=gzipped)).status == 404
            assert (await rig.ask(body, path="/v1/models", headers=gzipped)).status == 405
            assert (await rig.get("/health", data=body, headers=gzipped)).status == 200
            for coding in ("gzip", "GZip", "deflate", "br", "zstd", "identity, gzip", "unheard-of"):
                reply = await rig.ask(body, headers={**KEY, "Content-Encoding": coding})
                assert (reply.status, reply.error["code"]) == (415, "bad_content_encoding")
                assert reply.headers["Accept-Encoding"] == "identity"
            for coding in ("identity", "", " Identity "):
                assert (await rig.ask(headers={**KEY, "Content-Encoding": coding})).status == 200

    try:
        run(test)
    finally:
        aiohttp.set_zlib_backend(zlib)  # type: ignore[arg-type]
    assert counting.inflated == 0


def test_a_refused_body_ends_its_connection_and_a_served_one_does_not() -> None:
    """After 401, 404, 405 and 415 with a body, whole or not, the connection is closed: what follows goes unanswered."""
    whole, begun = b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY), b"Content-Length: 100000\r\n\r\n{"
    follows = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def test() -> None:
        async with rigged(api_key="sesame") as rig:
            refused = [
                POST,
                POST.replace(b"/v1/completions", b"/nowhere"),
                POST.replace(b"POST", b"PUT"),
                POST.replace(b"application/json", b"text/plain") + b"Authorization: Bearer sesame\r\n",
            ]
            for head, rest in ((head, rest) for head in refused for rest in (whole, begun)):
                answer = await _raw(rig, head + rest, follows)
                assert answer.count(b"HTTP/1.1 ") == 1
                assert answer.split()[1] in (b"401", b"404", b"405", b"415")
                assert b"Connection: close" in answer
            served = POST + b"Authorization: Bearer sesame\r\n" + whole
            answer = await _raw(rig, served, follows.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            assert answer.count(b"HTTP/1.1 200 ") == 2

    run(test)


def test_only_a_body_that_is_wanted_is_invited() -> None:
    """100 Continue is sent by whoever reads the body: not for one that is refused, whatever for."""

    async def test() -> None:
        async with rigged(api_key="sesame", max_body_bytes=2048) as rig:
            expects = b"Expect: 100-continue\r\nContent-Length: %d\r\n"
            keyed = POST + b"Authorization: Bearer sesame\r\n"
            for head, status in (
                (POST + expects % len(BODY), b"401"),
                (POST.replace(b"/v1/completions", b"/nowhere") + expects % len(BODY), b"404"),
                (POST.replace(b"POST", b"PUT") + expects % len(BODY), b"405"),
                (keyed + expects % 4096, b"413"),
                (keyed + b"Content-Encoding: gzip\r\n" + expects % len(BODY), b"415"),
                (keyed + b"Expect: tea\r\nContent-Length: 5\r\n", b"417"),
                (keyed + b"X-Odd: \xff\r\n" + expects % 4096, b"413"),
            ):
                answer = await _raw(rig, head + b"\r\n")
                assert answer.split()[1] == status
                assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["message"]
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.router.port)
            writer.write(keyed + b"X-Odd: \xff\r\n" + expects % len(BODY) + b"\r\n")
            assert await asyncio.wait_for(reader.readexactly(25), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(BODY)
            assert (await asyncio.wait_for(reader.readline(), 5)).split()[1] == b"200"
            writer.close()
            assert "expect" not in rig.d.seen[0].headers

    run(test)


def test_who_does_not_listen_is_let_go() -> None:
    """A refused client that goes on sending, or says nothing more, and never closes, is disconnected soon; of many at
    once only some are waited for, and others are served meanwhile."""
    lingering: list[int] = []

    async def test() -> None:
        async with rigged(api_key="sesame") as rig:
            opened = [await asyncio.open_connection("127.0.0.1", rig.router.port) for _ in range(200)]
            for number, (_, writer) in enumerate(opened):
                writer.write(POST + b"Content-Length: 10000000\r\n\r\n" + b"x" * (number % 2 * 100_000))
            filtered = rig.router._main._filter  # type: ignore[union-attr]
            ended = asyncio.gather(*(reader.read() for reader, _ in opened), return_exceptions=True)
            while not any(lingering) or lingering[-1]:  # until all are let go
                lingering.append(filtered._lingering)
                assert (await rig.get("/live")).status == 200
            heads = [answer[:13] for answer in await ended if isinstance(answer, bytes)]
            assert heads.count(b"HTTP/1.1 401 ") >= MAX_LINGERING
            for _, writer in opened:
                writer.close()

    run(test)
    assert 0 < max(lingering) <= MAX_LINGERING


@pytest.mark.parametrize(
    ("raw", "taken"),
    [
        (codecs.BOM_UTF8 + BODY, True),
        (BODY.decode().encode("utf-16"), True),
        (BODY.decode().encode("utf-16-le"), True),
        (BODY.decode().encode("utf-16-be"), True),
        (BODY.decode().encode("utf-32"), True),
        (codecs.BOM_UTF32_BE + BODY.decode().encode("utf-32-be"), True),
        (codecs.BOM_UTF8, False),
        (codecs.BOM_UTF16_LE + b"\x00\xd8{", False),
        (codecs.BOM_UTF16_LE + b"{", False),
        (b"{\x00", False),
        (b"\x00" * 64, False),
    ],
)
def test_json_comes_in_any_encoding_of_unicode(raw: bytes, taken: bool) -> None:
    """As vLLM takes it; the servers get UTF-8. What is no text in its encoding is a 400, never a 500."""

    async def test() -> None:
        async with rigged() as rig:
            reply = await rig.ask(raw)
            assert reply.status == (200 if taken else 400)
            if taken:
                assert rig.d.seen[0].body["prompt"] == ask()["prompt"]
                rig.d.seen[0].raw.decode("utf-8")
                assert not rig.d.seen[0].raw.startswith(codecs.BOM_UTF8)
            else:
                assert reply.error["code"] == "invalid_json"

    run(test)


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/chat/completions/"])
def test_a_slash_behind_a_path_changes_nothing(path: str) -> None:
    """vLLM redirects such requests; the router serves them, and the servers get the path without it."""

    async def test() -> None:
        async with rigged() as rig:
            body = ask() if "chat" not in path else {"model": "m", "messages": [{"role": "user", "content": "a"}]}
            assert (await rig.ask(body, path)).status == 200
            assert rig.d.seen[0].path == path.rstrip("/")
            for other in ("/v1/models/", "/health/", "/live/"):
                assert (await rig.get(other)).status == 200
            for other in ("/pd/status/", "/metrics/", "/v1//completions", "/v1/completions//"):
                assert (await rig.get(other)).status == 404

    run(test)


def test_an_answer_has_the_version_that_is_spoken_here() -> None:
    """A client that says HTTP/2.0 in HTTP/1.1's form is answered in HTTP/1.1."""

    async def test() -> None:
        async with rigged() as rig:
            answer = await _raw(rig, b"GET /live HTTP/2.0\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 "), answer[:80]

    run(test)


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def _unreadable() -> int:
    """How deep a value is that this Python's json does not read: 1,000 lists on 3.11, more from 3.12 on."""
    for depth in range(900, 200_000, 5):
        try:
            json.loads(_nested(depth))
        except RecursionError:
            return depth
    raise AssertionError("json reads whatever it is given")


@pytest.mark.parametrize("member", ["model", "cache_salt", "n", "other"])
def test_no_depth_of_a_body_makes_the_router_fail(member: str) -> None:
    """What is nested as deep as it can be read is passed on, and deeper a 400: nothing later fails on it."""

    async def test() -> None:
        async with rigged() as rig:
            answers = set()
            deepest = _unreadable()
            for depth in (500, *range(deepest - 100, deepest + 10, 5)):
                reply = await rig.ask(f'{{"{member}": {_nested(depth)}, "prompt": "{"x" * 2000}"}}'.encode())
                answers.add((reply.status, reply.error["code"] if reply.status != 200 else None))
            assert answers == {(200, None), (400, "invalid_json")}

    run(test)


def test_a_fault_of_our_own_is_one_line_whatever_a_client_sent(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that makes the router itself fail gets a 500; ten of them write one line, which quotes nothing."""

    async def test() -> None:
        async with rigged() as rig:

            def fail(*_: Any, **__: Any) -> Any:
                raise ValueError("my-prompt")

            monkeypatch.setattr("pdtransport.router.server.parse", fail)
            for _ in range(10):
                reply = await rig.ask()
                assert (reply.status, reply.error["code"]) == (500, "router_error")

    with caplog.at_level(logging.INFO, "pdtransport"):
        run(test)
    said = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 1
    assert (
        said[0].getMessage().startswith("a request failed in the router itself: ValueError at test_request_bodies.py:")
    )
    assert said[0].exc_info is None
    assert "my-prompt" not in caplog.text


def test_repeated_lines_are_counted_and_kinds_are_bounded() -> None:
    """One line a kind and period; the next one tells how many were left out; endless kinds share one."""
    now = [0.0]
    limiter = LogLimiter(logging.getLogger("test"), 60.0, clock=lambda: now[0])
    assert [limiter.line("x", "a") for _ in range(3)] == ["x", "", ""]
    assert limiter.line("y", "b") == "y"
    now[0] = 60.0
    assert [limiter.line("x", "a"), limiter.line("x", "a")] == ["x (and 2 more like it)", ""]
    lines = [limiter.line("z", str(n)) for n in range(10 * MAX_KINDS)]
    assert sum(map(bool, lines)) <= MAX_KINDS


def test_what_goes_on_is_logged_ever_more_seldom() -> None:
    """Pauses double up to their longest; after silence they start anew."""
    limiter = LogLimiter(logging.getLogger("test"), 10.0, 40.0)
    written = [second for second in range(200) if limiter.line("x", now=float(second))]
    assert written == [0, 10, 30, 70, 110, 150, 190]
    assert limiter.line("x", now=1000.0)
    assert limiter.line("x", now=1010.0)
