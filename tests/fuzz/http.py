"""The ``http`` target: bytes on a connection of a real router, whose servers say what the input tells them to.

An input has up to three parts: what the client sends, prefill's answer, decode's answer. A part that begins with one of
the bytes 1 to 5 is put into a well-formed request or answer, so that changes reach what lies behind the parser; any
other one is sent as it is.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import io
import json
from http.client import HTTPException, HTTPResponse
from typing import Any

from pdtransport.router import Router, RouterSettings
from tests.fuzz.faults import Faults
from tests.fuzz.split import SEPARATOR
from tests.unit.router_rig import completion

HANG_S = 10.0  # nothing here waits for more than a fraction of a second
QUIET_TURNS = 40  # of the loop in which nothing comes: all sides live in it, so that nothing will
BUSY_TURNS = 1000  # after which the router waits for a time
MAX_ANSWER = 1 << 20
LEFT_S = 2.0  # for what an input began to be over
COMPLETIONS, CHAT, ANSWER, EVENTS, CHUNKS = b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"
OWN = {
    400,
    401,
    403,
    404,
    405,
    408,
    411,
    413,
    415,
    417,
    421,
    431,
    499,
    501,
    502,
    503,
    504,
}  # besides what decode answers
PREFILL = json.dumps(
    completion("p", id="c", created=1, model="m")
    | {"choices": [{"index": 0, "text": "p", "finish_reason": "length"}]}
    | {"kv_transfer_params": {"do_remote_prefill": True, "transfer_id": "t", "first_token": 5}}
).encode()
DECODE = json.dumps(completion("d")).encode()


def http(data: bytes) -> None:
    """Whatever a client and the servers say: an answer in HTTP, one of the documented ones, nothing in the log that
    speaks of a fault of ours, and nothing left when it is over."""
    front().try_one(*[*data.split(SEPARATOR, 2), b"", b""][:3])


@functools.cache
def front() -> Front:
    return Front()


class Server:
    """Answers generation requests with the given bytes and closes; anything else as a healthy server."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.says = b""
        self.params: dict[str, Any] = {}
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.split(b"\r\n")
            length = next((int(line[15:]) for line in lines if line.lower().startswith(b"content-length:")), 0)
            await reader.readexactly(length)
            if b" /v1/" in first:
                writer.write(self._answer())
            else:
                status = b"200 OK" if b" /health" in first else b"404 Not Found"
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    def _answer(self) -> bytes:
        form, rest = self.says[:1], self.says[1:]
        if form == EVENTS:
            return _head(b"text/event-stream") + b"Transfer-Encoding: chunked\r\n\r\n" + _chunked([rest])
        if form == CHUNKS:  # of one byte: an event arrives in as many pieces as it has
            pieces = [rest[at : at + 1] for at in range(min(len(rest), 4096))]
            return _head(b"text/event-stream") + b"Transfer-Encoding: chunked\r\n\r\n" + _chunked(pieces)
        if form == ANSWER or not self.says:
            body = rest or (PREFILL if self.role == "prefill" else DECODE)
            return _head(b"application/json") + b"Content-Length: %d\r\n\r\n" % len(body) + body
        return self.says

    def stop(self) -> None:
        self._server.close()


