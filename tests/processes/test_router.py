"""The router as its own process, with servers that are killed, frozen and brought back.

Run as a program this file is one such server (``python -m tests.processes.test_router ROLE PORT``), or it measures what
the router costs a request (``... measure``).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, ClientTimeout, web

from pdtransport.control.channel import StatusRequested
from tests.processes.control_rig import bench
from tests.unit.router_rig import POST, Engine, completion, event, rigged
from tests.unit.router_workers import Workers, info

PATIENCE_S = 60.0
FLOOD_BYTES = 32 << 20
FAST_CHECKS = ("--health-interval-s", "0.1", "--health-timeout-s", "0.5")


class Child:
    """One process of ours; whatever happens, it is gone when its ``with`` block ends."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        self.process: subprocess.Popen[str]

    def __enter__(self) -> Child:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=PATIENCE_S)

    def line(self, pattern: str) -> str:
        """Group 1 of the first line of output that has ``pattern``."""
        assert self.process.stdout is not None
        seen = []
        while text := self.process.stdout.readline():
            seen.append(text)
            if found := re.search(pattern, text):
                return found[1]
        raise AssertionError(f"no {pattern!r} in: {''.join(seen)}")


@contextmanager
def server(role: str, port: int = 0) -> Iterator[tuple[str, Child]]:
    with Child("-m", "tests.processes.test_router", role, str(port)) as child:
        yield child.line(r"serving on (\S+)"), child


@contextmanager
def router(*arguments: str) -> Iterator[tuple[str, Child]]:
    with Child("-m", "pdtransport.router.cli", "--port", "0", *arguments) as child:
        yield child.line(r"listening on (http://[^,\s]+)"), child


@pytest.fixture(scope="module")
def front() -> Iterator[tuple[str, Child]]:
    """One router and its two servers, for tests that leave them as they were."""
    with server("prefill") as (p, _), server("decode") as (d, _), router("--prefill", p, "--decode", d) as running:
        yield running


def run(test: Callable[[ClientSession], Awaitable[None]]) -> None:
    async def with_client() -> None:
        async with ClientSession(timeout=ClientTimeout(total=PATIENCE_S)) as client:
            await test(client)

    asyncio.run(with_client())


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": list(range(64)), "max_tokens": 4, **more}


async def path_of(client: ClientSession, url: str, **more: Any) -> str:
    async with client.post(f"{url}/v1/completions", json=body(**more)) as response:
        assert response.status == 200, await response.text()
        await response.read()
        return response.headers["x-pd-path"]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def test_router_serves_lets_a_stream_end_on_sigterm_and_exits_with_0() -> None:
    with server("prefill") as (p, _), server("decode") as (d, _), router("--prefill", p, "--decode", d) as (url, child):

        async def test(client: ClientSession) -> None:
            assert await path_of(client, url) == "disaggregated"
            async with client.post(f"{url}/v1/completions", json=body(stream=True, user="slow")) as response:
                assert await response.content.readany() == event(completion("0"))
                child.process.send_signal(signal.SIGTERM)
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
            assert await asyncio.to_thread(child.process.wait, PATIENCE_S) == 0

        run(test)


def test_decode_killed_mid_stream_ends_the_stream_in_form_and_the_other_serves_on() -> None:
    with (
        server("prefill") as (p, _),
        server("decode") as (d1, one),
        server("decode") as (d2, two),
        router("--prefill", p, "--decode", d1, d2, *FAST_CHECKS) as (url, _),
    ):

        async def test(client: ClientSession) -> None:
            async with client.post(f"{url}/v1/completions", json=body(stream=True, user="hang")) as response:
                await response.content.readany()
                victim = one if response.headers["x-pd-decode"] in d1 else two
                victim.process.kill()
                last = (await response.read()).removesuffix(b"\n\n").rsplit(b"\n\n", 1)[-1]
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_interrupted"
            for _ in range(4):
                assert await path_of(client, url) == "disaggregated"

        run(test)


def test_prefill_killed_under_a_request_costs_no_answer_and_its_successor_is_used() -> None:
    with server("decode") as (d, _), server("prefill") as (p, first):
        port = p.rsplit(":", 1)[1]
        with router("--prefill", p, "--decode", d, *FAST_CHECKS) as (url, _):

            async def test(client: ClientSession) -> None:
                assert await path_of(client, url) == "disaggregated"
                asked = asyncio.create_task(path_of(client, url, user="prefill-hangs"))
                await asyncio.sleep(0.3)
                first.process.kill()
                assert (await asked).startswith("decode-only; prefill server ")
                assert (await path_of(client, url)).startswith("decode-only; ")
                with server("prefill", int(port)):

                    async def used_again() -> bool:
                        return await path_of(client, url) == "disaggregated"

                    await until(used_again)

            run(test)


