"""Minimal HTTP client for pdlaunch's own servers: plain HTTP, on this machine, with deadlines."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pdtransport.errors import PDTransportError

MAX_ANSWER = 64 << 20
HEALTH_S = 2.0


class WebError(PDTransportError):
    """A server did not answer as expected; the text names the server and what happened."""


@dataclass(frozen=True)
class HttpAnswer:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: Any


def is_healthy(url: str) -> bool:
    """True if ``GET url/health`` answers 200."""
    try:
        return _ask("GET", f"{url}/health", None, {}, HEALTH_S).status == 200
    except WebError:
        return False


def get(url: str, timeout_s: float, headers: Mapping[str, str] | None = None) -> HttpAnswer:
    return _ask("GET", url, None, headers or {}, timeout_s)


def post(url: str, body: Mapping[str, Any], timeout_s: float, headers: Mapping[str, str] | None = None) -> HttpAnswer:
    """POST ``body`` as JSON.

    Raises:
        WebError: no answer within ``timeout_s``, or a broken one. An HTTP error status counts as an answer.
    """
    return _ask("POST", url, json.dumps(body).encode(), headers or {}, timeout_s)


def stream(
    url: str, body: Mapping[str, Any], timeout_s: float, headers: Mapping[str, str] | None = None
) -> tuple[Mapping[str, str], Iterator[Any]]:
    """POST ``body``; returns the answer's headers and an iterator over its parsed server-sent events.

    Raises:
        WebError: no answer, or not an event stream.
    """
    connection, response = _open("POST", url, json.dumps(body).encode(), headers or {}, timeout_s)
    if response.status != 200:
        text = response.read(4096).decode("utf-8", "replace")
        connection.close()
        raise WebError(f"{url} answered {response.status}: {text[:500]}")
    return _lower(response), _events(connection, response, url, time.monotonic() + timeout_s)


def _events(
    connection: http.client.HTTPConnection, response: http.client.HTTPResponse, url: str, deadline: float
) -> Iterator[Any]:
    try:
        while line := response.readline(MAX_ANSWER):
            if time.monotonic() > deadline:
                raise WebError(f"{url}: the stream did not end in time")
            text = line.strip()
            if text == b"data: [DONE]":
                return
            if text.startswith(b"data: "):
                yield json.loads(text[6:])
        raise WebError(f"{url}: the stream ended early")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise WebError(f"{url}: the stream broke: {error}") from None
    finally:
        connection.close()


def _open(
    method: str, url: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        extra = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, parts.path + ("?" + parts.query if parts.query else ""), body, {**extra, **headers})
        return connection, connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        reason = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else f"{error}"
        raise WebError(f"{url}: {reason or type(error).__name__}") from None


def _ask(method: str, url: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float) -> HttpAnswer:
    connection, response = _open(method, url, body, headers, timeout_s)
    try:
        raw = response.read(MAX_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        raise WebError(f"{url}: the answer broke off: {error}") from None
    finally:
        connection.close()
    try:
        parsed = json.loads(raw) if raw else None
    except ValueError:
        parsed = raw.decode("utf-8", "replace")
    return HttpAnswer(response.status, _lower(response), parsed)


def _lower(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}
