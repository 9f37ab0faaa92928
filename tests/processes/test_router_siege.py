"""The router as its own process under siege: thousands of idle connections, slow ones, and garbage. It serves on."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import selectors
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.processes.test_router import Child, body, router, server
from tests.unit.router_rig import POST

IDLE = 10_000
WITHIN_S = 60.0  # an answer; a healthy one takes milliseconds
SPARE = 200  # descriptors of this process for everything else


@pytest.fixture(scope="module")
def backends() -> Iterator[tuple[str, str]]:
    with server("prefill") as (p, _), server("decode") as (d, _):
        yield p, d


def answered(url: str) -> bool:
    """A whole request, over a connection of its own."""
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body()).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=WITHIN_S) as response:
        return bool(response.status == 200 and json.loads(response.read())["choices"])


def descriptors(child: Child) -> int:
    return len(list(Path(f"/proc/{child.process.pid}/fd").iterdir()))


def test_ten_thousand_idle_connections_leave_it_serving(backends: tuple[str, str]) -> None:
    """Beyond max_connections the longest idle gives way, so neither those that are served nor newcomers notice."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = IDLE if hard == resource.RLIM_INFINITY else min(IDLE, hard - SPARE)
    bounds = ("--max-connections", "2000", "--max-idle-per-client", "1500")
    try:
        with (
            router("--prefill", backends[0], "--decode", backends[1], *bounds) as (url, child),
            contextlib.ExitStack() as stack,
        ):
            where = urlsplit(url)
            assert answered(url)
            for opened in range(count):
                stack.enter_context(socket.create_connection((where.hostname, where.port), timeout=WITHIN_S))
                if opened % 2000 == 0:
                    assert answered(url)
            for _ in range(5):
                assert answered(url)
            assert descriptors(child) < 2000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("files", "serves"), [(64, False), (400, True)])
def test_few_descriptors_mean_few_connections_or_an_error_that_says_so(
    backends: tuple[str, str], files: int, serves: bool
) -> None:
    """The router never runs out of descriptors: it takes as many clients as the limit has room for."""
    arguments = ["--prefill", backends[0], "--decode", backends[1], "--port", "0"]
    main = "import resource, sys; from pdtransport.router.cli import main; "
    main += f"resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files})); sys.exit(main({arguments!r}))"
    with Child("-c", main) as child, contextlib.ExitStack() as stack:
        if not serves:
            assert child.line(r"(may open 64 files at most.*raise the limit \(ulimit -n\))")
            assert child.process.wait(WITHIN_S) == 2
            return
        assert child.line(r"(max_connections is 4096, but with at most 400 open files only \d+ fit)")
        url = child.line(r"listening on (http://[^,\s]+)")
        where = urlsplit(url)
        for _ in range(files // 2):
            stack.enter_context(socket.create_connection((where.hostname, where.port), timeout=WITHIN_S))
        for _ in range(3):
            assert answered(url)
        child.process.terminate()
        assert "out of system resource" not in child.process.communicate(timeout=WITHIN_S)[0]


def test_slow_heads_and_slow_bodies_are_cut_off_at_their_deadlines(backends: tuple[str, str]) -> None:
    """Slowloris: hundreds of connections that say a little now and then are gone soon after the deadline."""
    slow = ("--timeouts-client-head-s", "1", "--timeouts-client-body-s", "1")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    starts = [head, head + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"]
    with router("--prefill", backends[0], "--decode", backends[1], *slow) as (url, _), contextlib.ExitStack() as stack:
        where, watched = urlsplit(url), stack.enter_context(selectors.DefaultSelector())
        for number in range(300):
            one = stack.enter_context(socket.create_connection((where.hostname, where.port), timeout=WITHIN_S))
            one.sendall(starts[number % 2])
            one.setblocking(False)
            watched.register(one, selectors.EVENT_READ)
        assert answered(url)
        deadline = time.monotonic() + WITHIN_S
        while watched.get_map():
            assert time.monotonic() < deadline, f"{len(watched.get_map())} slow clients are still connected"
            for key, _ in watched.select(0.1):
                with contextlib.suppress(BlockingIOError):
                    try:
                        gone = not key.fileobj.recv(65536)  # type: ignore[union-attr]
                    except ConnectionError:
                        gone = True
                    if gone:
                        watched.unregister(key.fileobj)
            for key in list(watched.get_map().values()):
                with contextlib.suppress(OSError):
                    key.fileobj.send(b"x")  # type: ignore[union-attr]
        assert answered(url)


def test_garbage_on_the_port_is_refused_and_says_nothing_in_the_log(backends: tuple[str, str]) -> None:
    """Port scans: TLS, other protocols and noise end their own connection; no traceback, nothing echoed, no crash."""
    chance = random.Random(5)
    probes = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(500),
        b"\x00" * 4096,
        b"SSH-2.0-scan\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00" * 9,
        b"GET " + b"/a" * 60_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(5000)) + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /%00%ff/../../etc/passwd?secret=sesame HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nAuthorization: Bearer sesame\r\nno colon here\r\n\r\n",
        b"GET / HTTP/1.1\r\nAuthorization: Bearer sesame\x00\r\n\r\n",
        b"\xff\xfb\x01\r\n" * 100,
    ] + [chance.randbytes(chance.randrange(1, 5000)) for _ in range(100)]
    with router("--prefill", backends[0], "--decode", backends[1]) as (url, child):
        where = urlsplit(url)
        for probe in probes:
            one = socket.create_connection((where.hostname, where.port), timeout=WITHIN_S)
            with one, contextlib.suppress(ConnectionError, BrokenPipeError):
                one.sendall(probe)
                one.shutdown(socket.SHUT_WR)
                while one.recv(65536):
                    pass
        assert answered(url)
        child.process.terminate()
        said = child.process.communicate(timeout=WITHIN_S)[0]
    assert "Traceback" not in said
    assert "sesame" not in said
    assert len(said) < 4000, said[:4000]
