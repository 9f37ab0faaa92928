"""Chooses the server for a request.

The least loaded server is chosen, unless another server recently had the same prompt prefix and is at most a margin
busier: that server finds those pages in its prefix cache and computes (prefill) or fetches (decode) only the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count

from pdtransport.router.endpoints import Endpoint, Role
from pdtransport.router.settings import RouterPlacement


class Affinity:
    """Bounded map from prompt prefixes to the server that had them last; the least recently used are evicted first."""

    def __init__(self, entries: int) -> None:
        self._bound = entries
        self._last: OrderedDict[bytes, Endpoint] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def find(self, keys: Sequence[bytes], candidates: Sequence[Endpoint]) -> Endpoint | None:
        """The candidate that had the longest prefix; ``keys`` are ordered from short to long."""
        for key in reversed(keys):
            endpoint = self._last.get(key)
            if endpoint is not None and endpoint in candidates:
                return endpoint
        return None

    def remember(self, keys: Sequence[bytes], endpoint: Endpoint) -> None:
        for key in reversed(keys):  # short prefixes last: they are shared by more prompts, so they should live longer
            self._last[key] = endpoint
            self._last.move_to_end(key)
        while len(self._last) > self._bound:
            self._last.popitem(last=False)


class Placer:
    """Chooses servers."""

    def __init__(self, settings: RouterPlacement) -> None:
        self._margin: dict[Role, int] = {
            "prefill": settings.affinity_margin_tokens,
            "decode": settings.affinity_margin_requests,
        }
        self._affinity: dict[Role, Affinity] = {
            "prefill": Affinity(settings.affinity_entries),
            "decode": Affinity(settings.affinity_entries),
        }
        self._picks = count(1)

    def entries(self, role: Role) -> int:
        return len(self._affinity[role])

    def choose(self, role: Role, keys: Sequence[bytes], candidates: Sequence[Endpoint]) -> Endpoint | None:
        """One of ``candidates``, or None if there are none. Servers with equal load take turns."""
        if not candidates:
            return None
        least = min(candidates, key=lambda endpoint: (endpoint.load, endpoint.picked))
        had = self._affinity[role].find(keys, candidates)
        chosen = had if had is not None and had.load - least.load <= self._margin[role] else least
        chosen.picked = next(self._picks)
        self._affinity[role].remember(keys, chosen)
        return chosen
