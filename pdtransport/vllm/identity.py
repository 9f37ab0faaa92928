"""Facts besides weights, tokens and adapters that an engine's KV depends on, read from vLLM's configuration.

Each fact is compared with the peer's and is part of the pool's keys. Whatever does not change the K and V values is
left out: paths and names (if the weights have a digest), library versions, parallel sizes that only split the KV,
compilation, CUDA graphs, and kernels that compute the same in another order.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtransport.kv.model_facts import IRRELEVANT, ModelFacts
from pdtransport.protocol.messages import FingerprintValue
from pdtransport.vllm.checkpoint import NoFiles, snapshot

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig

# Page format of these vLLM versions: K and V of a head packed, one view of [blocks, heads, tokens, content] per layer.
# Pages of any two of them are the same if all facts (attention backend, shape, layout, dtype) are. Any other version
# counts as a format of its own.
PAGE_FORMAT = "packed-kv-1"
KNOWN_VERSIONS = ("0.30", "0.31", "0.32")

CONTEXT_PARALLEL_FACTS = {
    "dcp_size": "decode_context_parallel_size",
    "pcp_size": "prefill_context_parallel_size",
    "cp_interleave": "cp_kv_cache_interleave_size",
}

# Fields of vLLM's multimodal configuration that change the embedding of an input.
_MEDIA = (
    "mm_processor_kwargs",
    "media_io_kwargs",
    "video_pruning_rate",
    "video_pruning_method",
    "mm_encoder_attn_dtype",
)
# Files beside the model that say how its processor crops, scales and normalizes images and audio.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_NOT_OF_PROCESSORS = IRRELEVANT | {"chat_template", "processor_class"}


def model_identity(config: VllmConfig, kv_dtype: torch.dtype) -> dict[str, FingerprintValue]:
    """Facts of the model and of the flags that change its KV.

    Args:
        kv_dtype: dtype of the cache's tensors.
    """
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    return {
        "model_config": model_facts(model).text(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": quantization(model),
        "kv_cache_dtype": kv_cache_dtype(cache, kv_dtype),
        "page_format": page_format(),
        "sliding_window": str(model.get_sliding_window() or ""),
        "long_rope": long_rope(model),
        "media": media(model),
        "remote_code": remote_code(config),
        **{fact: int(getattr(parallel, name, 1) or 1) for fact, name in CONTEXT_PARALLEL_FACTS.items()},
    }


def model_facts(model: ModelConfig) -> ModelFacts:
    """Configuration of the whole model, including image encoder and projector, whose output becomes KV."""
    whole, text = model.hf_config, model.hf_text_config
    facts = dict(whole.to_dict())
    if text is not whole and not any(part is text for part in vars(whole).values()):
        facts["text_model"] = text.to_dict()  # vLLM built it; it is not part of the whole configuration
    return ModelFacts(facts, _defaults(whole))


def _defaults(config: Any) -> Mapping[str, Any]:
    try:
        defaults: Mapping[str, Any] = type(config)().to_dict()
    except Exception:  # noqa: BLE001 - classes of remote code may need arguments; then no field counts as a default
        return {}
    return defaults


def quantization(model: ModelConfig) -> str:
    """The quantization method, named by the checkpoint or a flag, and the flags' quantization options."""
    asked = getattr(model, "quantization_config", None)
    more = "" if asked is None else f" {json.dumps(_plain(asked), sort_keys=True, default=str)}"
    return f"{model.quantization or ''}{more}"


def _plain(value: Any) -> Any:
    return value if isinstance(value, Mapping) else getattr(value, "__dict__", str(value))


