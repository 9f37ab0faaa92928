"""The engine around a scheduler, seen from within one of its steps.

Nothing tells a connector that clients ask for something, or how many steps the engine keeps under way. What is taken
hold of, :meth:`EngineLoop.of` says; where it is not as expected there is none, and steps go vLLM's own way.
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
    """Used in the engine's thread, within a step."""

    def __init__(self, core: EngineCoreProc) -> None:
        self._core = core
        self._words = core.input_queue
        self._depth = core.batch_queue_size
        # With CUDA graphs a step is launched in less time than the one before it takes, which hides that.
        graphs = core.vllm_config.compilation_config.cudagraph_mode
        self._slow_launches = core.batch_queue is not None and (graphs is None or graphs.name == "NONE")

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

    def answer_first(self) -> None:
        """Look at the outcome of the step that begins before another is launched, if nothing else is under way and
        launches are slow: its first token would wait for as long as launching the next one takes."""
        if self._slow_launches and not self._core.batch_queue:
            self._core.batch_queue_size = 1

    def as_before(self) -> None:
        self._core.batch_queue_size = self._depth
