"""What a stranger can send to our HTTP servers: compressed bodies, false ones, endless ones, and what no page may send.

Each attack goes to a router or a ``pdpool --http`` of its own process, which asks for keys that the attacker does not
have (or, where its name says so, has). Servers behind the router are not there: a refusal needs none.
"""

from __future__ import annotations

import http.client
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from pdtransport.pool.client.pool_client import PoolClient
from tests.siege.bystander import Effect, idle, processor_s, resident, settled, watched

KEY = "open-sesame"
PATIENCE_S = 30.0
INFLATED = 1 << 30  # bytes that a bomb of about 1 MiB becomes
HUGE = 64 << 20  # a body that nobody asked for
JSON_TYPE = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"
TARGETS = {  # what the router refuses, and with which status where no key is shown
    "POST /v1/completions": 401,
    "POST /v1/chat/completions": 401,
    "GET /v1/models": 401,
    "POST /pd/status": 405,
    "GET /pd/traces": 401,
    "GET /metrics": 401,
    "PUT /v1/completions": 405,
    "POST /nowhere": 404,
    "GET /live": 200,  # served, but nobody wants its body
}
POOL_TARGETS = {
    "POST /pool/lookup": 401,
    "POST /pool/clear": 401,
    "GET /pool/status": 401,
    "PUT /pool/clear": 405,
    "POST /nowhere": 404,
    "GET /health": 200,
}
CODINGS = ("gzip", "deflate", "br", "zstd", "x-gzip", "gzip, gzip", "identity, gzip", "no-such-coding")


@dataclass
class Shot:
    """One request of an attacker's, and what came of it."""

    head: str
    status: int = 0  # 0: no answer
    sent: int = 0  # bytes of the body that left
    invited: bool = False  # by 100 Continue
    ended: bool = False  # the server closed the connection
    answers: int = 0


@dataclass
class WebEffect(Effect):
    """With what was sent."""

    shots: list[Shot] = field(default_factory=list)


@dataclass
class Door:
    """A server of ours as a process of its own; all that it says goes into a file."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int = 0

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def get(self, path: str) -> int:
        """The status of a plain GET, over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()


@contextmanager
def router(folder: Path, *options: str) -> Iterator[Door]:
    """A router that wants KEY."""
    key = _key_file(folder)
    nobody = "http://127.0.0.1:9"
    command = ["-m", "pdtransport.router.cli", "--port", "0", "--prefill", nobody, "--decode", nobody]
    keys = ["--api-key-file", str(key), "--admin-api-key-file", str(_key_file(folder, "admin"))]
    with _process(folder, "listening on ", [*command, *keys, "--health-interval-s", "600", *options]) as door:
        yield door


@contextmanager
def pool(folder: Path) -> Iterator[tuple[Door, PoolClient]]:
    """A pool whose HTTP API wants KEY, and a client of it."""
    directory = Path(f"/dev/shm/pdt-siege-{os.getpid()}")
    command = ["-m", "pdtransport.pool.cli", "--dir", str(directory), "--memory-bytes", "1MiB"]
    http_options = ["--http", "127.0.0.1:0", "--http-key-file", str(_key_file(folder))]
    try:
        with (
            _process(folder, "HTTP API at ", [*command, *http_options]) as door,
            PoolClient(directory=directory) as client,
        ):
            client.lookup([]).result()
            yield door, client
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _key_file(folder: Path, name: str = "keys") -> Path:
    path = folder / name
    path.write_text(f"{name}-{KEY}\n" if name != "keys" else f"{KEY}\n")
    path.chmod(0o600)
    return path


@contextmanager
def _process(folder: Path, ready: str, arguments: list[str]) -> Iterator[Door]:
    log = folder / "said.log"
    with log.open("wb") as out:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=subprocess.STDOUT, env=environment)
    door = Door(process, log)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (said := next((line for line in door.lines() if ready in line), "")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"it did not start: {log.read_text()}")
            time.sleep(0.02)
        door.port = int(said.partition(ready)[2].partition(",")[0].rpartition(":")[2])
        yield door
    finally:
        process.kill()
        process.wait()


def shoot(door: Door, head: str, body: bytes = b"", more: int = 0) -> Shot:
    """Send a request by hand: ``head`` (lines, without the last empty one), then ``body``, ``more`` times over, until
    there is an answer; then read to the connection's end, or for a second where it stays open."""
    shot = Shot(head.partition("\r\n")[0])
    with socket.create_connection(("127.0.0.1", door.port), PATIENCE_S) as one:
        with suppress(OSError):
            one.sendall(f"{head}\r\nHost: localhost\r\n\r\n".encode("latin-1"))
        one.setblocking(False)
        left = memoryview(body)
        deadline = time.monotonic() + PATIENCE_S
        while left and time.monotonic() < deadline:
            readable, writable, _ = select.select([one], [one], [], 1.0)
            if readable:
                break
            if writable:
                try:
                    sent = one.send(left[: 1 << 16])
                except OSError:
                    break
                shot.sent += sent
                left = left[sent:]
                if not left and more:
                    left, more = memoryview(body), more - 1
        one.settimeout(1.0)
        answer = b""
        try:
            while part := one.recv(1 << 16):
                answer += part
            shot.ended = True
        except ConnectionError:
            shot.ended = True
        except TimeoutError:
            pass
    shot.invited = answer.startswith(b"HTTP/1.1 100 ")
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    statuses = re.findall(rb"(?m)^HTTP/1\.[01] (\d{3}) ", answer)
    shot.answers, shot.status = len(statuses), int(statuses[0]) if statuses else 0
    return shot


