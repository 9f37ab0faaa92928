"""The engine's live requests with a LoRA adapter, as its scheduler's half knows them.

vLLM's prefix cache knows an adapter by name and path. KV of an older content under these would be found by who comes
after: no worker hands it over (:mod:`pdtransport.vllm.adapted`), so equal adapters would be computed twice for as long
as such blocks are found. So each content gets a part of the cache for itself: a generation is part of the hashes of a
request's blocks, and a new one begins where an adapter is replaced in place, comes back under another id, or where a
worker says that it has loaded another content. Generation 0 hashes as vLLM does. None of this is needed for answers to
be right.
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

MAX_NAMES = 4096  # adapters that are remembered; beyond it all are forgotten, which costs cache hits

_Name = tuple[str, str]  # name and path
_generations: Counter[_Name] = Counter()  # of this process; vLLM's function that hashes them is the process's, too


class AdapterRequests:
    """One per engine.

    Args:
        block_size: tokens of a block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._live: dict[str, LoRARequest] = {}
        self._begun: set[str] = set()  # a step of theirs was scheduled
        self._names: dict[int, _Name] = {}
        self._contents: dict[int, str] = {}  # as workers told
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
        if known:  # it was loaded under another id: nobody knows whether it is the same
            _generations[name] += 1
            request.block_hashes.clear()
            request.update_block_hashes()

    def content(self, request: Request) -> str | None:
        """Digest of the request's adapter as the workers last loaded it; empty without an adapter, None if they have
        not said. A guess: workers check it."""
        if request.lora_request is None:
            return ""
        return self._contents.get(request.lora_request.lora_int_id) or None

    def hear(self, loaded: Mapping[int, str]) -> None:
        """What workers loaded, by id."""
        for number, content in loaded.items():
            before = self._contents.get(number)
            if before not in (None, content) and number in self._names:
                _generations[self._names[number]] += 1
            self._contents[number] = content

    def wrote(self, output: SchedulerOutput, computed: Mapping[str, int]) -> list[Wrote]:
        """Which blocks this step writes. ``computed``: tokens of each scheduled request before it."""
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
        """Forget the request; True if it had an adapter and no step: workers may still wait for its first one."""
        begun = req_id in self._begun
        self._begun.discard(req_id)
        return self._live.pop(req_id, None) is not None and not begun


def separate_generations() -> None:
    """Take hold of how vLLM hashes a request's adapter, and of what replaces one. Once a process."""
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

    @functools.wraps(add)  # vLLM reads the types of its arguments off its signature
    def add_lora(core: EngineCore, lora_request: LoRARequest) -> bool:
        if lora_request.load_inplace:
            _generations[lora_request.lora_name, lora_request.lora_path] += 1
        return add(core, lora_request)

    with_generation.pdtransport = True  # type: ignore[attr-defined]
    kv_cache_utils._gen_lora_extra_hash_keys = with_generation
    EngineCore.add_lora = add_lora  # type: ignore[method-assign]
