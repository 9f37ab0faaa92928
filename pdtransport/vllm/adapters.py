"""Which LoRA adapters a worker holds, by content: a digest over what was loaded, taken while it was loaded.

An adapter's name, id and path say nothing of its content: it can be replaced in place, and a worker goes on with what
it has loaded, or loads anew, at moments that nobody else sees (first use, an eviction, ``load_inplace``). So the
digest is made from the tensors that vLLM's loader has just read, not from the files, and stays with the object that
vLLM made of them: whatever vLLM holds under an id, its digest is at hand. The tensors are copied first. What vLLM
keeps of an adapter whose dtype is the model's is a view of the mapped file, and would change with it.

Equal for every tensor-parallel size (adapters are split later), name, id and path. It covers the names, dtypes, shapes
and bytes of all tensors, what of ``adapter_config.json`` vLLM computes with (rank, alpha, patterns, rsLoRA, ...), the
dtype that it computes in, and the server's flags that say to which parts of the model it is applied.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

_MARK = "pdtransport_content"
# Of an adapter's configuration: how it was trained or begun, what the tensors' names say, what is the engine's own.
_IRRELEVANT = ("bias", "init_lora_weights", "target_modules", "vllm_max_position_embeddings")

# Of vLLM's LoRAConfig: what makes another computation of the same adapter.
_FLAGS = ("target_modules", "enable_tower_connector_lora", "enable_moe_shared_loras")


def content_digest(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: object = None) -> str:
    """32 hex digits over tensors on the host, as read, and a configuration of scalars, lists and dicts."""
    state = hashlib.sha256()
    facts = {name: _plain(value) for name, value in config.items() if name not in _IRRELEVANT}
    state.update(json.dumps([facts, str(dtype)], sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        state.update(_bytes(tensor))
    return state.hexdigest()[:32]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):  # patterns: of several that match a module the first one counts
        return [[name, _plain(each)] for name, each in value.items()]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _applied(manager: Any) -> str:
    """The flags that are set, as they are part of digests; empty if none is."""
    config = getattr(manager, "lora_config", None)
    said = {name: getattr(config, name, None) for name in _FLAGS}
    told = {name: sorted(v) if isinstance(v, list) else v for name, v in said.items() if v not in (None, False)}
    return f":{json.dumps(told, sort_keys=True)}" if told else ""


def named(request: LoRARequest) -> str:
    """An adapter, for people."""
    return f"LoRA adapter {request.lora_name!r}"


class AdapterUnknown(Exception):
    """What this worker computes with under an adapter's id can't be told; the text says why."""


class Adapters:
    """Those of this worker. Used by its own thread.

    Args:
        manager: vLLM's; None: there is none that could be looked at, and every adapter is unknown.
    """

    def __init__(self, manager: Any | None) -> None:
        self._manager = manager
        self._told: dict[int, str] = {}
        self._applied = _applied(manager)
        if manager is not None:
            manager._lora_model_cls = _with_digest(manager._lora_model_cls)

    @classmethod
    def of_this_worker(cls) -> Adapters:
        """Takes hold of the loader of this process's LoRA manager, before any adapter is loaded."""
        try:
            from vllm.lora.worker_manager import WorkerLoRAManager

            (manager,) = (thing for thing in gc.get_objects() if issubclass(type(thing), WorkerLoRAManager))
            return cls(manager)
        except (ImportError, ValueError, AttributeError) as error:
            logger.warning(
                "prompts with a LoRA adapter are not handed over: this vLLM's adapters can't be looked at (%s)", error
            )
            return cls(None)

    def held(self, number: int) -> str | None:
        """Digest of what is loaded under an adapter's id; None if nothing is.

        Raises:
            AdapterUnknown: it was loaded where nobody could see it.
        """
        manager = self._look()
        model = manager._adapter_manager.list_adapters().get(number)
        if model is None:
            return None
        digest = getattr(model, _MARK, "")
        if not digest:
            raise AdapterUnknown("it was loaded in parts, by experts, or before this connector")
        # Only read where servers mix both forms of experts' weights; the tensors are then taken in another way.
        form = ":3d" if getattr(model, "is_3d_lora_weight", False) else ""
        return f"{digest}{form}{self._applied}"

    def load(self, request: LoRARequest, used: Collection[int] = ()) -> str | None:
        """As vLLM does at an adapter's first use. Not while a step is being prepared: it may take another one's slot.

        Args:
            used: ids of adapters that must stay, since running requests compute with them.

        Returns:
            its digest; None if there is no room for it now.

        Raises:
            AdapterUnknown: it can't be loaded, or looked at.
        """
        manager = self._look()
        held = set(manager.list_adapters())
        if request.lora_int_id in held:
            return self.held(request.lora_int_id)
        if len(held) >= manager._adapter_manager.capacity and held <= set(used):
            return None
        try:
            manager.add_adapter(request)
        except Exception as error:  # whatever vLLM finds wrong with the files
            raise AdapterUnknown(f"it can't be loaded: {error}") from error
        return self.held(request.lora_int_id)

    def take_news(self) -> dict[int, str]:
        """By id: what was loaded since the last call."""
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
            raise AdapterUnknown("this vLLM's adapters can't be looked at")
        return self._manager


def _with_digest(base: Any) -> Any:
    """vLLM's class of loaded adapters, whose objects know the digest of what they were made of.

    Raises:
        AttributeError: this vLLM's class is another.
    """
    needed = {"tensors", "peft_helper", "dtype"}
    if not needed <= set(inspect.signature(base.from_lora_tensors).parameters):
        raise AttributeError(f"{base.__name__}.from_lora_tensors has not the parameters {sorted(needed)}")

    class DigestedLoRAModel(base):
        @classmethod
        def from_lora_tensors(cls, *, tensors: dict[str, torch.Tensor], peft_helper: Any, **more: Any) -> Any:
            tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            digest = content_digest(tensors, asdict(peft_helper), more.get("dtype"))
            model = super().from_lora_tensors(tensors=tensors, peft_helper=peft_helper, **more)
            setattr(model, _MARK, digest)
            return model

        @classmethod
        def from_local_checkpoint(cls, *args: Any, **more: Any) -> Any:
            model = super().from_local_checkpoint(*args, **more)
            if more.get("moe_ep_spec") is not None:  # only this rank's experts were read
                setattr(model, _MARK, "")
            return model

    DigestedLoRAModel.__name__ = base.__name__
    return DigestedLoRAModel
