"""One dispatch of one request: in which order prefill and decode get it, and how both end."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import ClientError

from pdtransport.router import first_token
from pdtransport.router.call import PATHS, Call
from pdtransport.router.endpoints import Endpoint, Failure, is_replica
from pdtransport.router.first_token import FirstToken
from pdtransport.router.handoffs import HandOff, HandOffs
from pdtransport.router.metrics import Metrics
from pdtransport.router.settings import RouterSettings
from pdtransport.router.splice import Lost, VoidCheck, joined
from pdtransport.router.traces import Trace
from pdtransport.router.upstream import Opened, PrefillAnswer, Upstream, UpstreamError

Order = Literal["concurrent", "serial", "alone", "continued"]
_CLIENT_FAULTS = range(400, 500)
# If prefill refuses a body, decode probably does too and needs about as long: wait as long as prefill took, but at most
# this long.
_VERDICT_S = 1.0


class NoHandover(Exception):
    """Prefill answered but has no pages to hand over."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The servers that get a request, and in which order."""

    decode: Endpoint
    prefill: Endpoint | None
    order: Order
    why_order: str
    first: FirstToken | None = None  # order "continued": the token that decode continues from, which the client has


def prefill_params(transfer_id: str) -> dict[str, Any]:
    """kv_transfer_params for prefill."""
    return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}


def continue_params(first: FirstToken) -> dict[str, Any]:
    """kv_transfer_params for a decode that computes the prompt itself and continues from a token already given out."""
    return {"do_remote_decode": False, "do_remote_prefill": False, "continue_from": first.token}


