"""Admission limits of the router: requests, bytes of bodies, and time to receive a body."""

from __future__ import annotations

from types import TracebackType

from aiohttp import web

from pdtransport.router.settings import RouterSettings
from pdtransport.serving.bodies import read_body
from pdtransport.serving.errors import SERVER, ApiError


class Admission:
    """Counts requests and body bytes in flight."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self.inflight = 0
        self.buffered = 0

    def enter(self) -> Seat:
        """Admit one request. It is counted only once its body has arrived, so that slow senders occupy no seat.

        Raises:
            ApiError: 503, there are max_inflight requests already.
        """
        self.check()
        return Seat(self, self._settings)

    def check(self) -> None:
        """Check that another request may begin.

        Raises:
            ApiError: 503, there are max_inflight requests already.
        """
        if self.inflight >= self._settings.max_inflight:
            raise self._full(f"the router already serves max_inflight ({self._settings.max_inflight}) requests")

    def reserve(self, nbytes: int) -> None:
        """Account for ``nbytes`` of a body.

        Raises:
            ApiError: 503, bodies in flight would exceed max_buffered_bytes.
        """
        if self.buffered + nbytes > self._settings.max_buffered_bytes:
            raise self._full(f"the router already holds max_buffered_bytes ({self._settings.max_buffered_bytes})")
        self.buffered += nbytes

    def _full(self, why: str) -> ApiError:
        retry = {"Retry-After": str(self._settings.retry_after_s)}
        return ApiError(503, f"{why}: try again later", kind=SERVER, code="overloaded", headers=retry, close=True)


class Seat:
    """Seat and body bytes of one request; released when the ``with`` block ends."""

    def __init__(self, admission: Admission, settings: RouterSettings) -> None:
        self._admission = admission
        self._settings = settings
        self._bytes = 0
        self._taken = False

    def __enter__(self) -> Seat:
        return self

    def take(self) -> None:
        """The request's body has arrived: count the request as in flight.

        Raises:
            ApiError: 503, there are max_inflight requests already.
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
        """Release the body's bytes; it is no longer needed."""
        self._admission.buffered -= self._bytes
        self._bytes = 0

    async def read(self, request: web.Request) -> bytes:
        """Read the request's whole body.

        Raises:
            ApiError: 413 too large, 408 too slow, 400 cut short, 503 too many bytes in flight.
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
