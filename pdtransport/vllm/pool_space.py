"""Key spaces of this engine's chunks in the shared pool, and which engines and requests can't use it.

A key space holds everything that a chunk's key depends on besides the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata

from pdtransport.errors import SettingsError
from pdtransport.kernels.quant import DTYPES, DType, Grid
from pdtransport.kv.geometry import KVGeometry
from pdtransport.kv.groups import CacheGroups
from pdtransport.kv.keys import KeySpace
from pdtransport.pool.core.key_spaces import Space, whole_salt
from pdtransport.pool.remote.remote_wire import host_and_port
from pdtransport.pool.settings import MAX_CHUNK_BYTES, PoolSettings
from pdtransport.pool.tiers.codecs import Lossy
from pdtransport.pool.tiers.registry import lossy_codec
from pdtransport.settings import PoolUse
from pdtransport.transport import fingerprint_of
from pdtransport.vllm.geometry import Described
from pdtransport.vllm.identity import CONTEXT_PARALLEL_FACTS, model_facts

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


@dataclass
class Shard(KVConnectorHandshakeMetadata):
    """Key spaces of one worker's parts of chunks, without a salt; sent to the scheduler when the engine starts."""

    spaces: list[KeySpace]


def check_use(use: PoolUse, load_failure_policy: str) -> None:
    """Check the pool settings.

    Raises:
        SettingsError: the pool's name, directory, address or codec is invalid, or the engine does not recompute what
            can't be loaded.
    """
    place = {"name": use.name} if use.dir is None else {"name": use.name, "dir": use.dir}
    PoolSettings.parse(place, where="kv_connector_extra_config: pool")
    if use.address is not None:
        host_and_port(use.address)
    if use.load and load_failure_policy != "recompute":
        raise SettingsError(
            f"pool.load needs kv_load_failure_policy: recompute in --kv-transfer-config, not {load_failure_policy}: a "
            "chunk may be gone when it is to be loaded. Set that policy, or pool.load: false"
        )
    if use.codec != "none" and lossy_codec(use.codec) is None:
        raise SettingsError(
            f"pool.codec {use.codec} is no lossy codec that is installed here: none, fp8 and int4 always are; set a "
            "lossless codec for a tier of the pool instead (pdpool --disk-codec)"
        )


def head_parts(geometry: KVGeometry, shards: int) -> list[tuple[int, int]]:
    """Ranges of KV heads that this worker stores as separate chunks if the model's heads are split into ``shards``.

    Raises:
        SettingsError: this worker's heads can't be divided into such parts.
    """
    heads, odd = divmod(geometry.total_heads, shards)
    heads = heads or 1  # fewer heads than shards: several workers hold the same head
    if (odd and shards < geometry.total_heads) or geometry.heads % heads:
        raise SettingsError(
            f"pool.shards {shards} makes no whole parts of a worker's {geometry.heads} KV heads of "
            f"{geometry.total_heads}: set it to the largest tensor-parallel size of the engines that share chunks"
        )
    return [(head, head + heads) for head in range(geometry.head_lo, geometry.head_hi, heads)]


def key_spaces(described: Described, config: VllmConfig, use: PoolUse) -> list[KeySpace]:
    """Key spaces of this worker's parts of chunks.

    They hold all facts that two workers compare before they exchange pages, except those that say which part of the
    model's KV a worker holds.
    """
    geometry, facts = described.geometry, described.fingerprint
    layout = {
        **fingerprint_of(CacheGroups.of(geometry), described.ranks),
        "attention_backend": facts["attention_backend"],
        "layer_names": facts["layer_names"],
        "kernel_blocks": described.pages[0].ratio,
        "page_format": facts["page_format"],
    }
    # Chunks can be shared across tensor-parallel sizes, since `shard` says which heads they hold, and across protocol
    # versions, which don't change pages.
    del layout["tp_size"], layout["protocol_version"]
    elsewhere = {*layout, "model", "revision", "dtype", "kv_cache_dtype", "model_config", *CONTEXT_PARALLEL_FACTS}
    computed = {name: value for name, value in facts.items() if name not in elsewhere}
    computed["model_config"] = model_facts(config.model_config).digest()
    computed["draft"] = _draft(config)
    if not facts["weights"]:  # a digest of the weights makes names irrelevant
        computed["revision"] = facts["revision"]
    return [
        KeySpace(
            model=f"weights {facts['weights']}" if facts["weights"] else str(facts["model"]),
            revision=json.dumps(computed, sort_keys=True),
            dtype=f"{facts['dtype']}/{facts['kv_cache_dtype']}",
            layout=json.dumps(layout, sort_keys=True),
            shard=f"heads {low}-{high} of {geometry.total_heads}, {len(geometry.layers)} layers",
            chunk_tokens=use.chunk_blocks * config.cache_config.block_size,
            codec="" if use.codec == "none" else use.codec,
        )
        for low, high in head_parts(geometry, use.shards or described.ranks)
    ]


