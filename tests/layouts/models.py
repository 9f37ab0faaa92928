"""Tiny checkpoints of an architecture with random weights whose answers depend on the whole context.

As transformers initializes them, models of a few layers repeat their last token: the residual stream is that token's
embedding. Here queries and keys are large, so that attention picks single tokens; what attention adds outweighs the
embedding; and logits spread over some nats, so that a greedy token is far ahead of the next one.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from tests.rig.servers import TINY_LM

HIDDEN = 128
VOCABULARY = 4096
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LOGITS = 4.0  # their standard deviation, nats
SMALL = 0.02  # standard deviation of embeddings that are tied to the head
# Gains: a matrix of gain 1 keeps the size of its input.
_GAINS = (
    (r"\.(q|k|q_a|q_b|kv_a|kv_b|qkv|query_key_value)_?(proj|proj_with_mqa)?\.weight$", 2.0),
    (r"\.(v_proj|o_proj|dense)\.weight$", 1.5),
    (r"(lm_head|embed_out)\.weight$", LOGITS),
    (r"\.(mlp|feed_forward|block_sparse_moe|experts|router)\b", 0.5),
)


def write_model(folder: Path, config: Any, seed: int = 0, auto: str = "AutoModelForCausalLM") -> Path:
    """A checkpoint of ``config``, a configuration of transformers, and tiny-lm's tokenizer."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            _scale(name, weights, tied=bool(config.tie_word_embeddings))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LM / name, folder)
    return folder


def write_draft(folder: Path, seed: int = 0) -> Path:
    """An EAGLE draft model for tiny-lm: one of its layers with other weights, fed with its hidden states."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((TINY_LM / "config.json").read_text())
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = (head * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    shapes = {
        "embed_tokens": (config["vocab_size"], hidden),
        "fc": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj": (heads, hidden),
        "layers.0.self_attn.k_proj": (kv_heads, hidden),
        "layers.0.self_attn.v_proj": (kv_heads, hidden),
        "layers.0.self_attn.o_proj": (hidden, heads),
        "layers.0.mlp.gate_proj": (inner, hidden),
        "layers.0.mlp.up_proj": (inner, hidden),
        "layers.0.mlp.down_proj": (hidden, inner),
        "layers.0.post_attention_layernorm": (hidden,),
    }
    random = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {f"{name}.weight": torch.randn(shape, generator=random) / hidden**0.5 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    return folder


def _scale(name: str, weights: Any, *, tied: bool) -> None:
    if weights.dim() < 2:
        if tied and re.search(r"(model\.norm|final_layernorm)\.weight$", name):
            weights.fill_(LOGITS / (SMALL * HIDDEN**0.5))
        elif re.search(r"\b(q|k|query|key)_(norm|layernorm)\.weight$", name):
            weights.add_(1.0)  # these norms undo the gains of queries and keys
        elif tied and name.endswith("post_attention_layernorm.weight"):
            weights.add_(3.0)  # in Gemma it gives attention's output a size, in others the MLP's input
        elif tied and name.endswith("post_feedforward_layernorm.weight"):
            weights.sub_(0.5)
        elif name.endswith(("bias", "sinks")):
            weights.normal_(0, 0.1)
        return
    if "embed" in name:
        weights.normal_(0, SMALL if tied else 0.5)
        return
    gain = next((gain for pattern, gain in _GAINS if re.search(pattern, name)), 1.0)
    fan_in = weights.shape[-1] if weights.dim() == 2 else min(weights.shape[-2:])
    weights.normal_(0, gain / fan_in**0.5)
