"""Computes a digest of a LoRA adapter's content as a worker loads it.

The digest is computed from the tensors that vLLM's loader has just read, not from the files. It is attached to the
object that vLLM builds from these tensors, so it is always the digest of what vLLM holds under an id. The hook replaces
``WorkerLoRAManager._lora_model_cls`` with a subclass. The tensors are copied first, because vLLM keeps a view of the
memory-mapped file if the adapter has the model's dtype, and that view changes with the file.

The digest does not depend on tensor-parallel size (adapters are split later), name, id or path. It covers the names,
dtypes, shapes and bytes of all tensors, the fields of ``adapter_config.json`` that vLLM computes with (rank, alpha,
patterns, rsLoRA, ...), the dtype it computes in, and the server flags that select the parts of the model it applies to.

Answers depend on this hook, so it has no switch. If its check fails, the content of all adapters is unknown, and
prompts with an adapter are not handed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pdtransport.vllm.patches.base import Patch, expect

if TYPE_CHECKING:
    import torch

MARK = "pdtransport_content"
# Fields of an adapter's configuration that do not change the result: training and initialization, what the tensors'
# names already say, and the engine's own settings.
_IRRELEVANT = ("bias", "init_lora_weights", "target_modules", "vllm_max_position_embeddings")


def _check() -> None:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.worker_manager import WorkerLoRAManager

    _check_class(LoRAModel)
    expect(WorkerLoRAManager.__init__, uses=["_lora_model_cls"])
    expect(
        WorkerLoRAManager._load_adapter,
        takes=["self", "lora_request"],
        uses=["_lora_model_cls", "from_local_checkpoint"],
    )
    expect(WorkerLoRAManager.list_adapters, takes=["self"], uses=["_adapter_manager", "list_adapters"])
    expect(WorkerLoRAManager.add_adapter, uses=["_load_adapter"])


def _check_class(base: Any) -> None:
    expect(base.from_lora_tensors, accepts=["tensors", "peft_helper", "dtype"])
    expect(base.from_local_checkpoint, uses=["from_lora_tensors", "tensors", "peft_helper"])


PATCH = Patch(
    "adapter_digest",
    _check,
    costs="prompts with a LoRA adapter are not handed over",
    unneeded=lambda settings, config: "no LoRA adapters" if config is not None and config.lora_config is None else "",
)


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


def with_digest(base: Any) -> Any:
    """A subclass of vLLM's LoRA model class that attaches the digest of the loaded tensors to each object.

    Raises:
        Unexpected, AttributeError: the class is not as expected.
    """
    if getattr(base, "digests_content", False):
        return base
    _check_class(base)

    class DigestedLoRAModel(base):
        digests_content = True

        @classmethod
        def from_lora_tensors(cls, *, tensors: dict[str, torch.Tensor], peft_helper: Any, **more: Any) -> Any:
            tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            digest = content_digest(tensors, asdict(peft_helper), more.get("dtype"))
            model = super().from_lora_tensors(tensors=tensors, peft_helper=peft_helper, **more)
            setattr(model, MARK, digest)
            return model

        @classmethod
        def from_local_checkpoint(cls, *args: Any, **more: Any) -> Any:
            model = super().from_local_checkpoint(*args, **more)
            if more.get("moe_ep_spec") is not None:  # only this rank's experts were read
                setattr(model, MARK, "")
            return model

    DigestedLoRAModel.__name__ = base.__name__
    return DigestedLoRAModel
