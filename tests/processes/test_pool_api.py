"""The pool's HTTP API: a running ``pdpool --http`` does what its description says, and nothing without a key."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pdtransport.pool.admin import api_requests
from pdtransport.pool.cli import main
from pdtransport.pool.client.pool_client import PoolClient
from tests.processes.pool_rig import CHUNK, Pages, daemon, key, store, until
from tests.processes.test_launch_pool import SPACE
from tests.rig.described import WITHIN_S, cases, description, told_truly

KEY = "open-sesame"
DESCRIBED = api_requests.describe()["paths"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A pool with a disk and an API: its URL and directory."""
    directory, folder = Path(f"/dev/shm/pdt-test-{os.getpid()}-api"), tmp_path_factory.mktemp("api")
    (folder / "keys").write_text(f"another\n{KEY}\n")
    (folder / "keys").chmod(0o600)
    options = ["--disk", str(folder / "disk"), "--disk-bytes", "64MiB", "--http-key-file", str(folder / "keys")]
    with daemon(directory, "--http", "127.0.0.1:0", *options) as made:
        yield made.url(), directory
    for left in directory.glob("*"):
        left.unlink()
    directory.rmdir()


@pytest.fixture(scope="module")
def client(running: tuple[str, Path]) -> Iterator[PoolClient]:
    with PoolClient(directory=running[1]) as client:
        client.lookup([]).result()
        client.introduce(SPACE.model_dump_json())
        until(lambda: client.spaces().result(), "spaces were not told")
        yield client


def ask(
    url: str, method: str, path: str, body: Any = None, shown: str = KEY, kind: str = "application/json"
) -> tuple[int, Any]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=WITHIN_S)
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {shown}"} if shown else {}
    try:
        with contextlib.suppress(ConnectionError):  # refused while the body is still being sent: the answer is here
            connection.request(method, path, raw, headers | ({"Content-Type": kind} if raw is not None else {}))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def described(running: tuple[str, Path], client: PoolClient) -> Any:
    return description(running[0])


@pytest.mark.parametrize(("path", "mode"), cases(DESCRIBED))
def test_no_request_brings_an_answer_that_is_not_described(path: str, mode: Any, described: Any) -> None:
    told_truly(described, path, mode, KEY, examples=15)


