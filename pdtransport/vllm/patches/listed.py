"""All hooks into vLLM: importing this module fills :data:`pdtransport.vllm.patches.base.PATCHES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdtransport.observe.status import PatchStatus
from pdtransport.settings import Settings
from pdtransport.vllm.patches import (  # noqa: F401
    adapter_digest,
    adapter_generations,
    appended_token,
    cached_usage,
    connector_loader,
    decode_stream,
    engine_loop,
    engine_probe,
    hold_back,
    late_caching,
    model_loading,
    packed_weights,
    poll_backoff,
    scheduler_hook,
    stale_blocks,
    weight_watch,
    withheld,
)
from pdtransport.vllm.patches.base import PATCHES

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class PatchStates:
    """The states of all hooks of one engine, as a worker's status shows them.

    For hooks of other processes it is this worker's own finding, until the scheduler's process reports theirs.
    """

    def __init__(self, settings: Settings, config: VllmConfig) -> None:
        self._settings, self._config = settings, config
        self._told: dict[str, PatchStatus] = {}

    def hear(self, told: list[PatchStatus]) -> None:
        """Record states that the scheduler's process reported."""
        self._told.update((status["name"], status) for status in told)

    def all(self) -> list[PatchStatus]:
        return [self._told.get(name) or patch.state(self._settings, self._config) for name, patch in PATCHES.items()]
