"""``GET /pd/engine`` of vLLM's own HTTP server: does the engine answer?

vLLM's ``/health`` is answered by the HTTP process alone: it says 200 while the process of the engine's core is stopped
or hangs. This path puts a question to the core, which costs no step: the core answers between two steps, or at once
where it is idle. The router asks (``pdtransport/router/health.py``).
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any

logger = logging.getLogger(__name__)

PATH = "/pd/engine"
ANSWER_S = 10.0  # then 503; the question stays with the core, and nobody asks another one meanwhile
_HTTP_PROCESS = "vllm.entrypoints.launchers.api_server.routers"  # loaded where vLLM serves HTTP


class EngineProbe:
    """One question at a time, whose answer is for all who ask meanwhile: who floods the path costs the core nothing.

    Args:
        answer_s: how long one who asks waits.
    """

    def __init__(self, answer_s: float = ANSWER_S) -> None:
        self._answer_s = answer_s
        self._asked: asyncio.Future[Any] | None = None

    async def answers(self, ask: Callable[[], Awaitable[Any]]) -> bool:
        """Whether the engine answers ``ask`` in time. An error is an answer, too: that an engine is dead, vLLM's
        ``/health`` says."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.ensure_future(ask())
            self._asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
        asked = self._asked
        await asyncio.wait({asked}, timeout=self._answer_s)
        return asked.done()


def offer_probe() -> None:
    """Add the path to those of vLLM's HTTP server, before it makes its application. Elsewhere, and where this vLLM is
    not as expected, nothing happens: who asks gets a 404."""
    if _HTTP_PROCESS not in sys.modules:
        return
    try:
        from starlette.responses import JSONResponse, Response
        from vllm.entrypoints.serve.instrumentator.health import engine_client, router
        from vllm.v1.engine.async_llm import AsyncLLM

        assert callable(AsyncLLM.is_paused)
    except (ImportError, AttributeError, AssertionError) as error:
        logger.info("%s is not offered, since vLLM's HTTP server is another: %s", PATH, error)
        return
    probe = EngineProbe()

    async def answer(request: Any) -> Response:
        client = engine_client(request)
        if not isinstance(client, AsyncLLM):
            return JSONResponse({"engine": "can't be asked"}, 404)
        does = await probe.answers(client.is_paused)
        return JSONResponse({"engine": "answers" if does else "does not answer"}, 200 if does else 503)

    if not any(getattr(route, "path", "") == PATH for route in router.routes):
        router.add_route(PATH, answer, methods=["GET"], include_in_schema=False)
