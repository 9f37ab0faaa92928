"""Worker half of the connector: opens the transport and the pool over vLLM's KV cache.

From then on :class:`pdtransport.engine.worker.EngineWorker` runs the scheduler's commands.
"""

from __future__ import annotations

import logging
import secrets
import sys
from typing import TYPE_CHECKING

from pdtransport.engine.commands import Commands
from pdtransport.engine.worker import EngineWorker
from pdtransport.errors import PoolUnavailable
from pdtransport.settings import Settings
from pdtransport.transport import Transport
from pdtransport.vllm.adapters import Adapters
from pdtransport.vllm.checkpoint import checkpoint_identity
from pdtransport.vllm.geometry import Described, KVCaches, describe
from pdtransport.vllm.patches.base import announce
from pdtransport.vllm.patches.listed import PatchStates
from pdtransport.vllm.patches.model_loading import report_loading
from pdtransport.vllm.patches.poll_backoff import shorten_spins
from pdtransport.vllm.stats import PDTransportStats
from pdtransport.vllm.weight_rpc import sides

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from pdtransport.vllm.pool_space import Shard

logger = logging.getLogger(__name__)

# vLLM's threads spin through short waits, and a thread that needs the GIL from a spinning one waits a switch interval
# each time. At the default of 5 ms these waits would be most of a hand-off's time: on a GPU host the worker runs in the
# engine's own process, and a hand-off takes the GIL about ten times.
SWITCH_INTERVAL_S = 0.00002


class WorkerSide(EngineWorker):
    """Worker half of the connector, one per tensor-parallel rank."""

    def __init__(self, settings: Settings, config: VllmConfig, role: str, caches: KVCacheConfig | None = None) -> None:
        super().__init__(settings, PDTransportStats)
        self._config = config
        self._caches = caches
        self._role = role
        self._patches = PatchStates(settings, config)
        self.shard: Shard | None = None  # key spaces of this worker's chunks in the pool; None: it uses no pool
        self.checkpoint = ""  # identity of the checkpoint that its weights were loaded from; empty: none
        self._described: Described | None = None

    def register(self, kv_caches: KVCaches) -> None:
        """Open the transport and the pool for this KV cache; called once.

        Args:
            kv_caches: layer name -> ``[blocks, heads, tokens, content]`` view of its cache.
        """
        described = self._described = describe(kv_caches, self._caches, self._config, self._settings)
        self.checkpoint = checkpoint_identity(self._config, self._settings)
        # Without weight files, the identity is computed from checksums over all workers' weights before the first
        # request. Until then the weights match no peer's.
        described.fingerprint["weights"] = self.checkpoint or f"unknown:{secrets.token_hex(16)}"
        shorten_spins(self._settings)
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        transfer_config = self._config.kv_transfer_config
        assert transfer_config is not None
        transport = Transport(
            described.groups,
            self._settings.calling_anyone(),  # the scheduler half has checked and resolved each address
            engine=str(transfer_config.engine_id),
            rank=described.rank,
            world=described.ranks,
            role=self._role,
            fingerprint=described.fingerprint,
            regions=described.regions,
            port=described.port,
        )
        self.open(transport, described.pages)
        logger.info(
            "pdtransport: rank %d of %d listens on %s:%d",
            described.rank,
            described.ranks,
            transport.host,
            transport.port,
        )
        self._use_pool(described)
        if self._config.lora_config is not None:
            self.use_adapters(Adapters.of_this_worker(), self._config.cache_config.block_size)
        sides.add(self)
        report_loading(self._settings, self._config)
        announce()
        transport.show_patches(self._patches.all())

    def _use_pool(self, described: Described) -> None:
        use = self._settings.pool
        if use is None:
            return
        from pdtransport.vllm.pool_space import Shard, head_parts, key_spaces, kv_events_on, loss_of, why_no_pool

        assert self._caches is not None
        problem = why_no_pool(described, self._config, self._caches, use)
        if problem:
            logger.warning("pdtransport: the pool is not used: %s", problem)
            return
        try:
            self.open_pool(
                use,
                head_parts(described.geometry, use.shards or described.ranks),
                who="vllm",
                lossy=loss_of(described, use),
                tell_stored=kv_events_on(self._config),
            )
        except PoolUnavailable as error:
            logger.warning("pdtransport: the pool is not used: %s", error)
            return
        self.shard = Shard(key_spaces(described, self._config, use))

    def change_weights(self, identity: str, reason: str) -> tuple[int, Shard | None]:
        """End transfers and loads of the old weights, and announce the new weights to peers.

        Returns:
            The rank, and the new key spaces of this worker's chunks in the pool (None: it uses no pool).
        """
        described, use = self._described, self._settings.pool
        assert described is not None
        described.fingerprint["weights"] = identity
        self.announce_weights(identity, reason)
        if self.shard is not None and use is not None:
            from pdtransport.vllm.pool_space import Shard, key_spaces

            self.shard = Shard(key_spaces(described, self._config, use))
        return self._rank, self.shard

    def before_forward(self, commands: Commands) -> None:
        """Run the ``before`` commands. Idempotent: vLLM's two model runners call it from different hooks."""
        if commands.patches and self._transport is not None:
            self._patches.hear(commands.patches)
            commands.patches = []
            self._transport.show_patches(self._patches.all())
        super().before_forward(commands)

    def close(self) -> None:
        sides.discard(self)
        super().close()
