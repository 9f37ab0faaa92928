"""Reduces the prompt of a vLLM request to its first token, before it is scheduled.

Used for prefill requests whose only purpose is a hand-over that is not possible
(:mod:`pdtransport.vllm.beyond_window`). Without this hook prefill, too, computes the whole prompt; decode's answer is
the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdtransport.vllm.patches.base import Patch, Unexpected, expect

if TYPE_CHECKING:
    from vllm.v1.request import Request


def _check() -> None:
    """Check what the hook relies on, and try the change on a request."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.request import Request

    expect(Request.__init__, uses=["prompt_token_ids", "_all_token_ids", "num_prompt_tokens", "block_hashes"])
    expect(Request.update_block_hashes, takes=["self"])
    try:
        request = Request("window-probe", [1, 2, 3], SamplingParams(max_tokens=1), None)
        shorten(request)
        new = NewRequestData.from_request(request, ([],))
        works = request.prompt_token_ids == new.prompt_token_ids == list(request.all_token_ids) == [1]
        works = works and (request.num_tokens, request.num_prompt_tokens, request.num_output_tokens) == (1, 1, 0)
    except Exception as error:  # whatever is missing: an unknown vLLM version
        raise Unexpected(f"a request whose prompt is changed fails: {error!r}") from error
    if not works:
        raise Unexpected("a shortened request differs from one made with the shorter prompt")


PATCH = Patch(
    "shortened_prompt",
    _check,
    setting="patches.shortened_prompt",
    costs="prompts that are longer than the model's window are computed twice, on prefill and on decode",
)


def shorten(request: Request) -> None:
    """Keep only the first prompt token; its KV is the same as in the whole prompt."""
    assert request.prompt_token_ids is not None
    request.prompt_token_ids = list(request.prompt_token_ids[:1])
    del request._all_token_ids[1:]
    request.num_prompt_tokens = 1
    request.block_hashes.clear()
    request.update_block_hashes()
