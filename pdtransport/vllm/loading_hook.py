"""What happens in a worker's process before its model is loaded: two things are taken hold of in vLLM.

vLLM makes the worker's half of the connector after the model was loaded. The digest of the checkpoint should begin
before (``WorkerWrapperBase.init_device``), and what CPU kernels pack away should be summed while it can be seen
(``vllm._custom_ops.create_onednn_mm``). Where vLLM is not as expected the digest begins later, and weights that nobody
saw are not taken for equal.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from pdtransport.errors import SettingsError
from pdtransport.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_HOOKED = "_pdtransport_hooked"


def watch_loading() -> None:
    """Take hold of the start of this process' workers, and of those forked from it. Idempotent; starts nothing."""
    try:
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        init_device = WorkerWrapperBase.init_device
    except (ImportError, AttributeError) as error:
        logger.info("pdtransport: the weights' digest begins after they are loaded: %s", error)
        return
    if getattr(init_device, _HOOKED, False):
        return

    @functools.wraps(init_device)
    def begun(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        _before_loading(getattr(wrapper, "vllm_config", None))
        return init_device(wrapper, *args, **kwargs)

    setattr(begun, _HOOKED, True)
    WorkerWrapperBase.init_device = begun  # type: ignore[method-assign]


def our_settings(config: VllmConfig | None) -> Settings | None:
    """Of the connector in this configuration, alone or among several; None: it has none."""
    from pdtransport.vllm import CONNECTOR

    transfer = getattr(config, "kv_transfer_config", None)
    if transfer is None:
        return None
    extra = transfer.kv_connector_extra_config or {}
    if transfer.kv_connector == CONNECTOR:
        return Settings.parse(extra)
    for child in extra.get("connectors", ()) if transfer.kv_connector == "MultiConnector" else ():
        if isinstance(child, dict) and child.get("kv_connector") == CONNECTOR:
            return Settings.parse(child.get("kv_connector_extra_config") or {})
    return None


def _before_loading(config: VllmConfig | None) -> None:
    try:
        settings = our_settings(config)
    except SettingsError:
        return  # the connector says so
    if settings is None or config is None:
        return
    _see_packed_weights()
    if settings.model_id is None:
        from pdtransport.vllm.checkpoint import CheckpointDigest

        CheckpointDigest.begin(config, settings.weights_digest_s)


def _see_packed_weights() -> None:
    """oneDNN's handles keep weights where Python can't see them: sum the weights that one is made of."""
    from pdtransport.vllm.loaded import MARK, tensor_sum

    try:
        from vllm import _custom_ops as ops

        if not getattr(ops, "_supports_onednn", False):
            return
        makers = {name: getattr(ops, name) for name in ("create_onednn_mm", "create_onednn_scaled_mm")}
    except (ImportError, AttributeError):
        return
    for name, make in makers.items():
        if getattr(make, _HOOKED, False):
            continue

        @functools.wraps(make)
        def made(weight: Any, *args: Any, _make: Any = make, **kwargs: Any) -> Any:
            value = tensor_sum(weight)
            handle = _make(weight, *args, **kwargs)
            setattr(handle, MARK, value)
            return handle

        setattr(made, _HOOKED, True)
        setattr(ops, name, made)
