"""One dispatch of one request: the order in which prefill and decode get it, and what becomes of both."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from pdtransport.router.call import PATHS, Call
from pdtransport.router.endpoints import Endpoint
from pdtransport.router.metrics import Metrics
from pdtransport.router.settings import RouterSettings
from pdtransport.router.traces import Trace
from pdtransport.router.upstream import Opened, PrefillAnswer, Upstream, UpstreamError

Order = Literal["concurrent", "serial", "alone"]
_CLIENT_FAULTS = range(400, 500)


class NoHandover(Exception):
    """Prefill answered, and has no pages to hand over."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Who gets a request, and in which order."""

    decode: Endpoint
    prefill: Endpoint | None
    order: Order
    why_order: str


def prefill_params(transfer_id: str) -> dict[str, Any]:
    """kv_transfer_params for prefill."""
    return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}


class Attempt:
    """Runs a :class:`Dispatch`. :meth:`open` once, then :meth:`close`, whatever happened.

    Each attempt has its own ``transfer_id``, so that nothing late of a given-up one can reach another.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        prompt_tokens: int,
        trace: Trace,
        upstream: Upstream,
        settings: RouterSettings,
        metrics: Metrics,
    ) -> None:
        self.transfer_id = secrets.token_hex(16)
        self.dispatch = dispatch
        self.opened: Opened | None = None
        self._trace = trace
        self._upstream = upstream
        self._settings = settings
        self._metrics = metrics
        self._began = 0.0
        self._prefill: asyncio.Task[PrefillAnswer] | None = None
        self._decode: asyncio.Task[Opened] | None = None
        self._end_decode = dispatch.decode.begin(prompt_tokens)
        self._end_prefill = dispatch.prefill.begin(prompt_tokens) if dispatch.prefill else lambda: None

    async def open(self, call: Call, headers: list[tuple[str, str]]) -> Opened:
        """Send the request and wait for the first bytes of decode's answer.

        Raises:
            UpstreamError: a server failed, and nothing has reached the client.
            NoHandover: prefill has nothing to hand over, so decode would wait for nothing.
        """
        self._began = asyncio.get_running_loop().time()
        params: dict[str, Any] | None = None
        prefill = self.dispatch.prefill
        if prefill is not None:
            self._prefill = self._start(self._run_prefill(prefill, call, headers))
            self._trace.mark("dispatched")
            if self.dispatch.order == "serial":
                params = await self._wait_for_prefill(self._prefill, prefill)
            elif prefill.control is not None:
                params = prefill.control.params(self.transfer_id)
        self._decode = self._start(self._run_decode(params, call, headers))
        self._trace.mark("decode_dispatched" if prefill is not None else "dispatched")
        self.opened = await self._race(self._decode, call.stream)
        if call.stream:
            self._trace.mark("first_token")
        return self.opened

    def close(self) -> None:
        """Give up whatever still runs: connections close, so that the servers abort. Never blocks, never raises."""
        for task in (self._prefill, self._decode):
            if task is not None:
                task.cancel()
        opened = self.opened
        if opened is None and self._decode is not None and self._decode.done() and not self._decode.cancelled():
            opened = None if self._decode.exception() else self._decode.result()
        if opened is not None:
            opened.response.close()
        self._end_prefill()
        self._end_decode()

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # its failure was seen
        return task

    async def _run_prefill(self, prefill: Endpoint, call: Call, headers: list[tuple[str, str]]) -> PrefillAnswer:
        path, body = PATHS[call.api], call.for_prefill(prefill_params(self.transfer_id))
        began = asyncio.get_running_loop().time()
        try:
            answer = await self._upstream.prefill(prefill, path, body, headers, self.transfer_id)
        except UpstreamError as error:
            self._blame(error)
            if self.opened is not None:
                self._trace.note = f"decode began before prefill failed: {error}"
            raise
        finally:
            self._end_prefill()
        self._trace.mark("prefill_response")
        self._metrics.prefill.observe(asyncio.get_running_loop().time() - began, self.dispatch.order)
        prefill.succeeded()
        if answer.params is not None:
            prefill.learn(answer.params)
        return answer

    async def _run_decode(self, params: dict[str, Any] | None, call: Call, headers: list[tuple[str, str]]) -> Opened:
        path, body = PATHS[call.api], call.for_decode(params)
        decode = self.dispatch.decode
        try:
            opened = await self._upstream.decode(decode, path, body, headers, self._trace.mark)
        except UpstreamError as error:
            self._blame(error)
            raise
        decode.succeeded()
        return opened

    def _blame(self, error: UpstreamError) -> None:
        if error.status not in _CLIENT_FAULTS:
            error.endpoint.failed(str(error), error.how, self._settings.health)

    async def _wait_for_prefill(self, task: asyncio.Task[PrefillAnswer], prefill: Endpoint) -> dict[str, Any]:
        name, until = self._next_deadline(task, stream=False)
        await asyncio.wait({task}, timeout=max(until - asyncio.get_running_loop().time(), 0))
        if not task.done():
            raise self._too_slow(prefill, name)
        return self._handed_over(task)

    def _handed_over(self, task: asyncio.Task[PrefillAnswer]) -> dict[str, Any]:
        params = task.result().params
        if params is None:
            raise NoHandover
        return params

    async def _race(self, decode: asyncio.Task[Opened], stream: bool) -> Opened:
        """Decode's first bytes, unless prefill fails before them (where both got the request at once)."""
        prefill = self._prefill if self.dispatch.order == "concurrent" else None
        while True:
            name, until = self._next_deadline(prefill, stream)
            waiting: set[asyncio.Task[Any]] = {decode} if prefill is None else {decode, prefill}
            left = until - asyncio.get_running_loop().time()
            await asyncio.wait(waiting, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            if decode.done():
                return decode.result()
            if prefill is not None and prefill.done():
                self._handed_over(prefill)
                prefill = None
            elif asyncio.get_running_loop().time() >= until:
                late = self.dispatch.prefill if name == "prefill_s" else None
                raise self._too_slow(late or self.dispatch.decode, name)

    def _next_deadline(self, prefill: asyncio.Task[Any] | None, stream: bool) -> tuple[str, float]:
        """Name and loop time of the wait that ends first."""
        timeouts = self._settings.timeouts
        now = asyncio.get_running_loop().time()
        deadlines = [("total_s", now + timeouts.total_s - self._trace.elapsed())]
        if stream:
            deadlines.append(("first_byte_s", self._began + timeouts.first_byte_s))
        if prefill is not None:
            deadlines.append(("prefill_s", self._began + timeouts.prefill_s))
        return min(deadlines, key=lambda deadline: deadline[1])

    def _too_slow(self, endpoint: Endpoint, setting: str) -> UpstreamError:
        seconds = getattr(self._settings.timeouts, setting)
        error = UpstreamError(endpoint, "timeout", f"did not answer within timeouts.{setting} ({seconds:g} s)")
        self._blame(error)
        return error
