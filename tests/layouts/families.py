"""The families: what makes a tiny model of each, and how its servers are started."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.layouts.models import COMMON, HIDDEN, VOCABULARY, write_draft, write_model
from tests.rig.adapters import write_adapter
from tests.rig.odd_models import without_weights
from tests.rig.servers import TINY_LM

WINDOW = 64
MIXED = ["sliding_attention"] * 3 + ["full_attention"]


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Args:
        make: writes a model into a folder that does not exist, and gives the folder to serve.
        edges: windows and chunks, in tokens.
        flags: more of vLLM's, for all three servers.
        env: as ``flags``.
        blocks: decode's; few enough that its requests preempt one another.
        model: what the requests ask for; "": the served model's name.
        answers: with tokens; False: it embeds.
        chunk: tokens that prefill computes in a step.
    """

    name: str
    make: Callable[[Path], Path]
    edges: Sequence[int] = ()
    flags: Callable[[Path], Sequence[str]] = lambda _folder: ()
    env: Mapping[str, str] = field(default_factory=dict)
    blocks: int = 64
    model: str = ""
    answers: bool = True
    chunk: int = 128


def _of(kind: str, **facts: Any) -> Callable[[Path], Path]:
    """Makes a model of transformers' configuration class ``kind``."""

    def make(folder: Path) -> Path:
        import transformers

        made = {name: value for name, value in {**COMMON, **facts}.items() if value is not ...}
        return write_model(folder, getattr(transformers, kind)(**made))

    return make


def _tiny_lm(_folder: Path) -> Path:
    return TINY_LM


def _eagle(folder: Path) -> Sequence[str]:
    """A draft model of one layer for tiny-lm; its drafts are hardly ever right, but its layer has a cache."""
    draft = write_draft(folder / "draft")
    return ("--speculative-config", json.dumps({"method": "eagle", "model": str(draft), "num_speculative_tokens": 2}))


def _qwen2_vl(folder: Path) -> Path:
    """Its text only: prompts have no images."""
    from transformers import Qwen2VLConfig

    text = {name: value for name, value in COMMON.items() if name != "head_dim"}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6]}
    config = Qwen2VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=VISION)
    config.tie_word_embeddings = False
    write_model(folder, config, auto="AutoModelForImageTextToText")
    facts = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


def _whisper(folder: Path) -> Path:
    from transformers import WhisperConfig

    facts = WhisperConfig(**SPEECH, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0).to_dict()
    without_weights(folder, {**facts, "architectures": ["WhisperForConditionalGeneration"]})
    found = {"feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "WhisperProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(found))
    return folder


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA = {"tie_word_embeddings": True, "sliding_window": WINDOW, "query_pre_attn_scalar": 32}
GEMMA4 = {**GEMMA, "global_head_dim": 64, "hidden_size_per_layer_input": 0}
LLAMA4 = {
    **MOE,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 256,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": WINDOW,
    "num_hidden_layers": 8,
    "use_qk_norm": False,  # as Maverick; with it random queries attend to all tokens alike, and no broken page shows
    "no_rope_layers": [1, 1, 1, 0] * 2,
    "layer_types": (["chunked_attention"] * 3 + ["full_attention"]) * 2,
}
DEEPSEEK = {
    "head_dim": ...,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,  # vLLM's kernels take no other sizes of a latent vector
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
VISION = {"depth": 1, "embed_dim": 64, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2}
SPEECH: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_target_positions": 512,
}
ADAPTER = "adapted"
LORA = ("--enable-lora", "--max-lora-rank", "16", "--lora-modules")
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}

FAMILIES = (
    Family("Llama", _tiny_lm),
    Family("Gemma 3", _of("Gemma3TextConfig", **GEMMA, layer_types=MIXED), (WINDOW,), blocks=56),
    Family("gpt-oss", _of("GptOssConfig", **MOE, sliding_window=WINDOW, layer_types=MIXED[2:] * 2), (WINDOW,)),
    Family("Llama 4", _of("Llama4TextConfig", **LLAMA4), (WINDOW,)),
    Family(
        "Llama 4, one group",
        _of("Llama4TextConfig", **LLAMA4),
        (WINDOW,),
        env={"VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE": "0"},
    ),
    Family("DeepSeek V3", _of("DeepseekV3Config", **DEEPSEEK)),
    Family("Gemma 4", _of("Gemma4TextConfig", **GEMMA4, layer_types=MIXED), (WINDOW,), blocks=48),
    Family(
        "Gemma 4, shared layers",
        _of(
            "Gemma4TextConfig",
            **{**GEMMA4, "num_hidden_layers": 6},
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=3,
        ),
        (WINDOW,),
        blocks=36,
    ),
    Family("Mixtral", _of("MixtralConfig", **MOE)),
    Family("Qwen3", _of("Qwen3Config")),
    Family("Gemma 2", _of("Gemma2Config", **GEMMA, layer_types=["sliding_attention", "full_attention"] * 2), (WINDOW,)),
    Family("Mistral v0.1", _of("MistralConfig", sliding_window=WINDOW), (WINDOW,), blocks=24),
    Family(
        "Qwen3 MoE",
        _of("Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True),
    ),
    Family("Phi 3", _of("Phi3Config", head_dim=...)),
    Family("Phi", _of("PhiConfig", head_dim=..., num_key_value_heads=4)),
    Family("GLM 4", _of("Glm4Config")),
    Family("OLMo 2", _of("Olmo2Config", head_dim=...)),
    Family("OLMo 3", _of("Olmo3Config", head_dim=..., sliding_window=WINDOW, layer_types=MIXED), (WINDOW,), blocks=56),
    Family("Cohere", _of("CohereConfig", head_dim=..., tie_word_embeddings=True, logit_scale=1.0)),
    Family(
        "Cohere 2",
        _of("Cohere2Config", tie_word_embeddings=True, logit_scale=1.0, sliding_window=WINDOW, layer_types=MIXED),
        (WINDOW,),
        blocks=56,
    ),
    Family(
        "MiniMax-M2",
        _of("MiniMaxM2Config", **MOE, rotary_dim=16, scoring_func="sigmoid", use_routing_bias=True),
    ),
    Family("fp8 KV", _tiny_lm, flags=lambda _folder: ("--kv-cache-dtype", "fp8")),
    Family(
        "LoRA",
        _tiny_lm,
        flags=lambda folder: (*LORA, f"{ADAPTER}={write_adapter(folder / ADAPTER, 1)}"),
        model=ADAPTER,
    ),
    Family("n-gram", _tiny_lm, flags=lambda _folder: ("--speculative-config", json.dumps(NGRAM))),
    Family("EAGLE", _tiny_lm, flags=_eagle),
    Family("Qwen2-VL", _qwen2_vl, flags=lambda _folder: ("--limit-mm-per-prompt", '{"image": 0, "video": 0}')),
    Family("Whisper", _whisper, flags=lambda _folder: ("--load-format", "dummy"), chunk=2048),
    Family("embedding model", _of("Qwen3Config"), flags=lambda _folder: ("--runner", "pooling"), answers=False),
)


def named(names: Sequence[str]) -> list[Family]:
    """Families of these names, in any case; all of them without a name.

    Raises:
        ValueError: there is no such family.
    """
    known = {family.name.lower(): family for family in FAMILIES}
    unknown = [name for name in names if name.lower() not in known]
    if unknown:
        raise ValueError(f"unknown family {unknown[0]}: one of {', '.join(f.name for f in FAMILIES)}")
    return [known[name.lower()] for name in names] or list(FAMILIES)
