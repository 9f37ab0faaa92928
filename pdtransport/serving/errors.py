"""Errors in the form that OpenAI's clients read."""

from __future__ import annotations

import asyncio
import json
import logging
from weakref import WeakSet

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from pdtransport.serving.log_limits import LogLimiter

CLIENT_LEFT = 499  # nginx's code for it
STOPPING = "stopping"  # code of what ends because the server does
_stopped: WeakSet[asyncio.Task[object]] = WeakSet()

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


def stop_request(task: asyncio.Task[object]) -> None:
    """End a request because the server ends: its task is cancelled, and :func:`stopped` tells it why."""
    _stopped.add(task)
    task.cancel()


def stopped() -> bool:
    """Whether the current task, a request's, was cancelled because the server ends. Else its client went away."""
    return asyncio.current_task() in _stopped


def json_errors(who: str, log: logging.Logger) -> Middleware:
    """Every error of the server ``who`` leaves in OpenAI's form, and none with a traceback, in the log neither."""
    limiter = LogLimiter(log)

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            return error.response()
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            refusal = ApiError(405, f"this path takes {allowed}", code="method_not_allowed", headers={"Allow": allowed})
            return refusal.response()
        except web.HTTPException as error:
            return ApiError(error.status, f"{error.reason}: the {who} has no such path", code="not_found").response()
        except asyncio.CancelledError:
            if not stopped():
                raise
            text = f"the {who} stops before this request is done: send it again"
            return ApiError(503, text, kind=SERVER, code=STOPPING, close=True).response()
        except ConnectionError:
            if request.transport is None or request.transport.is_closing():
                return web.Response(status=CLIENT_LEFT)  # nobody reads it, and nobody logs it
            raise
        except Exception as error:  # noqa: BLE001  # told in a line, and to the client
            limiter.failed(f"a request failed in the {who} itself", error)
            text = f"the {who} failed: {type(error).__name__}"
            return ApiError(500, text, kind=SERVER, code=f"{who}_error").response()

    return answer
