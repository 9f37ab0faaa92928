"""Load targets of `benchmarks.router`: HTTP servers that answer as vLLM's prefill and decode do, and compute nothing.

``python -m benchmarks._sse_engines PREFILL_PORT DECODE_PORT``. Prefill answers with what decode is to fetch; decode
streams an event with the role, ``max_tokens`` events with a token each, and one that says why the answer ended.
``GET /asked`` says how many requests a server has had.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from aiohttp import web

from tests.rig.ports import HOST

CONTROL_PORT = 7670  # told, never called: the router passes it on to decode
DONE = b"data: [DONE]\n\n"


def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


ROLE, TOKEN, LAST = event({"role": "assistant", "content": ""}), event({"content": " word"}), event({}, "length")


class Engine:
    def __init__(self) -> None:
        self._asked = 0

    async def asked(self, request: web.Request) -> web.Response:
        return web.json_response(self._asked)

    async def healthy(self, request: web.Request) -> web.Response:
        return web.Response()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self._asked += 1
        if not body.get("stream"):
            return web.json_response(_handed_over(body.get("kv_transfer_params") or {}))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await response.write(ROLE)
        for _ in range(body["max_tokens"]):
            await response.write(TOKEN)
            await asyncio.sleep(0)  # an event a packet, as a decoding server sends them
        await response.write(LAST + DONE)
        return response

    async def serve(self, port: int) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.add_routes([web.get("/asked", self.asked), web.get("/health", self.healthy)])
        app.add_routes([web.post("/v1/chat/completions", self.chat)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, HOST, port).start()


def _handed_over(params: dict[str, Any]) -> dict[str, Any]:
    """Prefill's answer."""
    told = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": params.get("transfer_id"),
        "remote_engine_id": "prefill",
        "remote_request_id": "chatcmpl-1",
        "remote_block_ids": [1, 2, 3],
        "remote_host": HOST,
        "remote_port": CONTROL_PORT,
        "tp_size": 1,
    }
    message = {"role": "assistant", "content": " word"}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "kv_transfer_params": told}


async def _main(ports: list[int]) -> None:
    for port in ports:
        await Engine().serve(port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main([int(port) for port in sys.argv[1:]]))
