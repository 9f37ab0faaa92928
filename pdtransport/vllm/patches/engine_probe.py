"""Adds ``GET /pd/engine`` to vLLM's HTTP server, a health check that includes the engine core.

vLLM's ``/health`` is answered by the HTTP process alone and returns 200 even if the engine core's process is stopped or
hangs. This path sends a request to the core, which answers between two steps, or at once if idle; it costs no step. The
router uses it (``pdtransport/router/health.py``). Without this hook the path returns 404, and routers use ``/health``.

The path must be added before vLLM creates its application, when the settings are not known yet. So the switch is
checked when a request for the path comes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from pdtransport.vllm.patches.base import Patch, Unexpected, expect
from pdtransport.vllm.patches.model_loading import our_settings

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


def _check() -> None:
    from vllm.entrypoints.serve.instrumentator.health import engine_client, router
    from vllm.v1.engine.async_llm import AsyncLLM

    expect(engine_client, takes=["request"], uses=["app", "state", "engine_client"])
    expect(AsyncLLM.is_paused, takes=["self"], uses=["engine_core"])  # the core answers it
    expect(AsyncLLM.__init__, uses=["vllm_config"])
    if not asyncio.iscoroutinefunction(AsyncLLM.is_paused):
        raise Unexpected("AsyncLLM.is_paused is no coroutine")
    expect(router.add_route, accepts=["path", "endpoint", "methods", "include_in_schema"])
    _ = router.routes


PATCH = Patch(
    "engine_probe",
    _check,
    setting="patches.engine_probe",
    costs=f"{PATH} returns 404: routers don't notice an engine that hangs behind a server that answers",
)


def offer_probe() -> None:
    """Add the path to vLLM's HTTP server, before it creates its application.

    In other processes, and if vLLM is not as expected, nothing is added: the path then returns 404.
    """
    if _HTTP_PROCESS not in sys.modules or not PATCH.allowed():
        return
    from starlette.responses import JSONResponse, Response
    from vllm.entrypoints.serve.instrumentator.health import engine_client, router
    from vllm.v1.engine.async_llm import AsyncLLM

    probe = EngineProbe()

    async def answer(request: Any) -> Response:
        client = engine_client(request)
        if not isinstance(client, AsyncLLM):
            return JSONResponse({"engine": "can't be asked"}, 404)
        settings = our_settings(client.vllm_config)
        if settings is None or not settings.patches.engine_probe:
            return JSONResponse({"engine": "is not asked: patches.engine_probe is false"}, 404)
        does = await probe.answers(client.is_paused)
        return JSONResponse({"engine": "answers" if does else "does not answer"}, 200 if does else 503)

    if not any(getattr(route, "path", "") == PATH for route in router.routes):
        router.add_route(PATH, answer, methods=["GET"], include_in_schema=False)
