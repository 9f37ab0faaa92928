"""HTTP requests to one server."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    DummyCookieJar,
    TCPConnector,
)

from pdtransport.router.endpoints import Endpoint, Failure
from pdtransport.router.settings import RouterSettings

MAX_WHOLE_BYTES = 64 << 20  # limit of a decode answer that is joined with prefill's first token
MAX_ERROR_BODY_BYTES = 64 << 10  # limit of a server's error answer; the rest is cut off
_LARGE_BODY_BYTES = 1 << 20  # from this size on aiohttp needs a file-like object, which it sends in pieces
_READ_BYTES = 64 << 10
_SSE_ERROR = b'data: {"error"'
_BUSY = frozenset({408, 425, 429})  # a 4xx that does not blame the request: another server may accept it

# Headers of one connection, not of the message: never passed on (RFC 9110, 7.6.1).
_HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip
# Headers of the client's body or of its connection to the router: a request to a server gets its own.
_NOT_FORWARDED = frozenset(
    {"host", "origin", "content-length", "content-type", "content-encoding", "accept-encoding", "expect"}
)
_CORS = "access-control-"


class UpstreamError(Exception):
    """A server did not serve a request. ``status`` and ``body`` are set if the server answered with an error."""

    def __init__(self, endpoint: Endpoint, how: Failure, why: str, status: int = 0, body: bytes = b"") -> None:
        super().__init__(f"{endpoint.role} server {endpoint.name} {why}")
        self.endpoint = endpoint
        self.how = how
        self.status = status
        self.body = body

    @property
    def refused(self) -> bool:
        """True if the server rejects the request itself. (Another server may accept it: its flags can differ.)"""
        return 400 <= self.status < 500 and self.status not in _BUSY


@dataclass(frozen=True, slots=True)
class PrefillAnswer:
    """Prefill's 2xx answer. ``params`` describes the hand-off; None: prefill has nothing to hand over."""

    params: dict[str, Any] | None
    answer: dict[str, Any] = field(default_factory=dict)  # the whole answer


