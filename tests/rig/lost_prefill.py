"""A prefill server that is lost between its answer and its commit, as router and decode see it.

It stands in front of a real one: the prompt is computed there, but under another transfer, and the answer says that the
first token was given out. Decode, which promised to go on from it, waits for a commit that never comes.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import ClientSession, web

from tests.rig.ports import HOST
from tests.rig.servers import PORTS, Server


class LostPrefill:
    """Like a :class:`Server`, as far as a router needs one."""

    def __init__(self, prefill: Server) -> None:
        self.spec = prefill.spec
        self.control_port = prefill.control_port
        self.port = PORTS.take()
        self.url = f"http://{HOST}:{self.port}"
        self.answers = 0
        self._behind = prefill.url

    async def answer(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        transfer = body["kv_transfer_params"]["transfer_id"]
        body["kv_transfer_params"]["transfer_id"] = secrets.token_hex(16)
        told, body["return_token_ids"] = body.get("return_token_ids", False), True
        headers = {"X-Request-Id": request.headers["X-Request-Id"]}
        async with (
            ClientSession() as session,
            session.post(self._behind + request.path, json=body, headers=headers) as response,
        ):
            answer = await response.json()
        (choice,) = answer["choices"]
        params = answer["kv_transfer_params"]
        assert params.pop("first_token_declined") == "no_promise"
        answer["kv_transfer_params"] = {**params, "transfer_id": transfer, "first_token": choice["token_ids"][0]}
        if not told:
            choice["prompt_token_ids"] = None
        self.answers += 1
        return web.json_response(answer)

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()


@asynccontextmanager
async def lost_prefill(prefill: Server) -> AsyncIterator[LostPrefill]:
    server = LostPrefill(prefill)
    app = web.Application(client_max_size=1 << 26)
    app.add_routes([web.post("/v1/completions", server.answer), web.get("/health", server.health)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, server.port).start()
        yield server
    finally:
        await runner.cleanup()
        PORTS.give_back([server.port])
