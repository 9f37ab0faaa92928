"""The vLLM connector. ``--kv-transfer-config '{"kv_connector": "PDTransportConnector", "kv_role": "kv_producer"}'``
finds it through the ``vllm.general_plugins`` entry point; ``"kv_connector_module_path": "pdtransport.vllm"`` works too.
"""

from __future__ import annotations

import sys
from typing import Any

CONNECTOR = "PDTransportConnector"


def register() -> None:
    """Register the connector with vLLM. Called by vLLM's plugin loader in every process, maybe more than once."""
    from pdtransport.vllm.logs import join_vllm_log
    from pdtransport.vllm.patches import connector_loader

    join_vllm_log()
    connector_loader.register(CONNECTOR, "pdtransport.vllm.connector", _chosen)
    if "vllm.v1.worker.worker_base" in sys.modules:  # a worker process, before it creates its worker
        _watch_loading()


def _chosen() -> None:
    """Called when vLLM loads the connector in this process."""
    from pdtransport.vllm.patches.engine_probe import offer_probe

    _watch_loading()
    offer_probe()


def _watch_loading() -> None:
    from pdtransport.vllm.patches.model_loading import watch_loading

    watch_loading()


def __getattr__(name: str) -> Any:
    if name == CONNECTOR:
        _watch_loading()
        from pdtransport.vllm.connector import PDTransportConnector

        return PDTransportConnector
    raise AttributeError(name)