@dataclass(frozen=True, slots=True)
class Opened:
    """Decode's answer: its first bytes, and the response to read the rest from."""

    response: ClientResponse
    first: bytes

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream of server-sent events."""
        return self.response.headers.get("Content-Type", "").lower().startswith("text/event-stream")


def session(settings: RouterSettings, connections: int) -> ClientSession:
    """A client session with bounded connections, idle times and headers."""
    return ClientSession(
        connector=TCPConnector(limit=0, limit_per_host=connections, keepalive_timeout=settings.upstream_keep_alive_s),
        cookie_jar=DummyCookieJar(),  # one client's cookies must not get into another's requests
        auto_decompress=False,
        trust_env=False,
        timeout=ClientTimeout(total=None, sock_connect=settings.timeouts.connect_s),
        read_bufsize=settings.stream_buffer_bytes,
        max_line_size=settings.max_header_bytes,
        max_field_size=settings.max_header_bytes,
        skip_auto_headers=("User-Agent",),
    )


def end_to_end(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Headers that belong to the message, without those of the connection and without CORS headers.

    CORS is left out because the router has its own allowed_origins. Values that are not printable text are dropped.
    """
    skip = _HOP_BY_HOP | {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    kept = [(k, v) for k, v in headers.items() if k.lower() not in skip and v.isprintable()]
    return [(k, v) for k, v in kept if not k.lower().startswith(_CORS)]


def request_headers(headers: Mapping[str, str], key: str | None, drop_authorization: bool) -> list[tuple[str, str]]:
    """The client's headers to pass on to servers; ``key`` replaces its Authorization."""
    skip = _NOT_FORWARDED | ({"authorization"} if key is not None or drop_authorization else set())
    kept = [(k, v) for k, v in end_to_end(headers) if k.lower() not in skip]
    if key is not None:
        kept.append(("Authorization", f"Bearer {key}"))
    return [*kept, ("Content-Type", "application/json"), ("Accept-Encoding", "identity")]


class Upstream:
    """Sends requests to servers and classifies their failures."""

    def __init__(self, settings: RouterSettings, http: ClientSession) -> None:
        self._settings = settings
        self._http = http

    async def prefill(
        self, endpoint: Endpoint, path: str, body: bytes, headers: list[tuple[str, str]], transfer_id: str
    ) -> PrefillAnswer:
        """Let prefill compute the prompt.

        Raises:
            UpstreamError: prefill failed or refused.
        """
        response = await self._post(endpoint, path, body, headers)
        try:
            await self._refuse_error(endpoint, response, from_status=300)
            bound = self._settings.max_prefill_response_bytes
            raw = await self._read(endpoint, response, bound, cut=False, limit="max_prefill_response_bytes")
        except BaseException:
            response.close()
            raise
        return _handover(endpoint, raw, transfer_id)

    async def decode(
        self, endpoint: Endpoint, path: str, body: bytes, headers: list[tuple[str, str]], mark: Any
    ) -> Opened:
        """Open decode's answer: any 2xx or 4xx whose first bytes arrived. ``mark`` is called when its headers arrive.

        Raises:
            UpstreamError: decode failed before the first bytes of an answer.
        """
        response = await self._post(endpoint, path, body, headers)
        try:
            mark("decode_first_byte")
            await self._refuse_error(endpoint, response, from_status=500)
            if 300 <= response.status < 400:
                raise UpstreamError(endpoint, "protocol", f"answered with a redirect ({response.status})")
            first = await self._read_some(endpoint, response)
            if not first and response.status < 300:
                raise UpstreamError(endpoint, "disconnected", "ended its answer before its first byte")
            if first.startswith(_SSE_ERROR):
                _refuse_error_event(endpoint, first)
        except BaseException:
            response.close()
            raise
        return Opened(response, first)

    async def whole(self, endpoint: Endpoint, opened: Opened) -> bytes:
        """Read the rest of an opened answer; returns all of it.

        Raises:
            UpstreamError: the connection broke, or the answer is longer than an answer of one choice should be.
        """
        return opened.first + await self._read(endpoint, opened.response, MAX_WHOLE_BYTES, cut=False, limit="bytes")

    async def _post(self, endpoint: Endpoint, path: str, body: bytes, headers: list[tuple[str, str]]) -> ClientResponse:
        data = body if len(body) < _LARGE_BODY_BYTES else io.BytesIO(body)
        try:
            return await self._http.post(endpoint.url + path, data=data, headers=headers, allow_redirects=False)
        except (ClientConnectorError, ConnectionTimeoutError) as error:
            raise UpstreamError(endpoint, "connect", f"can't be reached: {reason(error)}") from None
        except (ClientError, OSError, asyncio.TimeoutError, ValueError) as error:
            raise UpstreamError(endpoint, "disconnected", f"broke the connection: {reason(error)}") from None

    async def _refuse_error(self, endpoint: Endpoint, response: ClientResponse, from_status: int) -> None:
        if response.status >= from_status:
            body = await self._read(endpoint, response, MAX_ERROR_BODY_BYTES, cut=True)
            raise UpstreamError(endpoint, "status", f"answers {response.status}", response.status, body)

    async def _read_some(self, endpoint: Endpoint, response: ClientResponse) -> bytes:
        try:
            return await response.content.readany()
        except (ClientError, OSError, asyncio.TimeoutError) as error:
            raise UpstreamError(endpoint, "disconnected", f"broke the connection: {reason(error)}") from None

    async def _read(
        self, endpoint: Endpoint, response: ClientResponse, bound: int, cut: bool, limit: str = ""
    ) -> bytes:
        """Read the body, at most ``bound`` bytes, and free the connection.

        A longer body is cut off, or refused with an error that names ``limit``.
        """
        parts, size = [], 0
        while part := await self._read_some(endpoint, response):
            parts.append(part)
            size += len(part)
            if size > bound:
                response.close()
                if not cut:
                    raise UpstreamError(endpoint, "protocol", f"answered with more than {limit} ({bound})")
                break
        return b"".join(parts)[:bound]


def reason(error: BaseException) -> str:
    """One line about a failed connection, without any header or body."""
    if isinstance(error, ClientConnectorError):
        inner = error.os_error
        if inner.errno is not None and inner.errno > 0:  # name resolution errors have codes below 0
            return os.strerror(inner.errno)
        return inner.strerror or type(inner).__name__
    return type(error).__name__


def _handover(endpoint: Endpoint, raw: bytes, transfer_id: str) -> PrefillAnswer:
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        raise UpstreamError(endpoint, "protocol", "answered with something other than JSON") from None
    params = answer.get("kv_transfer_params") if isinstance(answer, dict) else None
    if params is None:
        return PrefillAnswer(None)
    if not isinstance(params, dict):
        raise UpstreamError(endpoint, "protocol", "answered with kv_transfer_params that are not an object")
    if params.get("transfer_id", transfer_id) != transfer_id:
        raise UpstreamError(endpoint, "protocol", "answered with another transfer_id")
    return PrefillAnswer(params or None, answer)


def _refuse_error_event(endpoint: Endpoint, first: bytes) -> None:
    """Raise if a stream begins with an error event of the server's own failure (5xx): the client need not see it."""
    event = first.split(b"\n\n", 1)[0].removeprefix(b"data: ").strip()
    try:
        code = json.loads(event)["error"]["code"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return
    if isinstance(code, int) and 500 <= code < 600:
        raise UpstreamError(endpoint, "status", f"ended its stream at once with error {code}", code, event)
