"""What the router takes in: so many requests, so many bytes of bodies, no slower than a deadline."""

from __future__ import annotations

from types import TracebackType

from aiohttp import web

from pdtransport.router.settings import RouterSettings
from pdtransport.serving.bodies import read_body
from pdtransport.serving.errors import SERVER, ApiError


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
        bounds = self._settings

        def reserve(nbytes: int) -> None:
            self._admission.reserve(nbytes)
            self._bytes += nbytes

        limit, seconds = (
            (bounds.max_body_bytes, "max_body_bytes"),
            (bounds.timeouts.client_body_s, "timeouts.client_body_s"),
        )
        return await read_body(request, limit, seconds, reserve)