class Attempt:
    """Runs a :class:`Dispatch`. Call :meth:`open` once, then always :meth:`close`.

    Each attempt has its own ``transfer_id``, so that late messages of an abandoned attempt can't reach another one.

    Attributes:
        opened: decode's answer, once it began. If ``first`` is set, :meth:`rest` waits for it.
        first: the token that prefill gave out and decode continues from. A streamed answer begins with it.
        whole: the complete body, if it is joined from both servers' answers.
        refusal: prefill's refusal of a body that decode answered by itself.
        hand_off: the state of the hand-off; None without one.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        prompt_tokens: int,
        trace: Trace,
        upstream: Upstream,
        settings: RouterSettings,
        metrics: Metrics,
        hand_offs: HandOffs,
    ) -> None:
        self.transfer_id = secrets.token_hex(16)
        self.dispatch = dispatch
        self.opened: Opened | None = None
        self.first: FirstToken | None = dispatch.first
        self.whole: bytes | None = None
        self.refusal: UpstreamError | None = None
        self.hand_off: HandOff | None = None
        self._asks = False  # prefill is asked for its first token
        self._trace = trace
        self._upstream = upstream
        self._settings = settings
        self._metrics = metrics
        self._hand_offs = hand_offs
        self._began = 0.0
        self._prefill: asyncio.Task[PrefillAnswer] | None = None
        self._decode: asyncio.Task[Opened] | None = None
        self._end_decode = dispatch.decode.begin(prompt_tokens)
        self._end_prefill = dispatch.prefill.begin(prompt_tokens) if dispatch.prefill else lambda: None

    async def open(self, call: Call, headers: list[tuple[str, str]]) -> None:
        """Send the request, then wait for decode's first bytes or, for a stream, for a first token from prefill.

        Raises:
            UpstreamError: a server failed, and nothing has reached the client.
            NoHandover: prefill has nothing to hand over, so decode would wait for pages that never come.
            first_token.Unusable: decode continues from prefill's token, but the token has no usable text; or decode
                promised to continue from a token that prefill gave to nobody, and the hand-off failed.
        """
        self._began = asyncio.get_running_loop().time()
        params: dict[str, Any] | None = None
        prefill = self.dispatch.prefill
        if prefill is not None:
            noted = self._trace.dispatches[-1]
            self.hand_off = self._hand_offs.begin(self.transfer_id, prefill, self.dispatch.decode, noted)
            self._asks = self._may_ask(call)
            self._prefill = self._start(self._run_prefill(prefill, call, headers))
            self._trace.mark("dispatched")
            if self.dispatch.order == "serial":
                params = await self._wait_for_prefill(self._prefill, prefill)
            elif prefill.control is not None:
                params = prefill.control.params(self.transfer_id)
                if self._asks:
                    params["first_token"] = True
        self._decode = self._start(self._run_decode(params, call, headers))
        self._trace.mark("decode_dispatched" if prefill is not None else "dispatched")
        self.opened = await self._race(self._decode, call)
        if self._asks and self.first is None and self.opened is not None and self.opened.response.status < 300:
            self.opened = await self._not_void(self.opened)
        if self.first is None:
            if call.stream:
                self._trace.mark("first_token")
        elif self.opened is not None and not call.stream:
            self.whole = await self._join(call, self.first, self.opened)

    def begin(self, call: Call, headers: list[tuple[str, str]]) -> None:
        """Send decode a request that continues from :attr:`first`; :meth:`rest` waits for the answer."""
        assert self.first is not None
        self._began = asyncio.get_running_loop().time()
        self._decode = self._start(self._run_decode(continue_params(self.first), call, headers))

    async def rest(self) -> Opened:
        """Wait for the answer of a decode that continues from the first token.

        Raises:
            UpstreamError: decode failed before its first bytes.
        """
        assert self._decode is not None
        while self.opened is None:
            name, until = self._next_deadline(None, stream=True)
            left = until - asyncio.get_running_loop().time()
            await asyncio.wait({self._decode}, timeout=max(left, 0))
            if not self._decode.done():
                raise self._too_slow(self.dispatch.decode, name)
            self.opened = self._decode.result()
        status = self.opened.response.status
        if status >= 300:  # it, or another decode server, accepted the same body before
            raise UpstreamError(self.dispatch.decode, "status", f"answers {status}", status)
        return self.opened

    def lost(self, why: str, how: Failure = "status") -> UpstreamError:
        """The error for a decode that did not continue from the first token; it counts as a failure of that server."""
        error = UpstreamError(self.dispatch.decode, how, why, 500)
        self._blame(error)
        return error

    def _may_ask(self, call: Call) -> bool:
        """True if prefill may be asked for the first token; otherwise the reason is noted in the trace."""
        why = "off" if self._settings.first_token == "off" else call.not_first
        if not why and self.dispatch.order != "concurrent":
            why = "serial"  # decode grants too late: its promise can't be in prefill's answer
        self._trace.first_token("decode" if why else None, why)
        return not why

    async def _join(self, call: Call, first: FirstToken, opened: Opened) -> bytes | None:
        """Prefill's first token and decode's rest as one body; None if decode answers with a client error."""
        if opened.response.status >= 300:
            return None
        try:
            left = self._settings.timeouts.total_s - self._trace.elapsed()
            raw = await asyncio.wait_for(self._upstream.whole(self.dispatch.decode, opened), max(left, 0))
            return joined(call.api, first, raw)
        except asyncio.TimeoutError:
            raise self._too_slow(self.dispatch.decode, "total_s") from None
        except Lost:
            raise self.lost("did not continue from the first token") from None
        except ValueError as error:
            raise self.lost(f"answers {error}") from None

    async def _not_void(self, opened: Opened) -> Opened:
        """Decode's answer, read up to its first token.

        Raises:
            first_token.Unusable: it is void.
            UpstreamError: the token did not come in time.
        """
        seen = VoidCheck(opened.streams)

        async def look() -> None:
            more = opened.first
            while more and not seen.feed(more):
                more = await opened.response.content.readany()

        name, until = self._next_deadline(None, opened.streams)
        try:
            await asyncio.wait_for(look(), max(until - asyncio.get_running_loop().time(), 0))
        except Lost:
            raise first_token.Unusable("decode lost a first token that prefill gave to nobody") from None
        except asyncio.TimeoutError:
            raise self._too_slow(self.dispatch.decode, name) from None
        except (ClientError, OSError):
            pass  # it broke: whoever passes it on sees that
        return Opened(opened.response, seen.data)

    def close(self) -> None:
        """Abandon all that still runs: connections close, so that the servers abort. Never blocks, never raises."""
        for task in (self._prefill, self._decode):
            if task is not None:
                task.cancel()
        opened = self.opened
        if opened is None and self._decode is not None and self._decode.done() and not self._decode.cancelled():
            opened = None if self._decode.exception() else self._decode.result()
        # Break a reference cycle: a task's exception holds stack frames, which hold this attempt and the request's
        # body. It would stay alive until the garbage collector runs.
        self._prefill = self._decode = None
        if opened is not None:
            opened.response.close()
        if self.hand_off is not None:
            self._hand_offs.end(self.hand_off, opened is not None and opened.response.status < 300)
        self._end_prefill()
        self._end_decode()

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # marks its exception as retrieved
        return task

    async def _run_prefill(self, prefill: Endpoint, call: Call, headers: list[tuple[str, str]]) -> PrefillAnswer:
        params = prefill_params(self.transfer_id)
        if self._asks:
            params["first_token"] = True
        path, body = PATHS[call.api], call.for_prefill(params, self._asks and call.token_ids)
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
            if self.hand_off is not None:
                self._hand_offs.nothing(self.hand_off, "prefill has nothing to hand over")
            raise NoHandover
        return params

    async def _race(self, decode: asyncio.Task[Opened], call: Call) -> Opened | None:
        """Wait for decode's first bytes, or for a failure of prefill before them (if both got the request at once).

        None: prefill gave out the first token of a stream.
        """
        prefill = self._prefill if self.dispatch.order == "concurrent" else None
        while True:
            waiting: set[asyncio.Task[Any]] = {decode} if prefill is None else {decode, prefill}
            answered = prefill is not None and self._asks and decode.done() and decode.exception() is None
            if answered and prefill is not None:
                if decode.result().response.status >= 300:
                    return decode.result()  # an error does not begin with a token
                if self.hand_off is not None and self.hand_off.held:
                    self._trace.first_token("decode", "no_promise")
                    return decode.result()
                waiting = {prefill}  # only prefill's answer shows whether decode's begins with the first token
            name, until = self._next_deadline(prefill, call.stream and not answered)
            left = until - asyncio.get_running_loop().time()
            await asyncio.wait(waiting, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            if decode in waiting and decode.done() and (prefill is None or not self._asks or decode.exception()):
                return decode.result()
            if prefill is not None and prefill.done():
                if isinstance(refusal := prefill.exception(), UpstreamError) and refusal.refused:
                    return await self._verdict(decode, refusal)
                params = self._handed_over(prefill)
                self._check_replica(params)
                if self._asks:
                    self._read_first(call, prefill.result().answer, params)
                    if self.first is not None and call.stream:
                        return None
                prefill = None
            elif asyncio.get_running_loop().time() >= until:
                late = self.dispatch.prefill if name == "prefill_s" or answered else None
                raise self._too_slow(late or self.dispatch.decode, name)

    async def _verdict(self, decode: asyncio.Task[Opened], refusal: UpstreamError) -> Opened:
        """Decode's answer to a body that prefill refused, if it has one by now or soon.

        An error that both servers share then costs no third request. A decode that waits for pages that will not come
        is soon abandoned.

        Raises:
            UpstreamError: ``refusal``, if decode has no answer.
        """
        took = asyncio.get_running_loop().time() - self._began
        await asyncio.wait({decode}, timeout=min(took, _VERDICT_S))
        if not decode.done() or decode.exception() is not None:
            raise refusal
        self.refusal = refusal.with_traceback(None)
        return decode.result()

    def _check_replica(self, params: dict[str, Any]) -> None:
        """Check that the data-parallel replica that decode asks for pages is the one that served prefill's request.

        Decode would otherwise wait for pages that another replica holds.

        Raises:
            UpstreamError: another replica served the request.
        """
        prefill, engine = self.dispatch.prefill, params.get("remote_engine_id")
        told = prefill.control if prefill is not None else None
        if prefill is None or told is None or not isinstance(engine, str) or not is_replica(engine):
            return
        if params.get("remote_port") != told.port:
            raise UpstreamError(prefill, "protocol", "answers from another data-parallel replica than decode asks")

    def _read_first(self, call: Call, answer: dict[str, Any], params: dict[str, Any]) -> None:
        try:
            self.first, why = first_token.read(call.api, answer, params)
        except first_token.Unusable:
            self._trace.first_token("decode", "unusable")
            raise
        self._trace.first_token("prefill" if self.first else "decode", why)
        if self.first is not None:
            self.dispatch.decode.goes_on = True

    def _next_deadline(self, prefill: asyncio.Task[Any] | None, stream: bool) -> tuple[str, float]:
        """Setting name and loop time of the deadline that comes first."""
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
