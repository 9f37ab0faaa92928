"""Gives each content of a LoRA adapter its own part of vLLM's prefix cache, which uses name and path.

A generation number becomes part of the block hashes of requests with an adapter; in generation 0 the hashes are vLLM's
own. The hook is on ``kv_cache_utils._gen_lora_extra_hash_keys`` and ``EngineCore.add_lora``. It only saves work:
without it prompts that find blocks of an adapter's older content are computed on both sides instead of handed over.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING, Any

from pdtransport.settings import Settings
from pdtransport.vllm.patches.base import Patch, expect, expect_fields

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

Name = tuple[str, str]  # an adapter's name and path
generations: Counter[Name] = Counter()  # per process, as is vLLM's hash function


def _check() -> None:
    from vllm.lora.request import LoRARequest
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore

    expect(kv_cache_utils._gen_lora_extra_hash_keys, takes=["request"], uses=["lora_request"])
    expect(kv_cache_utils.generate_block_hash_extra_keys, uses=["_gen_lora_extra_hash_keys"])
    expect(EngineCore.add_lora, takes=["self", "lora_request"])
    expect_fields(LoRARequest, "lora_name", "lora_path", "load_inplace")


PATCH = Patch(
    "adapter_generations",
    _check,
    setting="patches.adapter_generations",
    costs="after a LoRA adapter was replaced, prompts that find blocks of its older content are not handed over",
    unneeded=lambda settings, config: "no LoRA adapters" if config is not None and config.lora_config is None else "",
)


def separate_generations(settings: Settings) -> None:
    """Patch vLLM's adapter hash function and ``EngineCore.add_lora`` to use generations. Idempotent."""
    if not PATCH.allowed(settings):
        return
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore

    keys, add = kv_cache_utils._gen_lora_extra_hash_keys, EngineCore.add_lora
    if getattr(keys, "pdtransport", False):
        return

    @functools.wraps(keys)
    def with_generation(request: Request) -> list[Any]:
        adapter, found = request.lora_request, list(keys(request))
        generation = generations[adapter.lora_name, adapter.lora_path] if adapter and generations else 0
        return [*found, ("lora_generation", generation)] if generation else found

    @functools.wraps(add)  # vLLM reads argument types from the signature
    def add_lora(core: EngineCore, lora_request: LoRARequest) -> bool:
        if lora_request.load_inplace:
            generations[lora_request.lora_name, lora_request.lora_path] += 1
        return add(core, lora_request)

    with_generation.pdtransport = True  # type: ignore[attr-defined]
    kv_cache_utils._gen_lora_extra_hash_keys = with_generation
    EngineCore.add_lora = add_lora  # type: ignore[method-assign]
