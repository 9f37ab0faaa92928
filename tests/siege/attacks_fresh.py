"""Attacks on the router by clients and by servers behind it, told apart from the rest by having been made up from its
documentation alone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

from tests.siege.bystander import Effect
from tests.siege.fresh_rig import (
    Front,
    Seen,
    Writer,
    body,
    front,
    measured,
    one_reply,
    reset,
)
from tests.siege.fresh_shapes import (
    CHUNKED,
    SALTS,
    head,
    hostile_answers,
    odd_authorizations,
    odd_bodies,
    request,
    side_doors,
    smugglers,
)

FAST = ("--timeouts-client-head-s", "3", "--timeouts-client-body-s", "3")


def pipelined_and_unread(folder: Path) -> Effect:
    """Clients that send thousands of requests without reading one answer."""
    effect = Effect("30 clients pipeline 1,000 requests each, read nothing")
    with front(folder) as it, measured(effect, it.router, it.probe):
        socks = [it.connect() for _ in range(30)]
        many = head("/v1/models", method="GET") * 500 + request(body(user="pipe")) * 500
        for sock in socks:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while many:
                    sent = sock.send(many)
                    if sent < len(many):
                        break
        time.sleep(2)
        for sock in socks:
            reset(sock)
        time.sleep(0.5)
    return effect


def half_closed(folder: Path) -> Effect:
    """Clients that close their sending half behind the request, and wait for the answer."""
    effect = Effect("100 clients half-close behind their request")
    with front(folder) as it, measured(effect, it.router, it.probe):
        for part in (request(body()), request(body())[:-20], b"GET /health HTTP/1.1\r\n", b""):
            socks = []
            for _ in range(25):
                sock = it.connect()
                sock.sendall(part)
                sock.shutdown(socket.SHUT_WR)
                socks.append(sock)
            for sock in socks:
                sock.settimeout(10)
                with contextlib.suppress(ConnectionError):
                    while sock.recv(1 << 16):
                        pass
                sock.close()
    return effect


def request_smuggling(folder: Path) -> Effect:
    """Bodies framed so that the router and a server could disagree where they end."""
    effect = Effect(f"{len(smugglers())} kinds of request smuggling")
    with front(folder) as it, measured(effect, it.router, it.probe):
        _smuggle(it)
    return effect


def _smuggle(it: Front) -> dict[str, bytes]:
    replies = {}
    for name, data in smugglers().items():
        replies[name] = it.raw(data, 0.3)
        assert b"HTTP/1.1 5" not in replies[name].replace(b"HTTP/1.1 501", b""), (name, replies[name][:300])
    for seen in (*it.prefill.seen, *it.decode.seen):
        assert "smuggled" not in seen.line, seen
        assert seen.line == "POST /v1/completions HTTP/1.1", seen
        assert "X:" not in seen.line
        assert json.loads(seen.body)["prompt"] == body()["prompt"], seen
    return replies


def odd_json(folder: Path) -> Effect:
    """Bodies of all shapes: both servers must read alike what is passed on, and get nothing of what is forbidden."""
    found = odd_bodies()
    effect = Effect(f"{len(found)} odd JSON bodies")
    (folder / "keys").write_text("client-key-of-odd tenant-a\n")
    (folder / "keys").chmod(0o600)
    env = {"PDROUTER_TENANT_SECRET": "s" * 40}
    with (
        front(folder, "--api-key-file", str(folder / "keys"), env=env, key="client-key-of-odd") as it,
        measured(effect, it.router, it.probe),
    ):
        wrong = []
        for name, data in found.items():
            p, d = len(it.prefill.seen), len(it.decode.seen)
            reply = it.ask(data)
            if reply.status >= 500:
                wrong.append(f"{name}: {reply.status} {reply.body[:200]!r}")
            if "x-pd-path" in reply.headers:
                it.notes.setdefault(name, (reply.status, reply.headers.get("x-pd-path")))
            # the bystander's requests come in between: theirs are known by their user
            wrong += _misled(name, it.prefill.seen[p:], it.decode.seen[d:])
        assert not wrong, "\n".join(wrong)
    return effect


def _misled(name: str, prefill: list[Seen], decode: list[Seen]) -> list[str]:
    """What servers got that they must not get."""
    wrong: list[str] = []
    prompts: dict[str, dict[str, Any]] = {}
    for role, seen in [*(("P", each) for each in prefill), *(("D", each) for each in decode)]:
        if b'"bystander"' in seen.body:
            continue
        try:
            asked = seen.asked
        except (ValueError, RecursionError):
            continue  # no server reads it either
        text = json.dumps(asked)
        if ("192.0.2.1" in text and "vllm_xargs" not in text) or ("theirs" in text and "vllm_xargs" not in text):
            wrong.append(f"{name}: {role} got the client's transfer parameters: {seen.body[:300]!r}")
        if isinstance(asked.get("vllm_xargs"), dict) and "kv_transfer_params" in asked["vllm_xargs"]:
            wrong.append(f"{name}: {role} got transfer parameters in vllm_xargs")
        salt = asked.get("cache_salt")
        if not isinstance(salt, str) or len(salt) < 32:
            wrong.append(f"{name}: {role} got the salt {salt!r}")
        transfer = (asked.get("kv_transfer_params") or {}).get("transfer_id", "")
        prompts.setdefault(transfer, {})[role] = repr((asked.get("prompt"), asked.get("model"), salt))
    for transfer, both in prompts.items():
        if transfer and len(set(both.values())) > 1:
            wrong.append(f"{name}: P and D read differently: {str(both)[:300]}")
    return wrong


def odd_keys(folder: Path) -> Effect:
    """Authorization headers of all shapes, and side doors to the administrators' paths for who holds a client's key."""
    effect = Effect("odd keys and side doors")
    for name, key in {"keys": "client-key", "admin": "admin-key"}.items():
        (folder / name).write_text(key + "\n")
        (folder / name).chmod(0o600)
    options = ("--api-key-file", str(folder / "keys"), "--admin-api-key-file", str(folder / "admin"))
    with front(folder, *options, key="client-key") as it, measured(effect, it.router, it.probe):
        data = json.dumps(body()).encode()
        wrong = []
        for value in odd_authorizations():
            reply = it.raw(head("/v1/completions", len(data), *value, "Connection: close") + data, 2.0)
            if not reply.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400", b"HTTP/1.1 403")):
                wrong.append(f"{value[:1]}: {reply[:200]!r}")
        for path in side_doors():
            for method in ("GET", "HEAD", "OPTIONS", "POST", "PROPFIND"):
                reply = it.raw(
                    head(path, None, "Authorization: Bearer client-key", "Connection: close", method=method), 2.0
                )
                if reply.startswith((b"HTTP/1.1 2", b"HTTP/1.1 5", b"HTTP/1.1 3")):
                    wrong.append(f"{method} {path}: {reply[:200]!r}")
        assert not wrong, "\n".join(wrong)
    return effect


def aborts_at_each_byte(folder: Path) -> Effect:
    """Requests that are cut (RST) after each of their bytes, and whole ones given up at once."""
    effect = Effect("one request cut at each byte; 400 given up at once")
    with front(folder, *FAST) as it:

        async def slowly(seen: Seen, writer: Writer) -> bool:
            if b'"gone"' in seen.body:
                await asyncio.sleep(30)
            return False

        it.prefill.behave = it.decode.behave = slowly
        whole = request(body(user="gone", prompt=[1, 2, 3]))
        with measured(effect, it.router, it.probe):
            for end in range(len(whole) + 1):
                sock = it.connect()
                sock.sendall(whole[:end])
                reset(sock)
            for _ in range(400):
                sock = it.connect()
                sock.sendall(whole)
                reset(sock)
            time.sleep(1)
        until = time.monotonic() + 10
        while (left := _under_way(it)) and time.monotonic() < until:
            time.sleep(0.1)
        assert not left, f"{left} connections of given-up requests are left"
    return effect


def _under_way(it: Front) -> int:
    status = json.loads(it.http("GET", "/pd/status").body)
    return sum(int(v) for v in _numbers(status, "inflight")) + sum(
        int(v) for v in _numbers(status, "requests_under_way")
    )


def _numbers(value: Any, name: str) -> list[float]:
    if isinstance(value, dict):
        own = [v for k, v in value.items() if k == name and isinstance(v, int | float)]
        return own + [n for v in value.values() for n in _numbers(v, name)]
    return [n for v in value for n in _numbers(v, name)] if isinstance(value, list) else []


async def _endless(writer: Writer, head: bytes, piece: bytes, seconds: float = 6.0) -> bool:
    """Write for ever, as one who means harm; the reader may hang up."""
    writer.write(head)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)
    raise ConnectionResetError


def hostile_server(folder: Path) -> Effect:
    """Prefill, then decode, answers marked requests as no server should."""
    return _hostile(folder, list(hostile_answers()))


def _hostile(folder: Path, names: list[str], *options: str) -> Effect:
    effect = Effect(f"{len(names)} hostile answers of prefill and of decode")
    answers = hostile_answers()
    fast = (
        "--timeouts-prefill-s",
        "4",
        "--timeouts-first-byte-s",
        "4",
        "--timeouts-total-s",
        "8",
        "--health-eject-after",
        "1000",
    )
    with front(folder, *fast, *options) as it:
        for role, backend in (("P", it.prefill), ("D", it.decode)):

            async def behave(seen: Seen, writer: Writer, role: str = role) -> bool:
                user = seen.asked.get("user", "")
                if not user.startswith(role + ":"):
                    return False
                begin, more = answers[user[2:]]
                if more:
                    return await _endless(writer, begin, more)
                writer.write(begin)
                await writer.drain()
                raise ConnectionResetError

            backend.behave = behave
        with measured(effect, it.router, it.probe, 10):
            wrong = []

            def one(role: str, name: str, stream: bool) -> None:
                start = time.monotonic()
                data = json.dumps(body(user=f"{role}:{name}", stream=stream)).encode()
                reply = it.raw(head("/v1/completions", len(data), "Connection: close") + data, 12.0)
                took = time.monotonic() - start
                if took > 11:
                    wrong.append(f"{role} {name} {stream}: took {took:.1f} s, {len(reply)} bytes")
                if b"planted" in reply or b"steal" in reply or b"forged" in reply:
                    wrong.append(f"{role} {name}: {reply[:300]!r}")
                if role == "P" and not reply.startswith(b"HTTP/1.1 200"):
                    wrong.append(f"{role} {name}: {reply[:300]!r}")
                if not reply.startswith(b"HTTP/1.1 ") or b"Traceback" in reply:
                    wrong.append(f"{role} {name}: {reply[:300]!r}")

            for role in ("P", "D"):
                for group in (names[i : i + 4] for i in range(0, len(names), 4)):
                    threads = [
                        threading.Thread(target=one, args=(role, name, stream))
                        for name in group
                        for stream in ((False,) if role == "P" else (False, True))
                    ]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
            assert not wrong, "\n".join(wrong)
    return effect


def many_readers_of_state(folder: Path) -> Effect:
    """Readers of every administrators' path, with odd limits, while requests go on."""
    effect = Effect("20 readers of traces, status and metrics")
    with front(folder) as it:
        for _ in range(300):
            it.probe()
        with measured(effect, it.router, it.probe):
            over = time.monotonic() + 4
            wrong: list[str] = []

            def read() -> None:
                limits = (
                    "1024",
                    "1e9",
                    "-1",
                    "99999999999999999999",
                    "NaN",
                    "",
                    "0",
                    "%00",
                    "1_0",
                    "%D9%A1",
                    "1&limit=2",
                )
                paths = [f"/pd/traces?limit={each}" for each in limits]
                paths += ["/metrics", "/pd/status?workers=1", "/pd/status?workers=x", "/pd/trace/none"]
                for path in itertools.cycle(paths):
                    if time.monotonic() > over:
                        return
                    reply = it.raw(head(path, None, "Connection: close", method="GET"), 20)
                    if reply.startswith(b"HTTP/1.1 5") or not reply:
                        wrong.append(f"{path}: {reply[:200]!r}")

            threads = [threading.Thread(target=read) for _ in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong, "\n".join(sorted(set(wrong)))
    return effect


def names_without_end(folder: Path) -> Effect:
    """Clients choose ever new models, users, paths, methods, request ids and salts: nothing may grow with them."""
    effect = Effect("150 new names of each kind, and 60 of 1 MiB")
    with front(folder, "--traces", "64") as it:
        for i in range(70):  # as many as it remembers
            it.ask({"user": f"before {i % 7}"})
        series = len(it.http("GET", "/metrics").body)
        with measured(effect, it.router, it.probe):
            with it.connect() as sock:
                sock.settimeout(20)
                for i in range(150):
                    sock.sendall(
                        request(body(model=f"model-{i}", user=f"u{i}", cache_salt=f"s{i}"), f"X-Request-Id: r{i}")
                    )
                    one_reply(sock)
            for i in range(150):
                it.raw(head(f"/unknown/{i}", None, "Connection: close", method="GET"), 5)
                it.raw(head("/v1/completions", None, "Connection: close", method=f"M{i}"), 5)
            for i in range(60):
                it.ask({"model": chr(97 + i % 26) * (1 << 20), "user": "x" * 1000, "cache_salt": "y" * 100_000})
        grown = len(it.http("GET", "/metrics").body) - series
        assert grown < 20_000, f"/metrics grew by {grown} bytes"
        traces = len(it.http("GET", "/pd/traces?limit=64").body)
        assert traces < 1 << 20, f"{traces} bytes of traces"
    return effect


def unread_streams(folder: Path) -> Effect:
    """Clients with the smallest window ask for long streams, and read one byte now and then."""
    effect = Effect("60 streams read a byte at a time")
    with front(folder, "--timeouts-client-stall-s", "4") as it:

        async def long(seen: Seen, writer: Writer) -> bool:
            if b'"slow"' not in seen.body or it.decode.role not in ("decode",):
                return False
            with contextlib.suppress(ConnectionResetError):
                await _endless(writer, CHUNKED, b"1000\r\n" + (b"data: " + b"a" * 0x1FF8 + b"\n\n")[:0x1000] + b"\r\n")
            raise ConnectionResetError

        it.decode.behave = long
        with measured(effect, it.router, it.probe):
            socks = []
            for _ in range(60):
                sock = socket.socket()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                sock.connect(("127.0.0.1", it.port))
                sock.sendall(request(body(user="slow", stream=True)))
                socks.append(sock)
            for _ in range(3):
                time.sleep(1)
                for sock in socks:
                    sock.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        sock.recv(1)
            for sock in socks:
                reset(sock)
            time.sleep(0.5)
    return effect


def expected_and_upgraded(folder: Path) -> Effect:
    """Headers that ask for more than an answer: Expect, Upgrade, HTTP/2's preface, TE, ranges, conditions, methods."""
    effect = Effect("Expect, Upgrade, h2, ranges, 300 connections")
    with front(folder, *FAST) as it, measured(effect, it.router, it.probe):
        data = json.dumps(body()).encode()
        wrong = []
        for more in (
            ("Expect: 100-continue",),
            ("Expect: 200-ok",),
            ("Expect: 100-continue, x",),
            (
                "Upgrade: websocket",
                "Connection: Upgrade",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                "Sec-WebSocket-Version: 13",
            ),
            ("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"),
            ("Range: bytes=0-1",),
            ("If-Match: x",),
            ("If-Modified-Since: x",),
            ("Accept-Encoding: gzip;q=1e999",),
            ("Connection: close, keep-alive",),
            ("Keep-Alive: timeout=1e999",),
            ("X-Forwarded-For: " + "1," * 7000,),
            ("Content-Type: application/json; charset=utf-7",),
            ("Content-Type: text/plain; charset=\xff",),
            ("Content-Type: multipart/form-data",),
            ("Accept: " + "," * 15000,),
            ("Cookie: " + ";" * 15000,),
            ("Cookie: a=" + "\\" * 10000,),
            ("X-Request-Id: a\tb\x7f\xff",),
            ("X-Request-Id: " + "r" * 15000,),
            ("Transfer-Encoding: chunked", "Expect: 100-continue"),
        ):
            reply = it.raw(head("/v1/completions", len(data), *more, "Connection: close") + data, 4)
            if reply.startswith(b"HTTP/1.1 5") or not reply:
                wrong.append(f"{more[0][:60]}: {reply[:200]!r}")
        preface = it.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), 2)
        if preface.startswith(b"HTTP/1.1 5"):
            wrong.append(f"h2: {preface[:200]!r}")
        socks = [it.connect() for _ in range(300)]
        for sock in socks:
            sock.sendall(head("/v1/completions", 1 << 20, "Expect: 100-continue"))
        time.sleep(1)
        for sock in socks:
            reset(sock)
        assert not wrong, "\n".join(wrong)
    return effect


