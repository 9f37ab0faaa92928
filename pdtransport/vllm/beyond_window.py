"""Prompts longer than the sliding window of a model whose layers all have one: decode computes them, not prefill.

vLLM frees and reuses such a prompt's first blocks while it computes the rest, so its KV is never complete and can't be
handed over. Decode detects such a prompt itself and computes it at once. Prefill has nothing useful to compute then: it
shortens the prompt to its first token and responds, so that the whole prompt is computed only once. A prefill request
that asks for more than one output token is computed in full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdtransport.settings import Settings
from pdtransport.vllm.patches.shortened_prompt import PATCH, shorten

if TYPE_CHECKING:
    from vllm.v1.request import Request

CODE = "beyond_window"


class WindowRule:
    """Decides for one engine which prompts are too long to be handed over.

    Args:
        tokens: size of the window; None: the model has no window.
    """

    def __init__(self, tokens: int | None, settings: Settings) -> None:
        self._tokens = tokens
        self._shortens = tokens is not None and PATCH.allowed(settings)

    def why_not(self, request: Request) -> str:
        """Decode: why it can't receive this prompt's pages, one line that begins with :data:`CODE`; empty if it can."""
        if self._tokens is None or request.num_prompt_tokens <= self._tokens:
            return ""
        return (
            f"{CODE}: its {request.num_prompt_tokens} prompt tokens exceed the model's window of "
            f"{self._tokens}, and vLLM frees blocks that leave the window while it computes the prompt"
        )

    def why_not_held(self, request: Request) -> str:
        """Prefill: why it can't hold this prompt's pages, as in :meth:`why_not`; empty if it can.

        The output tokens count too: they move the window, which must not leave any page of the prompt behind.
        """
        problem = self.why_not(request)
        if problem or self._tokens is None or request.num_prompt_tokens + request.max_tokens - 1 <= self._tokens:
            return problem
        return (
            f"{CODE}: prefill may compute {request.max_tokens} tokens after the prompt's {request.num_prompt_tokens}, "
            f"together more than the model's window of {self._tokens}: set max_tokens to 1 for prefill"
        )

    def shorten(self, request: Request) -> None:
        """Shorten the prompt to one token if the request's only purpose is a hand-over, which is impossible."""
        params = request.sampling_params
        if (
            self._shortens
            and params is not None
            and request.max_tokens == 1
            and not (params.prompt_logprobs or params.structured_outputs or request.mm_features or request.resumable)
            and request.prompt_embeds is None
        ):
            shorten(request)
