"""The LoRA adapters that a worker has loaded, identified by a digest of their content.

An adapter's name, id and path don't identify its content: the files can be replaced in place, and only the worker
knows when it reloads them (at first use, after an eviction, with ``load_inplace``). So the digest is computed while an
adapter is loaded (:mod:`pdtransport.vllm.patches.adapter_digest`).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from pdtransport.engine.adapted import AdapterUnknown
from pdtransport.vllm.patches.adapter_digest import MARK, PATCH, with_digest
from pdtransport.vllm.patches.base import Unexpected

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

# Fields of vLLM's LoRAConfig that change what the same adapter computes.
_FLAGS = ("target_modules", "enable_tower_connector_lora", "enable_moe_shared_loras")


def _applied(manager: Any) -> str:
    """The flags in ``_FLAGS`` that are set, as a suffix of digests; empty if none is."""
    config = getattr(manager, "lora_config", None)
    said = {name: getattr(config, name, None) for name in _FLAGS}
    told = {name: sorted(v) if isinstance(v, list) else v for name, v in said.items() if v not in (None, False)}
    return f":{json.dumps(told, sort_keys=True)}" if told else ""


class Adapters:
    """A worker's :class:`~pdtransport.engine.adapted.LoadedAdapters`.

    Args:
        manager: vLLM's LoRA manager; None: it was not found or is not supported, and every adapter is unknown.
    """

    def __init__(self, manager: Any | None) -> None:
        self._manager = manager
        self._told: dict[int, str] = {}
        self._applied = _applied(manager)
        if manager is not None:
            manager._lora_model_cls = with_digest(manager._lora_model_cls)

    @classmethod
    def of_this_worker(cls) -> Adapters:
        """Hook into this process's LoRA manager; call before any adapter is loaded."""
        if PATCH.allowed():
            try:
                from vllm.lora.worker_manager import WorkerLoRAManager

                (manager,) = (thing for thing in gc.get_objects() if issubclass(type(thing), WorkerLoRAManager))
                return cls(manager)
            except (ValueError, AttributeError, Unexpected) as error:
                PATCH.fail(str(error))
        return cls(None)

    def held(self, number: int) -> str | None:
        """Digest of the adapter loaded under an id; None if none is.

        Raises:
            AdapterUnknown: it was loaded without passing the hook, or only in part.
        """
        manager = self._look()
        model = manager._adapter_manager.list_adapters().get(number)
        if model is None:
            return None
        digest = getattr(model, MARK, "")
        if not digest:
            raise AdapterUnknown("only this rank's experts of it were loaded, or it was loaded before this connector")
        # vLLM reads this flag only if a server mixes 2D and 3D expert weights, and then interprets tensors differently.
        form = ":3d" if getattr(model, "is_3d_lora_weight", False) else ""
        return f"{digest}{form}{self._applied}"

    def load(self, adapter: LoRARequest, used: Collection[int] = ()) -> str | None:
        """Load an adapter, as vLLM does at its first use.

        Must not be called while a step is being prepared, since the load may evict another adapter.

        Args:
            used: ids of adapters that running requests use and that must stay loaded.

        Returns:
            Its digest; None if there is no room for it now.

        Raises:
            AdapterUnknown: it can't be loaded or identified.
        """
        manager = self._look()
        held = set(manager.list_adapters())
        if adapter.lora_int_id in held:
            return self.held(adapter.lora_int_id)
        if len(held) >= manager._adapter_manager.capacity and held <= set(used):
            return None
        try:
            manager.add_adapter(adapter)
        except Exception as error:  # whatever vLLM finds wrong with the files
            raise AdapterUnknown(f"it can't be loaded: {error}") from error
        return self.held(adapter.lora_int_id)

    def take_news(self) -> dict[int, str]:
        """Digests by id of the adapters loaded since the last call."""
        if self._manager is None:
            return {}
        news = {}
        for number in self._manager.list_adapters():
            try:
                digest = self.held(number)
            except AdapterUnknown:
                continue
            if digest is not None and self._told.get(number) != digest:
                news[number] = self._told[number] = digest
        return news

    def _look(self) -> Any:
        if self._manager is None:
            raise AdapterUnknown("the adapters that this vLLM version loads can't be inspected")
        return self._manager
