"""Scheduler half of the connector: decides what is sent, received, stored and loaded.

It runs in the engine's thread. It touches no KV bytes and never blocks on the network; the only place where it sleeps
is :meth:`SchedulerSide._wait`, when the engine has nothing else to do.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pdtransport.engine.commands import (
    CancelLoad,
    Command,
    Commands,
    FinishStores,
    ReleaseIfPooled,
    Rewind,
    WorkerReport,
)
from pdtransport.engine.consuming import Consuming, ConsumingRequests
from pdtransport.engine.producing import ProducingRequests
from pdtransport.engine.wakeups import WakeupReceiver, WakeupSender
from pdtransport.protocol.messages import Code
from pdtransport.settings import Settings
from pdtransport.vllm.adapter_requests import AdapterRequests
from pdtransport.vllm.cache_groups import HandedGroups
from pdtransport.vllm.first_token import FirstTokens
from pdtransport.vllm.patches.base import announce, take_news
from pdtransport.vllm.patches.cached_usage import CachedUsage
from pdtransport.vllm.patches.scheduler_hook import Arrivals, SchedulerHook
from pdtransport.vllm.patches.stale_blocks import StaleBlocks
from pdtransport.vllm.patches.withheld import Withheld
from pdtransport.vllm.request_reader import RequestReader
from pdtransport.vllm.stats import PDTransportStats

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from pdtransport.vllm.pool_scheduler import PoolScheduler
    from pdtransport.vllm.pool_space import Shard

logger = logging.getLogger(__name__)

BLIND_WAIT_S = 0.004  # longest sleep if new client requests can't be noticed during it
REJECTED = "decode's server rejected the request, or its client left before the engine had it"


class SchedulerSide:
    """Scheduler half of the connector, one per engine.

    Args:
        producer: this engine sends KV pages (prefill).
        consumer: this engine receives KV pages (decode).
        groups: the cache groups that are handed over.
        engine: vLLM's engine id, returned to routers as ``remote_engine_id``.
        port: control port of this engine's rank-0 worker, returned to routers as ``remote_port``.
        ranks: tensor-parallel size of this engine.
        heads: attention heads of the model; a peer's tensor-parallel size must divide them. 0: unknown.
        first_tokens: decides which requests may continue from prefill's first token; None: no request may.
        events: publish the pool's chunks in vLLM's KV events.
        adapters: requests may use LoRA adapters.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        producer: bool,
        consumer: bool,
        groups: HandedGroups,
        engine: str,
        port: int,
        ranks: int,
        heads: int = 0,
        first_tokens: FirstTokens | None = None,
        events: bool = False,
        adapters: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._groups, tables = groups, groups.tables
        self._adapters = AdapterRequests(tables.block_sizes[0], settings) if adapters else None
        self._ranks = ranks
        self._clock = clock
        self._before: list[Command] = []
        self._producing = ProducingRequests(
            self._before, settings, tables=tables, engine=engine, port=port, ranks=ranks, clock=clock
        )
        self._consuming = ConsumingRequests(
            self._before,
            settings,
            tables=tables,
            heads=heads,
            strict=consumer,
            refused=self._not_fetched,
            clock=clock,
        )
        self._reader = RequestReader(
            self._before,
            self._producing,
            self._consuming,
            (producer, consumer),
            tables,
            first_tokens,
            clock,
        )
        self._bell = WakeupReceiver()
        self._rope = WakeupSender()
        self._rope.name = self._bell.name
        self._pool = self._make_pool(events)
        # First tokens of requests that have not resumed yet, because not all workers have their pages.
        self._tokens: dict[str, int] = {}
        # By request, the workers that sent no grant; kept until all workers have reported the transfer's end.
        self._never_granted: Counter[str] = Counter()
        self._look_again = 0  # empty steps that must not sleep
        self._arrivals = Arrivals(ranks)
        self._start: SchedulerHook | None = None
        self._awaited: set[str] = set()  # requests that vLLM holds until the workers report the end of their transfer
        self._stale = StaleBlocks()
        self._withheld = Withheld(settings)
        self._usage = CachedUsage(settings)
        self._stale_arrivals: set[str] = set()  # requests whose pages may come from replaced weights
        self._model_names: tuple[Sequence[str], str] = ((), "")

    def _make_pool(self, events: bool) -> PoolScheduler | None:
        if self._settings.pool is None:
            return None
        from pdtransport.vllm.pool_scheduler import PoolScheduler

        return PoolScheduler(
            self._settings.pool,
            block_size=self._groups.tables.block_sizes[0],
            ranks=self._ranks,
            clock=self._clock,
            ring=self._rope.pull,
            events=events,
            settings=self._settings,
            adapters=self._adapters,
        )

    def bind(self, connector: Any, manager: Any) -> None:
        """Hook into the engine's cache manager. ``connector``: the connector object that the scheduler holds."""
        self._stale.bind(manager, self._settings)
        self._withheld.bind(manager)
        self._start = SchedulerHook.of(connector, manager, self._begin, self._settings, self._hear_cached)
        announce()

    def start_pool(self, shards: dict[int, Shard], served: Sequence[str] = (), tokenizer: str = "") -> None:
        """Start using the pool.

        Args:
            shards: key spaces of each worker's chunks, by rank.
            served: names under which clients ask for the model.
            tokenizer: name of the model's tokenizer.
        """
        self._model_names = served, tokenizer
        if self._pool is not None:
            self._pool.start(shards, served, tokenizer)

    def weights_changed(self, shards: dict[int, Shard], reason: str) -> None:
        """Drop what depends on the old weights: the workers have new ones and have ended all transfers.

        Args:
            shards: as for :meth:`start_pool`.
            reason: why the weights changed, for the log.
        """
        self._bell.arrivals()
        self._stale_arrivals = self._arrivals.void(self._awaited)
        for req_id in self._stale.void_arrivals():
            if (entry := self._consuming.get(req_id)) is not None:
                self._usage.nothing_came(entry.request)
        if self._start is not None:
            self._start.forget()
        tainted = self._stale.change()
        if tainted:
            logger.info("%d requests with KV of old weights are not handed over or stored: %s", len(tainted), reason)
        if self._pool is not None:
            self._pool.restart(shards, *self._model_names)

    def _set_apart(self, req_id: str) -> None:
        """Neither hand over nor store this request: it builds on blocks of replaced weights."""
        self._producing.drop(req_id, report=False, reason="weights: its prefix was computed by old ones")
        if self._pool is not None:
            self._pool.set_apart(req_id)

    # -- arrival -------------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        if getattr(request, "abort_immediately", False):
            # vLLM's stub for a request that its server rejected: a one-token prompt, aborted right after this call.
            params = self._reader.parse(request).consume
            if params is not None:
                # vLLM also sends it for requests that failed after they had started: their transfer has ended already.
                self._consuming.decline(params, Code.REJECTED, REJECTED)
            return
        if self._adapters is not None:
            self._adapters.arrive(request)
        self._reader.read(request)
        if self._pool is not None:
            self._pool.arrive(request, look_up=request.request_id not in self._consuming)

    def _not_fetched(self, req_id: str, entry: Consuming, problem: str) -> None:
        self._reader.complain(entry.request, problem)
        if self._pool is not None:
            self._pool.ask(req_id)

    # -- decode --------------------------------------------------------------------------------------------------

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Number of tokens beyond ``computed`` that prefill or the pool can supply, and whether they load
        asynchronously.

        The number is None if it is not known yet: vLLM asks again.
        """
        if self._stale.begins_on(request.request_id, computed):
            self._set_apart(request.request_id)
        lacking = self._consuming.lacking(request.request_id, computed)
        if lacking is None:
            return None, False
        if self._pool is not None and not self._consuming.ours(request.request_id):
            return self._pool.matched_tokens(request, computed)
        if request.num_output_tokens:
            return 0, False
        return lacking, lacking > 0

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        req_id, ids = request.request_id, self._groups.blocks(blocks.get_block_ids())
        if self._pool is not None and not self._consuming.ours(req_id):
            fetch = self._pool.allocated(request, ids[0], external_tokens)
            if fetch is not None:
                self._before.append(fetch)
                self._awaited.add(req_id)
        entry = self._consuming.allocated(req_id, ids, external_tokens)
        if entry is None:
            return
        self._awaited.add(req_id)
        p = entry.params
        hosts = entry.named, p.remote_host
        if self._withheld.takes(request, hosts, p.remote_port, p.tp_size) and self._pool is not None:
            self._pool.keep_out(req_id)

    def update_output(self, output: KVConnectorOutput) -> None:
        """Process the workers' report, and remove from it the requests that resumed ahead of it."""
        stale = self._stale_arrivals.intersection(output.finished_recving or ())
        # vLLM already recomputes these requests (see weights_changed). It reads `failed_recving` before this call, so
        # adding them affects only the code below.
        if stale:
            self._stale_arrivals -= stale
            output.failed_recving = {*(output.failed_recving or ()), *stale}
        late = self._arrivals.reported(output.finished_recving or ())
        if late and output.finished_recving is not None:
            output.finished_recving = output.finished_recving - late
        self._awaited.difference_update(output.finished_sending or (), output.finished_recving or ())
        self._producing.freed(output.finished_sending or ())
        if self._pool is not None:
            self._pool.freed(output.finished_sending or ())
        news = getattr(output, "kv_connector_worker_meta", None)
        if isinstance(news, WorkerReport):
            self._hear_cached(news)
            self._tokens.update(news.first_tokens)
            self._never_granted.update(news.never_granted)
            self._producing.promised(news.promised)
            if self._adapters is not None:
                self._adapters.hear(news.adapters)
            if self._pool is not None:
                self._pool.kept(news.kept)
                self._pool.stored(news.in_pool)
        for req_id in late:  # already resumed from its token; an earlier report may have brought the token again
            self._tokens.pop(req_id, None)
        failed = getattr(output, "failed_recving", ())
        for req_id in failed:
            if (entry := self._consuming.get(req_id)) is not None:
                self._usage.nothing_came(entry.request)
        for req_id in output.finished_recving or ():
            from_pool = self.from_pool(req_id)
            if self._pool is not None:
                self._pool.loaded(req_id, req_id not in failed)
            token = self._tokens.pop(req_id, None)
            # If no worker sent a grant, prefill heard of no promise: nothing was promised.
            promised = self._never_granted.pop(req_id, 0) < self._ranks
            entry = self._consuming.received(req_id) if not from_pool else None
            if entry is None:
                continue
            if entry.first_token and promised and req_id in failed:
                self._reader.go_on(entry.request, None)
            elif token is not None:
                self._reader.go_on(entry.request, token)
            elif self._pool is not None and req_id in failed:
                self._pool.ask(req_id)  # prefill may have stored the pages that it could not hand over

    def _hear_cached(self, news: WorkerReport) -> None:
        """Record how many tokens prefill had cached.

        Also called before :meth:`update_output`, which vLLM calls too late for the outputs of the same step.
        """
        for req_id, tokens in news.cached.items():
            entry = self._consuming.get(req_id)
            if entry is not None:
                self._usage.set(entry.request, tokens)

    # -- each step -----------------------------------------------------------------------------------------------

    def _begin(self, step: SchedulerHook) -> None:
        """Let requests whose pages arrived resume in this very step; called when a step begins."""
        if self._awaited and not self.has_pending_work() and step.idle():
            self._wait()
        arrived = self._bell.arrivals()
        ready = self._arrivals.hear(arrived, self._awaited)
        for (req_id, _), token in arrived.items():
            if token is not None and req_id in self._awaited:
                self._tokens[req_id] = token
        if ready:
            self._arrivals.went_on(step.go_on(ready))

    def build(self, output: SchedulerOutput) -> Commands:
        after: list[Command] = []
        self._producing.promised(self._bell.promises())
        self._stale.began(new.req_id for new in output.scheduled_new_reqs)
        for req_id in output.preempted_req_ids or ():
            storing = self._pool is not None and self._pool.preempted(req_id)
            if storing or req_id in self._producing:
                self._before.append(Rewind(req_id))
        if self._producing or self._pool is not None or self._adapters is not None:
            computed = _computed_before(output)
            if self._adapters is not None:
                after += self._adapters.wrote(output, computed)
            after += self._progress(output, computed)
            if self._pool is not None:
                after += self._pool.progress(output, computed)
                self._pool.hint()
                self._before += [ReleaseIfPooled(req_id) for req_id in self._pool.handed_over()]
        loads = any(self.from_pool(req_id) for req_id in self._producing)
        self._producing.make_room(still=not output.total_num_scheduled_tokens and not loads)
        self._consuming.step()
        before = self._before.copy()
        self._before.clear()
        if output.total_num_scheduled_tokens:
            self._look_again = 1
        elif not before and not after and self._waits_here():
            self._wait()
        return Commands(before, after, self._bell.name, take_news())

    def _waits_here(self) -> bool:
        asking = self._pool is not None and self._pool.asking
        return asking or (bool(self._awaited) and self._start is None)

    def _wait(self) -> None:
        """Sleep until a wakeup or a client request comes, instead of letting the engine spin through empty steps.

        Called when the engine only waits for transfers or for a lookup in the pool. With asynchronous scheduling the
        engine reads a step's output one step later. So the steps that follow a wakeup, or a step that computed
        something, must not sleep.
        """
        if self._look_again:
            self._look_again -= 1
        elif self._bell.wait(*self._how_long()):
            self._look_again = 2

    def _how_long(self) -> tuple[float, Callable[[], bool] | None]:
        """Longest time to wait for a wakeup, and a condition that ends the wait early (None: no such condition)."""
        wait_s = self._settings.idle_wait_s
        asked = self._start.clients_wait if self._start is not None else None
        return (wait_s, asked) if asked is not None else (min(wait_s, BLIND_WAIT_S), None)

    def _progress(self, output: SchedulerOutput, computed: dict[str, int]) -> list[Command]:
        progress: list[Command] = []
        for req_id, before in computed.items():
            entry = self._producing.get(req_id)
            block_state = output.kv_connector_block_state if entry is not None else None
            ids = block_state.get_block_ids(req_id) if block_state is not None else None
            if entry is None or ids is None:
                continue
            cached = self._usage.of(entry.request, before)
            pages = self._producing.progress(
                req_id, self._groups.blocks(ids), before, before + output.num_scheduled_tokens[req_id], cached
            )
            if pages is not None:
                progress.append(pages)
        return progress

    def has_pending_work(self) -> bool:
        """Whether commands are queued that need a step to reach the workers."""
        return bool(self._before) or self._consuming.declining

    def take_stats(self) -> PDTransportStats | None:
        """Counts of pool chunks settled in the scheduler since the last call; None if there are none."""
        counts = self._pool.take_counts() if self._pool is not None else None
        if not counts:
            return None
        stats = PDTransportStats()
        stats.count_chunks(counts)
        return stats

    def take_events(self) -> list[KVCacheEvent]:
        """KV events about the pool's chunks since the last call."""
        return self._pool.take_events() if self._pool is not None else []

    def from_pool(self, req_id: str) -> bool:
        """Whether this request's pages come from the pool."""
        return self._pool is not None and self._pool.loading(req_id)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._rope.close()
        self._bell.close()
        self._consuming.close()

    # -- the end -------------------------------------------------------------------------------------------------

    def finished(self, request: Request, block_ids: Sequence[Sequence[int]]) -> tuple[bool, dict[str, Any] | None]:
        """Clean up after a finished or aborted request.

        Args:
            block_ids: its blocks, by vLLM's cache group.

        Returns:
            Whether vLLM must keep the blocks until ``finished_sending``, and the ``kv_transfer_params`` of the
            response (None if there are none).
        """
        req_id = request.request_id
        self._stale.ended(req_id, {block for ids in block_ids for block in ids})
        consuming = self._consuming.finished(req_id)
        if self._adapters is not None and self._adapters.finished(req_id) and (consuming is not None or self._pool):
            self._before.append(CancelLoad(req_id))  # workers may still hold state for its first step
        self._producing.promised(self._bell.promises())
        # vLLM keeps the blocks until the end of the load is reported; the request must not be reported a second time.
        if self.from_pool(req_id):
            self._before.append(CancelLoad(req_id))
            self._producing.drop(req_id, report=False)
        entry = self._producing.get(req_id)
        delivered = entry is not None and _delivered(request, entry.tokens)
        storing = self._pool is not None and self._pool.finished(req_id, hand_off=delivered)
        if entry is None:
            if storing:
                self._awaited.add(req_id)
                self._before.append(FinishStores(req_id))
            return storing, None
        self._awaited.add(req_id)
        if not delivered:
            self._producing.drop(req_id)
            return True, None
        token, declined = self._reader.first_token_of(entry, request)
        told: dict[str, Any] = {}
        if entry.first_token:
            told = {"first_token_declined": declined} if token is None else {"first_token": token}
        return True, {**told, **self._producing.finish(req_id, block_ids, token)}


def _delivered(request: Request, tokens: int) -> bool:
    """Whether the request ended normally with its prompt of ``tokens`` tokens computed."""
    from vllm.v1.request import RequestStatus

    ends = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
    return request.status in ends and request.num_computed_tokens >= tokens


def _computed_before(output: SchedulerOutput) -> dict[str, int]:
    """Number of tokens computed before this step, for each scheduled request."""
    computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return computed
