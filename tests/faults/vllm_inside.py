"""The connector with an injector inside: what vLLM loads in the servers of the vLLM rig.

``kv_connector_module_path`` names this module. It puts the injector into the worker's process before the transport is
made. Now and then vLLM loses the word that wakes a process of its own that has been idle for a second, and looks again
after 5 s; here after 0.1 s, so that times are those of the faults. vLLM and pdtransport are otherwise as installed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm.distributed.device_communicators import shm_broadcast

from pdtransport.vllm.connector import KVConnectorRole
from pdtransport.vllm.connector import PDTransportConnector as Installed
from tests.faults.inject import install
from tests.faults.rule_server import SOCKET_VARIABLE, serve_rules
from tests.faults.rules import Injector

shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = 100


class PDTransportConnector(Installed):
    """Strays as the rig says."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        if role is KVConnectorRole.WORKER:
            self._injector = Injector()
            install(self._injector)
        super().__init__(vllm_config, role, kv_cache_config)

    def register_kv_caches(self, kv_caches: Any) -> None:
        super().register_kv_caches(kv_caches)
        transport = self.worker._transport
        assert transport is not None
        serve_rules(Path(os.environ[SOCKET_VARIABLE]), transport, self._injector)
