"""Enters a received request's blocks into the prefix cache during its first step instead of before it.

vLLM enters them before that step: 1.7 us per block, 1.7 ms for 16,000 tokens, which delays the first token. This hook
enters them when the next step begins or before they are freed, whichever comes first. So no later step can miss them,
and nothing is entered that vLLM would not have entered. Without this hook vLLM enters them before the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pdtransport.vllm.patches.base import Patch, expect

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request


def _check() -> None:
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    expect(KVCacheCoordinator.cache_blocks, takes=["self", "request", "num_computed_tokens"])
    expect(KVCacheCoordinator.free, takes=["self", "request_id"])
    expect(KVCacheCoordinator.pop_blocks_for_free, takes=["self", "request_id"])
    for caches in (KVCacheManager.allocate_slots, KVCacheManager.cache_blocks):
        expect(caches, uses=["coordinator", "cache_blocks"])
    expect(KVCacheManager.free, uses=["coordinator", "free"])


PATCH = Patch(
    "late_caching",
    _check,
    setting="patches.late_caching",
    needs=["step_ahead"],
    costs="blocks are cached before a received request's first step, 1.7 ms for 16,000 tokens",
)


class LateCaching:
    """Hooks the coordinator of ``manager`` where it caches and frees blocks.

    Raises:
        AttributeError: the coordinator of this vLLM version is not as expected; nothing was patched.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        coordinator = manager.coordinator
        self._cache, free, pop = coordinator.cache_blocks, coordinator.free, coordinator.pop_blocks_for_free
        self._late: dict[str, tuple[Request, int] | None] = {}

        def cache_blocks(request: Request, tokens: int) -> None:
            if request.request_id in self._late:
                self._late[request.request_id] = request, tokens  # a later call covers more tokens
            else:
                self._cache(request, tokens)

        def freed(request_id: str) -> None:
            self._enter(request_id)
            free(request_id)

        def popped(request_id: str) -> Any:
            self._enter(request_id)
            return pop(request_id)

        estimate = getattr(manager, "estimate_cached_tokens", None)  # for usage; missing in older versions

        def estimated(request: Request) -> int:
            late = self._late.get(request.request_id)
            known = int(estimate(request)) if estimate is not None else 0
            if late is None:
                return known
            sizes = [group.kv_cache_spec.block_size for group in manager.kv_cache_config.kv_cache_groups]
            return max(known, min(late[1] // size * size for size in sizes))

        if estimate is not None:
            manager.estimate_cached_tokens = estimated  # type: ignore[method-assign]
        coordinator.cache_blocks = cache_blocks  # type: ignore[method-assign]
        coordinator.free = freed  # type: ignore[method-assign]
        coordinator.pop_blocks_for_free = popped  # type: ignore[method-assign]

    def put_off(self, req_ids: Iterable[str]) -> None:
        """Delay caching the blocks of these requests until the next step begins."""
        self._late.update(dict.fromkeys(req_ids))

    def catch_up(self) -> None:
        """Enter the delayed blocks; called when a step begins."""
        for req_id in list(self._late):
            self._enter(req_id)

    def forget(self) -> None:
        """Never enter the delayed blocks: the weights changed, so their KV is invalid."""
        self._late.clear()

    def _enter(self, req_id: str) -> None:
        late = self._late.pop(req_id, None)
        if late is not None:
            self._cache(*late)
