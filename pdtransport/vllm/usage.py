"""Corrects the number of cached prompt tokens in ``usage.prompt_tokens_details`` and ``vllm:prompt_tokens_cached``.

vLLM counts all tokens from a connector as cached, so a handed-over prompt would always count as fully cached. The right
number is what prefill found in its caches, the pool included: that is what an undivided server would have found. If the
router asks prefill first, vLLM's own parameter ``remote_prefill_cached_tokens`` carries it to decode; if it asks both
at once, prefill's commit does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request


def cached_tokens(request: Request, computed: int) -> int:
    """Prefill: cached prompt tokens, as its own response reports them. Call in the request's first step.

    Args:
        computed: tokens that were there before that step.
    """
    stats = getattr(request, "prefill_stats", None)
    return computed if stats is None else int(stats.num_cached_tokens)


def set_cached(request: Request, tokens: int) -> None:
    """Decode: set the prompt tokens that were cached on prefill. Call before the request's first output is made."""
    stats = getattr(request, "prefill_stats", None)
    if stats is not None:
        stats.num_cached_tokens = min(tokens, stats.num_prompt_tokens)


def nothing_came(request: Request) -> None:
    """Decode: the transfer failed; count only tokens in this engine's own cache, since the others are computed here."""
    stats = getattr(request, "prefill_stats", None)
    if stats is not None:
        stats.set(stats.num_prompt_tokens, stats.num_local_cached_tokens, 0)
