"""Relays decode's answer to the client: the same bytes, as they arrive, at the client's pace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import ClientError, web

from pdtransport.router.attempt import Attempt
from pdtransport.router.events import WholeEvents
from pdtransport.router.settings import RouterTimeouts
from pdtransport.router.traces import Trace
from pdtransport.router.upstream import end_to_end
from pdtransport.serving.errors import SERVER, STOPPING, error_body, stopped

ENDED_EARLY = "its stream ended without [DONE]"
PD_HEADERS = ("x-pd-path", "x-pd-transfer-id", "x-pd-prefill", "x-pd-decode", "x-pd-first-token", "x-pd-hand-off")


class RelayTimer:
    """One timer for all waits of an answer: closes whatever is waited for too long. Costs nothing per chunk."""

    def __init__(self, total_left_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time() + max(total_left_s, 0)
        self._deadline = self._last
        self._setting = "total_s"
        self._close: Callable[[], None] = lambda: None
        self._timer: asyncio.TimerHandle | None = None
        self.expired = ""  # name of the setting whose timeout expired

    def expect(self, setting: str, seconds: float, close: Callable[[], None]) -> None:
        """A new wait begins: call ``close`` if it takes longer than ``seconds``."""
        deadline = self._loop.time() + seconds
        self._deadline, self._setting = min((deadline, setting), (self._last, "total_s"))
        self._close = close
        if self._timer is None or self._timer.when() > self._deadline:
            self.stop()
            self._timer = self._loop.call_at(self._deadline, self._tick)

    def _tick(self) -> None:
        if self._loop.time() >= self._deadline:
            self.expired = self._setting
            self._timer = None
            self._close()
        else:
            self._timer = self._loop.call_at(self._deadline, self._tick)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def pd_headers(trace: Trace) -> dict[str, str]:
    """The x-pd-* headers, which show how a request was served. Empty before its first dispatch."""
    if not trace.dispatches:
        return {}
    last = trace.dispatches[-1]
    reason = trace.decode_only_reason
    path = trace.path if reason is None else f"{trace.path}; {reason.text}"
    if trace.recomputed:
        path = f"recomputed; {trace.recomputed}"
    headers = {
        "x-pd-transfer-id": last["transfer_id"],
        "x-pd-decode": last["decode"],
        "x-pd-path": _plain(path),
    }
    if last["prefill"] is not None:
        headers["x-pd-prefill"] = last["prefill"]
        about = last.get("link") or last.get("hand_off_reason")
        headers["x-pd-hand-off"] = _plain(f"{last.get('hand_off')}; {about}" if about else str(last.get("hand_off")))
    if trace.first_token_from is not None:
        why = f"; {trace.why_first_token}" if trace.why_first_token else ""
        headers["x-pd-first-token"] = trace.first_token_from + why
    return headers


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() and c.isascii() else "?" for c in text)


class Relay:
    """Relays one opened answer."""

    def __init__(self, request: web.Request, attempt: Attempt, trace: Trace, timeouts: RouterTimeouts) -> None:
        self._request = request
        self._opened = attempt.opened
        self._whole = attempt.whole
        self._trace = trace
        self._timeouts = timeouts
        self._watch = RelayTimer(timeouts.total_s - trace.elapsed())
        self._decode = attempt.dispatch.decode.name
        self._events: WholeEvents | None = None
        if attempt.opened is not None:
            self._upstream = attempt.opened.response
            self._events = WholeEvents() if attempt.opened.streams else None

    async def run(self) -> web.StreamResponse:
        """Relay the answer to its end. If the client disconnects, this ends with CancelledError or ConnectionError.

        Raises:
            ValueError: the attempt has no answer yet.
        """
        if self._opened is None:
            raise ValueError("the attempt has no answer yet")
        reason = self._upstream.reason or ""  # as with headers, bytes that are not printable text are not passed on
        response = web.StreamResponse(status=self._upstream.status, reason=reason if reason.isprintable() else None)
        for name, value in end_to_end(self._upstream.headers):
            if self._whole is None or name.lower() != "content-length":
                response.headers.add(name, value)
        response.headers.update(pd_headers(self._trace))
        try:
            await response.prepare(self._request)
            await self._pass_on(response, self._opened.first)
        except asyncio.CancelledError:
            if not await self._told_stopped(response):
                raise
        finally:
            self._watch.stop()
        return response

    def _streams(self) -> bool:
        return self._events is not None

    async def _pass_on(self, response: web.StreamResponse, first: bytes) -> None:
        chunk: bytes | None = first
        if self._whole is not None:  # joined from two answers
            await self._write(response, self._whole)
            chunk = b""
        while chunk:
            await self._write(response, self._events.feed(chunk) if self._events else chunk)
            chunk = await self._next()
        if chunk is None:
            await self._interrupted(response)
        else:
            rest = self._events.rest() if self._events else b""
            if rest is None:
                await self._interrupted(response, ENDED_EARLY)
            else:
                await self._write(response, rest)
                await response.write_eof()
                self._trace.outcome = "ok" if self._upstream.status < 400 else "client_error"
        self._trace.status = self._upstream.status

    async def _next(self) -> bytes | None:
        """More of the answer; empty at its end, None if decode failed."""
        self._watch.expect("stall_s", self._timeouts.stall_s, self._upstream.close)
        try:
            return await self._upstream.content.readany()
        except (ClientError, OSError, asyncio.TimeoutError):
            return None

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        if data:
            self._watch.expect("client_stall_s", self._timeouts.client_stall_s, self._drop_client)
            await response.write(data)

    def _drop_client(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()

    async def _interrupted(self, response: web.StreamResponse, why: str = "") -> None:
        """Decode failed in the middle of its answer: send an error event if it is a stream, else cut the connection."""
        broke = f"timeouts.{self._watch.expired} passed" if self._watch.expired else "it broke the connection"
        why = why or broke
        message = f"decode server {self._decode} did not finish its answer: {why}"
        self._trace.outcome = "interrupted"
        await self._end(response, message, "upstream_interrupted")

    async def _told_stopped(self, response: web.StreamResponse) -> bool:
        """Because the router stops, end an answer that has begun.

        False: the answer has not begun, or the client disconnected.
        """
        if not stopped() or not response.prepared:
            return False
        self._trace.outcome = "stopped"
        self._trace.status = response.status
        await self._end(response, "the router stops before this answer is done: send the request again", STOPPING)
        return True

    async def _end(self, response: web.StreamResponse, message: str, code: str) -> None:
        self._trace.note = message
        if not self._streams():
            self._drop_client()  # only a cut body shows the client that it is incomplete
            return
        await self._write(response, b"data: " + error_body(message, SERVER, code) + b"\n\n")
        await response.write_eof()
