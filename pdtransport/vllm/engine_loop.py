"""The engine around a scheduler, seen from within one of its steps.

Nothing tells a connector that clients ask for something, or how an engine launches its steps. :meth:`EngineLoop.of`
finds out; where the engine is not as expected there is none, and steps go vLLM's own way.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCoreProc

logger = logging.getLogger(__name__)


class EngineLoop:
    """Used in the engine's thread, within a step.

    ``slow_launches``: launching a step may take as long as computing it. With CUDA graphs it takes less than the step
    before it, which hides it. ``waits_for_workers``: no step begins before the worker has launched the one before it.
    """

    def __init__(self, core: EngineCoreProc) -> None:
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        self._words = core.input_queue
        graphs = core.vllm_config.compilation_config.cudagraph_mode
        ahead = core.batch_queue is not None
        self.slow_launches = ahead and (graphs is None or graphs.name == "NONE")
        self.waits_for_workers = not ahead or isinstance(core.model_executor, UniProcExecutor)

    @classmethod
    def of(cls, scheduler: Scheduler) -> EngineLoop | None:
        """The one whose step called us; None where this vLLM has another."""
        try:
            from vllm.v1.engine.core import EngineCoreProc

            frame = sys._getframe(1)
            while frame.f_back is not None:
                frame = frame.f_back
                core = frame.f_locals.get("self")
                if isinstance(core, EngineCoreProc) and core.scheduler is scheduler:
                    return cls(core)
        except (ImportError, AttributeError) as error:
            logger.info("the engine's loop is left alone: %s", error)
        return None

    def clients_wait(self) -> bool:
        """Clients or a signal handler told the engine something that it has not looked at."""
        return not self._words.empty()
