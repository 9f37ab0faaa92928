"""Which kinds of cache can be handed over, by what vLLM itself says of them: the specs of its cache groups.

A tensor's shape does not tell: a state-space model's state has four dimensions like a KV cache, and would pass for one
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

# By name: vLLM's versions have more and fewer of them. A kind that is not listed (state, cross attention, compressed or
# ring buffers) keeps something else in its pages, or blocks of other meaning in a request's block table.
_WHOLE = frozenset({"FullAttentionSpec", "MLAAttentionSpec"})
_WINDOW = {"SlidingWindowSpec": "sliding_window", "ChunkedLocalAttentionSpec": "attention_chunk_size"}


def refuse_model(config: VllmConfig) -> None:
    """For a hook that runs before vLLM lays out the cache, and may fail at it with a reason of its own.

    Raises:
        SettingsError: the model keeps a state instead of keys and values, or beside them.
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
    """Raises SettingsError where ranks hold every other token of a block, which nothing here knows how to move."""
    for kind in ("decode", "prefill"):
        size = getattr(config.parallel_config, f"{kind}_context_parallel_size", 1)
        if size > 1:
            raise SettingsError(
                f"pdtransport does not hand over context-parallel shards yet: leave --{kind}-context-parallel-size at "
                f"1, not {size}"
            )


def refuse_caches(caches: KVCacheConfig) -> None:
    """Raises SettingsError unless all layers keep keys and values of one kind that can be moved."""
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
    """Tokens of the longest prompt that can be handed over; None: any. Where all layers attend to a window only, vLLM
    gives the blocks behind it back while the prompt is still computed: a longer one never is there as a whole."""
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
    """Those of the layers, where a group has one for each."""
    inner = getattr(spec, "kv_cache_specs", None)
    if inner is None:
        yield spec
    else:
        yield from inner.values()
