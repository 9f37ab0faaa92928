"""Describes a worker's KV cache: where its pages lie, which heads they hold, and the facts peers must agree on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtransport.errors import SettingsError
from pdtransport.kv.geometry import HOST, KVGeometry, LayerPages, Region, head_range
from pdtransport.protocol.messages import FingerprintValue
from pdtransport.settings import Settings
from pdtransport.vllm.identity import model_identity

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

KVCaches = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Described:
    geometry: KVGeometry
    regions: list[Region]
    fingerprint: dict[str, FingerprintValue]
    kernel_blocks_per_block: int
    rank: int
    ranks: int
    port: int


def control_port(settings: Settings, config: VllmConfig) -> int:
    """Control port of this engine's rank-0 worker.

    Data-parallel replicas use consecutive port ranges, one port per tensor-parallel rank. The replica's index is used,
    since replicas of a dense model all have ``data_parallel_rank`` 0.
    """
    parallel = config.parallel_config
    role = str(config.kv_transfer_config.kv_role) if config.kv_transfer_config is not None else "kv_both"
    return settings.control.base_port(role) + parallel.data_parallel_index * parallel.tensor_parallel_size


def attention_heads(config: VllmConfig) -> int:
    """Number of the model's attention heads; 0 if its configuration has none.

    vLLM refuses a tensor-parallel size that does not divide it.
    """
    heads = getattr(config.model_config.hf_text_config, "num_attention_heads", 0)
    return heads if isinstance(heads, int) else 0


def describe(kv_caches: KVCaches, config: VllmConfig, settings: Settings) -> Described:
    """Geometry, memory regions and fingerprint of this worker's KV cache.

    Args:
        kv_caches: layer name -> ``[blocks, heads, tokens, content]`` view, K and V of a head packed in ``content``.

    Raises:
        SettingsError: this version can't move such a cache; the message says what to do.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    rank, ranks = get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size
    caches = _distinct(kv_caches)
    geometry = _geometry(caches, config, rank, ranks)
    kernel_block = geometry.block_size
    block_size = config.cache_config.block_size
    if block_size % kernel_block:
        raise SettingsError(f"--block-size {block_size} is not a multiple of the attention kernel's {kernel_block}")
    return Described(
        geometry=geometry,
        regions=_regions(caches),
        fingerprint=_fingerprint(caches, config, settings),
        kernel_blocks_per_block=block_size // kernel_block,
        rank=rank,
        ranks=ranks,
        port=control_port(settings, config) + rank,
    )


def _distinct(kv_caches: KVCaches) -> KVCaches:
    """Keep each cache once: layers that share a cache appear under several names."""
    seen: set[int] = set()
    caches: KVCaches = {}
    for name, cache in kv_caches.items():
        if cache.device.type not in ("cpu", "cuda"):
            raise SettingsError(f"layer {name} keeps its KV on {cache.device}; KV on a CPU or a CUDA GPU can be moved")
        if cache.dim() != 4:
            raise SettingsError(
                f"layer {name} has a KV cache of {cache.dim()} dimensions, 4 were expected: state-space and hybrid "
                "models are not supported, and vLLM must be 0.29 or newer"
            )
        if cache.data_ptr() not in seen:
            seen.add(cache.data_ptr())
            caches[name] = cache
    if not caches:
        raise SettingsError("this model has no KV cache to hand over")
    return caches


def _geometry(caches: KVCaches, config: VllmConfig, rank: int, ranks: int) -> KVGeometry:
    first = next(iter(caches.values()))
    blocks, heads, tokens, content = first.shape
    item = first.element_size()
    heads_first = heads == 1 or first.stride(1) > first.stride(2)
    for name, cache in caches.items():
        inner = (tokens * content, content, 1) if heads_first else (content, heads * content, 1)
        # The stride of a dimension of size 1 is meaningless.
        dense = all(
            size == 1 or stride == wanted
            for size, stride, wanted in zip(cache.shape[1:], cache.stride()[1:], inner, strict=True)
        )
        if tuple(cache.shape) != (blocks, heads, tokens, content) or not dense:
            raise SettingsError(
                f"layer {name} has KV pages of shape {tuple(cache.shape)} and strides {tuple(cache.stride())}: "
                "pages must be dense and alike in all layers; unset VLLM_KV_CACHE_LAYOUT"
            )
    total = heads if ranks == 1 else config.model_config.get_total_num_kv_heads()
    if heads == 1 and total > 1 and ranks == 1:
        total = 1
    lo, hi = head_range(rank, ranks, total)
    if hi - lo != heads:  # latent attention (MLA): every rank holds the whole cache
        lo, total = 0, heads
    return KVGeometry(
        layers=tuple(
            LayerPages(name, cache.data_ptr(), cache.stride(0) * cache.element_size()) for name, cache in caches.items()
        ),
        num_blocks=blocks,
        block_size=tokens,
        heads=heads,
        head_lo=lo,
        total_heads=total,
        slot_bytes=content * item,
        heads_first=heads_first,
        device=_device(first),
    )


def _device(cache: torch.Tensor) -> int:
    return int(cache.device.index) if cache.device.type == "cuda" else HOST


def _regions(caches: KVCaches) -> list[Region]:
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in caches.values()}
    device = _device(next(iter(caches.values())))
    return [Region(address, storage.nbytes(), storage, device) for address, storage in storages.items()]


def _fingerprint(caches: KVCaches, config: VllmConfig, settings: Settings) -> dict[str, FingerprintValue]:
    model = config.model_config
    first = next(iter(caches.values()))
    return {
        "model": settings.model_id or _model_name(model),
        "revision": str(model.revision or ""),
        **model_identity(config, first.dtype),
        "attention_backend": _attention_backend(config),
        "layer_names": _digest(sorted(caches)),
    }


def _model_name(model: Any) -> str:
    """The model's name; for a directory its last component, since the path may differ between hosts."""
    path = Path(model.model)
    return path.resolve().name if path.exists() else str(model.model)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _attention_backend(config: VllmConfig) -> str:
    """Names of the attention backends and, on CPU, of the instruction set that the page format depends on."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = get_layers_from_vllm_config(config, AttentionLayerBase)
    names = set()
    for layer in layers.values():
        backend = layer.get_attn_backend()
        isa = getattr(getattr(layer, "impl", None), "isa", None) or _cpu_isa(config, backend.get_name())
        names.add(f"{backend.get_name()}{':' + str(isa) if isa else ''}")
    return ",".join(sorted(names))


def _cpu_isa(config: VllmConfig, backend: str) -> str:
    if backend != "CPU_ATTN":
        return ""
    from vllm.v1.attention.backends import cpu_attn

    choose = getattr(cpu_attn, "_get_attn_isa", None)
    if choose is None:
        return ""
    model = config.model_config
    try:
        return str(choose(model.dtype, config.cache_config.block_size, model.get_head_size()))
    except TypeError:  # vLLM changed its arguments: hosts that differ only in the ISA then count as equal here
        return ""
