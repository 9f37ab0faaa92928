"""A stream that begins with prefill's first token, before decode has answered.

From then on the client has a token that can't be replaced: whatever happens to decode, the answer continues from it or
ends with an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from pdtransport.router.attempt import Attempt
from pdtransport.router.call import Call
from pdtransport.router.ladder import FallbackPolicy
from pdtransport.router.relay import ENDED_EARLY, Relay, pd_headers
from pdtransport.router.settings import RouterTimeouts
from pdtransport.router.splice import Lost, StreamSplice, opening
from pdtransport.router.traces import Trace
from pdtransport.router.upstream import Opened, UpstreamError


class EarlyRelay(Relay):
    """Relays one such answer, and closes its attempts.

    Args:
        decode_began: called once the request's body is no longer needed.
    """

    def __init__(
        self,
        request: web.Request,
        attempt: Attempt,
        trace: Trace,
        timeouts: RouterTimeouts,
        call: Call,
        headers: list[tuple[str, str]],
        ladder: FallbackPolicy,
        decode_began: Callable[[], None],
    ) -> None:
        super().__init__(request, attempt, trace, timeouts)
        self._attempt = attempt
        self._call = call
        self._headers = headers
        self._ladder = ladder
        self._decode_began = decode_began

    async def run(self) -> web.StreamResponse:
        """Send the first token at once, then decode's events; errors as :meth:`Relay.run`."""
        first = self._attempt.first
        assert first is not None
        response = web.StreamResponse()
        response.headers["Content-Type"] = "text/event-stream; charset=utf-8"
        response.headers.update(pd_headers(self._trace))
        try:
            await response.prepare(self._request)
            await self._write(response, opening(self._call.api, first, self._call.token_ids))
            self._trace.mark("first_token")
            await self._follow(response)
        except asyncio.CancelledError:
            if not await self._told_stopped(response):
                raise
        finally:
            self._watch.stop()
            self._attempt.close()
        return response

    def _streams(self) -> bool:
        return True

    async def _follow(self, response: web.StreamResponse) -> None:
        tries = 0
        while True:  # the fallback policy ends the loop
            self._watch.stop()  # the attempt has its own timeouts until decode answers
            try:
                await self._pass_rest(response, await self._attempt.rest())
                return
            except UpstreamError as error:
                try:
                    self._attempt = await self._ladder.go_on(
                        self._call, self._headers, self._trace, self._attempt, error, tries
                    )
                except UpstreamError:
                    self._decode = self._attempt.dispatch.decode.name
                    await self._interrupted(response, str(error))
                    self._trace.status = 200
                    return
                self._decode = self._attempt.dispatch.decode.name
                tries += 1

    async def _pass_rest(self, response: web.StreamResponse, opened: Opened) -> None:
        """Relay decode's events.

        Raises:
            UpstreamError: decode failed, and nothing of its answer has reached the client.
        """
        self._upstream, splice, passed = opened.response, StreamSplice(self._call.api), False
        chunk: bytes | None = opened.first
        while chunk:
            try:
                data = splice.feed(chunk)
            except Lost:
                raise self._attempt.lost("did not continue from the first token") from None
            if data and not passed:
                passed = True
                self._decode_began()
            await self._write(response, data)
            chunk = await self._next()
        if not passed and chunk is None:
            raise self._attempt.lost("broke the connection before its first token", "disconnected")
        if not passed:
            raise self._attempt.lost("ended its stream before its first token")
        rest = splice.rest() if chunk is not None else None
        if chunk is None or rest is None:
            await self._interrupted(response, "" if chunk is None else ENDED_EARLY)
        else:
            await self._write(response, rest)
            await response.write_eof()
            self._trace.outcome = "ok"
        self._trace.status = opened.response.status
