"""What the router adds to a request: ``python -m benchmarks.router [--clients 1,16] [--requests 400] [--json FILE]``.

Clients ask for streamed chat answers of ``--tokens`` tokens (32) to a prompt of ``--chars`` characters (4,000): from a
decode server directly, and through a ``pdrouter`` process that dispatches each request to prefill and decode at once
(``--first-token off``). Both servers are stand-ins in one process that answer immediately (`benchmarks._sse_engines`):
all that a request takes is HTTP, JSON and the router. Each of ``--clients`` sends its next request when the last is
answered; with one client the router is otherwise idle. Direct and routed windows of ``--requests`` (400) take turns,
``--rounds`` (5) of each.

Columns, milliseconds: *TTFT* from sending to the first event, median and 99th percentile over all requests; *added*:
the routed figure less the direct one; *requests/s*; *cpu*: processor time of the router per request; *failed*: requests
that got an error or too few events, which count in no other column.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks._figures import FAILED, keep, measuring, say
from benchmarks._handoff_report import markdown
from benchmarks.handoff import machine
from tests.rig import watch
from tests.rig.client import Client, Prepared, RequestFailed
from tests.rig.ports import HOST
from tests.rig.router import RunningRouter
from tests.rig.servers import POLL_S, PORTS, ServerFailed, die_with_parent

WAYS = ("direct", "router")
WARM_UP = 20  # requests of each way
REQUEST_S = 60.0
START_S = 20.0
MORE_EVENTS = 2  # than tokens: the role, and the reason why it ended
OFF = ("--dispatch", "concurrent", "--first-token", "off", "--log-level", "warning")


@dataclass(frozen=True)
class Window:
    """``requests`` of one way, one after another by ``clients`` each; seconds."""

    way: str
    clients: int
    ttft_s: list[float]
    failed: int
    wall_s: float
    cpu_s: float  # of the router


@contextmanager
def engines(logs: Path) -> Iterator[tuple[str, str]]:
    """URLs of prefill and decode.

    Raises:
        ServerFailed: they are not up in time.
    """
    ports = [PORTS.take(), PORTS.take()]
    urls = tuple(f"http://{HOST}:{port}" for port in ports)
    command = [sys.executable, "-m", "benchmarks._sse_engines", *map(str, ports)]
    with (logs / "engines.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=die_with_parent())
    try:
        asyncio.run(_up(urls))
        yield urls[0], urls[1]
    finally:
        process.kill()
        process.wait()
        PORTS.give_back(ports)


async def _up(urls: Sequence[str]) -> None:
    ends = time.monotonic() + START_S
    async with Client() as client:
        for url in urls:
            while True:
                try:
                    await client.get_text(f"{url}/health")
                    break
                except aiohttp.ClientError:
                    if time.monotonic() > ends:
                        raise ServerFailed(f"the stand-in at {url} is not up after {START_S:.0f} s") from None
                await asyncio.sleep(POLL_S)


@contextmanager
def routing(prefill: str, decode: str, logs: Path) -> Iterator[RunningRouter]:
    """
    Raises:
        ServerFailed: it did not start.
    """
    port = PORTS.take()
    log = logs / "router.log"
    command = [sys.executable, "-m", "pdtransport.router.cli", "--port", str(port), *OFF]
    log.write_bytes(b"")
    router = RunningRouter.start(f"http://{HOST}:{port}", log, [*command, "--prefill", prefill, "--decode", decode])
    try:
        router.wait_ready()
        yield router
    finally:
        router.stop()
        PORTS.give_back([port])


async def window(way: str, to: Prepared, clients: int, requests: int, events: int, router: int) -> Window:
    """``requests`` in all. ``router``: its process id."""
    ttfts: list[float] = []
    failed = 0
    left = iter(range(requests))

    async def one(client: Client) -> None:
        nonlocal failed
        for _ in left:
            try:
                answer = await client.send(to)
            except (RequestFailed, aiohttp.ClientError, asyncio.TimeoutError):
                failed += 1
                continue
            if len(answer.arrivals) == events:
                ttfts.append(answer.ttft_s)
            else:
                failed += 1

    async with Client(REQUEST_S) as client:
        began, cpu = time.monotonic(), watch.cpu_seconds([router])
        await asyncio.gather(*(one(client) for _ in range(clients)))
        return Window(way, clients, ttfts, failed, time.monotonic() - began, watch.cpu_seconds([router]) - cpu)


def measure(options: argparse.Namespace, logs: Path, windows: list[Window]) -> None:
    """Adds to ``windows``.

    Raises:
        ServerFailed: a process did not start, or the router served requests without prefill.
    """
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": ("word " * options.chars)[: options.chars]}],
        "max_tokens": options.tokens,
        "stream": True,
    }
    payload, events = json.dumps(body).encode(), options.tokens + MORE_EVENTS
    with engines(logs) as (prefill, decode), routing(prefill, decode, logs) as router:
        to = {
            way: Prepared(f"{url}/v1/chat/completions", payload, stream=True)
            for way, url in zip(WAYS, (decode, router.url), strict=True)
        }
        for way in WAYS:
            asyncio.run(window(way, to[way], 1, WARM_UP, events, router.pid))
        before = asyncio.run(_asked(prefill))
        for number in range(options.rounds):
            for clients in options.clients:
                for way in WAYS if number % 2 == 0 else reversed(WAYS):
                    windows.append(asyncio.run(window(way, to[way], clients, options.requests, events, router.pid)))
                    say(f"round {number + 1} of {options.rounds}: {clients} clients, {way}: {windows[-1].wall_s:.1f} s")
        routed = sum(len(each.ttft_s) + each.failed for each in windows if each.way == "router")
        prefilled = asyncio.run(_asked(prefill)) - before
    if prefilled < routed:
        raise ServerFailed(f"the router sent {prefilled} of {routed} requests to prefill: these figures say nothing")


async def _asked(url: str) -> int:
    async with Client() as client:
        return int(await client.get_text(f"{url}/asked"))


def summarise(windows: Sequence[Window]) -> list[dict[str, Any]]:
    """A row for each number of clients and way. Field names are those that `benchmarks.builds` compares."""
    rows: list[dict[str, Any]] = []
    for clients in dict.fromkeys(each.clients for each in windows):
        base: dict[str, Any] = {}
        for way in WAYS:
            chosen = [each for each in windows if (each.clients, each.way) == (clients, way)]
            ttfts = [ttft for each in chosen for ttft in each.ttft_s]
            if not ttfts:
                continue
            p50, p99 = (float(value) for value in np.percentile(ttfts, [50, 99]) * 1e3)
            row: dict[str, Any] = {
                "clients": clients,
                "system": way,
                "requests": len(ttfts),
                "failed": sum(each.failed for each in chosen),
                "ttft_p50_ms": round(p50, 3),
                "ttft_p99_ms": round(p99, 3),
                "requests_s": round(len(ttfts) / sum(each.wall_s for each in chosen), 1),
            }
            if way == "direct":
                base = row
            else:
                for name in ("p50", "p99") if base else ():
                    row[f"added_{name}_ms"] = round(row[f"ttft_{name}_ms"] - base[f"ttft_{name}_ms"], 3)
                row["cpu_ms"] = round(1e3 * sum(each.cpu_s for each in chosen) / len(ttfts), 3)
            rows.append(row)
    return rows


COLUMNS = {
    "clients": "clients",
    "system": "way",
    "requests": "requests",
    "failed": "failed",
    "ttft_p50_ms": "TTFT p50",
    "ttft_p99_ms": "TTFT p99",
    "added_p50_ms": "added p50",
    "added_p99_ms": "added p99",
    "requests_s": "requests/s",
    "cpu_ms": "cpu",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown(list(COLUMNS.values()), [[str(row.get(name, "")) for name in COLUMNS] for row in rows])


def numbers(text: str) -> list[int]:
    """For argparse."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError("numbers from 1 on, separated by commas, such as 1,16")
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router", description=str(__doc__).splitlines()[0])
    parser.add_argument("--clients", type=numbers, default=[1, 16], help="at a time, by comma (default 1,16)")
    parser.add_argument("--requests", type=int, default=400, help="of a window (default 400)")
    parser.add_argument("--rounds", type=int, default=5, help="windows of each way (default 5)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (default 32)")
    parser.add_argument("--chars", type=int, default=4000, help="of a prompt (default 4000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(argv)
    if min(options.requests, options.rounds, options.tokens, options.chars) < 1:
        parser.error("--requests, --rounds, --tokens and --chars are at least 1")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    before = machine()
    windows: list[Window] = []
    with tempfile.TemporaryDirectory(prefix="pdtransport-router-") as logs, measuring(ServerFailed) as ending:
        measure(options, Path(logs), windows)
    rows = summarise(windows)
    if not rows or ending.status == FAILED:
        return ending.status or FAILED
    asked = {key: value for key, value in vars(options).items() if key != "json"}
    shown = {"machine": before, "asked": asked, "rows": rows, "windows": [asdict(each) for each in windows]}
    keep(options.json, json.dumps(shown) + "\n")
    print(f"{before['cpu']}, {before['cores']} cores, load {before['load_average'][0]:.1f} at first")
    print(table(rows))
    failed = sum(row["failed"] for row in rows)
    return ending.status or (FAILED if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
