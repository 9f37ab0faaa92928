"""Identifies the LoRA adapters that a worker has loaded by a digest of their content, computed as they are loaded.

Name, id and path of an adapter don't identify its content: it can be replaced in place, and a worker keeps the old
content or reloads at moments nobody else sees (first use, eviction, ``load_inplace``). So the digest is computed from
the tensors that vLLM's loader has just read, not from the files, and attached to the object that vLLM builds from them:
for whatever vLLM holds under an id, the digest is known. The tensors are copied first, because vLLM keeps a view of the
memory-mapped file if the adapter has the model's dtype, and that view changes with the file.

The digest does not depend on tensor-parallel size (adapters are split later), name, id or path. It covers the names,
dtypes, shapes and bytes of all tensors, the fields of ``adapter_config.json`` that vLLM computes with (rank, alpha,
patterns, rsLoRA, ...), the dtype it computes in, and the server flags that select the parts of the model it applies to.
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
# Fields of an adapter's configuration that do not change the result: training and initialization, what the tensors'
# names already say, and the engine's own settings.
_IRRELEVANT = ("bias", "init_lora_weights", "target_modules", "vllm_max_position_embeddings")

# Fields of vLLM's LoRAConfig that change what the same adapter computes.
_FLAGS = ("target_modules", "enable_tower_connector_lora", "enable_moe_shared_loras")


def content_digest(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: object = None) -> str:
    """Content digest, 32 hex digits, of tensors as read from the files and a configuration of scalars, lists and
    dicts."""
    state = hashlib.sha256()
    facts = {name: _plain(value) for name, value in config.items() if name not in _IRRELEVANT}
    state.update(json.dumps([facts, str(dtype)], sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        state.update(_bytes(tensor))
    return state.hexdigest()[:32]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):  # patterns: order matters, since the first one that matches a module counts
        return [[name, _plain(each)] for name, each in value.items()]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _applied(manager: Any) -> str:
    """The flags in ``_FLAGS`` that are set, as a suffix of digests; empty if none is."""
    config = getattr(manager, "lora_config", None)
    said = {name: getattr(config, name, None) for name in _FLAGS}
    told = {name: sorted(v) if isinstance(v, list) else v for name, v in said.items() if v not in (None, False)}
    return f":{json.dumps(told, sort_keys=True)}" if told else ""


def named(request: LoRARequest) -> str:
    """An adapter's name for logs and error messages."""
    return f"LoRA adapter {request.lora_name!r}"


class AdapterUnknown(Exception):
    """The content that this worker has loaded under an adapter's id can't be identified; the message says why."""


class Adapters:
    """The adapters that this worker has loaded. Used by the worker's thread.

    Args:
        manager: vLLM's LoRA manager; None: it was not found or is not supported, and every adapter is unknown.
    """

    def __init__(self, manager: Any | None) -> None:
        self._manager = manager
        self._told: dict[int, str] = {}
        self._applied = _applied(manager)
        if manager is not None:
            manager._lora_model_cls = _with_digest(manager._lora_model_cls)

    @classmethod
    def of_this_worker(cls) -> Adapters:
        """Hook into this process's LoRA manager; call before any adapter is loaded."""
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
        """Digest of the adapter loaded under an id; None if none is.

        Raises:
            AdapterUnknown: it was loaded without passing the hook, or only in part.
        """
        manager = self._look()
        model = manager._adapter_manager.list_adapters().get(number)
        if model is None:
            return None
        digest = getattr(model, _MARK, "")
        if not digest:
            raise AdapterUnknown("it was loaded in parts, by experts, or before this connector")
        # vLLM reads this flag only if a server mixes 2D and 3D expert weights, and then interprets tensors differently.
        form = ":3d" if getattr(model, "is_3d_lora_weight", False) else ""
        return f"{digest}{form}{self._applied}"

    def load(self, request: LoRARequest, used: Collection[int] = ()) -> str | None:
        """Load an adapter, as vLLM does at its first use.

        Not to be called while a step is being prepared, since it may evict another adapter.

        Args:
            used: ids of adapters that running requests use and that must stay loaded.

        Returns:
            Its digest; None if there is no room for it now.

        Raises:
            AdapterUnknown: it can't be loaded or identified.
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
            raise AdapterUnknown("this vLLM's adapters can't be looked at")
        return self._manager


def _with_digest(base: Any) -> Any:
    """A subclass of vLLM's LoRA model class that attaches the digest of the loaded tensors to each object.

    Raises:
        AttributeError: the class of this vLLM version is not as expected.
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
