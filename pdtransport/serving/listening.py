"""A listening socket with limits: connections, idle connections, header lines, time to send a request, time to drain.

aiohttp does the parsing. Its own handling of bodies is switched off: bodies are not decompressed, and bodies that the
application left unread are not drained (:mod:`pdtransport.serving.request_filter`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from pdtransport.serving.cross_site import CorsRule, HostRule
from pdtransport.serving.errors import stop_request
from pdtransport.serving.request_filter import RequestFilter
from pdtransport.system.log_limits import LogLimiter, where
from pdtransport.system.reclaim import Reclaim

BACKLOG = 1024  # up to this many may be accepted at once before one of them is closed
_SWEEP_S = 1.0  # longest interval between checks for late connections
_CUT_S = 1.0  # after drain_s: for cancelled requests to send their clients the reason
_CLOSE_S = 0.25  # then for the last bytes of their answers; at most twice
_SEND_S = 30.0  # in addition to keep_alive_s: for the rest of an answer that its client reads slowly


_http_log = logging.getLogger("pdtransport.serving.http")
_limiter = LogLimiter(_http_log)
_NO_DESCRIPTORS = "socket.accept() out of system resource"  # asyncio's message


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Exception handler of the loop: logs a lack of file descriptors in one line a minute.

    By default asyncio logs a traceback every second for each connection in the backlog.
    """
    if context.get("message") != _NO_DESCRIPTORS:
        loop.default_exception_handler(context)
        return
    error = context.get("exception")
    why = error.strerror if isinstance(error, OSError) else error
    _limiter.warn(f"new connections wait: {why}; raise the limit of open files (ulimit -n)", "descriptors")


def _short(record: logging.LogRecord) -> bool:
    """Log filter: shortens aiohttp's messages about connections to one line; False drops the message.

    Invalid HTTP gets a 400 and no log line: otherwise any client could fill the disk, and the message quotes headers,
    which may hold a key.
    """
    error = record.exc_info[1] if record.exc_info else None
    if record.levelno < logging.WARNING or error is None:
        return True
    if isinstance(error, (HttpProcessingError, web.RequestPayloadError)):
        return False
    line = _limiter.line(f"a connection failed: {where(error)}", where(error))
    record.msg, record.args, record.exc_info, record.exc_text = line, (), None, None
    return bool(line)


_http_log.addFilter(_short)


@dataclass(frozen=True)
class Bounds:
    """Limits for clients.

    Seconds for a request's head and body, number and lifetime of idle connections, length of a header line; and how
    long requests in flight get when the server stops.
    """

    client_head_s: float
    client_body_s: float
    keep_alive_s: float
    max_idle_per_client: int
    max_header_bytes: int
    drain_s: float


