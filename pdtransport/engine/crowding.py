"""Resolves deadlocks in which prefill and decode wait for blocks in each other's KV cache.

Prefill keeps a finished prompt until decode has received it; decode allocates blocks for the requests at the head of
its own queue. If the caches are too small for all requests in flight, prefill's cache can be full of prompts that
decode has no blocks for yet, while decode's blocks are reserved for prompts that prefill has no blocks to compute.
Nothing moves then until ``deadlines.claim_s`` expires.

So once prefill has been stuck for a while, it releases finished prompts that decode has not begun to receive, one at a
time and the newest first, until it moves again. Decode computes these itself or loads them from the pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

STILL_S = 2.0  # time stuck (prompts wait, no step computes) before the first release; added to the pool's lookup time
NEXT_S = 0.5  # between two releases: workers free the pages and the engine schedules again

REASON = "prefill's KV cache had no room for other prompts, and decode had none for this one"


class Crowding:
    """Chooses which finished prompt to release. Used in the engine's thread, once a step.

    Args:
        clock: monotonic seconds.
        lookup_s: how long prompts may wait for a lookup in the pool.
    """

    def __init__(self, clock: Callable[[], float], lookup_s: float) -> None:
        self._clock = clock
        self._still_s = STILL_S + lookup_s
        self._kept: OrderedDict[str, None] = OrderedDict()  # finished and held for decode, oldest first
        self._let_go: set[str] = set()  # chosen for release, and not freed yet
        self._at: float | None = None  # when to release the next one; None: the engine is not stuck

    def keep(self, req_id: str) -> None:
        """This request is finished, and its pages are held for decode."""
        self._kept[req_id] = None

    def freed(self, req_ids: Iterable[str]) -> None:
        """The pages of these requests were freed."""
        for req_id in req_ids:
            self._kept.pop(req_id, None)
            self._let_go.discard(req_id)

    def let_go(self, still: bool) -> str | None:
        """The request to release in this step, if any.

        Args:
            still: prompts wait, and this step computes nothing.
        """
        if not still or not self._kept:
            self._at = None
            return None
        now = self._clock()
        if self._at is None:
            self._at = now + self._still_s
        if now < self._at:
            return None
        chosen = next((req_id for req_id in reversed(self._kept) if req_id not in self._let_go), None)
        if chosen is not None:
            self._let_go.add(chosen)
            self._at = now + NEXT_S
        return chosen
