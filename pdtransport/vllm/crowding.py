"""Prefill and decode that wait for each other's room.

Prefill keeps a finished prompt until decode has taken it; decode gives its room to the requests at the head of its own
queue. Where the caches hold less than what is under way, prefill's may be full of prompts that decode has no room for
yet, and decode's full of room for prompts that prefill has no room to compute: nothing moves until
``deadlines.claim_s`` ends. So prefill, once it has stood still for a moment, lets go of finished prompts that decode
has not begun to take, one after the other and the newest first, until it moves again. Decode computes those itself, or
takes them from the pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

STILL_S = 2.0  # without a step, although prompts wait, beyond what they may wait for the pool's answer
NEXT_S = 0.5  # until the next one: for workers to let go and the engine to look again

REASON = "prefill had no room left for other prompts (both caches are full of what the other side waits for)"


class Crowding:
    """Used in the engine's thread, once a step.

    Args:
        lookup_s: how long prompts may wait for the pool's answer.
    """

    def __init__(self, clock: Callable[[], float], lookup_s: float) -> None:
        self._clock = clock
        self._still_s = STILL_S + lookup_s
        self._kept: OrderedDict[str, None] = OrderedDict()  # finished, and held for decode; oldest first
        self._let_go: set[str] = set()
        self._at: float | None = None  # when the next one is let go; None: the engine moves, or has nothing to do

    def keep(self, req_id: str) -> None:
        """This request is finished, and its pages are held for decode."""
        self._kept[req_id] = None

    def freed(self, req_ids: Iterable[str]) -> None:
        """Nobody holds these requests' pages any more."""
        for req_id in req_ids:
            self._kept.pop(req_id, None)
            self._let_go.discard(req_id)

    def let_go(self, still: bool) -> str | None:
        """The request to let go of in this step. ``still``: prompts wait, and this step computes nothing."""
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
