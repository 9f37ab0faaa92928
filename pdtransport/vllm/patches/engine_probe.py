"""Adds ``GET /pd/engine`` to vLLM's HTTP server, a health check that includes the engine core.

vLLM's ``/health`` is answered by the HTTP process alone and returns 200 even if the engine core's process is stopped or
hangs. This path sends a request to the core, which answers between two steps, or at once if idle; it costs no step. The
router uses it (``pdtransport/router/health.py``).
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any

logger = logging.getLogger(__name__)

PATH = "/pd/engine"
ANSWER_S = 10.0  # then respond 503; the request to the core stays pending, and no other is sent meanwhile
_HTTP_PROCESS = "vllm.entrypoints.launchers.api_server.routers"  # loaded only in processes that serve HTTP


class EngineProbe:
    """Sends one request to the core at a time, shared by all concurrent callers, so that floods don't reach the core.

    Args:
        answer_s: how long a caller waits.
    """

    def __init__(self, answer_s: float = ANSWER_S) -> None:
        self._answer_s = answer_s
        self._asked: asyncio.Future[Any] | None = None

    async def answers(self, ask: Callable[[], Awaitable[Any]]) -> bool:
        """Whether the engine answers ``ask`` in time.

        An error counts as an answer: vLLM's ``/health`` already reports dead engines.
        """
        if self._asked is None or self._asked.done():
            self._asked = asyncio.ensure_future(ask())
            self._asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
        asked = self._asked
        await asyncio.wait({asked}, timeout=self._answer_s)
        return asked.done()


def offer_probe() -> None:
    """Add the path to vLLM's HTTP server, before it creates its application.

    In other processes, and if vLLM is not as expected, nothing is added: the path then returns 404.
    """
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