def introduction(shards: Sequence[Shard], use: PoolUse, served: Sequence[str], tokenizer: str) -> str:
    """Description of this engine's keys for the pool, as JSON text."""
    spaces = [space for shard in shards for space in shard.spaces]
    return Space.of(spaces, salted=bool(use.salt), served=tuple(served), tokenizer=tokenizer).model_dump_json()


def loss_of(described: Described, use: PoolUse) -> Lossy | None:
    """How tiers may compress this worker's chunks with loss; None: not at all.

    In each block, the keys and the values of each head have their own scales. If a page's layout differs from what is
    assumed here, the scales fit worse, but nothing else goes wrong.
    """
    geometry = described.geometry
    if use.codec == "none":
        return None
    dtype = _element(described)
    assert dtype is not None
    content, tokens = geometry.slot_bytes // Grid(dtype, 1, 1, 1).item_bytes, geometry.block_size
    if geometry.heads_first and "CPU_ATTN" in str(described.fingerprint["attention_backend"]):
        grid = Grid(dtype, 1, 1, tokens * content // 2)  # all keys of a head's page, then all values
    elif geometry.heads_first:
        grid = Grid(dtype, tokens, 2, content // 2)
    else:
        low, high = head_parts(geometry, use.shards or described.ranks)[0]
        grid = Grid(dtype, tokens, 2 * (high - low), content // 2)
    return Lossy(use.codec, grid)


def _element(described: Described) -> DType | None:
    """The element type of this worker's KV; None if the lossy codecs don't support it."""
    name = str(described.fingerprint["kv_cache_dtype"]).rpartition("/")[2]
    return next((dtype for dtype in DTYPES if dtype == name), None)


def _draft(config: VllmConfig) -> str:
    """The draft model, whose layers' KV is in the same pages; empty if there is no draft model."""
    speculation = config.speculative_config
    if speculation is None or getattr(speculation, "draft_model_config", None) is None:
        return ""
    return f"{speculation.method}:{speculation.model}"


def why_no_pool(described: Described, config: VllmConfig, caches: KVCacheConfig, use: PoolUse) -> str:
    """Why this engine's KV can't be stored in the pool, for the log; empty if it can."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    kinds = [type(group.kv_cache_spec) for group in caches.kv_cache_groups]
    if len(kinds) != 1 or kinds[0] not in (FullAttentionSpec, MLAAttentionSpec) or len(described.groups) != 1:
        # Blocks that leave a sliding window also leave the block table while the prompt is still being computed.
        names = ", ".join(dict.fromkeys(kind.__name__ for kind in kinds))
        return f"only full attention in one group of layers can be stored, not {len(described.groups)} of {names}"
    geometry = described.geometry
    speculation = config.speculative_config
    if speculation is not None and speculation.use_eagle():
        return "a draft model's KV of a chunk depends on the token after the chunk, which the key does not cover"
    parallel = config.parallel_config
    if max(getattr(parallel, f"{name}_context_parallel_size", 1) for name in ("decode", "prefill")) > 1:
        return "context-parallel shards can't be stored"
    if use.codec != "none" and _element(described) is None:
        return (
            f"pool.codec {use.codec} packs KV of {', '.join(DTYPES)}, not of {described.fingerprint['kv_cache_dtype']}"
        )
    try:
        parts = head_parts(geometry, use.shards or described.ranks)
    except SettingsError as error:
        return str(error)
    nbytes = use.chunk_blocks * described.pages[0].ratio * geometry.block_bytes(*parts[0])
    if nbytes > MAX_CHUNK_BYTES:
        return f"pool.chunk_blocks {use.chunk_blocks} makes chunks of {nbytes} bytes, above {MAX_CHUNK_BYTES}: lower it"
    if use.address is not None and nbytes > use.staging_bytes:
        return f"pool.staging_bytes {use.staging_bytes} can't hold a chunk of {nbytes} bytes: raise it"
    return ""


def kv_events_on(config: VllmConfig) -> bool:
    """Whether vLLM publishes KV events."""
    return config.kv_events_config is not None and config.kv_events_config.enable_kv_cache_events


def why_unkeyable(request: Request) -> str:
    """Why this request's KV can't be identified by its tokens, as a short code; empty if it can."""
    if request.mm_features:
        return "multimodal"
    if request.prompt_token_ids is None or request.prompt_embeds is not None or request.prompt_is_token_ids is not None:
        return "embeddings"
    if request.resumable or request.sampling_params is None:
        return "kind"  # streamed input, pooling
    return ""


def salt_of(configured: str, request: Request) -> str:
    """Salt that combines the instance's configured salt and the request's ``cache_salt``."""
    return whole_salt(configured, request.cache_salt or "")