class _Refuse(asyncio.Protocol):
    """Closes a connection beyond the limit."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            transport.abort()


class _Connection(asyncio.Protocol):
    """One client connection, wrapped around aiohttp's handler.

    It is *idle* until a request (head and body) is complete, and again after the request. An idle connection has a
    deadline, and is closed first if there are too many.
    """

    def __init__(self, listener: HttpListener, inner: asyncio.Protocol) -> None:
        self._listener = listener
        self._inner = inner
        self.transport: asyncio.Transport | None = None
        self.client = ""
        self.deadline = 0.0
        self.waited_for = True  # a request is expected, or has begun to arrive

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.client = str(peer[0]) if peer else ""
        self._inner.connection_made(transport)
        self._listener.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.lost(self)
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.waited_for:
            self._listener.began(self)
        try:
            self._inner.data_received(data)
        except Exception as error:  # noqa: BLE001  # a fault of the parser's: asyncio would log a traceback for each
            _limiter.failed("a connection failed", error)
            self._listener.close(self)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


class HttpListener:
    """Serves one application on one address. ``cors``: which web pages may use it; None: none."""

    def __init__(
        self, app: web.Application, bounds: Bounds, max_connections: int, hosts: HostRule, cors: CorsRule | None = None
    ) -> None:
        self._bounds = bounds
        self._hosts, self._cors = hosts, cors or CorsRule()
        self._max_connections = max_connections
        self._open: dict[asyncio.BaseTransport, _Connection] = {}
        self._accepted = 0  # open connections, and those about to open
        self._idle: OrderedDict[_Connection, None] = OrderedDict()  # longest idle first
        self._idle_of: dict[str, OrderedDict[_Connection, None]] = {}  # the same, by client address
        self._sweeper: asyncio.TimerHandle | None = None
        self._reclaim = Reclaim()
        self._under_way: set[asyncio.Task[object]] = set()
        self._stopped = False
        app.on_response_prepare.append(self._cors.mark)  # for streams: their headers leave before the handler returns
        self._runner = web.AppRunner(
            app,
            logger=_http_log,
            access_log=None,  # a line per request would reveal which client asked what
            handler_cancellation=True,  # a client's disconnect must reach the servers at once
            shutdown_timeout=_CLOSE_S,
            keepalive_timeout=bounds.keep_alive_s,
            max_line_size=bounds.max_header_bytes,
            max_field_size=bounds.max_header_bytes,
            auto_decompress=False,
            lingering_time=0,
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
            OSError: the address is in use or is not one of this machine.
        """
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        self._filter = RequestFilter(server.request_handler, self._hosts, self._cors)
        server.request_handler = self._handle
        asyncio.get_running_loop().set_exception_handler(_on_loop_error)
        self._server = await asyncio.get_running_loop().create_server(
            self._protocol, host, port, backlog=min(BACKLOG, self._max_connections), reuse_address=True
        )
        self._sweep()

    def _protocol(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        if server is None:
            return _Refuse()
        if self._accepted >= self._max_connections:
            victim = next(iter(self._idle), None)
            if victim is None:
                return _Refuse()
            self.close(victim)
        self._accepted += 1
        return _Connection(self, server())

    async def stop(self) -> None:
        """Accept no more requests, give those in flight ``drain_s`` to finish, then cancel the rest.

        Cancelled requests get a moment to answer their clients. May be called twice.
        """
        if self._stopped:
            return
        self._stopped = True
        if self._server is not None:
            self._server.close()
        if self._runner.server is not None:
            await asyncio.sleep(0)  # let accepted connections begin
            self._runner.server.pre_shutdown()  # idle connections close now, others after their answers
            await self._ended(self._bounds.drain_s)
            for task in self._under_way:
                stop_request(task)
            await self._ended(_CUT_S)
        await self._runner.cleanup()
        if self._sweeper is not None:
            self._sweeper.cancel()

    async def _ended(self, seconds: float) -> None:
        """Wait until no request is in flight, at most ``seconds``."""
        ends = asyncio.get_running_loop().time() + seconds
        while self._under_way and (left := ends - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(self._under_way, timeout=left)

    # -- who is idle ------------------------------------------------------------------------------------------------

    def opened(self, connection: _Connection) -> None:
        assert connection.transport is not None
        self._open[connection.transport] = connection
        self._rest(connection, self._bounds.client_head_s, waited_for=True)

    def began(self, connection: _Connection) -> None:
        """The connection receives data. If it is idle, this is the beginning of a request's head."""
        if connection in self._idle:
            self._rest(connection, self._bounds.client_head_s, waited_for=True)

    def body_in(self, request: web.Request) -> None:
        """All of a request has been read: from now on the client waits for the server."""
        if request.transport in self._open:
            self._work(self._open[request.transport])

    def lost(self, connection: _Connection) -> None:
        if connection.transport is not None and self._open.pop(connection.transport, None) is not None:
            self._accepted -= 1
            self._reclaim.freed(asyncio.get_running_loop().time())
        self._work(connection)

    def _rest(self, connection: _Connection, seconds: float, *, waited_for: bool) -> None:
        """Mark the connection as idle, with a deadline in ``seconds``."""
        connection.waited_for = waited_for
        connection.deadline = asyncio.get_running_loop().time() + seconds
        fellows = self._idle_of.setdefault(connection.client, OrderedDict())
        for idle in (self._idle, fellows):
            idle[connection] = None
            idle.move_to_end(connection)
        if len(fellows) > self._bounds.max_idle_per_client:
            self.close(next(iter(fellows)))

    def _work(self, connection: _Connection) -> None:
        """Mark the connection as not idle."""
        self._idle.pop(connection, None)
        fellows = self._idle_of.get(connection.client)
        if fellows is not None:
            fellows.pop(connection, None)
            if not fellows:
                del self._idle_of[connection.client]

    def close(self, connection: _Connection) -> None:
        """Close the connection at once, whatever its state."""
        self.lost(connection)
        if connection.transport is not None:
            connection.transport.abort()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        for connection in [one for one in self._idle if one.deadline <= loop.time()]:
            self.close(connection)
        self._reclaim.tick(loop.time())
        self._sweeper = loop.call_later(min(_SWEEP_S, self._bounds.client_head_s / 4), self._sweep)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Handle one request while its connection's deadlines are watched."""
        assert isinstance(request, web.Request)  # applications create requests of this class
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        connection = self._open.get(request.transport) if request.transport is not None else None
        if connection is None:
            return await self._filter(request)
        if request.can_read_body:  # reading a body has its own deadline; this one covers bodies that are never read
            self._rest(connection, self._bounds.client_body_s + _SEND_S, waited_for=True)
        else:
            self._work(connection)
        try:
            return await self._filter(request)
        finally:
            if large := request.content.total_bytes >> 16:
                self._reclaim.freed(asyncio.get_running_loop().time(), large)
            if connection.transport in self._open:
                self._rest(connection, self._bounds.keep_alive_s + _SEND_S, waited_for=False)


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
