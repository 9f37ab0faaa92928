"""The half of the connector that lives in vLLM's scheduler: decides, never waits, touches no bytes."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdtransport.kv.keys import request_key
from pdtransport.settings import Settings
from pdtransport.vllm.bell import Bell
from pdtransport.vllm.metadata import Cancel, Claim, Command, Commands, Drop, Finish, Open, Pages, Rewind, Take
from pdtransport.vllm.params import ConsumeParams, parse

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

CLAIM_EVERY_S = 2.0  # a request that waits for room here tells prefill so at this interval


@dataclass
class _Producing:
    transfer: str
    tokens: int


@dataclass
class _Consuming:
    params: ConsumeParams
    key: bytes
    tokens: int
    state: str = "waiting"  # -> "loading" -> "done"; or straight to "done" when nothing needs to come
    claim_at: float = 0.0


class SchedulerSide:
    """One per engine.

    Args:
        host, port: control address of this engine's rank-0 worker, for the parameters that prefill returns.
        ranks: tensor-parallel size of this engine.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        producer: bool,
        consumer: bool,
        block_size: int,
        engine: str,
        port: int,
        ranks: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._producer, self._consumer = producer, consumer
        self._block_size = block_size
        self._engine, self._port, self._ranks = engine, port, ranks
        self._clock = clock
        self._producing: dict[str, _Producing] = {}
        self._consuming: dict[str, _Consuming] = {}
        self._before: list[Command] = []
        self._bell = Bell()
        self._look_again = 0  # empty steps that must not wait
        self._awaited: set[str] = set()  # requests that vLLM holds until the workers report their transfer's end
        self._taken: OrderedDict[str, None] = OrderedDict()  # transfers that the workers were told to take

    # -- arrival -------------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        wanted = parse(request.kv_transfer_params, producer=self._producer, consumer=self._consumer)
        problem = wanted.problem
        if (wanted.produce or wanted.consume) and request.prompt_token_ids is None:
            problem = "a prompt of embeddings has no token ids to identify its KV by"
        if problem:
            logger.warning("request %s is not handed over: %s", request.request_id, problem)
            return
        if wanted.produce is not None:
            tokens = request.num_prompt_tokens
            self._producing[request.request_id] = _Producing(wanted.produce, tokens)
            self._before.append(Open(request.request_id, wanted.produce, content_key(request), tokens))
        elif wanted.consume is not None:
            self._consuming[request.request_id] = _Consuming(
                wanted.consume, content_key(request), request.num_prompt_tokens, claim_at=self._clock()
            )

    # -- decode --------------------------------------------------------------------------------------------------

    def matched_tokens(self, request: Request, computed: int) -> tuple[int, bool]:
        """Tokens that can come from prefill beyond the ``computed`` ones held here, and whether they come later."""
        entry = self._consuming.get(request.request_id)
        if entry is None or entry.state != "waiting" or request.num_output_tokens:
            return 0, False
        # The last prompt token is computed here in any case: its logits give the first token.
        if entry.tokens - computed <= 1:
            return 0, False
        return entry.tokens - computed, True

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        entry = self._consuming.get(request.request_id)
        if entry is None or entry.state != "waiting":
            return
        if external_tokens == 0:
            self._release(request.request_id, entry)
            return
        entry.state = "loading"
        self._awaited.add(request.request_id)
        first = (entry.tokens - external_tokens) // self._block_size
        end = -(-entry.tokens // self._block_size)
        self._take(request.request_id, entry, first, blocks.get_block_ids()[0][first:end])

    def _release(self, req_id: str, entry: _Consuming) -> None:
        """Nothing needs to come: say so, and prefill frees its pages.

        vLLM also asks for this when a request failed after its transfer was taken (it replays the request's arrival and
        end to clean up); then the transfer has found its end already.
        """
        entry.state = "done"
        if entry.params.transfer_id in self._taken:
            return
        self._take(req_id, entry, -(-entry.tokens // self._block_size), [])

    def _take(self, req_id: str, entry: _Consuming, first_block: int, pages: list[int]) -> None:
        p = entry.params
        self._taken[p.transfer_id] = None
        if len(self._taken) > self._settings.tombstones:
            self._taken.popitem(last=False)
        self._before.append(
            Take(
                req_id,
                p.transfer_id,
                entry.key,
                entry.tokens,
                first_block,
                list(pages),
                p.remote_host,
                p.remote_port,
                p.tp_size,
            )
        )

    def update_output(self, output: KVConnectorOutput) -> None:
        self._awaited.difference_update(output.finished_sending or (), output.finished_recving or ())
        for req_id in output.finished_recving or ():
            entry = self._consuming.get(req_id)
            if entry is not None:
                entry.state = "done"

    # -- each step -----------------------------------------------------------------------------------------------

    def build(self, output: SchedulerOutput) -> Commands:
        after: list[Command] = []
        for req_id in output.preempted_req_ids or ():
            if req_id in self._producing:
                self._before.append(Rewind(req_id))
        if self._producing:
            after = self._progress(output)
        self._claim_waiting()
        before, self._before = self._before, []
        if output.total_num_scheduled_tokens:
            self._look_again = 1
        elif self._awaited and not before:
            self._wait()
        return Commands(before, after, self._bell.name)

    def _wait(self) -> None:
        """The engine only waits for our workers: do so here, asleep, instead of letting it spin through empty steps.

        With asynchronous scheduling the engine looks at a step's outcome one step later: neither a step that is still
        computed nor what the bell announced may wait here.
        """
        if self._look_again:
            self._look_again -= 1
        elif self._bell.wait(self._settings.idle_wait_s):
            self._look_again = 2

    def _progress(self, output: SchedulerOutput) -> list[Command]:
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        progress: list[Command] = []
        for req_id, before in computed.items():
            entry = self._producing.get(req_id)
            if entry is None or before >= entry.tokens:
                continue  # not ours, or its prompt was complete before this step
            block_state = output.kv_connector_block_state
            ids = block_state.get_block_ids(req_id) if block_state is not None else None
            if ids is None:
                continue
            tokens = min(before + output.num_scheduled_tokens[req_id], entry.tokens)
            progress.append(Pages(req_id, list(ids[0][: -(-entry.tokens // self._block_size)]), tokens))
        return progress

    def _claim_waiting(self) -> None:
        now = self._clock()
        for entry in self._consuming.values():
            if entry.state == "waiting" and now >= entry.claim_at:
                entry.claim_at = now + CLAIM_EVERY_S
                p = entry.params
                self._before.append(Claim(p.transfer_id, p.remote_host, p.remote_port, p.tp_size))

    def has_pending_work(self) -> bool:
        """Commands wait for a step."""
        return bool(self._before)

    def close(self) -> None:
        self._bell.close()

    # -- the end -------------------------------------------------------------------------------------------------

    def finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """``(keep the blocks until finished_sending, parameters for the response)``."""
        from vllm.v1.request import RequestStatus

        req_id = request.request_id
        consuming = self._consuming.pop(req_id, None)
        if consuming is not None:
            if consuming.state == "loading":
                self._before.append(Cancel(req_id))
            elif consuming.state == "waiting":
                self._release(req_id, consuming)
        entry = self._producing.pop(req_id, None)
        if entry is None:
            return False, None
        self._awaited.add(req_id)
        delivered = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        if request.status not in delivered or request.num_computed_tokens < entry.tokens:
            self._before.append(Drop(req_id))
            return True, None
        self._before.append(Finish(req_id))
        return True, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": entry.transfer,
            "remote_engine_id": self._engine,
            "remote_request_id": req_id,
            "remote_block_ids": [list(block_ids)],
            "remote_host": self._settings.control.host,
            "remote_port": self._port,
            "tp_size": self._ranks,
        }


def content_key(request: Request) -> bytes:
    """What the request's KV depends on beside the model: tokens, adapter, multimodal inputs, tenant's salt."""
    assert request.prompt_token_ids is not None
    extra: list[str] = []
    if request.lora_request is not None:
        extra.append(f"lora:{request.lora_request.lora_name}:{request.lora_request.lora_path}")
    for feature in request.mm_features or ():
        extra.append(f"mm:{feature.identifier}:{feature.mm_position.offset}:{feature.mm_position.length}")
    return request_key(request.prompt_token_ids, salt=request.cache_salt or "", extra=extra)
