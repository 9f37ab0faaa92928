"""How many of a prompt's tokens were cached, as vLLM's accounts tell it (``usage.prompt_tokens_details``, the metric
``vllm:prompt_tokens_cached``).

vLLM counts all tokens that came by a connector as cached, so that a handed-over prompt would always be cached whole.
What counts is what prefill found in its caches, the pool included: that is what a plain server would have found. In
the serial order vLLM's own parameter ``remote_prefill_cached_tokens`` tells decode; where decode is asked before
prefill has answered, prefill's commit does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request


def cached_tokens(request: Request, computed: int) -> int:
    """Prefill: what its own answer's usage says, in the request's first step, before which ``computed`` tokens were
    there."""
    stats = getattr(request, "prefill_stats", None)
    return computed if stats is None else int(stats.num_cached_tokens)


def set_cached(request: Request, tokens: int) -> None:
    """Decode: ``tokens`` of the prompt were cached on prefill. Call before the request's first output is made."""
    stats = getattr(request, "prefill_stats", None)
    if stats is not None:
        stats.num_cached_tokens = min(tokens, stats.num_prompt_tokens)


def nothing_came(request: Request) -> None:
    """Decode: the transfer failed, and what was counted as cached is computed here. Only what this engine holds is."""
    stats = getattr(request, "prefill_stats", None)
    if stats is not None:
        stats.set(stats.num_prompt_tokens, stats.num_local_cached_tokens, 0)
