"""A server that may open no more files: one line, and it serves again when some are free."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
FILES = 48
SERVER = """
import asyncio, logging
from aiohttp import web
from pdtransport.serving.cross_site import HostRule
from pdtransport.serving.listening import Bounds, HttpListener

async def main():
    app = web.Application()
    app.add_routes([web.get("/", lambda request: asyncio.sleep(0, web.Response(text="here")))])
    listener = HttpListener(app, Bounds(60, 60, 60, 1000, 8192, 1), 1000, HostRule("127.0.0.1"))
    await listener.start("127.0.0.1", 0)
    print(listener.port, flush=True)
    await asyncio.sleep(600)

logging.basicConfig()
asyncio.run(main())
"""


def test_no_descriptor_for_a_connection_is_one_line(tmp_path: Path) -> None:
    """asyncio itself writes a traceback for each connection that its backlog may hold, every second: 2.5 MB within
    seconds. What waited is served once descriptors are free."""
    log = tmp_path / "log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES)),
        ) as server,
    ):
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            held = [socket.create_connection(("127.0.0.1", port)) for _ in range(2 * FILES)]
            time.sleep(2.5)  # asyncio tries again every second
            for one in held:
                one.close()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                assert answer.read() == b"here"
        finally:
            server.kill()
    [line] = log.read_text().splitlines()
    assert line.endswith("new connections wait: Too many open files; raise the limit of open files (ulimit -n)")
