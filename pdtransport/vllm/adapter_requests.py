"""The engine's live requests with a LoRA adapter, as seen by the scheduler half.

vLLM's prefix cache knows an adapter by name and path, so after a replacement it still finds blocks computed with the
old content. Workers never hand such blocks over (:mod:`pdtransport.engine.adapted`), so decode would recompute those
prompts for as long as the old blocks are found. Therefore each content gets its own part of the cache: a generation
number is part of the block hashes (:mod:`pdtransport.vllm.patches.adapter_generations`). A new generation begins when
an adapter is replaced in place, comes back under another id, or a worker reports that it loaded other content. In
generation 0 the hashes are vLLM's own.

This only saves work; correctness does not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pdtransport.engine.commands import Wrote
from pdtransport.settings import Settings
from pdtransport.vllm.patches.adapter_generations import Name, generations, separate_generations

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

MAX_NAMES = 4096  # remembered adapters; beyond it all are forgotten, which costs cache hits


class AdapterRequests:
    """Live requests with an adapter, one per engine.

    Args:
        block_size: tokens per scheduler block.
    """

    def __init__(self, block_size: int, settings: Settings) -> None:
        self._block_size = block_size
        self._live: dict[str, LoRARequest] = {}
        self._begun: set[str] = set()  # requests with at least one scheduled step
        self._names: dict[int, Name] = {}  # by adapter id
        self._contents: dict[int, str] = {}  # digests by adapter id, as workers reported them
        separate_generations(settings)

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
            generations[name] += 1
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
        """Record digests of adapters that workers loaded, by id."""
        for number, content in loaded.items():
            before = self._contents.get(number)
            if before not in (None, content) and number in self._names:
                generations[self._names[number]] += 1
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
        """Forget the request; True if it has an adapter and was never scheduled: workers may hold state for it."""
        begun = req_id in self._begun
        self._begun.discard(req_id)
        return self._live.pop(req_id, None) is not None and not begun
