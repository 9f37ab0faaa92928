"""What every request passes before an application sees it, and the end of those whose body nobody wanted.

A refused request's body is neither read nor drained, and nothing is ever inflated: the answer is sent, then the
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

LINGER_S = 1.0  # that a client has to read a refusal before its connection is reset
MAX_LINGERING = 64  # connections at once that wait for that; more are closed right away
_FIRST_LOOK_S = 0.01  # after that long, then twice as long, and so on

Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RequestFilter:
    """Stands before the application ``handle``."""

    def __init__(self, handle: Handle, hosts: HostRule, cors: CorsRule) -> None:
        self._handle = handle
        self._hosts = hosts
        self._cors = cors
        self._lingering = 0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if request._version.major != 1:  # not by `version`, which is remembered
            request._version = HttpVersion11  # the answer's, too: aiohttp would say a version that nobody speaks here
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
        """Send the answer to a request whose body was not read to its end, and read nothing more."""
        response.force_close()
        request.protocol.close()  # what comes from now on is not parsed
        transport, arrived = request.transport, request.content.is_eof()
        _forget(request)
        if transport is None or arrived:
            return  # nothing of the body is left in the socket
        transport.pause_reading()
        try:
            await response.prepare(request)
            await response.write_eof()
            # Closing a socket that holds unread bytes resets the connection, which may overtake the answer: say that no
            # more comes from here, and let the client close.
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
    """Drop what the parser holds of the body, which may else wait for the garbage collector with its connection."""
    try:
        request.content.read_nowait()
    except (asyncio.TimeoutError, web.RequestPayloadError, OSError, RuntimeError):
        pass  # it broke off, and whoever read it knows


async def _until_closed(transport: asyncio.Transport) -> None:
    """Wait until the client has closed its side, without reading from it; LINGER_S at most."""
    poll, waited, step = select.poll(), 0.0, _FIRST_LOOK_S
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
    while waited < LINGER_S and not transport.is_closing() and not poll.poll(0):
        await asyncio.sleep(step)
        waited, step = waited + step, min(2 * step, LINGER_S - waited)


def _without_expect(request: web.Request) -> web.Request:
    """The request as the application gets it: aiohttp would invite the body of whatever it is about to refuse. Whoever
    reads the body does that (:func:`pdtransport.serving.bodies.read_body`).

    Raises:
        ApiError: 417, something else than 100-continue is expected.
    """
    expected = request.headers.get(hdrs.EXPECT)
    if expected is None or request.version < HttpVersion11:
        return request
    if expected.lower() != "100-continue":
        raise ApiError(417, "only 100-continue can be expected", code="bad_expect")
    # Bytes that are no text make no header of ours or of a server's.
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
