"""Keeps received KV that is not trusted out of the caches that requests share: vLLM's prefix cache and the pool.

Checksums prove that pages arrived as sent, not that they belong to this prompt. A party that can both hand over to this
instance and send it requests can provide any KV for any prompt. A request always uses the pages that it was told to
receive; but depending on ``share_received`` its blocks stay private: they never enter the prefix cache (the hook, on
``cache_blocks`` of the cache manager's coordinator), and none of its chunks is stored in the pool.

The switch is ``share_received`` itself: ``all`` needs no hook. Every other value depends on the hook, so if the check
fails, the start is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pdtransport.engine.trusted_producers import Producers
from pdtransport.errors import SettingsError
from pdtransport.settings import Settings
from pdtransport.vllm.patches.base import Patch, expect

if TYPE_CHECKING:
    from vllm.v1.request import Request


def _check() -> None:
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    expect(KVCacheCoordinator.cache_blocks, takes=["self", "request"])
    for caches in (KVCacheManager.allocate_slots, KVCacheManager.cache_blocks):
        expect(caches, uses=["coordinator", "cache_blocks"])


PATCH = Patch(
    "share_received",
    _check,
    costs="this engine does not start",
    unneeded=lambda settings, config: "share_received: all" if settings.share_received == "all" else "",
)


class Withheld:
    """Keeps the KV of requests with untrusted pages out of shared caches. Does nothing if ``share_received`` is all.

    Raises:
        SettingsError: ``trusted_producers`` is invalid.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._mode = settings, settings.share_received
        self._trusted = Producers(settings.trusted_producers)
        self._requests: weakref.WeakSet[Request] = weakref.WeakSet()

    def bind(self, manager: Any) -> None:
        """Hook into the cache manager, to filter what enters the prefix cache from now on.

        Raises:
            SettingsError: this vLLM version has no such hook point.
        """
        PATCH.allowed(self._settings)
        if self._mode == "all":
            return
        coordinator = getattr(manager, "coordinator", None)
        enter = getattr(coordinator, "cache_blocks", None)
        if not PATCH.active or not callable(enter):
            raise SettingsError(
                f"share_received: {self._mode} can't be kept with this vLLM, whose prefix cache is unknown: use a "
                "version that pdtransport knows, or share_received: all"
            )

        def cache_blocks(request: Request, *how: Any, **more: Any) -> Any:
            return None if request in self._requests else enter(request, *how, **more)

        coordinator.cache_blocks = cache_blocks  # type: ignore[union-attr]

    def takes(self, request: Request, hosts: Sequence[str], port: int, ranks: int) -> bool:
        """Called before a request receives pages; True if nothing of it may be shared from now on.

        Args:
            hosts: as for :meth:`Producers.cover`.
        """
        if self._mode == "all" or (self._mode == "trusted" and self._trusted.cover(hosts, port, ranks)):
            return False
        self._requests.add(request)
        return True
