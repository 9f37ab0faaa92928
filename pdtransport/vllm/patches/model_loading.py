"""Begins the digest of the checkpoint in a worker's process before the model is loaded.

vLLM creates the connector's worker half only after the model is loaded. Without this hook (on
``WorkerWrapperBase.init_device``) the digest begins only then, and the start waits for it; besides, the hook
:mod:`packed_weights` would come too late. This hook is installed before the settings are known, so its switch is
checked when a worker starts.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pdtransport.errors import SettingsError
from pdtransport.settings import Settings
from pdtransport.vllm.patches import packed_weights
from pdtransport.vllm.patches.base import Patch, expect

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_HOOKED = "_pdtransport_hooked"


def _check() -> None:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    expect(WorkerWrapperBase.init_device, takes=["self"], uses=["vllm_config", "worker", "init_device"])


PATCH = Patch(
    "early_digest",
    _check,
    setting="patches.early_digest",
    costs="the digest of the checkpoint begins after the model is loaded, and packed weights are not seen",
    unneeded=lambda settings, config: "" if settings.model_id is None else "model_id names the weights",
)


def watch_loading() -> None:
    """Hook the start of workers in this process and in processes forked from it. Idempotent; starts nothing."""
    if PATCH.check():  # the worker half logs it, once the settings are known
        return
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    init_device = WorkerWrapperBase.init_device
    if getattr(init_device, _HOOKED, False):
        return

    @functools.wraps(init_device)
    def begun(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        _before_loading(getattr(wrapper, "vllm_config", None))
        return init_device(wrapper, *args, **kwargs)

    setattr(begun, _HOOKED, True)
    WorkerWrapperBase.init_device = begun  # type: ignore[method-assign]


def report_loading(settings: Settings, config: VllmConfig) -> None:
    """Record the state of both hooks in this worker, once its model is loaded."""
    for patch in (PATCH, packed_weights.PATCH):
        if not patch.noted and patch.allowed(settings, config):
            patch.fail("the hook was not called before the model was loaded")


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
    packed_weights.see_packed_weights(settings)
    if PATCH.allowed(settings, config):
        from pdtransport.vllm.checkpoint import CheckpointDigest

        CheckpointDigest.begin(config, settings.weights_digest_s)