def tenants_salts(folder: Path) -> Effect:
    """Tenants with names that run into each other's salts: no two may end with one salt, nor may one name it."""
    effect = Effect("tenants' salts of odd characters")
    tenants = {
        "key-a": "a",
        "key-ab": "a:b",
        "key-b": "b",
        "key-c": "a\u0301",
        "key-d": "\u00e1",
        "key-e": 'a"b',
        "key-0": "a\\0",
    }
    (folder / "keys").write_text("".join(f"{key} {name}\n" for key, name in tenants.items()))
    (folder / "keys").chmod(0o600)
    env = {"PDROUTER_TENANT_SECRET": "s" * 40}
    options = ("--api-key-file", str(folder / "keys"))
    with front(folder, *options, env=env, key="key-a") as it, measured(effect, it.router, it.probe):
        found: dict[str, tuple[str, Any]] = {}
        for (key, name), salt in itertools.product(tenants.items(), [None, *SALTS]):
            before = len(it.decode.seen)
            reply = it.ask(
                body(user="s", **({} if salt is None else {"cache_salt": salt})), Authorization=f"Bearer {key}"
            )
            assert reply.status < 500, (name, salt, reply)
            if reply.status != 200:
                continue
            sent = next(s for s in it.decode.seen[before:] if b"bystander" not in s.body).asked["cache_salt"]
            assert found.setdefault(sent, (name, salt)) == (name, salt) or (
                found[sent][0] == name and salt in (None, "")
            ), f"{name!r} with {salt!r} has the salt of {found[sent]}"
            # a salt that was seen is no way in: named by another tenant it becomes another one
            again = it.ask(body(user="s", cache_salt=sent), Authorization="Bearer key-b")
            assert again.status == 200
            theirs = it.decode.seen[-1].asked["cache_salt"] if b"bystander" not in it.decode.seen[-1].body else ""
            assert theirs != sent
    return effect


def wide_bodies(folder: Path) -> Effect:
    """Bodies as long as may be, of millions of small values: the router reads them while all others wait."""
    effect = Effect("6 bodies of 16 MiB of empty lists")
    value = b'{"model": "m", "prompt": "p", "max_tokens": 1, "x": [' + b"[]," * ((16 << 20) // 3 - 100) + b"1]}"
    with front(folder) as it, measured(effect, it.router, it.probe):
        for _ in range(6):
            it.ask(value)
    return effect
