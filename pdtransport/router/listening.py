"""A listening socket with bounds: connections, header lines, idle time, time to drain."""

from __future__ import annotations

import asyncio

from aiohttp import web

from pdtransport.router.settings import RouterSettings

_BACKLOG = 1024


class _Refuse(asyncio.Protocol):
    """Closes a connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            transport.abort()


class Listener:
    """Serves one application on one address."""

    def __init__(self, app: web.Application, settings: RouterSettings) -> None:
        self._max_connections = settings.max_connections
        self._runner = web.AppRunner(
            app,
            access_log=None,  # a log line per request would name who asked what
            handler_cancellation=True,  # a client's going away must reach the servers at once
            shutdown_timeout=settings.timeouts.drain_s,
            keepalive_timeout=settings.keep_alive_s,
            max_line_size=settings.max_header_bytes,
            max_field_size=settings.max_header_bytes,
        )
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        if self._server is None or not self._server.sockets:
            raise RuntimeError("not listening")
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            OSError: the address is in use or not this machine's.
        """
        await self._runner.setup()
        self._server = await asyncio.get_running_loop().create_server(
            self._protocol, host, port, backlog=_BACKLOG, reuse_address=True
        )

    def _protocol(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        if server is None or len(server.connections) >= self._max_connections:
            return _Refuse()
        return server()

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()
