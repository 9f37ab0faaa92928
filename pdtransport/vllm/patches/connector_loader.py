"""Calls back when vLLM loads our connector's class, which it does only if the connector is configured.

vLLM loads the class in the API server first and may fork the other processes from there; these inherit what is
installed by then (:mod:`engine_probe`, :mod:`model_loading`). The hook is on the loader in
``KVConnectorFactory._registry``. Without it the connector is still registered, but ``GET /pd/engine`` returns 404, and
the digest of the checkpoint begins late where workers are forked. The hook is installed before the settings are known,
so it has no switch of its own; the hooks that it calls have theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pdtransport.vllm.patches.base import Patch, Unexpected, expect


def _check() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if not isinstance(KVConnectorFactory._registry, dict):
        raise Unexpected("KVConnectorFactory._registry is no dict")
    expect(KVConnectorFactory.register_connector, takes=["name", "module_path", "class_name"], uses=["_registry"])
    expect(KVConnectorFactory.get_connector_class, uses=["_registry"])


PATCH = Patch(
    "connector_loader",
    _check,
    costs="GET /pd/engine returns 404, and the digest of the checkpoint begins late where workers are forked",
)


def register(name: str, module_path: str, before: Callable[[], None]) -> None:
    """Register class ``name`` of a module as a connector, and call ``before`` whenever vLLM loads it. Idempotent."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if not PATCH.allowed():
        try:
            KVConnectorFactory.register_connector(name, module_path, name)
        except ValueError:
            pass  # already registered
        return
    if name in KVConnectorFactory._registry:
        return
    KVConnectorFactory.register_connector(name, module_path, name)
    load = KVConnectorFactory._registry[name]

    def loaded() -> Any:
        before()
        return load()

    KVConnectorFactory._registry[name] = loaded
