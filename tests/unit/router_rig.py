"""Servers that speak vLLM's side of the hand-off contract over real sockets, and a router in front of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web

from pdtransport.router import Router, RouterSettings

PROMPT = list(range(1, 65))
# The head of a request by hand, but for the length of its body and the empty line.
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
Script = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
# Nothing in these tests should take seconds: a wait that never ends fails them instead of hanging them.
PATIENCE_S = 20.0


@dataclass
class Seen:
    """One request as a server saw it."""

    path: str
    headers: dict[str, str]  # names in lower case
    raw: bytes
    body: dict[str, Any]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: bool = False  # the router closed the connection before the answer was complete

    @property
    def params(self) -> dict[str, Any] | None:
        return self.body.get("kv_transfer_params")


def completion(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, "text": text}], **more}


def error(status: int, message: str = "no", kind: str = "InternalServerError") -> web.Response:
    """An error as vLLM words it."""
    return web.json_response(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}, status=status
    )


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


class Engine:
    """A server. ``script`` decides what generation requests get; unset, it answers as a vLLM server would."""

    def __init__(self, role: str, control_port: int = 7670) -> None:
        self.role = role
        self.engine_id = f"{role}-engine"
        self.control_port = control_port
        self.tp_size = 1
        self.hands_over = True
        self.script: Script | None = None
        self.health_status = 200
        self.health_checks = 0
        self.slow_health_checks = 0  # that many are not answered in time
        self.engine_answers: asyncio.Event | None = None  # unset: its HTTP server can't ask the engine
        self.engine_asked = 0
        self.under_way = 0
        self.metrics: str | None = None  # unset: it has none, as with vLLM's --disable-log-stats
        self.metrics_read = 0
        self.metrics_script: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None
        self.seen: list[Seen] = []
        self.arrived = asyncio.Condition()
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.add_routes(
            [
                web.post("/v1/completions", self._generate),
                web.post("/v1/chat/completions", self._generate),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
                web.get("/pd/engine", self._probe),
                web.get("/under_way", self._under_way),
                web.get("/metrics", self._metrics),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def wait_for(self, requests: int) -> Seen:
        """The newest request, once there were ``requests`` of them."""
        async with self.arrived:
            await asyncio.wait_for(self.arrived.wait_for(lambda: len(self.seen) >= requests), PATIENCE_S)
        return self.seen[-1]

    async def _health(self, request: web.Request) -> web.Response:
        self.health_checks += 1
        if self.slow_health_checks:
            self.slow_health_checks -= 1
            await asyncio.sleep(PATIENCE_S)
        return web.Response(status=self.health_status)

    async def _under_way(self, request: web.Request) -> web.Response:
        """How many requests for completions it has not ended."""
        return web.Response(text=str(self.under_way))

    async def _probe(self, request: web.Request) -> web.Response:
        self.engine_asked += 1
        if self.engine_answers is None:
            return web.Response(status=404)
        await self.engine_answers.wait()
        return web.json_response({"engine": "answers"})

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        self.metrics_read += 1
        if self.metrics_script is not None:
            return await self.metrics_script(request)
        return web.Response(status=404) if self.metrics is None else web.Response(text=self.metrics)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": f"model-of-{self.role}"}]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        seen = Seen(request.path, {k.lower(): v for k, v in request.headers.items()}, raw, json.loads(raw))
        async with self.arrived:
            self.seen.append(seen)
            self.arrived.notify_all()
        self.under_way += 1
        try:
            return await (self.script or self.answer)(request, seen.body)
        except (asyncio.CancelledError, ConnectionError):
            seen.cancelled = True
            raise
        finally:
            self.under_way -= 1
            seen.ended.set()

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.role == "prefill":
            return web.json_response(self.prefill_answer(body))
        if body.get("stream"):
            return await stream(request, [event(completion(str(i))) for i in range(3)] + [b"data: [DONE]\n\n"])
        return web.json_response(completion("decoded"))

    def prefill_answer(self, body: dict[str, Any]) -> dict[str, Any]:
        params = body.get("kv_transfer_params") or {}
        return completion("p", kv_transfer_params=self.hand_over(params.get("transfer_id")))

    def hand_over(self, transfer_id: str | None) -> dict[str, Any] | None:
        if not self.hands_over or transfer_id is None:
            return None
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer_id,
            "remote_engine_id": self.engine_id,
            "remote_request_id": "cmpl-xyz",
            "remote_block_ids": [1, 2, 3],
            "remote_host": "127.0.0.1",
            "remote_port": self.control_port,
            "tp_size": self.tp_size,
        }


async def stream(
    request: web.Request, chunks: list[bytes], *, hold: asyncio.Event | None = None, die: bool = False
) -> web.StreamResponse:
    """Server-sent events, with headers first as uvicorn sends them. ``hold`` stops before the last chunk."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    await response.write(b"")
    for index, chunk in enumerate(chunks):
        if hold is not None and index == len(chunks) - 1:
            await hold.wait()
        await response.write(chunk)
    if die:
        await asyncio.sleep(0.02)
        assert request.transport is not None
        request.transport.abort()
    return response


