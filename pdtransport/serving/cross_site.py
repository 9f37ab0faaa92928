"""Keeps foreign web pages from using a server: checks ``Host`` and ``Origin``.

A page can make its visitor's browser send requests to 127.0.0.1. Without the server's consent (CORS) it can't read the
answers or send JSON. The exception is DNS rebinding: if a name of the page's own site resolves to 127.0.0.1, page and
server have the same origin for the browser, and only ``Host`` differs. An IP address in ``Host`` is always
accepted, because addresses can't be rebound.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from aiohttp import hdrs, web

from pdtransport.serving.errors import ApiError
from pdtransport.settings import is_loopback

_PREFLIGHT_AGE_S = "600"
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
_MAX_HEADER_NAMES = 4096  # characters of a browser's list of header names


class HostRule:
    """Names that a loopback request may have in ``Host``: ``allowed``, and the names of this machine."""

    def __init__(self, listening_on: str, allowed: Sequence[str] = ()) -> None:
        self._any = "*" in allowed
        self._names = {name.lower().rstrip(".") for name in (*allowed, listening_on, socket.gethostname(), "localhost")}

    def check(self, request: web.BaseRequest) -> None:
        """Check ``Host`` of a request that came over loopback.

        Raises:
            ApiError: 403, it names another host.
        """
        if self._any or not _over_loopback(request):
            return
        # A request without Host (HTTP/1.0) is not from a browser.
        if not all(self._is_ours(host) for host in request.headers.getall(hdrs.HOST, ())):
            raise ApiError(
                403, "Host is not a name of this machine: use the server's address or localhost, or add the name to "
                     "allowed_hosts",
                kind="permission_error", code="host_not_allowed",
            )  # fmt: skip

    def _is_ours(self, host: str) -> bool:
        name = _name_in(host)
        return name in self._names or name.endswith(".localhost") or _is_address(name)


class CorsRule:
    """Which web pages (origins) may use paths that begin with ``prefix``."""

    def __init__(self, origins: Sequence[str] = (), prefix: str = "/", shows: str = "") -> None:
        self._any = "*" in origins
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._prefix = prefix
        self._shows = shows  # response headers that pages may read

    def preflight(self, request: web.BaseRequest) -> web.Response | None:
        """The answer to a CORS preflight request; None if it is not one, or the page is not allowed."""
        if request.method != hdrs.METH_OPTIONS or hdrs.ACCESS_CONTROL_REQUEST_METHOD not in request.headers:
            return None
        headers = self._headers(request)
        if not headers:
            return None
        wanted = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
        if len(wanted) <= _MAX_HEADER_NAMES and _HEADER_NAMES.fullmatch(wanted):
            headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = wanted
        headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = "GET, POST"
        headers[hdrs.ACCESS_CONTROL_MAX_AGE] = _PREFLIGHT_AGE_S
        return web.Response(status=204, headers=headers)

    async def mark(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Let an allowed page read the answer."""
        response.headers.update(self._headers(request))

    def _headers(self, request: web.BaseRequest) -> dict[str, str]:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or not self._origins or not request.path.startswith(self._prefix):
            return {}
        if not self._any and origin.lower() not in self._origins:
            return {}
        headers: dict[str, str] = {
            hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: "*" if self._any else origin,
            hdrs.VARY: hdrs.ORIGIN,
        }
        if self._shows:
            headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = self._shows
        return headers


def _over_loopback(request: web.BaseRequest) -> bool:
    address = request.transport.get_extra_info("sockname") if request.transport is not None else None
    return not address or is_loopback(str(address[0]))


def _name_in(host: str) -> str:
    """The name or address in ``Host``, without the port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
