"""Corrects the number of cached prompt tokens in ``usage.prompt_tokens_details`` and ``vllm:prompt_tokens_cached``.

vLLM counts all tokens from a connector as cached, so a handed-over prompt would always count as fully cached. The right
number is what prefill found in its caches, the pool included: that is what an undivided server would have found. If the
router asks prefill first, vLLM's own parameter ``remote_prefill_cached_tokens`` carries the number to decode; if the
router asks both at once, prefill's commit does. Without this hook vLLM's own number stands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdtransport.settings import Settings
from pdtransport.vllm.patches.base import Patch, expect, expect_fields

if TYPE_CHECKING:
    from vllm.v1.request import Request


def _check() -> None:
    from vllm.v1.metrics.stats import PrefillStats
    from vllm.v1.request import Request

    expect(Request.__init__, uses=["prefill_stats"])
    expect_fields(PrefillStats, "num_prompt_tokens", "num_cached_tokens", "num_local_cached_tokens")
    expect(
        PrefillStats.set, takes=["self", "num_prompt_tokens", "num_local_cached_tokens", "num_external_cached_tokens"]
    )


PATCH = Patch(
    "cached_usage",
    _check,
    setting="patches.cached_usage",
    costs="usage and vllm:prompt_tokens_cached count all handed-over prompt tokens as cached",
)


class CachedUsage:
    """Reads and corrects ``Request.prefill_stats``, for one engine."""

    def __init__(self, settings: Settings) -> None:
        self._on = PATCH.allowed(settings)

    def of(self, request: Request, computed: int) -> int:
        """Prefill: cached prompt tokens, as its own response reports them. Call in the request's first step.

        Args:
            computed: number of tokens computed before that step.
        """
        stats = getattr(request, "prefill_stats", None)
        return computed if stats is None or not self._on else int(stats.num_cached_tokens)

    def set(self, request: Request, tokens: int) -> None:
        """Decode: set the prompt tokens that were cached on prefill. Call before the first output is made."""
        stats = getattr(request, "prefill_stats", None)
        if stats is not None and self._on:
            stats.num_cached_tokens = min(tokens, stats.num_prompt_tokens)

    def nothing_came(self, request: Request) -> None:
        """Decode: the transfer failed; count only tokens in this engine's own cache, since it computes the others."""
        stats = getattr(request, "prefill_stats", None)
        if stats is not None and self._on:
            stats.set(stats.num_prompt_tokens, stats.num_local_cached_tokens, 0)
