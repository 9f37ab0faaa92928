"""Keeps a running request out of the step that begins.

Used for requests whose first step must be processed before another step is launched; its result would otherwise be
read a step later. vLLM has a field for that, ``Request.next_decode_eligible_step``. Without this hook such requests are
launched again at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdtransport.vllm.patches.base import Patch, expect

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


def _check() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    expect(Request.__init__, uses=["next_decode_eligible_step"])
    expect(Scheduler.schedule, order=["current_step", "new_step_starts", "next_decode_eligible_step"])


PATCH = Patch(
    "hold_back",
    _check,
    setting="patches.hold_back",
    needs=["step_ahead"],
    costs="where launching is slow, a received request's first token waits for the next launch",
)


def can_hold_back(scheduler: Scheduler, request: Request) -> bool:
    """Whether :func:`hold_back` works with this vLLM."""
    return PATCH.active and hasattr(scheduler, "current_step") and hasattr(request, "next_decode_eligible_step")


def hold_back(scheduler: Scheduler, request: Request) -> None:
    """Keep this running request out of the step that begins."""
    request.next_decode_eligible_step = scheduler.current_step + 1
