"""Appends a token to the prompt of a vLLM request before it is scheduled, or makes the request end with its next token.

With this hook decode continues from the first token that prefill sampled (:mod:`pdtransport.vllm.first_token`). Without
it decode makes no such promise and samples the first token itself.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from pdtransport.vllm.patches.base import Patch, Unexpected, expect

if TYPE_CHECKING:
    from vllm.v1.request import Request

# stop_reason of a decode request whose promised first token did not arrive. The one token in its response must not be
# used.
LOST = "pdtransport:first-token-lost"


def _check() -> None:
    """Check what the hook relies on, and try both changes on a request."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.request import Request

    expect(Request.__init__, uses=["prompt_token_ids", "_all_token_ids", "num_prompt_tokens", "max_tokens"])
    expect(Request.update_block_hashes, takes=["self"])
    try:
        request = Request("first-token-probe", [1, 2], SamplingParams(max_tokens=4), None)
        append(request, 3)
        new = NewRequestData.from_request(request, ([],))
        assert new.sampling_params is not None
        lengths = (request.num_tokens, request.num_prompt_tokens, request.max_tokens, new.sampling_params.max_tokens)
        works = request.prompt_token_ids == new.prompt_token_ids == list(request.all_token_ids) == [1, 2, 3]
        works = works and lengths == (3, 3, 3, 3) and request.num_output_tokens == 0
        give_up(request)
        works = works and request.max_tokens == 1 and request.prompt_is_token_ids is None and not request.resumable
    except Exception as error:  # whatever is missing: an unknown vLLM version
        raise Unexpected(f"a request whose prompt is changed fails: {error!r}") from error
    if not works:
        raise Unexpected("a request with an appended token differs from one made with the longer prompt")


PATCH = Patch(
    "first_token",
    _check,
    setting="patches.first_token",
    costs="decode samples the first token itself, one step later",
)


def give_up(request: Request) -> None:
    """Make the request end with its next token; stop reason :data:`LOST` says that its response must not be used."""
    _limit(request, 1)
    assert request.sampling_params is not None
    request.sampling_params.stop_token_ids = None  # a stop token would overwrite stop_reason
    request.stop_reason = LOST


def append(request: Request, token: int) -> None:
    assert request.prompt_token_ids is not None
    request.prompt_token_ids = [*request.prompt_token_ids, token]
    request._all_token_ids.append(token)
    request.num_prompt_tokens += 1
    request.update_block_hashes()
    _limit(request, request.max_tokens - 1)


def _limit(request: Request, max_tokens: int) -> None:
    """Set ``max_tokens`` on a copy of the sampling parameters: an in-process engine shares them with its client."""
    request.max_tokens = max_tokens
    request.sampling_params = copy.copy(request.sampling_params)
    assert request.sampling_params is not None
    request.sampling_params.max_tokens = max_tokens
