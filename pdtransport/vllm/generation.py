"""What the scheduler still has of weights that are gone: blocks in vLLM's prefix cache, and requests computed halfway.

vLLM keeps both when its weights change: a later prompt would be computed on top of the old weights' KV, and that handed
over and stored as the new ones'. Blocks leave the prefix cache at the change. A request that was computed before (or
began on blocks of one that was) goes on here, as vLLM would have it, but is nobody else's: it is neither handed over
nor stored, and its blocks leave the prefix cache with it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Iterable
from typing import Any

logger = logging.getLogger(__name__)

VOIDED = "failed_recving_kv_req_ids"  # of vLLM's scheduler: requests whose pages count as not received


class StaleBlocks:
    """Runs in the scheduler's process. Nothing is done before the weights changed for the first time."""

    def __init__(self) -> None:
        self._manager: Any = None
        self._begun: set[str] = set()  # requests that have computed something
        self._tainted: set[str] = set()  # with something of old weights
        self._lasting = False  # the prefix cache can't be emptied here

    def bind(self, manager: Any) -> None:
        """The engine's cache manager is there."""
        self._manager = manager

    def began(self, req_ids: Iterable[str]) -> None:
        """They are computed from this step on."""
        self._begun.update(req_ids)

    def change(self) -> set[str]:
        """The weights are others now; the requests that hold KV of the old ones."""
        self._tainted |= self._begun
        self._evict(None)
        return set(self._tainted)

    def void_arrivals(self) -> set[str]:
        """Requests that have pages from elsewhere, or wait for some, and were not computed yet: vLLM computes them
        anew, from their first token, once their pages are reported (whatever ``kv_load_failure_policy`` is: nothing
        failed). To be called between steps."""
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
                "pdtransport: requests whose pages came before the weights changed can't be computed anew (%r): their "
                "answers may be of the old weights",
                error,
            )
            return set()
        return voided

    def begins_on(self, req_id: str, computed: int) -> bool:
        """Whether a request that finds ``computed`` tokens in the prefix cache may find old ones there."""
        if computed and (self._tainted or self._lasting):
            self._tainted.add(req_id)
            return True
        return False

    def ended(self, req_id: str, blocks: Collection[int]) -> None:
        """The request is through; ``blocks`` are not free yet."""
        self._begun.discard(req_id)
        if req_id in self._tainted:
            self._tainted.discard(req_id)
            self._evict(set(blocks))

    def _evict(self, blocks: set[int] | None) -> None:
        """Take ``blocks`` out of the prefix cache; None: all."""
        if self._manager is None:
            return
        try:
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
        LookupError: there is none.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    for thing in gc.get_objects():
        if issubclass(type(thing), Scheduler) and getattr(thing, "kv_cache_manager", None) is manager:
            return thing
    raise LookupError("its scheduler was not found")
