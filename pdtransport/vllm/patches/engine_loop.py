"""Finds the engine that runs a scheduler, from within one of its steps.

vLLM does not tell a connector whether new client requests are queued, or how the engine launches its steps.
:meth:`EngineLoop.of` finds out from the call stack. It returns None if the engine is not as expected: steps then run
as in plain vLLM, and an idle engine looks for client requests every few milliseconds.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pdtransport.vllm.patches.base import Patch, expect

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCoreProc


def _check() -> None:
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    expect(EngineCore.__init__, uses=["scheduler", "batch_queue", "vllm_config"])
    expect(EngineCoreProc.__init__, uses=["input_queue"])
    for step in (EngineCore.step, EngineCore.step_with_batch_queue):
        expect(step, takes=["self"], uses=["scheduler", "schedule"])


PATCH = Patch(
    "engine_loop",
    _check,
    setting="patches.engine_loop",
    needs=["step_ahead"],
    costs="an idle step sleeps 4 ms at most while pages are awaited; launches count as fast",
)


class EngineLoop:
    """The engine's main loop. Used in the engine's thread, within a step.

    Attributes:
        slow_launches: launching a step may take as long as computing it. (With CUDA graphs a launch is shorter than
            the step before it, which hides it.)
    """

    def __init__(self, core: EngineCoreProc) -> None:
        self._words = core.input_queue
        graphs = core.vllm_config.compilation_config.cudagraph_mode
        self.slow_launches = core.batch_queue is not None and (graphs is None or graphs.name == "NONE")

    @classmethod
    def of(cls, scheduler: Scheduler) -> EngineLoop | None:
        """The loop whose step is on the call stack; None if this vLLM version has another kind of engine."""
        try:
            from vllm.v1.engine.core import EngineCoreProc

            frame = sys._getframe(1)
            while frame.f_back is not None:
                frame = frame.f_back
                core = frame.f_locals.get("self")
                if isinstance(core, EngineCoreProc) and core.scheduler is scheduler:
                    return cls(core)
        except (ImportError, AttributeError) as error:
            PATCH.fail(str(error))
        return None

    def clients_wait(self) -> bool:
        """Whether the engine's input queue holds messages from clients or signal handlers."""
        return not self._words.empty()
