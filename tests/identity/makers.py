"""Checkpoints, configurations and adapters that are equal under other labels, or differ under the same ones.

All come of tiny-lm, which has learned to use its whole context: KV of something else changes its answers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.identity import contents
from tests.rig.servers import TINY_LM

INNER = 4  # the layer whose keys and values another checkpoint has: far from both ends of the file
LAYERS = 8
SHARDS = 3
RANK = 8
HIDDEN = 256
ADAPTED = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "o_proj": 256}  # outputs of each
Tensors = dict[str, Any]


@cache
def base() -> Tensors:
    from safetensors.torch import load_file

    return load_file(TINY_LM / "model.safetensors")


def _inner(projections: tuple[str, ...], seed: int) -> Tensors:
    """tiny-lm with its ``INNER`` layer's rows of these projections in another order: the same names and sizes."""
    import torch

    tensors = dict(base())
    mixed = torch.Generator().manual_seed(seed)
    for projection in projections:
        name = f"model.layers.{INNER}.self_attn.{projection}.weight"
        rows = tensors[name]
        tensors[name] = rows[torch.randperm(len(rows), generator=mixed)].contiguous()
    return tensors


WEIGHTS: dict[str, Callable[[], Tensors]] = {
    "base": base,
    "kv": lambda: _inner(("k_proj", "v_proj"), 1),
    "v": lambda: _inner(("v_proj",), 2),
}

# What each changes in tiny-lm's config.json; None takes a field away.
CONFIGS: dict[str, Mapping[str, Any]] = {
    "base": {},
    "named": {"_name_or_path": "/models/of/somebody", "transformers_version": "4.51.0", "use_cache": False},
    "older": {"rope_parameters": None, "rope_theta": 100000.0, "dtype": None, "torch_dtype": "bfloat16"},
    "theta": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    "eps": {"rms_norm_eps": 0.1},
    "scaled": {"rope_parameters": {"rope_theta": 100000.0, "rope_type": "linear", "factor": 4.0}},
}
SAME_CONFIGS = ("base", "named", "older")
OTHER_CONFIGS = ("theta", "eps", "scaled")
# What a message that refuses a pair may say of how it differs; any one of these words will do. A salt is a secret, and
# part of what makes two prompts the same: that they are not is all that is said.
NAMED_BY = {
    "weights": ("weight",),
    "config": ("rope", "rms_norm_eps", "model_config"),
    "adapter": ("adapter", "lora"),
    "salt": ("salt", "prompt"),
}


@dataclass(frozen=True)
class Model:
    """A checkpoint's folder, and how a server is started with it.

    Args:
        weights, config: keys of ``WEIGHTS`` and ``CONFIGS``.
        sharded: the tensors lie in several files.
        folder: its path below the rig's root; two of the same name may have other contents, one after the other.
        overrides_of: the key of ``CONFIGS`` that ``--hf-overrides`` brings, on top of ``config``; "": there are none.
        late: it is written over what was in the folder when other servers started.
    """

    weights: str = "base"
    config: str = "base"
    sharded: bool = False
    folder: str = "one/tiny"
    overrides_of: str = ""
    late: bool = False

    @property
    def overrides(self) -> Mapping[str, Any]:
        return CONFIGS[self.overrides_of] if self.overrides_of else {}

    def make(self, root: Path) -> Path:
        folder = root / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder, self.weights, self.sharded)
        fields = {**json.loads((TINY_LM / "config.json").read_text()), **CONFIGS[self.config]}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}, indent=2))
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(TINY_LM / name, folder)
        return folder

    def args(self) -> list[str]:
        return ["--hf-overrides", json.dumps(self.overrides)] if self.overrides else []

    def config_content(self, root: Path) -> str:
        return contents.config(root / self.folder, self.overrides)


def write_weights(folder: Path, weights: str, sharded: bool) -> None:
    """A checkpoint's files, in place of those that are there: each is renamed into its place, and has the name, the
    size and the time of change of the one before it."""
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    tensors = WEIGHTS[weights]()
    names = sorted(tensors, reverse=sharded)
    groups = [names[shard::SHARDS] for shard in range(SHARDS)] if sharded else [names]
    wanted = {}
    for shard, group in enumerate(groups):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors" if sharded else "model.safetensors"
        wanted[file] = {name: tensors[name] for name in group}
    index = folder / "model.safetensors.index.json"
    for old in folder.glob("*.safetensors"):
        if old.name not in wanted:
            old.unlink()
    for file, group_tensors in wanted.items():
        save(group_tensors, folder / file)
        if file in times:
            os.utime(folder / file, ns=(times[file], times[file]))
    if sharded:
        places = {name: file for file, group_tensors in wanted.items() for name in group_tensors}
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        index.unlink(missing_ok=True)


def save(tensors: Tensors, file: Path) -> None:
    from safetensors.torch import save_file

    part = file.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(file)


# -- adapters -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter's contents: random matrices of ``seed``, and what its configuration says of them.

    Args:
        base: the base model's name, which nothing depends on.
    """

    seed: int
    alpha: int = 16
    base: str = "tiny-lm"


ADAPTERS = {
    "a": Adapter(1),
    "b": Adapter(2),
    "louder a": Adapter(1, alpha=48),  # the same tensors, and another effect
    "renamed a": Adapter(1, base="/models/of/somebody"),
}


@cache
def _adapter_tensors(seed: int) -> Tensors:
    import torch

    drawn = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, outputs in ADAPTED.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=drawn) / 16
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, RANK, generator=drawn) / 24
    return tensors


def write_adapter(folder: Path, name: str) -> None:
    """One of ``ADAPTERS``, in place of what is there."""
    made = ADAPTERS[name]
    folder.mkdir(parents=True, exist_ok=True)
    save(_adapter_tensors(made.seed), folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": made.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ADAPTED),
        "base_model_name_or_path": made.base,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    part = folder / "adapter_config.part"
    part.write_text(json.dumps(fields))
    part.replace(folder / "adapter_config.json")
