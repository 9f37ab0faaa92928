"""Handles KV of replaced weights in the scheduler: blocks in vLLM's prefix cache, and partly computed requests.

vLLM keeps both when its weights change. A later prompt would then build on KV of the old weights, and the result would
be handed over and stored as KV of the new ones. So all blocks are evicted from the prefix cache at the change. A
request with KV of the old weights (computed before the change, or built on blocks of such a request) continues, as in
plain vLLM, but is neither handed over nor stored, and its blocks are evicted when it ends.

Answers depend on this hook, so it has no switch of its own (``watch_weights: false`` says that weights never change).
If vLLM's scheduler can't be told to recompute requests, :mod:`weight_watch` refuses the start. If vLLM's prefix cache
can't be emptied, prompts that are found there after a change are neither handed over nor stored.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Iterable
from typing import Any

from pdtransport.settings import Settings
from pdtransport.vllm.patches.base import FAILED, Patch, expect

logger = logging.getLogger(__name__)

VOIDED = "failed_recving_kv_req_ids"  # attribute of vLLM's scheduler: requests whose pages count as not received


def check_recompute() -> None:
    """Check that vLLM's scheduler can be told to recompute requests whose pages arrived.

    Raises:
        Unexpected, ImportError, AttributeError: it can't.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    expect(Scheduler.__init__, uses=[VOIDED, "requests", "kv_cache_manager"])
    expect(Scheduler._update_waiting_for_remote_kv, takes=["self", "request"], uses=[VOIDED, "num_computed_tokens"])


def _check() -> None:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    check_recompute()
    expect(KVCacheManager.__init__, uses=["block_pool"])
    expect(KVCacheManager.evict_blocks, takes=["self", "block_ids"], uses=["block_pool"])
    expect(BlockPool.__init__, uses=["blocks"])


PATCH = Patch(
    "stale_blocks",
    _check,
    costs="once the weights change, prompts that are found in the prefix cache are not handed over any more",
    unneeded=lambda settings, config: "" if settings.watch_weights else "watch_weights: false",
)


class StaleBlocks:
    """Tracks requests with KV of replaced weights, in the scheduler's process. Does nothing until the first change."""

    def __init__(self) -> None:
        self._manager: Any = None
        self._begun: set[str] = set()  # requests with computed tokens
        self._tainted: set[str] = set()  # requests with KV of old weights
        self._lasting = False  # the prefix cache can't be emptied with this vLLM version

    def bind(self, manager: Any, settings: Settings) -> None:
        """Use this cache manager of the engine."""
        self._manager = manager
        PATCH.allowed(settings)

    def began(self, req_ids: Iterable[str]) -> None:
        """These requests are scheduled for the first time."""
        self._begun.update(req_ids)

    def change(self) -> set[str]:
        """The weights changed: empty the prefix cache, and return the requests that hold KV of the old weights."""
        self._tainted |= self._begun
        self._evict(None)
        return set(self._tainted)

    def void_arrivals(self) -> set[str]:
        """Let vLLM recompute the requests whose remote pages have not been used yet, and return them.

        Their pages are still in flight, or have arrived and were not reported yet. Once they are reported, vLLM
        computes these requests from their first token, whatever ``kv_load_failure_policy`` says: nothing failed. Call
        between steps.
        """
        if self._manager is None:
            return set()
        from vllm.v1.request import RequestStatus

        try:
            scheduler = _scheduler_of(self._manager)
            voided = set()
            for req_id, request in scheduler.requests.items():
                if request.status is RequestStatus.WAITING_FOR_REMOTE_KVS:
                    request.num_computed_tokens = 0
                    getattr(scheduler, VOIDED).add(req_id)
                    voided.add(req_id)
        except Exception as error:  # noqa: BLE001 - another vLLM
            logger.error(
                "pdtransport: requests whose pages came before the weights changed can't be recomputed (%r): their "
                "answers may come from the old weights",
                error,
            )
            return set()
        return voided

    def begins_on(self, req_id: str, computed: int) -> bool:
        """Whether a request with ``computed`` tokens from the prefix cache may use KV of old weights."""
        if computed and (self._tainted or self._lasting):
            self._tainted.add(req_id)
            return True
        return False

    def ended(self, req_id: str, blocks: Collection[int]) -> None:
        """The request ended; its ``blocks`` are not freed yet."""
        self._begun.discard(req_id)
        if req_id in self._tainted:
            self._tainted.discard(req_id)
            self._evict(set(blocks))

    def _evict(self, blocks: set[int] | None) -> None:
        """Evict ``blocks`` from the prefix cache; None: all blocks."""
        if self._manager is None:
            return
        try:
            if (status := PATCH.state())["state"] == FAILED:
                raise LookupError(status["why"])
            if blocks is None:
                blocks = set(range(len(self._manager.block_pool.blocks)))
            self._manager.evict_blocks(blocks)
        except Exception as error:  # noqa: BLE001 - another vLLM
            if not self._lasting:
                logger.error(
                    "pdtransport: vLLM's prefix cache can't be emptied (%r): prompts that are found there are not "
                    "handed over any more; start again",
                    error,
                )
            self._lasting = True


def _scheduler_of(manager: Any) -> Any:
    """vLLM's scheduler that owns this cache manager.

    Raises:
        LookupError: it was not found.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    for thing in gc.get_objects():
        if issubclass(type(thing), Scheduler) and getattr(thing, "kv_cache_manager", None) is manager:
            return thing
    raise LookupError("its scheduler was not found")
