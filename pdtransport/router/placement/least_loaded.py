"""The default policy: the least loaded server, unless another one has the prompt's prefix.

A server that recently had the same prompt prefix is chosen if it is at most a margin busier: it finds those pages in
its prefix cache and computes (prefill) or fetches (decode) only the rest.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from itertools import count

from pdtransport.router.placement.base import PlacementPolicy, RequestView, Role, ServerView
from pdtransport.router.settings import RouterPlacement


class Affinity:
    """Bounded map from prompt prefixes to the server that had them last; the least recently used are evicted first."""

    def __init__(self, entries: int) -> None:
        self._bound = entries
        self._last: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def find(self, keys: Sequence[bytes], servers: Sequence[ServerView]) -> ServerView | None:
        """The server that had the longest prefix; ``keys`` are ordered from short to long."""
        for key in reversed(keys):
            name = self._last.get(key)
            if name is not None:
                for server in servers:
                    if server.name == name:
                        return server
        return None

    def remember(self, keys: Sequence[bytes], name: str) -> None:
        for key in reversed(keys):  # short prefixes last: they are shared by more prompts, so they should live longer
            self._last[key] = name
            self._last.move_to_end(key)
        while len(self._last) > self._bound:
            self._last.popitem(last=False)


class LeastLoaded(PlacementPolicy):
    """Servers with equal load take turns."""

    def __init__(self, settings: RouterPlacement) -> None:
        super().__init__(settings)
        self._margin: dict[Role, int] = {
            "prefill": settings.affinity_margin_tokens,
            "decode": settings.affinity_margin_requests,
        }
        self._affinity: dict[Role, Affinity] = {
            "prefill": Affinity(settings.affinity_entries),
            "decode": Affinity(settings.affinity_entries),
        }
        self._picks = count(1)
        # The number of the pick by which each server was last chosen.
        self._picked: dict[Role, dict[str, int]] = {"prefill": defaultdict(int), "decode": defaultdict(int)}

    def entries(self, role: Role) -> int:
        return len(self._affinity[role])

    def choose(self, request: RequestView, servers: Sequence[ServerView]) -> str:
        role, keys = request.role, request.prefix_keys
        picked = self._picked[role]
        least = min(servers, key=lambda server: (server.load, picked[server.name]))
        had = self._affinity[role].find(keys, servers)
        chosen = had if had is not None and had.load - least.load <= self._margin[role] else least
        picked[chosen.name] = next(self._picks)
        self._affinity[role].remember(keys, chosen.name)
        return chosen.name
