"""LoRA adapters for tiny-lm, as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAYERS, HIDDEN = 8, 256
OUT = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "o_proj": 256}


def write_adapter(folder: Path, seed: int, *, scale: float = 1.5, rank: int = 8, **config: Any) -> Path:
    """An adapter that changes tiny-lm's answers; another ``seed`` is another content. Files are rewritten in place."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, out in OUT.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=random) / 16
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=random) * scale / rank**0.5 / 4
    save_file(tensors, folder / "new.safetensors")
    (folder / "adapter_model.safetensors").write_bytes((folder / "new.safetensors").read_bytes())
    (folder / "new.safetensors").unlink()
    facts = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": list(OUT),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny-lm",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**facts, **config}))
    return folder