def test_frozen_decode_is_found_out_and_avoided_until_it_thaws() -> None:
    with (
        server("prefill") as (p, _),
        server("decode") as (d1, frozen),
        server("decode") as (d2, _),
        router("--prefill", p, "--decode", d1, d2, *FAST_CHECKS) as (url, _),
    ):

        async def healthy(client: ClientSession) -> int:
            async with client.get(f"{url}/health") as response:
                return int((await response.json())["decode"]["healthy"])

        async def test(client: ClientSession) -> None:
            frozen.process.send_signal(signal.SIGSTOP)
            try:

                async def noticed() -> bool:
                    return await healthy(client) == 1

                await until(noticed)
                for _ in range(4):
                    assert await path_of(client, url) == "disaggregated"
            finally:
                frozen.process.send_signal(signal.SIGCONT)

            async def back() -> bool:
                return await healthy(client) == 2

            await until(back)

        run(test)


def _rss(child: Child) -> int:
    text = Path(f"/proc/{child.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) << 10  # type: ignore[index]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_slow_clients_do_not_fill_the_routers_memory(front: tuple[str, Child]) -> None:
    """16 clients that read nothing, each with 32 MiB of answer waiting: without backpressure 512 MiB would pile up."""
    url, child = front

    async def test(client: ClientSession) -> None:
        assert await path_of(client, url) == "disaggregated"
        before = await asyncio.to_thread(_rss, child)
        data = json.dumps(body(stream=True, user="flood")).encode()
        host, port = url.removeprefix("http://").split(":")
        clients = [socket.create_connection((host, int(port))) for _ in range(16)]
        head = POST + b"Content-Length: %d\r\n\r\n" % len(data)
        for one in clients:
            one.sendall(head + data)
        peaks = [before]
        for _ in range(20):
            await asyncio.sleep(0.1)
            peaks.append(await asyncio.to_thread(_rss, child))
        for one in clients:
            one.close()
        assert max(peaks) - before < 96 << 20

    run(test)


def test_garbage_on_the_port_changes_nothing(front: tuple[str, Child]) -> None:
    url, _ = front

    async def test(client: ClientSession) -> None:
        host, port = url.removeprefix("http://").split(":")
        for garbage in (
            b"\x16\x03\x01\x02\x00\x01",
            b"\r\n\r\n\r\n",
            b"GET\r\n\r\n",
            os.urandom(4096),
            b"POST / HTTP/9.9\r\n\r\n",
        ):
            with socket.create_connection((host, int(port))) as one:
                one.sendall(garbage)
        assert await path_of(client, url) == "disaggregated"

    run(test)


def test_trace_holds_what_the_workers_say_over_their_control_channel() -> None:
    """A real control channel answers for prefill; decode's address is unknown, and the trace says so."""

    async def ask_both(control_port: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
        async with rigged(timeouts={"worker_status_s": 20}) as rig:
            rig.p.control_port = control_port
            reply = await rig.ask()
            trace = await rig.trace(reply)
            state = (await rig.get("/pd/status?workers=1")).json()
            return reply.headers["x-pd-transfer-id"], trace["workers"], state["workers"][f"prefill {rig.p.name}"]

    with bench() as channels, ThreadPoolExecutor(1) as thread:
        node = channels.node("p")
        asked = thread.submit(lambda: asyncio.run(ask_both(node.port)))
        wanted = []
        while not asked.done():
            channels.turn()
            for question in node.take(StatusRequested):
                wanted.append(question.transfer)
                question.reply(json.dumps({"engine": "p", "transfers": []}))
        transfer, workers, prefill = asked.result()
    assert wanted == [transfer, ""]
    assert workers["prefill"] == prefill == {"ranks": [{"engine": "p", "transfers": []}], "why": None}
    assert workers["decode"]["ranks"] is None


def test_port_in_use_is_one_line_and_status_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ("--prefill", "http://127.0.0.1:9", "--decode", "http://127.0.0.1:9", "--port", str(port))
        with Child("-m", "pdtransport.router.cli", *arguments, "--log-level", "error") as child:
            output, _ = child.process.communicate(timeout=PATIENCE_S)
    assert child.process.returncode == 2
    assert output == f"pdrouter: port: can't listen on 127.0.0.1:{port}: Address already in use; choose another port\n"


# -- one server ---------------------------------------------------------------------------------------------------


async def _script(
    engine: Engine, workers: Workers, resumed: asyncio.Event, request: web.Request, asked: dict[str, Any]
) -> web.StreamResponse:
    engine.seen.clear()  # nobody looks at them in this process
    wish = asked.get("user")
    if engine.role == "prefill":
        if wish == "prefill-hangs":
            await asyncio.sleep(PATIENCE_S)
        return await engine.answer(request, asked)
    params = asked.get("kv_transfer_params")
    if wish == "prefill-hangs" and params:
        await asyncio.sleep(PATIENCE_S)  # for pages that do not come
    if params:
        workers.took(params["transfer_id"])
    if wish == "mute":
        await asyncio.sleep(PATIENCE_S)
    if wish == "after-a-stop":
        await resumed.wait()
    if wish not in {"slow", "hang", "flood"} or not asked.get("stream"):
        return await engine.answer(request, asked)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    if wish == "flood":
        piece = event("x" * 65000)
        for _ in range(FLOOD_BYTES // len(piece)):
            await response.write(piece)
        return response
    for index in range(4 if wish == "slow" else 1):
        await response.write(event(completion(str(index))))
        await asyncio.sleep(0.3)
    if wish == "hang":
        await asyncio.sleep(PATIENCE_S)
    await response.write(b"data: [DONE]\n\n")
    return response


async def _serve(role: str, port: int) -> None:
    engine = Engine(role)
    engine.port = port
    resumed = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGCONT, resumed.set)
    async with Workers(turn_s=0.005) as workers:
        engine.script = lambda request, asked: _script(engine, workers, resumed, request, asked)
        if role == "decode":
            engine.metrics = info("kv_consumer", workers.port)
        await engine.start()
        print(f"serving on {engine.url}", flush=True)
        await asyncio.Event().wait()


# -- the router's cost --------------------------------------------------------------------------------------------


def _cpu_s(child: Child) -> float:
    fields = Path(f"/proc/{child.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _timed(client: ClientSession, url: str, data: bytes, times: int) -> tuple[list[float], list[float]]:
    """Seconds of each request, and those that the router itself says it took from the last body byte to dispatch."""
    headers = {"Content-Type": "application/json"}
    took, routing = [], []
    for _ in range(times):
        began = time.perf_counter()
        async with client.post(f"{url}/v1/completions", data=data, headers=headers) as response:
            await response.read()
        took.append(time.perf_counter() - began)
        if "x-pd-path" in response.headers:
            async with client.get(f"{url}/pd/traces?limit=1") as trace:
                events = (await trace.json())["traces"][0]["events"]
            routing.append(events["dispatched"] - events["received"])
    return took, routing


async def _measure(direct: str, url: str, child: Child, times: int = 300) -> None:
    print("| token ids | path | median ms | p90 ms | router's own work, median ms | router CPU ms a request |")
    print("|---|---|---|---|---|---|")
    async with ClientSession() as client:
        for tokens in (64, 16000):
            for name, to, more in (
                ("decode, no router", direct, {}),
                ("router, decode alone", url, {"n": 2}),
                ("router, disaggregated", url, {}),
            ):
                data = json.dumps(body(prompt=list(range(tokens)), **more)).encode()
                await _timed(client, to, data, 20)
                before = _cpu_s(child)
                took, routing = await _timed(client, to, data, times)
                cpu_ms = f"{(_cpu_s(child) - before) / times * 1e3:.2f}" if routing else ""
                own = f"{statistics.median(routing) * 1e3:.2f}" if routing else ""
                p90 = statistics.quantiles(took, n=10)[-1]
                print(
                    f"| {tokens} | {name} | {statistics.median(took) * 1e3:.2f} | {p90 * 1e3:.2f} | {own} | {cpu_ms} |"
                )


def _main() -> None:
    if sys.argv[1:] != ["measure"]:
        asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
        return
    with server("prefill") as (p, _), server("decode") as (d, _), router("--prefill", p, "--decode", d) as (url, child):
        asyncio.run(_measure(d, url, child))


if __name__ == "__main__":
    _main()
