"""What to try when a server fails before the client got a byte: another server, then decode alone, then an error.

Every fallback is visible in the answer's x-pd-path header, in the trace and in the metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pdtransport.router.attempt import Attempt, Dispatch, NoHandover
from pdtransport.router.call import Call, Reason
from pdtransport.router.endpoints import Endpoint, Fleet, usable
from pdtransport.router.first_token import Unusable
from pdtransport.router.handoffs import UNFIT, HandOff, HandOffs
from pdtransport.router.metrics import Metrics
from pdtransport.router.placer import Placer
from pdtransport.router.settings import RouterSettings
from pdtransport.router.traces import Trace, Traces
from pdtransport.router.upstream import Upstream, UpstreamError
from pdtransport.serving.errors import SERVER, ApiError, is_openai_error


@dataclass
class RetryState:
    """How much of the fallback sequence one request has used up."""

    decode_only_reason: Reason | None
    prefill_left: int
    decode_left: int
    avoid: set[Endpoint] = field(default_factory=set)
    last: UpstreamError | None = None  # last failure of decode
    refused: HandOff | None = None  # hand-off of an attempt that prefill refused


class FallbackPolicy:
    """Dispatches requests until one attempt's answer begins."""

    def __init__(
        self,
        settings: RouterSettings,
        fleet: Fleet,
        placer: Placer,
        upstream: Upstream,
        traces: Traces,
        metrics: Metrics,
        hand_offs: HandOffs,
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._placer = placer
        self._upstream = upstream
        self._traces = traces
        self._metrics = metrics
        self._hand_offs = hand_offs

    async def open(self, call: Call, headers: list[tuple[str, str]], trace: Trace) -> Attempt:
        """Returns the attempt whose answer began; the caller relays the answer and closes the attempt.

        Raises:
            ApiError: no server could serve the request.
        """
        settings = self._settings
        rungs = RetryState(self._decode_only_reason(call), settings.prefill_retries, settings.decode_retries)
        while True:  # terminates: each failure uses up a retry or ends disaggregation
            dispatch = await self._place(call, rungs)
            attempt = self._attempt(dispatch, call, trace)
            self._note(attempt, trace, rungs)
            try:
                await attempt.open(call, headers)
            except NoHandover:
                attempt.close()
                name = dispatch.prefill.name if dispatch.prefill else ""
                why = f"prefill server {name} had nothing to hand over"
                self._leave_prefill(Reason("no_handover", why), rungs, trace)
            except Unusable as unusable:
                attempt.close()
                why = str(unusable) or "prefill gave out a first token whose text is not usable"
                self._leave_prefill(Reason("first_token_unusable", why), rungs, trace)
            except UpstreamError as error:
                error.with_traceback(None)  # the error is kept; its traceback would keep the request's body alive
                attempt.close()
                if error.refused:
                    rungs.refused = attempt.hand_off
                self._step_down(error, dispatch, rungs, trace)
            except BaseException:
                attempt.close()
                raise
            else:
                if attempt.refusal is not None:
                    rungs.refused = attempt.hand_off
                    trace.decode_only(Reason("prefill_refused", str(attempt.refusal)))
                if rungs.refused is not None and attempt.opened and attempt.opened.response.status < 300:
                    reason = trace.decode_only_reason
                    self._hand_offs.refused(rungs.refused, reason.text if reason else "")
                return attempt

    async def go_on(
        self,
        call: Call,
        headers: list[tuple[str, str]],
        trace: Trace,
        failed: Attempt,
        error: UpstreamError,
        tries: int,
    ) -> Attempt:
        """Make another attempt after ``failed``, whose first token the client already has.

        The attempt computes what follows that token. It goes to a decode server that is known to support continuing
        from a given token and that computes the prompt itself.

        Args:
            tries: number of such attempts so far.

        Raises:
            UpstreamError: ``error``, if there is no such server, or ``tries`` reached the limit.
        """
        first = failed.first
        assert first is not None
        failed.close()
        trace.failure(str(error))
        self._metrics.retries.add(error.endpoint.role, error.how)
        known = [endpoint for endpoint in self._fleet.decode if endpoint.goes_on]
        decode = await self._placer.choose("decode", call, usable(known))
        if decode is None or tries >= max(self._settings.decode_retries, 1):
            raise error
        dispatch = Dispatch(decode, None, "continued", f"the client has the first token; {error}", first)
        attempt = self._attempt(dispatch, call, trace)
        trace.dispatch(attempt.transfer_id, dispatch.order, dispatch.why_order[:300], None, decode.name)
        self._traces.add(trace)
        attempt.begin(call, headers)
        return attempt

    def _attempt(self, dispatch: Dispatch, call: Call, trace: Trace) -> Attempt:
        return Attempt(
            dispatch, call.prompt_tokens, trace, self._upstream, self._settings, self._metrics, self._hand_offs
        )

    def _decode_only_reason(self, call: Call) -> Reason | None:
        if call.decode_only_reason is not None:
            return call.decode_only_reason
        tokens, size = self._settings.min_disagg_tokens, self._settings.min_disagg_bytes
        if call.prompt_tokens < tokens:
            return Reason("short_prompt", f"the prompt has fewer than min_disagg_tokens ({tokens}) tokens")
        if call.prompt_bytes < size:
            return Reason("short_prompt", f"the prompt has fewer than min_disagg_bytes ({size}) bytes")
        return None

    async def _place(self, call: Call, rungs: RetryState) -> Dispatch:
        candidates = usable(self._fleet.decode, rungs.avoid) or usable(self._fleet.decode)
        decode = await self._placer.choose("decode", call, candidates)
        if decode is None:
            raise self._final(rungs.last) if rungs.last else self._unavailable()
        if rungs.decode_only_reason is None and decode.unfit:
            rungs.decode_only_reason = Reason(UNFIT["decode"], f"decode server {decode.name} {decode.unfit}")
        if rungs.decode_only_reason is None:
            fit = [one for one in self._fleet.prefill if not one.unfit]
            candidates = usable(fit, rungs.avoid) or usable(fit)
            prefill = await self._placer.choose("prefill", call, candidates, decode)
            if prefill is not None:
                return self._ordered(decode, prefill)
            rungs.decode_only_reason = self._no_prefill()
        return Dispatch(decode, None, "alone", rungs.decode_only_reason.code)

    def _no_prefill(self) -> Reason:
        for one in usable(self._fleet.prefill):
            return Reason(UNFIT["prefill"], f"prefill server {one.name} {one.unfit}")
        return Reason("no_prefill", "no prefill server is healthy")

    def _ordered(self, decode: Endpoint, prefill: Endpoint) -> Dispatch:
        if self._settings.dispatch == "serial":
            return Dispatch(decode, prefill, "serial", "dispatch is set to serial")
        if prefill.replicated:
            return Dispatch(
                decode,
                prefill,
                "serial",
                "prefill has data-parallel replicas, and only its answer says which one is used",
            )
        if prefill.control is None:
            return Dispatch(decode, prefill, "serial", "prefill's control address is not known yet")
        return Dispatch(decode, prefill, "concurrent", "dispatch is set to concurrent")

    def _note(self, attempt: Attempt, trace: Trace, rungs: RetryState) -> None:
        dispatch = attempt.dispatch
        prefill = dispatch.prefill.name if dispatch.prefill else None
        trace.path = "disaggregated" if prefill else "decode-only"
        trace.decode_only_reason = rungs.decode_only_reason
        trace.first_token(None)
        trace.dispatch(attempt.transfer_id, dispatch.order, dispatch.why_order, prefill, dispatch.decode.name)
        self._traces.add(trace)

    def _leave_prefill(self, reason: Reason, rungs: RetryState, trace: Trace) -> None:
        rungs.decode_only_reason = reason
        trace.failure(reason.text)
        self._metrics.retries.add("prefill", reason.code)

    def _step_down(self, error: UpstreamError, dispatch: Dispatch, rungs: RetryState, trace: Trace) -> None:
        """Decide what the next attempt leaves out, or raise the request's final error."""
        trace.failure(str(error))
        if error.endpoint.role == "prefill":
            self._after_prefill(error, rungs)
        else:
            rungs.last = error
            self._after_decode(error, dispatch, rungs)
        self._metrics.retries.add(error.endpoint.role, error.how)

    def _after_prefill(self, error: UpstreamError, rungs: RetryState) -> None:
        if error.refused:  # decode makes the answer, so it decides whether the request is wrong
            rungs.decode_only_reason = Reason("prefill_refused", str(error))
            return
        rungs.avoid.add(error.endpoint)
        # A broken connection may have been an idle one that the server closed, so the same server is worth another try.
        others = usable(self._fleet.prefill, () if error.how == "disconnected" else rungs.avoid)
        if error.how == "timeout" or not rungs.prefill_left or not others:
            rungs.decode_only_reason = Reason("prefill_failed", str(error))
            return
        rungs.prefill_left -= 1

    def _after_decode(self, error: UpstreamError, dispatch: Dispatch, rungs: RetryState) -> None:
        rungs.avoid.add(error.endpoint)
        others = usable(self._fleet.decode, rungs.avoid)
        again = others or usable(self._fleet.decode)
        said_no = error.how == "status"
        if said_no and dispatch.prefill is not None:
            rungs.avoid.add(dispatch.prefill)  # perhaps its pages did not arrive
        last = not others or not rungs.decode_left  # the last disaggregated attempt
        may = bool(rungs.decode_left) or (
            said_no and not rungs.decode_only_reason and self._settings.decode_retries > 0
        )
        if error.how == "timeout" or not again or not may or (said_no and last and rungs.decode_only_reason):
            raise self._final(error)
        rungs.decode_left = max(0, rungs.decode_left - 1)
        if said_no and last:
            rungs.decode_only_reason = Reason("decode_failed", f"{error} to a disaggregated request")

    def _final(self, error: UpstreamError) -> ApiError:
        """The error for the client: the server's own if it is in OpenAI's format."""
        if error.status and is_openai_error(error.body):
            return ApiError(error.status, str(error), code="upstream_error", raw=error.body)
        status, code = (504, "upstream_timeout") if error.how == "timeout" else (502, "upstream_error")
        return ApiError(status, str(error), kind=SERVER, code=code)

    def _unavailable(self) -> ApiError:
        return ApiError(
            503,
            "no decode server is healthy: check /health of the router and the decode servers' logs",
            kind=SERVER,
            code="no_decode_server",
            headers={"Retry-After": str(self._settings.retry_after_s)},
        )
