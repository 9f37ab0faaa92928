"""The engine's live requests with a LoRA adapter, as seen by the scheduler half.

vLLM's prefix cache knows an adapter by name and path, so after a replacement it still finds blocks computed with the
old content. Workers never hand such blocks over (:mod:`pdtransport.vllm.adapted`), so decode would recompute those
prompts for as long as the old blocks are found. Therefore each content gets its own part of the cache: a generation
number is part of the block hashes. A new generation begins when an adapter is replaced in place, comes back under
another id, or a worker reports that it loaded another content. Generation 0 hashes as vLLM does.

This only saves work; correctness does not depend on it.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pdtransport.vllm.metadata import Wrote

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

MAX_NAMES = 4096  # remembered adapters; beyond it all are forgotten, which costs cache hits

_Name = tuple[str, str]  # name and path
_generations: Counter[_Name] = Counter()  # per process, as is vLLM's hash function


class AdapterRequests:
    """Live requests with an adapter, one per engine.

    Args:
        block_size: tokens per scheduler block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._live: dict[str, LoRARequest] = {}
        self._begun: set[str] = set()  # requests with at least one scheduled step
        self._names: dict[int, _Name] = {}  # by adapter id
        self._contents: dict[int, str] = {}  # digests by adapter id, as workers reported them
        separate_generations()

    def arrive(self, request: Request) -> None:
        adapter = request.lora_request
        if adapter is None:
            return
        self._live[request.request_id] = adapter
        name = (adapter.lora_name, adapter.lora_path)
        if self._names.get(adapter.lora_int_id) == name:
            return
        if len(self._names) >= MAX_NAMES:
            self._names.clear()
            self._contents.clear()
        known = name in self._names.values()
        self._names[adapter.lora_int_id] = name
        if known:  # it was loaded under another id before; the content may differ
            _generations[name] += 1
            request.block_hashes.clear()
            request.update_block_hashes()

    def content(self, request: Request) -> str | None:
        """Digest of the request's adapter as workers last reported it; empty without one, None if not reported yet.

        It may be outdated: workers check it before they use it.
        """
        if request.lora_request is None:
            return ""
        return self._contents.get(request.lora_request.lora_int_id) or None

    def hear(self, loaded: Mapping[int, str]) -> None:
        """Take in digests of adapters that workers loaded, by id."""
        for number, content in loaded.items():
            before = self._contents.get(number)
            if before not in (None, content) and number in self._names:
                _generations[self._names[number]] += 1
            self._contents[number] = content

    def wrote(self, output: SchedulerOutput, computed: Mapping[str, int]) -> list[Wrote]:
        """Which blocks this step writes for requests with an adapter.

        Args:
            computed: for each scheduled request, tokens computed before this step.
        """
        found: list[Wrote] = []
        state = output.kv_connector_block_state
        for req_id, before in computed.items() if self._live and state is not None else ():
            adapter = self._live.get(req_id)
            ids = state.get_block_ids(req_id) if adapter is not None else None
            if adapter is None or ids is None:
                continue
            self._begun.add(req_id)
            first, anew = before // self._block_size, before % self._block_size == 0
            end = -(-(before + output.num_scheduled_tokens[req_id]) // self._block_size)
            found.append(Wrote(req_id, adapter.lora_int_id, list(ids[0][first:end]), anew))
        return found

    def finished(self, req_id: str) -> bool:
        """Forget the request; True if it has an adapter and was never scheduled, so workers may hold state for it."""
        begun = req_id in self._begun
        self._begun.discard(req_id)
        return self._live.pop(req_id, None) is not None and not begun


def separate_generations() -> None:
    """Patch vLLM's adapter hash function and ``EngineCore.add_lora`` to use generations. Idempotent."""
    try:
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.engine.core import EngineCore

        keys, add = kv_cache_utils._gen_lora_extra_hash_keys, EngineCore.add_lora
    except (ImportError, AttributeError) as error:
        logger.info("the prefix cache does not tell an adapter's contents apart: %s", error)
        return
    if getattr(keys, "pdtransport", False):
        return

    def with_generation(request: Request) -> list[Any]:
        adapter, found = request.lora_request, list(keys(request))
        generation = _generations[adapter.lora_name, adapter.lora_path] if adapter and _generations else 0
        return [*found, ("lora_generation", generation)] if generation else found

    @functools.wraps(add)  # vLLM reads argument types from the signature
    def add_lora(core: EngineCore, lora_request: LoRARequest) -> bool:
        if lora_request.load_inplace:
            _generations[lora_request.lora_name, lora_request.lora_path] += 1
        return add(core, lora_request)

    with_generation.pdtransport = True  # type: ignore[attr-defined]
    kv_cache_utils._gen_lora_extra_hash_keys = with_generation
    EngineCore.add_lora = add_lora  # type: ignore[method-assign]
