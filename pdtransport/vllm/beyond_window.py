"""Prompts that are longer than the window of a model whose layers all have one: decode computes them, prefill need
not.

Such a prompt's first blocks are given back and used anew while it is computed, so it never is there to be handed over.
Decode sees that itself and computes the prompt at once. Prefill was asked for nothing but that hand-over: it computes
the prompt's first token and answers, so that the prompt is computed once. Of a request that wants more of prefill than
one token, all is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

CODE = "beyond_window"


class Window:
    """Decides for one engine.

    Args:
        tokens: of the window; None: there is none.
    """

    def __init__(self, tokens: int | None) -> None:
        self._tokens = tokens
        self._shortens = tokens is not None and _works()

    def why_not(self, request: Request) -> str:
        """Why decode can't get this prompt's pages: one line that begins with :data:`CODE`; empty if it can."""
        if self._tokens is None or request.num_prompt_tokens <= self._tokens:
            return ""
        return (
            f"{CODE}: its {request.num_prompt_tokens} prompt tokens are more than the model's window of "
            f"{self._tokens}, and blocks behind it are given back while the prompt is computed"
        )

    def why_not_held(self, request: Request) -> str:
        """The same of prefill's, which holds pages only while its own tokens move the window past none of them."""
        problem = self.why_not(request)
        if problem or self._tokens is None or request.num_prompt_tokens + request.max_tokens - 1 <= self._tokens:
            return problem
        return (
            f"{CODE}: prefill may compute {request.max_tokens} tokens behind the prompt's {request.num_prompt_tokens}, "
            f"past the model's window of {self._tokens}; ask it for one"
        )

    def shorten(self, request: Request) -> None:
        """Nobody wants more of this request than a hand-over that can't be: compute next to nothing."""
        params = request.sampling_params
        if (
            self._shortens
            and params is not None
            and request.max_tokens == 1
            and not (params.prompt_logprobs or params.structured_outputs or request.mm_features or request.resumable)
            and request.prompt_embeds is None
        ):
            _shorten(request)


def _shorten(request: Request) -> None:
    """Keep the first prompt token. The KV of it is what it would be in the whole prompt."""
    assert request.prompt_token_ids is not None
    request.prompt_token_ids = list(request.prompt_token_ids[:1])
    del request._all_token_ids[1:]
    request.num_prompt_tokens = 1
    request.block_hashes.clear()
    request.update_block_hashes()


def _works() -> bool:
    """Try it on a request of this vLLM."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.request import Request

    try:
        request = Request("window-probe", [1, 2, 3], SamplingParams(max_tokens=1), None)
        _shorten(request)
        new = NewRequestData.from_request(request, ([],))
        same = request.prompt_token_ids == new.prompt_token_ids == list(request.all_token_ids) == [1]
        return same and (request.num_tokens, request.num_prompt_tokens, request.num_output_tokens) == (1, 1, 0)
    except Exception:  # noqa: BLE001 - whatever is missing: not a vLLM that this was made for
        return False