def kv_cache_dtype(cache: Any, kv_dtype: torch.dtype) -> str:
    """dtype of the cache's tensors, with the KV format in front if it differs (the tensors then only store its bytes).

    ``auto`` and an explicit flag give the same text if they result in the same dtype. Layers that keep the computed
    dtype are named first.
    """
    stored, named = str(kv_dtype).removeprefix("torch."), str(cache.cache_dtype)
    skipped = ",".join(sorted(map(str, getattr(cache, "kv_cache_dtype_skip_layers", None) or ())))
    shown = stored if named in ("auto", stored) else f"{named}/{stored}"
    if getattr(cache, "calculate_kv_scales", False):  # scales depend on the engine's first request
        shown = f"{named}, scales of {secrets.token_hex(4)}/{stored}"
    return f"{skipped} as computed, rest {shown}" if skipped else shown


def page_format() -> str:
    """Version of the page format, which attention backends may change in any vLLM release."""
    import vllm

    minor = ".".join(vllm.__version__.split(".")[:2])
    return PAGE_FORMAT if minor in KNOWN_VERSIONS else f"vllm {vllm.__version__}"


def long_rope(model: ModelConfig) -> bool:
    """Whether LongRoPE's long factors are used from the first token on.

    vLLM does so if ``max_model_len`` exceeds the model's original maximum length.
    """
    config = model.hf_text_config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    kind = rope.get("rope_type", rope.get("type"))
    if kind != "longrope" or not original:
        return False
    built = _built_for_long_texts()
    return model.max_model_len > original if built is None else built


def _built_for_long_texts() -> bool | None:
    """Whether this process built its model with the long factors; None if the model has no LongRoPE embedding.

    ``max_model_len`` can't answer that: ``--max-model-len -1`` is lowered later to what fits into the cache.
    """
    try:
        from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    except ImportError:
        return None
    built = [each.use_long_rope for each in _ROPE_DICT.values() if hasattr(each, "use_long_rope")]
    return any(built) if built else None


def media(model: ModelConfig) -> str:
    """Flags and processor files that change the embedding of images and audio.

    Empty if all have their defaults or the model is not multimodal. The hash of a request's media covers the options in
    the request.
    """
    config = model.multimodal_config
    if config is None:
        return ""
    from dataclasses import MISSING, fields

    usual = {each.name: each.default for each in fields(type(config))}
    said = {name: getattr(config, name, None) for name in _MEDIA}
    told = {name: value for name, value in said.items() if value and value not in (usual.get(name), MISSING)}
    scales = getattr(config, "mm_encoder_fp8_scale_path", None)
    if scales:
        told["mm_encoder_fp8_scale_path"] = _digest(Path(scales).read_bytes())
    processor = _processor(model)
    if processor:
        told["processor"] = _digest(json.dumps(processor, sort_keys=True, default=str).encode())
    return json.dumps(told, sort_keys=True, default=str) if told else ""


def remote_code(config: VllmConfig) -> str:
    """Digest of the model's remote code; empty if none runs.

    Covers the bytes of the Python files beside the model. Code of other repositories is covered only by the names in
    ``auto_map`` and by ``--code-revision``.
    """
    model = config.model_config
    named = getattr(model.hf_config, "auto_map", None)
    if not named or not model.trust_remote_code:
        return ""
    folder = Path(str(model.model))
    try:
        files = sorted((folder if folder.is_dir() else snapshot(config)).glob("*.py"))
    except NoFiles:
        return f"unknown {secrets.token_hex(8)}"  # equal to no other engine's
    told = [named, str(model.code_revision or ""), [[file.name, _digest(file.read_bytes())] for file in files]]
    return _digest(json.dumps(told, sort_keys=True, default=str).encode())


def _processor(model: ModelConfig) -> dict[str, Any]:
    """Contents of the processor files found on this host, by file name, without irrelevant fields."""
    from vllm.transformers_utils.repo_utils import try_get_local_file

    found = {}
    for name in _PROCESSOR_FILES:
        file = try_get_local_file(model=str(model.model), file_name=name, revision=model.revision)
        if file is None or not Path(file).is_file():
            continue
        raw = json.loads(Path(file).read_bytes())
        if isinstance(raw, dict):
            raw = {key: value for key, value in raw.items() if key not in _NOT_OF_PROCESSORS}
        if raw:
            found[name] = raw
    return found


def _digest(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=8).hexdigest()
