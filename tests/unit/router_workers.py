"""Decode's workers as the router sees them: real control channels, and the metrics that say where they are."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import socket
from contextlib import ExitStack, suppress
from typing import Any

from aiohttp import web

from pdtransport.control.channel import ControlChannel, Identity
from pdtransport.protocol.messages import Code, Ended
from pdtransport.settings import ControlSettings
from tests.unit.router_rig import Engine


def free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that are free now. Below those that the system gives out by itself."""
    while True:
        first = 24000 + secrets.randbelow(6000)
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


_incarnations = itertools.count(1)


def info(role: str, port: int, *, host: str = "127.0.0.1", ranks: int = 1, engine: str = "e", index: int = 0) -> str:
    """Metrics of a vLLM server with our connector."""
    labels = (
        f'control_host="{host}",control_port="{port}",engine="{index}",engine_id="{engine}",model_name="m",'
        f'role="{role}",tp_size="{ranks}",version="0"'
    )
    return f"vllm:num_requests_running 0.0\nvllm:pdtransport_info{{{labels}}} 1.0\n"


PLAIN = 'vllm:num_requests_running{engine="0"} 0.0\n'  # of a vLLM server without it


class Workers:
    """The ranks of one decode server; drive them with :meth:`running`."""

    def __init__(
        self, ranks: int = 1, engine: str = "d", port: int = 0, turn_s: float = 0.001, **settings: Any
    ) -> None:
        self.channels = []
        self._turn_s = turn_s
        self.port = port or free_ports(ranks)
        for rank in range(ranks):
            me = Identity(engine, rank, ranks, next(_incarnations))
            channel = ControlChannel(ControlSettings(port=0, **settings), me)
            self.channels.append(channel)
            channel.bind(self.port + rank)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Workers:
        self._task = asyncio.create_task(self._turn())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        for channel in self.channels:
            channel.close()

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for channel in self.channels:
                channel.receive(loop.time())
                channel.tick(loop.time())
            await asyncio.sleep(self._turn_s)

    def end(self, transfer: str, rank: int = 0, code: Code | None = None, reason: str = "", **more: Any) -> None:
        """This rank's transfer is over."""
        self.channels[rank].publish(Ended(transfer=transfer, code=code, reason=reason, **more))

    def took(self, transfer: str, blocks: int = 2) -> None:
        """All ranks took ``blocks`` blocks, 1000 bytes each."""
        for rank in range(len(self.channels)):
            self.end(transfer, rank, blocks=blocks, nbytes=1000, link="cma", exposed_us=500 + rank, taken_us=2000)


def tells(engine: Engine, how: Any, first: float = 0.0) -> None:
    """Before it answers (by ``first`` seconds), the decode server's workers say with ``how(transfer_id)`` how the
    request's transfer ended."""

    async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        params = body.get("kv_transfer_params")
        if params is not None:
            how(params["transfer_id"])
            await asyncio.sleep(first)
        return await engine.answer(request, body)

    engine.script = script
