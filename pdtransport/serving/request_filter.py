"""Checks every request before the application sees it, and ends requests whose body was not read.

The body of a refused request is not read or drained, and nothing is ever decompressed: the answer is sent, then the
connection is closed.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion11, hdrs, web
from multidict import CIMultiDict

from pdtransport.serving.bodies import EXPECTS_CONTINUE
from pdtransport.serving.cross_site import CorsRule, HostRule
from pdtransport.serving.errors import ApiError

LINGER_S = 1.0  # for a client to read a refusal before its connection is reset
MAX_LINGERING = 64  # connections that wait for that at a time; others are closed right away
_FIRST_LOOK_S = 0.01  # first check after this long, then after twice as long, and so on

Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RequestFilter:
    """Runs before the application ``handle``."""

    def __init__(self, handle: Handle, hosts: HostRule, cors: CorsRule) -> None:
        self._handle = handle
        self._hosts = hosts
        self._cors = cors
        self._lingering = 0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if request._version.major != 1:  # not `version`, which is cached
            request._version = HttpVersion11  # also the answer's version; aiohttp would answer with the unsupported one
        try:
            self._hosts.check(request)
            answer = self._cors.preflight(request)
            response = await self._handle(_without_expect(request)) if answer is None else answer
        except ApiError as error:
            response = error.response()
        if not response.prepared:
            await self._cors.mark(request, response)
        if request.can_read_body:
            await self._end(request, response)
        return response

    async def _end(self, request: web.Request, response: web.StreamResponse) -> None:
        """Answer a request whose body was not read to its end, and read nothing more."""
        response.force_close()
        request.protocol.close()  # later data is not parsed
        transport, arrived = request.transport, request.content.is_eof()
        _forget(request)
        if transport is None or arrived:
            return  # no byte of the body is left in the socket
        transport.pause_reading()
        try:
            await response.prepare(request)
            await response.write_eof()
            # Closing a socket with unread bytes resets the connection, and the reset may overtake the answer. So close
            # only the sending side, and let the client close the connection.
            transport.write_eof()
        except OSError:  # the client is gone
            return
        if self._lingering >= MAX_LINGERING:
            return
        self._lingering += 1
        try:
            await _until_closed(transport)
        finally:
            self._lingering -= 1


def _forget(request: web.Request) -> None:
    """Drop buffered parts of the body, which could otherwise stay in memory until garbage collection."""
    try:
        request.content.read_nowait()
    except (asyncio.TimeoutError, web.RequestPayloadError, OSError, RuntimeError):
        pass  # the body broke off, and its reader got the error


async def _until_closed(transport: asyncio.Transport) -> None:
    """Wait until the client has closed its side, without reading from it; at most LINGER_S."""
    poll, waited, step = select.poll(), 0.0, _FIRST_LOOK_S
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
    while waited < LINGER_S and not transport.is_closing() and not poll.poll(0):
        await asyncio.sleep(step)
        waited, step = waited + step, min(2 * step, LINGER_S - waited)


def _without_expect(request: web.Request) -> web.Request:
    """The request for the application, without its Expect header.

    With the header, aiohttp would invite the body even of a request that is about to be refused.
    :func:`pdtransport.serving.bodies.read_body` sends 100 Continue instead.

    Raises:
        ApiError: 417, the client expects something else than 100-continue.
    """
    expected = request.headers.get(hdrs.EXPECT)
    if expected is None or request.version < HttpVersion11:
        return request
    if expected.lower() != "100-continue":
        raise ApiError(417, "only 100-continue can be expected", code="bad_expect")
    # Drop headers that are not valid text: they can't be passed on.
    kept = [(name, text) for name, text in request.headers.items() if name != hdrs.EXPECT and _is_text(text)]
    taken = request.clone(headers=CIMultiDict(kept))
    taken[EXPECTS_CONTINUE] = True
    return taken


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
