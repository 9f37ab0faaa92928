"""Errors in OpenAI's format."""

from __future__ import annotations

import asyncio
import json
import logging
from weakref import WeakSet

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from pdtransport.system.log_limits import LogLimiter

CLIENT_LEFT = 499  # nginx's code for a client that disconnected
STOPPING = "stopping"  # code of requests that end because the server stops
_stopped: WeakSet[asyncio.Task[object]] = WeakSet()

INVALID = "invalid_request_error"
SERVER = "server_error"


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> bytes:
    """``{"error": {"message", "type", "param", "code"}}`` as UTF-8 JSON."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


class ApiError(Exception):
    """Ends a request with this status and an error body.

    ``code`` is also the label in the metric of refused requests.
    """

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
        self.close = close  # close the connection: the request's body was not read to its end
        self.raw = raw  # a server's own error body, passed on unchanged

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
    """True if a server's error body is already in OpenAI's format."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("error"), dict) and "message" in value["error"]


def stop_request(task: asyncio.Task[object]) -> None:
    """Cancel a request's task because the server stops; :func:`stopped` then reports the reason to the task."""
    _stopped.add(task)
    task.cancel()


def stopped() -> bool:
    """True if the current task, a request, was cancelled because the server stops; False: its client disconnected."""
    return asyncio.current_task() in _stopped


def json_errors(who: str, log: logging.Logger) -> Middleware:
    """Middleware that returns every error of the server ``who`` in OpenAI's format, without tracebacks.

    Tracebacks go to the log only at level debug.
    """
    limiter = LogLimiter(log)

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            return error.response()
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            refusal = ApiError(
                405, f"this path accepts only {allowed}", code="method_not_allowed", headers={"Allow": allowed}
            )
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
                return web.Response(status=CLIENT_LEFT)  # the client is gone, and the error is not logged
            raise
        except Exception as error:  # noqa: BLE001  # told in a line, and to the client
            limiter.failed(f"a request failed in the {who} itself", error)
            text = f"the {who} failed: {type(error).__name__}"
            return ApiError(500, text, kind=SERVER, code=f"{who}_error").response()

    return answer
