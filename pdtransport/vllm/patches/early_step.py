"""What :class:`pdtransport.vllm.early.EarlyStep` takes hold of: it settles a step's outcome before vLLM looks at it.

Without this hook a request begins when all its pages are there.
"""

from __future__ import annotations

from pdtransport.vllm.patches.base import Patch, Unexpected, expect


def _check() -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    expect(Scheduler.__init__, uses=["prev_step_scheduled_req_ids", "recompute_kv_load_failures", "kv_cache_manager"])
    expect(
        Scheduler.update_from_output,
        takes=["self", "scheduler_output", "model_runner_output"],
        uses=["kv_connector_output"],
    )
    expect(Scheduler._preempt_request, takes=["self", "request", "timestamp"], accepts=["drop_stale_output"])
    expect(Request.__init__, uses=["num_stale_output_tokens", "num_preemptions"])
    if not hasattr(SamplingParams, "__struct_fields__"):
        raise Unexpected("SamplingParams does not list its fields")


PATCH = Patch(
    "early_step",
    _check,
    setting="early_step",
    needs=["step_ahead", "late_caching", "hold_back", "engine_loop"],
    costs="a request's first step begins when its last pages are there, 5 to 30 ms later on a GPU",
)
