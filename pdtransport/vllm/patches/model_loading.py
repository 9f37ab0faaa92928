"""Two hooks that run in a worker's process before and while its model is loaded.

vLLM creates the connector's worker half only after the model is loaded, which is too late for two things. The digest of
the checkpoint should start earlier (hook on ``WorkerWrapperBase.init_device``). Weights that CPU kernels pack out of
sight must be checksummed while they are still visible (hook on ``vllm._custom_ops.create_onednn_mm`` and
``create_onednn_scaled_mm``). If vLLM is not as expected, the digest starts later, and weights that can't be read are
never taken for equal.
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
    """Hook the start of workers in this process and in processes forked from it. Idempotent; starts nothing."""
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
    """Settings of our connector in this configuration, alone or under MultiConnector; None if it is not used."""
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
        return  # the connector itself reports this error
    if settings is None or config is None:
        return
    _see_packed_weights()
    if settings.model_id is None:
        from pdtransport.vllm.checkpoint import CheckpointDigest

        CheckpointDigest.begin(config, settings.weights_digest_s)


def _see_packed_weights() -> None:
    """Attach to each oneDNN handle the checksum of the weights it is made from, which Python can't read afterwards."""
    from pdtransport.engine.weight_sums import MARK, tensor_sum

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
