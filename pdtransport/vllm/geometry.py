"""Describes a worker's KV cache: where its pages lie, which heads they hold, and the facts peers must agree on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtransport.engine.worker import GroupPages
from pdtransport.errors import SettingsError
from pdtransport.kv.geometry import HOST, KVGeometry, LayerPages, Region, head_range
from pdtransport.protocol.messages import FingerprintValue
from pdtransport.settings import Settings
from pdtransport.vllm.cache_groups import HandedGroups
from pdtransport.vllm.identity import model_identity

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

KVCaches = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Described:
    """One worker's KV cache.

    Attributes:
        groups: its cache groups: layers of one of vLLM's groups whose pages are alike.
        pages: for each of them, where its pages are in vLLM's block tables.
        regions: the memory that holds them.
        port: control port.
    """

    groups: tuple[KVGeometry, ...]
    pages: tuple[GroupPages, ...]
    regions: list[Region]
    fingerprint: dict[str, FingerprintValue]
    rank: int
    ranks: int
    port: int

    @property
    def geometry(self) -> KVGeometry:
        """The only group, where there is one."""
        (only,) = self.groups
        return only


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


def describe(kv_caches: KVCaches, layout: KVCacheConfig | None, config: VllmConfig, settings: Settings) -> Described:
    """Geometry, memory regions and fingerprint of this worker's KV cache.

    Args:
        kv_caches: layer name -> ``[blocks, heads, tokens, content]`` view, K and V of a head packed in ``content``.
        layout: vLLM's cache groups; None: all layers are one.

    Raises:
        SettingsError: this version can't move such a cache; the message says what to do.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    rank, ranks = get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size
    handed = HandedGroups.of(layout) if layout is not None else HandedGroups.one(config.cache_config.block_size)
    alike: list[tuple[int, KVCaches]] = []
    for table, number in enumerate(handed.numbers):
        names = set(layout.kv_cache_groups[number].layer_names if layout is not None else kv_caches)
        caches = _distinct({name: cache for name, cache in kv_caches.items() if name in names})
        alike += [(table, each) for each in _alike(caches)]
    if not alike:
        raise SettingsError("this model has no KV cache to hand over")
    groups = tuple(_geometry(caches, config, rank, ranks) for _, caches in alike)
    pages = []
    for (table, _), group in zip(alike, groups, strict=True):
        block_size = handed.tables.block_sizes[table]
        if block_size % group.block_size:
            raise SettingsError(
                f"--block-size {block_size} is not a multiple of the attention kernel's {group.block_size}"
            )
        pages.append(GroupPages(table, block_size // group.block_size))
    caches = {name: cache for _, each in alike for name, cache in each.items()}
    fingerprint = _fingerprint(caches, config, settings)
    # Windows say how many tokens are handed over: a window that vLLM keeps whole on one side counts as none there.
    fingerprint["attention_kinds"] = "/".join(handed.kinds[table] for table, _ in alike)
    if len(groups) > 1:
        fingerprint["layer_names"] = _digest([sorted(each) for _, each in alike])
    return Described(
        groups=groups,
        pages=tuple(pages),
        regions=_regions(caches),
        fingerprint=fingerprint,
        rank=rank,
        ranks=ranks,
        port=control_port(settings, config) + rank,
    )


def _distinct(kv_caches: KVCaches) -> KVCaches:
    """Keep each cache of a group once: layers that share a cache appear under several names."""
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
    return caches


def _alike(caches: KVCaches) -> list[KVCaches]:
    """Split layers by the shape of their pages, in the order of the first layer of each shape."""
    found: dict[tuple[tuple[int, ...], bool, torch.dtype], KVCaches] = {}
    for name, cache in caches.items():
        shape = tuple(cache.shape), cache.stride(1) > cache.stride(2), cache.dtype
        found.setdefault(shape, {})[name] = cache
    return list(found.values())


def _geometry(caches: KVCaches, config: VllmConfig, rank: int, ranks: int) -> KVGeometry:
    """Geometry of layers whose pages are alike."""
    first = next(iter(caches.values()))
    blocks, heads, tokens, content = first.shape
    item = first.element_size()
    heads_first = heads == 1 or first.stride(1) > first.stride(2)
    inner = (tokens * content, content, 1) if heads_first else (content, heads * content, 1)
    for name, cache in caches.items():
        # The stride of a dimension of size 1 is meaningless.
        dense = all(
            size == 1 or stride == wanted
            for size, stride, wanted in zip(cache.shape[1:], cache.stride()[1:], inner, strict=True)
        )
        if not dense:
            raise SettingsError(
                f"layer {name} has KV pages of shape {tuple(cache.shape)} and strides {tuple(cache.stride())}: "
                "pages must be dense; unset VLLM_KV_CACHE_LAYOUT"
            )
    lo, total = _heads(next(iter(caches)), heads, config, rank, ranks)
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


def _heads(layer: str, heads: int, config: VllmConfig, rank: int, ranks: int) -> tuple[int, int]:
    """Number of this rank's first KV head over all ranks, and the number of heads over all ranks.

    Raises:
        SettingsError: it can't be told which heads this rank's layer has.
    """
    if ranks == 1:
        return 0, heads
    total = config.model_config.get_total_num_kv_heads()
    lo, hi = head_range(rank, ranks, total)
    if hi - lo == heads:
        return lo, total
    if config.model_config.use_mla:  # latent attention: every rank holds the whole cache
        return 0, heads
    if heads > 1:  # layers of another kind, split like the others
        return rank * heads, ranks * heads
    raise SettingsError(
        f"layer {layer} has one KV head on each of {ranks} ranks, the model has {total}: whether the ranks hold the "
        "same one can't be told; start this server with --tensor-parallel-size 1"
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
