"""Which kinds of KV cache can be handed over, decided by the specs of vLLM's cache groups.

Tensor shapes are not enough: a state-space model's state has four dimensions like a KV cache and would look like one
with pages of one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pdtransport.errors import SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

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
        SettingsError: a layer keeps something other than attention's keys and values, or there are several groups.
    """
    groups = caches.kv_cache_groups
    strange = sorted({kind for group in groups for kind in _kinds(group.kv_cache_spec)} - {*_WHOLE, *_WINDOW})
    if strange:
        raise SettingsError(
            f"pdtransport can't hand over this model's cache: it has layers of {', '.join(strange)}, and only "
            f"attention's keys and values can be moved yet ({', '.join([*sorted(_WHOLE), *_WINDOW])}); {_REMEDY}"
        )
    if len(groups) > 1:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise SettingsError(
            f"pdtransport can't hand over this model's cache: it has {len(groups)} groups of layers with blocks of "
            f"their own ({kinds}), and only one can be moved yet; start this server with "
            "--disable-hybrid-kv-cache-manager"
        )


def window_of(caches: KVCacheConfig) -> int | None:
    """Number of tokens of the longest prompt that can be handed over; None: any.

    If all layers use a sliding window, vLLM frees blocks that leave it while the prompt is still being computed, so the
    KV of a longer prompt is never complete.
    """
    sizes = [
        int(getattr(spec, _WINDOW[type(spec).__name__]))
        for group in caches.kv_cache_groups
        for spec in _specs(group.kv_cache_spec)
        if type(spec).__name__ in _WINDOW
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