def _head(kind: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: " + kind + b"\r\nConnection: close\r\n"


def _chunked(pieces: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n" % len(piece) + piece + b"\r\n" for piece in pieces if piece) + b"0\r\n\r\n"


class _Client(asyncio.Protocol):
    def __init__(self) -> None:
        self.said = bytearray()
        self.closed = False

    def data_received(self, data: bytes) -> None:
        self.said += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True


class Front:
    """A router and its servers, for all inputs of a process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.faults = Faults()
        self.loop.set_exception_handler(self._on_fault)
        self.loop.run_until_complete(self._start())
        atexit.register(self.stop)

    def _on_fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.faults.texts.append(f"{context.get('message')}: {context.get('exception')!r}")

    async def _start(self) -> None:
        self.prefill, self.decode = Server("prefill"), Server("decode")
        for server in (self.prefill, self.decode):
            await server.start()
        raw = {
            "port": 0,
            "allowed_hosts": ["h"],  # what openings call it
            "prefill": [f"http://127.0.0.1:{self.prefill.port}@127.0.0.1:9"],
            "decode": [f"http://127.0.0.1:{self.decode.port}"],
            "first_token": "auto",
            "max_body_bytes": 1 << 16,
            "health": {"interval_s": 3600.0},
            "hand_off": {"wait_s": 0.0},
            "timeouts": {
                **dict.fromkeys(("prefill_s", "first_byte_s", "stall_s", "client_stall_s", "client_body_s"), 0.3),
                "total_s": 2.0,
                "client_head_s": 0.3,
                "drain_s": 0.1,
                "worker_status_s": 0.05,
            },
        }
        self.router = Router(RouterSettings.build(raw))
        await self.router.start()
        self.tasks = len(asyncio.all_tasks())

    def stop(self) -> None:
        async def ended() -> None:
            await self.router.stop()
            for server in (self.prefill, self.decode):
                server.stop()

        self.loop.run_until_complete(ended())

    def try_one(self, client: bytes, prefill: bytes, decode: bytes) -> bytes:
        """What the client was answered.

        Raises:
            AssertionError: a promise was broken.
        """
        self.faults.begin()
        self.prefill.says, self.decode.says = prefill, decode
        for endpoint in self.router.fleet.all:  # each input finds the same router
            endpoint.set_healthy(True)
            endpoint.succeeded()
            endpoint.unfit, endpoint.goes_on = "", True
        said = self.loop.run_until_complete(self._within(self._one(client)))
        self.faults.check()
        check_answers(said, client)
        return said

    async def _within(self, work: Any) -> bytes:
        try:
            said: bytes = await asyncio.wait_for(work, HANG_S)
        except asyncio.TimeoutError:
            raise AssertionError(f"no end after {HANG_S:g} s") from None
        return said

    @property
    def _busy(self) -> bool:
        return bool(self.router.describe()["inflight"])

    async def _one(self, client: bytes) -> bytes:
        connection = _Client()
        transport, _ = await self.loop.create_connection(lambda: connection, "127.0.0.1", self.router.port)
        try:
            transport.write(request(client))
            idle = turns = 0
            while idle < QUIET_TURNS and not connection.closed and len(connection.said) < MAX_ANSWER:
                before = len(connection.said)
                await asyncio.sleep(0 if turns < BUSY_TURNS else 0.001)
                turns += 1
                idle = 0 if len(connection.said) > before or self._busy else idle + 1
        finally:
            transport.abort()
        await self._over()
        return bytes(connection.said)

    async def _over(self) -> None:
        """Nothing of the input is left: no request, no byte of a body, no task."""
        began = self.loop.time()
        while True:
            state = self.router.describe()
            left = {name: state[name] for name in ("inflight", "buffered_bytes") if state[name]}
            tasks = len(asyncio.all_tasks()) - 2 - self.tasks  # this one and the one that waits for it
            if not left and tasks <= 0:
                return
            assert self.loop.time() - began < LEFT_S, f"left after the connection closed: {left}, {tasks} tasks"
            await asyncio.sleep(0.001)


def request(client: bytes) -> bytes:
    path = {COMPLETIONS: b"/v1/completions", CHAT: b"/v1/chat/completions"}.get(client[:1])
    if path is None:
        return client
    body = client[1:]
    head = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (path, len(body)) + body


class _Said:
    """What HTTPResponse wants of a socket."""

    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)

    def makefile(self, _mode: str) -> io.BytesIO:
        return self.file


def check_answers(said: bytes, client: bytes) -> None:
    """The first answer is HTTP, and one that the description has."""
    said = said.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    if not said:
        return  # nothing was asked, or the connection was cut
    sent = request(client)
    answer = HTTPResponse(_Said(said), method="HEAD" if sent.lstrip()[:4] == b"HEAD" else "POST")  # type: ignore[arg-type]
    try:
        answer.begin()
        body = answer.read()
    except HTTPException:
        if getattr(answer, "headers", None) is None or not answer.getheader("x-pd-path"):
            raise AssertionError(f"no HTTP: {said[:300]!r}") from None
        return  # decode's own answer, which broke off
    assert b"the router failed" not in body, body[:300]
    if answer.getheader("x-pd-decode"):
        return  # decode's answer, whatever it is
    assert answer.status < 400 or answer.status in OWN, f"{answer.status}: {body[:300]!r}"
    if body and answer.status >= 400 and answer.getheader("Content-Type", "").startswith("application/json"):
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
