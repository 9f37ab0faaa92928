"""Which kinds of KV cache can be handed over, decided by the specs of vLLM's cache groups.

Tensor shapes are not enough: a state-space model's state has four dimensions like a KV cache and would look like one
with pages of one token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdtransport.engine.block_tables import BlockTables
from pdtransport.errors import SettingsError
from pdtransport.kv.groups import GONE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

NULL_BLOCK = 0  # id of the block that vLLM puts where it has given one back
_REMEDY = "start this server without --kv-transfer-config"

# Spec classes by name, since not every vLLM version has them all. Kinds not listed here (state, cross attention,
# compressed or ring buffers) keep other data in their pages or use the block table in another way.
_WHOLE = frozenset({"FullAttentionSpec", "MLAAttentionSpec"})
_WINDOW = {"SlidingWindowSpec": "sliding_window", "ChunkedLocalAttentionSpec": "attention_chunk_size"}


def refuse_model(config: VllmConfig) -> None:
    """Refuse models with recurrent state, before vLLM lays out the cache and fails with an unhelpful error.

    Raises:
        SettingsError: the model keeps recurrent state instead of, or besides, keys and values.
    """
    model = config.model_config
    if model is None:
        return
    if model.is_hybrid:
        raise SettingsError(_of_state(model, "keeps a recurrent state beside keys and values"))
    if model.is_attention_free:
        raise SettingsError(_of_state(model, "keeps a recurrent state, no keys and values"))


def _of_state(model: Any, what: str) -> str:
    return (
        f"pdtransport can't hand over the cache of {model.architecture}: it {what}, and states can't be moved "
        f"yet; {_REMEDY}"
    )


def refuse_context_parallel(config: VllmConfig) -> None:
    """Refuse context parallelism, where the tokens of a block are spread over ranks: such blocks can't be moved.

    Raises:
        SettingsError: decode or prefill context parallelism is on.
    """
    for kind in ("decode", "prefill"):
        size = getattr(config.parallel_config, f"{kind}_context_parallel_size", 1)
        if size > 1:
            raise SettingsError(
                f"pdtransport does not hand over context-parallel shards yet: leave --{kind}-context-parallel-size at "
                f"1, not {size}"
            )


def refuse_caches(caches: KVCacheConfig) -> None:
    """Refuse caches that can't be moved.

    Raises:
        SettingsError: a layer keeps something other than attention's keys and values.
    """
    strange = sorted({kind for group in caches.kv_cache_groups for kind in _kinds(group.kv_cache_spec)})
    strange = [kind for kind in strange if kind not in _WHOLE and kind not in _WINDOW]
    if strange:
        raise SettingsError(
            f"pdtransport can't hand over this model's cache: it has layers of {', '.join(strange)}, and only "
            f"attention's keys and values can be moved yet ({', '.join([*sorted(_WHOLE), *_WINDOW])}); {_REMEDY}"
        )


@dataclass(frozen=True)
class HandedGroups:
    """vLLM's cache groups that are handed over, and the block tables of requests for them.

    Args:
        numbers: of the groups among all of vLLM's.
        sparse: by group, whether vLLM gives blocks back while the request runs (window, chunk).
        kinds: by group, the kind of attention, for the fingerprint.
    """

    tables: BlockTables
    numbers: tuple[int, ...] = (0,)
    sparse: tuple[bool, ...] = (False,)
    kinds: tuple[str, ...] = ("FullAttentionSpec",)

    @classmethod
    def one(cls, block_size: int) -> HandedGroups:
        """A single group of full attention."""
        return cls(BlockTables((block_size,)))

    @classmethod
    def of(cls, caches: KVCacheConfig) -> HandedGroups:
        numbers = tuple(getattr(caches, "transfer_group_ids", range(len(caches.kv_cache_groups))))
        specs = [caches.kv_cache_groups[number].kv_cache_spec for number in numbers]
        windows = [_window_of(spec) for spec in specs]
        return cls(
            BlockTables(
                tuple(spec.block_size for spec in specs),
                min((window for window in windows if window is not None), default=None),
            ),
            numbers,
            tuple(window is not None for window in windows),
            tuple(
                type(spec).__name__ + ("" if window is None else f":{window}")
                for spec, window in zip(specs, windows, strict=True)
            ),
        )

    def blocks(self, block_ids: Sequence[list[int]]) -> tuple[list[int], ...]:
        """A request's blocks by group, from vLLM's ids of all its groups."""
        return tuple(
            [GONE if block == NULL_BLOCK else block for block in block_ids[number]] if sparse else block_ids[number]
            for number, sparse in zip(self.numbers, self.sparse, strict=True)
        )


def _window_of(spec: KVCacheSpec) -> int | None:
    """Tokens of the smallest window or chunk of a group's layers; None: they attend to the whole prompt."""
    sizes = [
        int(getattr(each, _WINDOW[type(each).__name__])) for each in _specs(spec) if type(each).__name__ in _WINDOW
    ]
    return min(sizes, default=None)


def _kinds(spec: KVCacheSpec) -> Iterator[str]:
    return (type(each).__name__ for each in _specs(spec))


def _specs(spec: KVCacheSpec) -> Iterator[KVCacheSpec]:
    """Yield the specs of a group: one per layer if they differ, else the group's own."""
    inner = getattr(spec, "kv_cache_specs", None)
    if inner is None:
        yield spec
    else:
        yield from inner.values()