def bomb(coding: str = "gzip") -> bytes:
    """About 1 MiB that inflates to INFLATED bytes."""
    made = zlib.compressobj(9, zlib.DEFLATED, 31 if coding == "gzip" else 15)
    block = bytes(1 << 20)
    start = made.compress(block) + made.flush(zlib.Z_FULL_FLUSH)
    again = made.compress(block) + made.flush(zlib.Z_FULL_FLUSH)
    return start + again * (INFLATED // len(block) - 1)


def _post(target: str, *lines: str) -> str:
    return "\r\n".join([f"{target} HTTP/1.1", *lines])


def _watch(door: Door, attack: str, probe: Callable[[], object], shots: Callable[[], Iterator[Shot]]) -> WebEffect:
    effect = WebEffect(attack)
    idle(effect, probe)
    pid, said = door.process.pid, len(door.lines())
    effect.memory_before, before_s = resident(pid), processor_s(pid)
    with watched(effect, probe):
        effect.shots = list(shots())
    effect.processor_s = processor_s(pid) - before_s
    effect.memory_after = settled(pid, effect.memory_before)
    effect.lines = door.lines()[said:]
    return effect


def compressed_bodies_to_the_router(folder: Path) -> Effect:
    """A bomb to each of the router's paths, none of which the sender may use; then from a client, whose key is right:
    vLLM inflates nothing, so nor does the router."""
    bodies = {coding: bomb(coding) for coding in ("gzip", "deflate")}

    def shots() -> Iterator[Shot]:
        for target, (coding, body) in product(TARGETS, bodies.items()):
            lines = (JSON_TYPE, f"Content-Encoding: {coding}", f"Content-Length: {len(body)}")
            yield shoot(door, _post(target, *lines), body)
        for body in bodies.values():
            lines = (
                JSON_TYPE,
                f"Authorization: Bearer {KEY}",
                "Content-Encoding: gzip",
                f"Content-Length: {len(body)}",
            )
            yield shoot(door, _post("POST /v1/completions", *lines), body)

    with router(folder) as door:
        return _watch(door, "compressed bodies, router", lambda: door.get("/live"), shots)


def compressed_bodies_to_the_pool(folder: Path) -> Effect:
    """Bombs to the pool's HTTP API, while an engine looks chunks up."""
    body = bomb()

    def shots() -> Iterator[Shot]:
        for target in POOL_TARGETS:
            lines = (JSON_TYPE, "Content-Encoding: gzip", f"Content-Length: {len(body)}")
            yield shoot(door, _post(target, *lines), body)

    with pool(folder) as (door, client):
        keys = [bytes([n]) * 32 for n in range(64)]
        return _watch(door, "compressed bodies, pool", lambda: client.lookup(keys).result(), shots)


def lies(door: Door, targets: dict[str, int]) -> Iterator[Shot]:
    """Bodies that are not what their heads say, from who has no key and from who has one."""
    wrong = (
        [((f"Content-Encoding: {coding}", "Content-Length: 14"), b"not compressed") for coding in CODINGS]
        + [((CHUNKED, f"Content-Encoding: {coding}"), b"e\r\nnot compressed\r\n0\r\n\r\n") for coding in CODINGS]
        + [
            ((CHUNKED,), b"zz\r\nno chunk\r\n"),
            ((CHUNKED,), b"5\r\nhelloBAD\r\n"),
            (("Transfer-Encoding: gzip, chunked",), b"0\r\n\r\n"),
            (("Content-Length: 5",), b"GET /\x00\x01\x02 HTTP/1.1\r\n\r\n" * 20),
            (("Content-Length: 3", "Expect: the-unexpected"), b"{}\n"),
            (("Content-Length: 3", "Expect: 100-continue, \xff"), b"{}\n"),
            (("Content-Length: 2", "Content-Encoding: \xff\xfe"), b"{}"),
        ]
    )  # fmt: skip
    for target, shown in product(targets, ("", f"Authorization: Bearer {KEY}")):
        for lines, body in wrong:
            keyed = (shown,) if shown else ()
            yield shoot(door, _post(target, JSON_TYPE, *keyed, *lines), body)


def lies_to_the_router(folder: Path) -> Effect:
    """False encodings, broken chunks, what no HTTP is behind what is some: not a line of log."""
    few = {target: TARGETS[target] for target in ("POST /v1/completions", "POST /nowhere", "GET /live")}
    with router(folder) as door:
        return _watch(door, "lies, router", lambda: door.get("/live"), lambda: lies(door, few))


def lies_to_the_pool(folder: Path) -> Effect:
    few = {target: POOL_TARGETS[target] for target in ("POST /pool/clear", "GET /health")}
    with pool(folder) as (door, client):
        return _watch(door, "lies, pool", lambda: client.lookup([]).result(), lambda: lies(door, few))


def unwanted_bodies_to_the_router(folder: Path) -> Effect:
    """Bodies of 64 MiB, with their length and in chunks that do not end, of clients that don't stop to listen; clients
    that wait to be invited; 32 requests in a row, each of which would be refused."""
    piece = bytes(1 << 20)
    chunk = b"100000\r\n" + piece + b"\r\n"
    row = 32 * b"{}POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"

    def shots() -> Iterator[Shot]:
        for target in TARGETS:
            yield shoot(door, _post(target, JSON_TYPE, f"Content-Length: {HUGE}"), piece, HUGE // len(piece) - 1)
            yield shoot(door, _post(target, JSON_TYPE, CHUNKED), chunk, HUGE // len(piece))
            expecting = ("Expect: 100-continue", f"Content-Length: {HUGE}")
            yield shoot(door, _post(target, JSON_TYPE, *expecting))
            yield shoot(door, _post(target, JSON_TYPE, "Content-Length: 2"), row)

    with router(folder) as door:
        return _watch(door, "64 MiB that nobody wants, router", lambda: door.get("/live"), shots)
