"""A router in a process of its own, before two servers that do whatever an attack needs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.siege.bystander import Effect, idle, processor_s, resident, settled, watched

PATIENCE_S = 60.0
PROMPT = list(range(1, 65))
HEAD_AT_MOST = 1 << 20
Writer = asyncio.StreamWriter
Behaviour = Callable[["Seen", Writer], Awaitable[bool]]


@dataclass
class Seen:
    """One request as a server saw it, byte by byte."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def asked(self) -> dict[str, Any]:
        return json.loads(self.body)  # type: ignore[no-any-return]


def answer(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    named = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{named}\r\n".encode() + body


def completion(**more: Any) -> bytes:
    choice = {"index": 0, "text": "hi", "finish_reason": "length"}
    return json.dumps({"id": "c", "object": "text_completion", "choices": [choice], **more}).encode()


class Backend:
    """A server of raw sockets in a thread. ``behave`` answers a completion and says whether it did; else it is answered
    as vLLM would."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.seen: list[Seen] = []
        self.behave: Behaviour | None = None
        self.other: Behaviour | None = None  # of GET requests
        self.open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name=role)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(PATIENCE_S)
        self.port: int = server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=HEAD_AT_MOST, backlog=1024)

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self.open += 1
        try:
            while True:
                seen = await self._request(reader)
                if seen.line.startswith("GET"):
                    if self.other is None or not await self.other(seen, writer):
                        writer.write(self._get(seen))
                else:
                    self.seen.append(seen)
                    if self.behave is None or not await self.behave(seen, writer):
                        writer.write(self._post(seen))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> Seen:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rest = head.rstrip("\r\n").split("\r\n")
        headers = [(name.strip().lower(), value.strip()) for name, _, value in (each.partition(":") for each in rest)]
        named = dict(headers)
        body = b""
        if "chunked" in named.get("transfer-encoding", ""):
            while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readuntil(b"\r\n")
        else:
            body = await reader.readexactly(int(named.get("content-length", "0")))
        return Seen(line, headers, body)

    def _get(self, seen: Seen) -> bytes:
        if "/v1/models" in seen.line:
            return answer(b'{"object": "list", "data": [{"id": "m"}]}')
        return answer(b"{}") if "/health" in seen.line else answer(b"{}", "404 Not Found")

    def _post(self, seen: Seen) -> bytes:
        if self.role != "prefill":
            return answer(completion())
        params = seen.asked.get("kv_transfer_params") or {}
        over = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": params.get("transfer_id"),
            "remote_engine_id": "p",
            "remote_request_id": "c",
            "remote_block_ids": [1],
            "remote_host": "127.0.0.1",
            "remote_port": 9,
            "tp_size": 1,
        }
        return answer(completion(kv_transfer_params=over))

    def close(self) -> None:
        async def end() -> None:
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)


class Process:
    """One process, whose log is a file."""

    def __init__(self, folder: Path, name: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            )

    @property
    def pid(self) -> int:
        return self.child.pid

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def wait_for(self, part: str) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for line in self.lines():
                if part in line:
                    return line
            if self.child.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"no {part!r} in {self.lines()}")

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.communicate()


@dataclass
class Front:
    """A router before one prefill and one decode server."""

    router: Process
    url: str
    prefill: Backend
    decode: Backend
    key: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def ask(self, value: dict[str, Any] | bytes | None = None, path: str = "/v1/completions", **headers: str) -> Reply:
        data = value if isinstance(value, bytes) else json.dumps({**body(), **(value or {})}).encode()
        return self.http("POST", path, data, **{"Content-Type": "application/json", **headers})

    def http(self, method: str, path: str, data: bytes | None = None, **headers: str) -> Reply:
        if self.key:
            headers.setdefault("Authorization", f"Bearer {self.key}")
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
                return Reply(reply.status, dict(reply.headers), reply.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, dict(error.headers), error.read())

    def probe(self) -> None:
        """What a bystander asks, and that it is answered rightly."""
        reply = self.ask({"user": "bystander"})
        assert reply.status == 200, reply
        assert json.loads(reply.body)["choices"][0]["text"] == "hi"

    def raw(self, data: bytes, wait_s: float = 2.0) -> bytes:
        """Send bytes, and read whatever comes until the other end closes or is silent."""
        found = b""
        with self.connect() as sock:
            sock.settimeout(wait_s)
            with contextlib.suppress(OSError):
                sock.sendall(data)
            with contextlib.suppress(OSError):
                while more := sock.recv(1 << 16):
                    found += more
        return found

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_S)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": PROMPT, "max_tokens": 4, **more}


def reset(sock: socket.socket) -> None:
    """Close with RST, as a client that was killed by its network."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@contextmanager
def front(folder: Path, *options: str, env: dict[str, str] | None = None, key: str = "") -> Iterator[Front]:
    prefill, decode = Backend("prefill"), Backend("decode")
    servers = ("--prefill", f"{prefill.url}@127.0.0.1:9", "--decode", decode.url)
    process = Process(folder, "router", "-m", "pdtransport.router.cli", "--port", "0", *servers, *options, env=env)
    try:
        line = process.wait_for("listening on")
        url = "http://" + line.split("listening on http://")[1].split()[0].rstrip(",")
        yield Front(process, url, prefill, decode, key)
    finally:
        process.close()
        prefill.close()
        decode.close()


@contextmanager
def measured(effect: Effect, process: Process, probe: Callable[[], object], times: int = 10) -> Iterator[None]:
    """Measure a bystander and a process while the block attacks."""
    idle(effect, probe, times)
    effect.memory_before = resident(process.pid)
    lines, spent = len(process.lines()), processor_s(process.pid)
    with watched(effect, probe):
        yield
    effect.processor_s = processor_s(process.pid) - spent
    effect.memory_after = settled(process.pid, effect.memory_before, 3.0)
    effect.lines = process.lines()[lines:]


def one_reply(sock: socket.socket) -> bytes:
    """One answer with a Content-Length."""
    found = b""
    while b"\r\n\r\n" not in found:
        more = sock.recv(1 << 16)
        if not more:
            return found
        found += more
    head, _, rest = found.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(rest) < length:
        rest += sock.recv(1 << 16)
    return head + b"\r\n\r\n" + rest
