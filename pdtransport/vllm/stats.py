"""Transfer statistics in vLLM's log lines and Prometheus metrics (``vllm:pdtransport_*``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from pdtransport import __version__
from pdtransport.engine.stats import TransferStats
from pdtransport.settings import Settings
from pdtransport.vllm.geometry import control_port

if TYPE_CHECKING:
    from vllm.config import VllmConfig

INFO = "vllm:pdtransport_info"  # read by routers
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclass
class PDTransportStats(TransferStats, KVConnectorStats):
    """:class:`TransferStats` in the form that vLLM passes on."""


class PDTransportPromMetrics(KVConnectorPromMetrics):
    """The same statistics as Prometheus metrics, and a gauge with the control address of this server's workers."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._transfers = self._counter_cls(
            name="vllm:pdtransport_transfers",
            documentation="Transfers that ended, by role and outcome: ok, or why not (cancelled: the request was "
            "aborted here; peer_cancelled: by the peer; rejected: by decode's server; all others are failures).",
            labelnames=[*labelnames, "role", "outcome"],
        )
        self._bytes = self._counter_cls(
            name="vllm:pdtransport_bytes",
            documentation="Bytes of KV pages handed over (producer) or received and verified (consumer), loaded from "
            "the shared pool and verified (load), or stored there (store).",
            labelnames=[*labelnames, "role"],
        )
        self._chunks = self._counter_cls(
            name="vllm:pdtransport_pool_chunks",
            documentation="Chunks of the shared pool, each part counted: loaded (hit), not in the pool (miss), "
            "stored, already in the pool (present), not stored for lack of room (skipped), or not looked up, loaded or "
            "stored for another reason (failed).",
            labelnames=[*labelnames, "outcome"],
        )
        self._exposed = self._histogram_cls(
            name="vllm:pdtransport_exposed_seconds",
            documentation="From prefill's commit to the last verified page on decode.",
            buckets=SECONDS,
            labelnames=labelnames,
        )
        self._tell_engines(vllm_config)

    def _tell_engines(self, config: VllmConfig) -> None:
        """Set one info gauge per engine, always 1, with labels that a router needs before the first request."""
        transfer, parallel = config.kv_transfer_config, config.parallel_config
        assert transfer is not None
        settings = Settings.parse(transfer.kv_connector_extra_config)
        first = control_port(settings, config) - parallel.data_parallel_index * parallel.tensor_parallel_size
        info = self._gauge_cls(
            name=INFO,
            documentation="This server's pdtransport: role, address of rank 0's control channel, version.",
            multiprocess_mode="mostrecent",
            labelnames=[*self._labelnames, "engine_id", "role", "control_host", "control_port", "tp_size", "version"],
        )
        for index, labels in self.per_engine_labelvalues.items():
            replicas = parallel.data_parallel_size > 1 or index > 0
            info.labels(
                *labels,
                f"{transfer.engine_id}_dp{index}" if replicas else str(transfer.engine_id),
                str(transfer.kv_role),
                settings.control.host,
                str(first + index * parallel.tensor_parallel_size),
                str(parallel.tensor_parallel_size),
                __version__,
            ).set(1)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for key, count in transfer_stats_data["ended"].items():
            self._transfers.labels(*labels, *key.split("/", 1)).inc(count)
        for role, count in transfer_stats_data["bytes"].items():
            self._bytes.labels(*labels, role).inc(count)
        for what, count in transfer_stats_data["chunks"].items():
            self._chunks.labels(*labels, what).inc(count)
        for seconds in transfer_stats_data["exposed_s"]:
            self._exposed.labels(*labels).observe(seconds)
