"""Errors in the form that OpenAI's clients read."""

from __future__ import annotations

import json

from aiohttp import web

INVALID = "invalid_request_error"
SERVER = "server_error"


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> bytes:
    """``{"error": {"message", "type", "param", "code"}}`` as UTF-8 JSON."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


class ApiError(Exception):
    """A request ends with this status and an error body. ``code`` also labels the metric of refused requests."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        close: bool = False,
        raw: bytes | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = headers or {}
        self.close = close  # the request's body was not read to its end
        self.raw = raw  # a server's own error body, passed on as it is

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        return error_body(self.message, self.kind, self.code, self.param)

    def response(self) -> web.Response:
        response = web.Response(
            status=self.status, body=self.body(), content_type="application/json", headers=self.headers
        )
        if self.close:
            response.force_close()
        return response


def is_openai_error(body: bytes) -> bool:
    """Whether a server's error body is already in OpenAI's form."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("error"), dict) and "message" in value["error"]
