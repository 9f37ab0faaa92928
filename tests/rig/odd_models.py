"""Folders of tiny models whose cache is another than tiny-lm's, for servers that start with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.rig.servers import TINY_LM

_SMALL = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "bos_token_id": 1, "eos_token_id": 2}

MAMBA2 = {
    **_SMALL,
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "state_size": 32,
    "num_heads": 8,
    "head_dim": 32,
    "n_groups": 1,
    "expand": 2,
}
GRANITE_HYBRID = {
    **_SMALL,
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "layer_types": ["mamba", "attention"] * 2,
    "max_position_embeddings": 8192,
    "intermediate_size": 256,
    "shared_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "position_embedding_type": "rope",
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 32,
    "mamba_expand": 2,
}


def without_weights(folder: Path, config: dict[str, Any]) -> Path:
    """A model of this configuration, for ``load_format="dummy"``."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LM / name, folder)
    return folder


def with_window(folder: Path, tokens: int) -> Path:
    """tiny-lm's weights in a model all of whose layers attend to the last ``tokens`` only, as in Mistral-7B-v0.1."""
    return _changed(folder, sliding_window=tokens, layer_types=["sliding_attention"] * 8)


def with_mixed_layers(folder: Path, tokens: int) -> Path:
    """tiny-lm's weights in a model whose every fourth layer attends to everything, the others to the last ``tokens``
    only, like Gemma 3 or gpt-oss."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    return _changed(folder, sliding_window=tokens, layer_types=kinds * 2)


def _changed(folder: Path, **facts: Any) -> Path:
    shutil.copytree(TINY_LM, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **facts}))
    return folder
