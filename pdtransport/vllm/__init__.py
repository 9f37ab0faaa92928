"""The vLLM connector. ``--kv-transfer-config '{"kv_connector": "PDTransportConnector", "kv_role": "kv_producer"}'``
finds it through the ``vllm.general_plugins`` entry point; ``"kv_connector_module_path": "pdtransport.vllm"`` works too.
"""

from __future__ import annotations

from typing import Any

CONNECTOR = "PDTransportConnector"


def register() -> None:
    """Make the connector known to vLLM. Called by vLLM's plugin loader, in every process, maybe more than once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from pdtransport.vllm.logs import join_vllm_log

    join_vllm_log()
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "pdtransport.vllm.connector", CONNECTOR)


def __getattr__(name: str) -> Any:
    if name == CONNECTOR:
        from pdtransport.vllm.connector import PDTransportConnector

        return PDTransportConnector
    raise AttributeError(name)
