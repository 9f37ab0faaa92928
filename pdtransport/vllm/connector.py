"""The vLLM connector: each ``KVConnectorBase_V1`` hook delegates in one line to :mod:`scheduler` or :mod:`worker`.

Tested with vLLM 0.32 (the V1 connector interface with ``[blocks, heads, tokens, content]`` KV views, new in 0.29).
Needs vLLM 0.30 or newer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from pdtransport.engine.commands import Commands, WorkerReport
from pdtransport.engine.stats import TransferStats
from pdtransport.links.registry import check_links
from pdtransport.settings import Settings
from pdtransport.vllm.cache_groups import HandedGroups, refuse_caches, refuse_context_parallel, refuse_model
from pdtransport.vllm.first_token import FirstTokens
from pdtransport.vllm.geometry import attention_heads, control_port
from pdtransport.vllm.logs import join_vllm_log
from pdtransport.vllm.patches.base import announce
from pdtransport.vllm.patches.decode_stream import shorten_priming
from pdtransport.vllm.patches.poll_backoff import shorten_spins
from pdtransport.vllm.patches.weight_watch import PATCH as WEIGHT_WATCH
from pdtransport.vllm.patches.weight_watch import watch_executor
from pdtransport.vllm.scheduler import SchedulerSide
from pdtransport.vllm.stats import PDTransportPromMetrics, PDTransportStats
from pdtransport.vllm.worker import WorkerSide

try:  # new in vLLM 0.30; older versions cannot report a failed load as failed
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
except ImportError as error:  # pragma: no cover - another vLLM
    raise ImportError("pdtransport needs vLLM 0.30 or newer: failed loads can't be reported to older ones") from error

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # pragma: no cover - another vLLM
    CacheHitSource = None  # type: ignore[assignment,misc]

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from pdtransport.vllm.pool_space import Shard

logger = logging.getLogger(__name__)

# vLLM wants its own metadata class between the two halves. `engine/` must not import vLLM, so Commands is registered.
KVConnectorMetadata.register(Commands)
KVConnectorWorkerMetadata.register(WorkerReport)


class PDTransportConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM connector. ``kv_role``: kv_producer sends KV pages, kv_consumer receives them, kv_both does both.

    ``kv_connector_extra_config`` is parsed as :class:`pdtransport.settings.Settings`.
    """

    if CacheHitSource is not None:
        _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        join_vllm_log()  # register() may not have run if this was loaded through kv_connector_module_path
        refuse_model(vllm_config)
        refuse_caches(kv_cache_config)
        config = self._kv_transfer_config
        settings = Settings.parse(config.kv_connector_extra_config)
        check_links(settings)
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise ValueError("pdtransport does not hand over pipeline-parallel shards yet: use tensor parallelism")
        refuse_context_parallel(vllm_config)
        events = False
        if settings.pool is not None:
            from pdtransport.vllm.pool_space import check_use, kv_events_on

            check_use(settings.pool, str(config.kv_load_failure_policy))
            events = kv_events_on(vllm_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            shorten_spins(settings)  # workers are running by now, so the engine's message readers exist
            self._scheduler = SchedulerSide(
                settings,
                producer=config.is_kv_producer,
                consumer=config.is_kv_consumer,
                groups=HandedGroups.of(kv_cache_config),
                engine=str(config.engine_id),
                port=control_port(settings, vllm_config),
                ranks=parallel.tensor_parallel_size,
                heads=attention_heads(vllm_config),
                first_tokens=FirstTokens(vllm_config, settings),
                events=events,
                adapters=vllm_config.lora_config is not None,
            )
            if settings.watch_weights:
                self._watch = watch_executor(vllm_config, self._scheduler.weights_changed)
            else:
                WEIGHT_WATCH.allowed(settings)
        else:
            self._worker = WorkerSide(settings, vllm_config, str(config.kv_role), kv_cache_config)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Requires no layout; used to refuse unsupported models early.

        vLLM calls no other hook before it lays out the cache. For hybrid models that step fails with an unhelpful
        error.
        """
        refuse_model(vllm_config)
        return None

    # -- scheduler -----------------------------------------------------------------------------------------------

    @property
    def scheduler(self) -> SchedulerSide:
        assert self._scheduler is not None, "a scheduler hook was called in a worker"
        return self._scheduler

    def on_new_request(self, request: Request) -> None:
        self.scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Commands:
        return self.scheduler.build(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.scheduler.update_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler.finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler.finished(request, block_ids)

    def has_pending_push_work(self) -> bool:
        return self.scheduler.has_pending_work()

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        self.scheduler.bind(self, kv_cache_manager)

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        model = self._vllm_config.model_config
        served = model.served_model_name
        self.scheduler.start_pool(metadata, [served] if isinstance(served, str) else served or [], str(model.tokenizer))

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self.scheduler.take_events()

    def get_external_cache_hit_sources(self, request: Request, num_hits: int) -> dict[Any, int]:
        if CacheHitSource is not None and self.scheduler.from_pool(request.request_id):
            return {CacheHitSource.HOST: num_hits}
        return super().get_external_cache_hit_sources(request, num_hits)

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        return self._kv_cache_config.transfer_group_ids

    # -- worker --------------------------------------------------------------------------------------------------

    @property
    def worker(self) -> WorkerSide:
        assert self._worker is not None, "a worker hook was called in the scheduler"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.worker.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: Commands) -> None:
        self.worker.before_forward(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: Commands) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.worker.before_forward(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """No-op: loads start when the step's metadata is bound."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No-op: a request is scheduled only once all its pages have arrived."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """No-op: pages are sent per step, not per layer."""

    def finish_forward(self) -> None:
        """Called by the new model runner after it launched the forward pass and before it launches sampling."""
        self.worker.launched(self._commands)

    def wait_for_save(self) -> None:
        self.worker.after_forward(self._commands)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        sent, received, failed = self.worker.collect()
        return KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.take_invalid()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending, results.finished_recving

    def get_handshake_metadata(self) -> Shard | None:
        return self.worker.shard

    def build_connector_worker_meta(self) -> WorkerReport | None:
        return self._worker.take_news() if self._worker is not None else None

    def get_kv_connector_stats(self) -> TransferStats | None:
        side = self._worker or self._scheduler
        return side.take_stats() if side is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PDTransportStats:
        return PDTransportStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PDTransportPromMetrics:
        join_vllm_log()
        # The only hook that runs in the API server's process and has the settings.
        shorten_priming(Settings.parse(vllm_config.kv_transfer_config.kv_connector_extra_config))
        announce()
        return PDTransportPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.close()

    @property
    def _commands(self) -> Commands:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Commands)
        return metadata