class Rig:
    """Engines, a router and a client."""

    def __init__(self, prefill: list[Engine], decode: list[Engine]) -> None:
        self.prefill = prefill
        self.decode = decode
        self.router: Router
        self.client: ClientSession

    @property
    def p(self) -> Engine:
        return self.prefill[0]

    @property
    def d(self) -> Engine:
        return self.decode[0]

    def post(self, body: dict[str, Any] | bytes, path: str = "/v1/completions", **more: Any) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **more.pop("headers", {})}
        return self.client.post(self.router.url + path, data=data, headers=headers, **more)

    async def ask(
        self, body: dict[str, Any] | bytes | None = None, path: str = "/v1/completions", **more: Any
    ) -> Reply:
        async with self.post(ask() if body is None else body, path, **more) as response:
            return Reply(response.status, dict(response.headers), await response.read())

    async def get(self, path: str, **more: Any) -> Reply:
        async with self.client.get(self.router.url + path, **more) as response:
            return Reply(response.status, dict(response.headers), await response.read())

    async def learn(self) -> None:
        """One request, after which the router knows where prefill's control channel is."""
        assert (await self.ask()).status == 200
        for engine in (*self.prefill, *self.decode):
            engine.seen.clear()

    async def trace(self, reply: Reply) -> dict[str, Any]:
        return (await self.get(f"/pd/trace/{reply.headers['x-pd-transfer-id']}")).json()

    async def metric(self, line: str) -> float:
        text = (await self.get("/metrics")).body.decode()
        values = [row.rsplit(" ", 1)[1] for row in text.splitlines() if row.rsplit(" ", 1)[0] == line]
        return float(values[0]) if values else 0.0


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, after a check of OpenAI's form."""
        value = self.json()
        assert set(value) == {"error"}
        assert set(value["error"]) == {"message", "type", "param", "code"}
        return value["error"]


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": PROMPT, "max_tokens": 8, **more}


@asynccontextmanager
async def rigged(
    prefill: int = 1,
    decode: int = 1,
    *,
    prefill_as: Callable[[Engine], Any] = lambda engine: engine.url,
    before: Callable[[Rig], Any] = lambda rig: None,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """Start ``prefill`` and ``decode`` servers and a router with ``settings``; ``prefill_as`` gives endpoints, and
    ``before`` is called before the router starts."""
    async with AsyncExitStack() as stack:
        engines = {
            "prefill": [Engine("prefill", 7670 + i) for i in range(prefill)],
            "decode": [Engine("decode") for _ in range(decode)],
        }
        for engine in (*engines["prefill"], *engines["decode"]):
            await engine.start()
            stack.push_async_callback(engine.stop)
        rig = Rig(engines["prefill"], engines["decode"])
        before(rig)
        raw: dict[str, Any] = {
            "port": 0,
            "prefill": [prefill_as(engine) for engine in rig.prefill],
            "decode": [engine.url for engine in rig.decode],
            **settings,
        }
        raw["timeouts"] = {"drain_s": 0.1, "worker_status_s": 0.05, **raw.get("timeouts", {})}
        rig.router = Router(RouterSettings.build(raw))
        await rig.router.start()
        stack.push_async_callback(rig.router.stop)
        rig.client = await stack.enter_async_context(
            ClientSession(timeout=ClientTimeout(total=PATIENCE_S), auto_decompress=False)
        )
        yield rig


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine, and fail it if it leaves tasks behind."""

    async def checked() -> None:
        await asyncio.wait_for(test(), PATIENCE_S)
        await asyncio.sleep(0)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if left:  # connections being closed end within a moment
            await asyncio.wait(left, timeout=1)
        assert [task for task in left if not task.done()] == []

    asyncio.run(checked())


async def soon(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds."""

    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), PATIENCE_S)


def fails(status: int, *, kind: str = "InternalServerError", times: int = 1000, engine: Engine | None = None) -> Script:
    """Answer with an error, the first ``times`` times."""
    left = [times]

    async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if left[0] == 0 and engine is not None:
            return await engine.answer(request, body)
        left[0] -= 1
        return error(status, f"status {status}", kind)

    return script


def waits(for_ever: asyncio.Event) -> Script:
    async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await for_ever.wait()
        raise AssertionError("nobody sets it")

    return script


def waits_if_remote(engine: Engine) -> Script:
    """A decode server that waits for pages which never come, unless it is asked without them."""

    async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body.get("kv_transfer_params"):
            await asyncio.Event().wait()
        return await engine.answer(request, body)

    return script


async def learned(rig: Rig) -> None:
    """Every prefill server's control address is known."""
    for engine, endpoint in zip(rig.prefill, rig.router.fleet.prefill, strict=True):
        endpoint.learn(engine.hand_over("t") or {})