def test_it_manages_chunks(running: tuple[str, Path], client: PoolClient) -> None:
    """Status, listing, lookup of a prompt, and each wish about chunks by tokens, by key and all."""
    url, tokens = running[0], list(range(300, 332))
    keys = [each for chunk in SPACE.parts(tokens) for each in chunk]
    memory = Pages(1)
    client.store(keys, [memory.runs(0)] * len(keys)).result()
    store(client, [1])
    until(lambda: not client.status().result()["writeback_bytes"], "chunks were not written")
    assert ask(url, "GET", "/health", shown="") == (200, {"status": "ok"})
    wish = {"tokens": tokens}
    assert ask(url, "POST", "/pool/lookup", wish)[1]["found"][0]["by_tier"] == {"memory": 4}
    assert ask(url, "POST", "/pool/move", {**wish, "to": "disk"}) == (200, {"done": 8, "of": 8})
    assert ask(url, "POST", "/pool/lookup", wish)[1]["found"][0]["by_tier"] == {"disk": 4}
    assert ask(url, "POST", "/pool/prefetch", {"keys": [keys[0].hex()]}) == (200, {"done": 1, "of": 1})
    assert ask(url, "POST", "/pool/pin", {**wish, "pin": "soft", "for_s": 60}) == (200, {"done": 8, "of": 8})
    listed = ask(url, "GET", "/pool/chunks")[1]
    assert {row["key"]: (row["tiers"], row["pin"]) for row in listed["chunks"]} == {
        **{each.hex(): (["memory", "disk"], "soft") for each in keys},
        key(1).hex(): (["memory", "disk"], "none"),
    }
    assert listed["next"] == -1
    assert ask(url, "POST", "/pool/unpin", {"all": True}) == (200, {"done": 9, "of": 9})
    assert ask(url, "POST", "/pool/clear", {"keys": [key(1).hex()]}) == (200, {"done": 1, "of": 1})
    held = ask(url, "GET", "/pool/status")[1]["held"]
    assert {(row["tier"], row["chunks"], row["bytes"]) for row in held if row["tier"] == "memory"} == {
        ("memory", 8, 8 * CHUNK)
    }
    assert ask(url, "POST", "/pool/clear", {"all": True}) == (200, {"done": 8, "of": 8})
    assert "tokenizer" not in ask(url, "GET", "/pool/spaces")[1]["spaces"][0]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/pool/clear", b"{", 400, "JSON"),
        ("/pool/clear", {}, 400, "exactly one of"),
        ("/pool/clear", {"all": True, "tenant": "a"}, 400, "exactly one of"),
        ("/pool/clear", {"all": None}, 400, "all"),
        ("/pool/clear", {"tenant": "bob"}, 409, "no quota"),
        ("/pool/move", {"all": True, "to": "tape"}, 409, "memory, disk, below"),
        ("/pool/compress", {"all": True}, 409, "codec"),
        ("/pool/lookup", {"tokens": [1], "salt": "x"}, 409, "no engine of this model has a salt"),
        ("/pool/pin", {"all": True, "for_s": 0}, 400, "for_s"),
        ("/pool/pin", b"[" * 100_000, 400, "recursion"),
        ("/pool/pin", b" " * ((4 << 20) + 1), 413, "http-max-body-bytes"),
        ("/pool/nothing", {}, 404, "no such path"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    running: tuple[str, Path], client: PoolClient, path: str, body: Any, status: int, says: str
) -> None:
    """JSON with what is wrong, and the API goes on."""
    found, told = ask(running[0], "POST", path, body)
    assert (found, says in told["error"]["message"]) == (status, True), told
    assert "\n" not in told["error"]["message"]


def test_keys_and_content_types_are_asked_for(running: tuple[str, Path], client: PoolClient) -> None:
    """No key, another one, or a body that a web page of somebody else's could send: refused."""
    url = running[0]
    for shown in ("", "sesame", KEY + "x", "another " + KEY):
        assert ask(url, "GET", "/pool/status", shown=shown)[0] == 401
        assert ask(url, "POST", "/pool/clear", {"all": True}, shown=shown)[0] == 401
    assert ask(url, "POST", "/pool/clear", {"all": True}, kind="text/plain")[0] == 415
    assert ask(url, "GET", "/pool/status", shown="another")[0] == 200


def test_web_pages_and_compressed_bodies_are_refused(running: tuple[str, Path], client: PoolClient) -> None:
    """Somebody else's name for this machine, a page's preflight, a body that would have to be inflated: no, also to who
    has a key, and nothing in the answer lets a page read it."""
    parts = urlsplit(running[0])
    keyed = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for method, path, more, status in (
        ("GET", "/pool/status", {"Host": "evil.example"}, 403),
        ("POST", "/pool/clear", {"Host": "evil.example:80"}, 403),
        ("GET", "/pool/status", {"Host": "localhost", "Origin": "https://evil.example"}, 200),
        ("OPTIONS", "/pool/clear", {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}, 405),
        ("POST", "/pool/clear", {"Content-Encoding": "gzip"}, 415),
        ("POST", "/pool/clear", {"Expect": "tea"}, 417),
    ):
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=WITHIN_S)
        connection.request(method, path, b'{"all": true}' if method == "POST" else None, keyed | more)
        answer = connection.getresponse()
        assert answer.status == status, (method, path, more)
        assert not any(name.lower().startswith("access-control-") for name in answer.headers)
        connection.close()
    utf16 = json.dumps({"keys": ["00" * 32]}).encode("utf-16")
    assert ask(running[0], "POST", "/pool/unpin", utf16)[0] == 200


def test_a_client_that_says_nothing_holds_up_nobody(running: tuple[str, Path], client: PoolClient) -> None:
    """Connections that stay silent in the middle of a request leave room for others."""
    parts = urlsplit(running[0])
    silent = [socket.create_connection((parts.hostname, parts.port), WITHIN_S) for _ in range(100)]
    try:
        for each in silent:
            each.sendall(b"POST /pool/clear HTTP/1.1\r\nHost: localhost\r\n")
        began = time.monotonic()
        assert ask(running[0], "GET", "/pool/status")[0] == 200
        assert time.monotonic() - began < 5
    finally:
        for each in silent:
            each.close()


def test_it_does_not_start_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a key, with an empty key file, on an address that is taken or none: one line, and no pool is left."""
    directory = Path(f"/dev/shm/pdt-test-{os.getpid()}-shut")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "keys").write_text("k\n")
    (tmp_path / "keys").chmod(0o600)
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for options, says in [
        (["--http", "127.0.0.1:0"], "http.key_file"),
        (["--http", "0.0.0.0:0"], "http.key_file"),
        (["--http", "127.0.0.1:0", "--http-key-file", str(tmp_path / "empty")], "has no key"),
        (["--http", "127.0.0.1", "--http-key-file", str(tmp_path / "keys")], "http.listen"),
        (["--http", "127.0.0.1:70000", "--http-key-file", str(tmp_path / "keys")], "above 65535"),
        (["--http", "no.such.host.invalid:0", "--http-key-file", str(tmp_path / "keys")], "http.listen"),
        (["--http", f"127.0.0.1:{port}", "--http-key-file", str(tmp_path / "keys")], "choose another address"),
    ]:
        assert main(["--dir", str(directory), "--memory-bytes", "1MiB", *options]) == 2
        text = capsys.readouterr().err
        assert (text.count("\n"), says in text) == (1, True), text
        assert not list(directory.glob("*.memory"))
    taken.close()
    for left in directory.glob("*"):
        left.unlink()
    if directory.exists():
        directory.rmdir()
