"""What the router takes in: so many requests, so many bytes of bodies, no slower than a deadline."""

from __future__ import annotations

import asyncio
from types import TracebackType

from aiohttp import web

from pdtransport.router.api_errors import SERVER, ApiError
from pdtransport.router.settings import RouterSettings


class Admission:
    """Counts requests and body bytes under way."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self.inflight = 0
        self.buffered = 0

    def enter(self) -> Seat:
        """A place for one request, to be taken when its body is in: a client that is slow to send holds up none.

        Raises:
            ApiError: 503, there are max_inflight already.
        """
        self.check()
        return Seat(self, self._settings)

    def check(self) -> None:
        """
        Raises:
            ApiError: 503, there are max_inflight already.
        """
        if self.inflight >= self._settings.max_inflight:
            raise self._full(f"the router already serves max_inflight ({self._settings.max_inflight}) requests")

    def reserve(self, nbytes: int) -> None:
        """Account for ``nbytes`` of a body.

        Raises:
            ApiError: 503, bodies under way hold max_buffered_bytes already.
        """
        if self.buffered + nbytes > self._settings.max_buffered_bytes:
            raise self._full(f"the router already holds max_buffered_bytes ({self._settings.max_buffered_bytes})")
        self.buffered += nbytes

    def _full(self, why: str) -> ApiError:
        retry = {"Retry-After": str(self._settings.retry_after_s)}
        return ApiError(503, f"{why}: try again later", kind=SERVER, code="overloaded", headers=retry, close=True)


class Seat:
    """One request's place and bytes; given back when the ``with`` block ends."""

    def __init__(self, admission: Admission, settings: RouterSettings) -> None:
        self._admission = admission
        self._settings = settings
        self._bytes = 0
        self._taken = False

    def __enter__(self) -> Seat:
        return self

    def take(self) -> None:
        """The request is in, and under way from now on.

        Raises:
            ApiError: 503, there are max_inflight already.
        """
        self._admission.check()
        self._admission.inflight += 1
        self._taken = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.inflight -= self._taken
        self._taken = False
        self.release()

    def release(self) -> None:
        """The body is not needed any more."""
        self._admission.buffered -= self._bytes
        self._bytes = 0

    async def read(self, request: web.Request) -> bytes:
        """The request's whole body.

        Raises:
            ApiError: 413 too large, 408 too slow, 400 cut short, 503 too many bytes under way.
        """
        bound = self._settings.max_body_bytes
        if request.content_length is not None and request.content_length > bound:
            raise self._too_large()
        seconds = self._settings.timeouts.client_body_s
        late = asyncio.TimeoutError()
        timer = asyncio.get_running_loop().call_later(seconds, request.content.set_exception, late)
        parts: list[bytes] = []
        size = 0
        try:
            while part := await request.content.readany():
                size += len(part)
                if size > bound:
                    raise self._too_large()
                self._admission.reserve(len(part))
                self._bytes += len(part)
                parts.append(part)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within timeouts.client_body_s ({seconds:g} s)",
                code="body_timeout", close=True,
            ) from None  # fmt: skip
        except (web.RequestPayloadError, ValueError) as error:
            raise ApiError(
                400, f"the body can't be read: {type(error).__name__}", code="bad_body", close=True
            ) from None
        finally:
            timer.cancel()
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        bound = self._settings.max_body_bytes
        return ApiError(413, f"the body is larger than max_body_bytes ({bound})", code="body_too_large", close=True)
