"""Scheduler half of the connector: decides what is sent, received, stored and loaded.

It runs in the engine's thread. It touches no KV bytes and never blocks on the network; the only place where it sleeps
is :meth:`SchedulerSide._wait`, when the engine has nothing else to do.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdtransport.engine.crowding import REASON, Crowding
from pdtransport.engine.request_batches import Batches
from pdtransport.engine.wakeups import WakeupReceiver, WakeupSender
from pdtransport.kv.fingerprint import plain
from pdtransport.kv.keys import prompt_digest
from pdtransport.protocol.messages import Code
from pdtransport.settings import Settings
from pdtransport.system.log_limits import LogLimiter
from pdtransport.vllm.adapter_requests import AdapterRequests
from pdtransport.vllm.beyond_window import CODE, WindowRule
from pdtransport.vllm.callees import Callees
from pdtransport.vllm.early import EarlyStep, Expectations
from pdtransport.vllm.first_token import FirstTokens
from pdtransport.vllm.metadata import (
    CancelLoad,
    Command,
    Commands,
    Decline,
    Drop,
    Finish,
    FinishStores,
    Open,
    Pages,
    ReleaseIfPooled,
    Rewind,
    SendClaim,
    StartReceive,
    WorkerReport,
)
from pdtransport.vllm.params import ConsumeParams, asked_transfer, marked, parse
from pdtransport.vllm.patches.appended_token import give_up
from pdtransport.vllm.patches.base import announce, take_news
from pdtransport.vllm.patches.cached_usage import CachedUsage
from pdtransport.vllm.patches.scheduler_hook import Arrivals, SchedulerHook
from pdtransport.vllm.patches.stale_blocks import StaleBlocks
from pdtransport.vllm.patches.withheld import Withheld
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

COMPLAIN_S = 10.0  # between two log lines about what clients ask for

BLIND_WAIT_S = 0.004  # longest sleep if new client requests can't be noticed during it
REJECTED = "decode's server rejected the request, or its client left before the engine had it"
LEFT = "the request was aborted on decode before it had room"
CLAIM_EVERY_S = 2.0  # interval at which a request that waits for blocks here asks prefill to keep its pages


@dataclass
class _Producing:
    transfer: str
    request: Request
    tokens: int
    first_token: bool = False  # the router asked prefill to return its first token
    promised: bool = False  # decode promised to continue from that token
    begun: bool = False  # its first step was scheduled


@dataclass
class _Consuming:
    params: ConsumeParams
    prompt_digest: bytes
    tokens: int
    request: Request
    first_token: bool = False  # continue from prefill's first token; decode promises that when it starts loading
    named: str = ""  # prefill's host as given in the request
    found: bool = False  # `params.remote_host` now holds an address that this engine may connect to
    state: str = "waiting"  # -> "loading" -> "done"; straight to "done" if there is nothing to load
    claim_at: float = 0.0  # when to send the next claim


class SchedulerSide:
    """Scheduler half of the connector, one per engine.

    Args:
        producer: this engine sends KV pages (prefill).
        consumer: this engine receives KV pages (decode).
        block_size: tokens per scheduler block.
        engine: vLLM's engine id, returned to routers as ``remote_engine_id``.
        port: control port of this engine's rank-0 worker, returned to routers as ``remote_port``.
        ranks: tensor-parallel size of this engine.
        heads: attention heads of the model; a peer's tensor-parallel size must divide them. 0: unknown.
        first_tokens: decides which requests may continue from prefill's first token; None: no request may.
        events: publish the pool's chunks in vLLM's KV events.
        window: decides which prompts are too long to be handed over; None: no prompt is.
        adapters: requests may use LoRA adapters.
        clock: monotonic seconds.
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
        heads: int = 0,
        first_tokens: FirstTokens | None = None,
        events: bool = False,
        window: WindowRule | None = None,
        adapters: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._window = window or WindowRule(None, settings)
        self._adapters = AdapterRequests(block_size, settings) if adapters else None
        self._unneeded: set[str] = set()  # prefill requests longer than the model's window
        self._producer, self._consumer = producer, consumer
        self._block_size = block_size
        self._engine, self._port, self._ranks = engine, port, ranks
        self._first_tokens = first_tokens
        self._clock = clock
        self._callees = Callees(settings.control, heads, strict=consumer, clock=clock)
        self._declining: list[tuple[ConsumeParams, Code, str]] = []  # to be sent once prefill's host is resolved
        self._limiter = LogLimiter(logger, COMPLAIN_S, clock=clock)  # clients choose their parameters
        self._batches = Batches()
        self._producing: dict[str, _Producing] = {}
        self._consuming: dict[str, _Consuming] = {}
        self._before: list[Command] = []
        self._bell = WakeupReceiver()
        self._rope = WakeupSender()
        self._rope.name = self._bell.name
        self._pool = self._make_pool(events)
        self._tokens: dict[
            str, int
        ] = {}  # first tokens of requests that do not go on yet: not all workers have their pages
        self._look_again = 0  # empty steps that must not sleep
        self._arrivals = Arrivals(ranks)
        self._start: SchedulerHook | None = None
        self._awaited: set[str] = set()  # requests that vLLM holds until the workers report the end of their transfer
        self._taken: OrderedDict[str, None] = OrderedDict()  # recent transfers that were received or declined
        self._expectations = Expectations(ranks)
        self._crowding = Crowding(clock, settings.pool.lookup_s if settings.pool is not None else 0.0)
        self._hold: list[str] = []  # who begins in this step before its last pages are there
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
            block_size=self._block_size,
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
        self._start = SchedulerHook.of(connector, manager, self._begin, self._settings, EarlyStep, self._hear_cached)
        announce()

    def start_pool(self, shards: dict[int, Shard], served: Sequence[str] = (), tokenizer: str = "") -> None:
        """Start using the pool.

        Args:
            shards: by rank, the chunks of the pool that each worker stores and loads.
            served: the model's names for clients.
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
            logger.info("%d requests hold KV of the old weights, and are nobody else's: %s", len(tainted), reason)
        if self._pool is not None:
            self._pool.restart(shards, *self._model_names)

    def _set_apart(self, req_id: str) -> None:
        """Neither hand over nor store this request: it builds on blocks of replaced weights."""
        if self._producing.pop(req_id, None) is not None:
            self._before.append(Drop(req_id, report=False, reason="weights: its prefix was computed by others"))
        if self._pool is not None:
            self._pool.set_apart(req_id)

    # -- arrival -------------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        if getattr(request, "abort_immediately", False):
            # vLLM's stub for a request that its server rejected: a one-token prompt, aborted right after this call.
            params = parse(request.kv_transfer_params, producer=self._producer, consumer=self._consumer).consume
            if params is not None:
                self._decline(params, Code.REJECTED, REJECTED)
            return
        if self._adapters is not None:
            self._adapters.arrive(request)
        self._read_wishes(request)
        if self._pool is not None:
            self._pool.arrive(request, look_up=request.request_id not in self._consuming)

    def _read_wishes(self, request: Request) -> None:
        wanted = parse(request.kv_transfer_params, producer=self._producer, consumer=self._consumer)
        problem = wanted.problem
        if (wanted.produce or wanted.consume) and _of_embeddings(request):
            problem = "a prompt of embeddings has no token ids to identify its KV by"
        named, transfer, without = wanted.produce or wanted.consume, "", ""
        if named is not None and named.transfer_id is not None and not problem:
            minted = wanted.produce is not None and request.kv_transfer_params.get("transfer_id") is None
            transfer, without = self._batches.transfer(request.request_id, named.transfer_id, minted=minted)
            problem = without
        if not problem and wanted.consume is not None:
            problem = self._window.why_not(request) or self._callees.why_not(wanted.consume)
        elif not problem and wanted.produce is not None:
            problem = self._window.why_not_held(request)
            if problem:
                self._unneeded.add(request.request_id)
                self._window.shorten(request)
        if problem:
            self._complain(request, problem)
            # A request without a transfer of its own must not decline the one in its body: another request owns that.
            asked = asked_transfer(request.kv_transfer_params)
            declined = "" if without or not asked else transfer or asked
            if declined:
                self._before.append(Decline(declined, Code.REFUSED, problem))
            if wanted.lost:
                give_up(request)
            return
        if wanted.produce is not None:
            tokens = request.num_prompt_tokens
            self._producing[request.request_id] = _Producing(transfer, request, tokens, wanted.produce.first_token)
            self._before.append(
                Open(request.request_id, transfer, prompt_digest_of(request), tokens, request.lora_request)
            )
        elif wanted.consume is not None:
            self._consuming[request.request_id] = _Consuming(
                wanted.consume.model_copy(update={"transfer_id": transfer}),
                prompt_digest_of(request),
                request.num_prompt_tokens,
                request,
                first_token=wanted.consume.first_token and self._may_go_on(request),
                named=wanted.consume.remote_host,
                claim_at=self._clock(),
            )
        elif wanted.continue_from is not None:
            self._go_on(request, wanted.continue_from if self._may_go_on(request) else None)

    def _complain(self, request: Request, problem: str) -> None:
        text = f"request {plain(request.request_id, 128)} is not handed over: {problem}"
        if problem.startswith(CODE):  # the engine warned of it at start
            logger.debug("%s", text)
        else:
            self._limiter.warn(text)

    def _find(self, req_id: str, entry: _Consuming) -> bool:
        """Resolve the address of this request's prefill.

        Returns:
            False while the lookup is running: ask again. True otherwise; if the host must not be connected to, the
            request has been declined and will not be handed over.
        """
        if entry.found or entry.state != "waiting":
            return True
        found = self._callees.find(entry.params)
        if isinstance(found, str):
            del self._consuming[req_id]
            self._complain(entry.request, found)
            self._note_taken(entry.params.transfer_id)
            self._before.append(Decline(entry.params.transfer_id, Code.REFUSED, found))
            if self._pool is not None:
                self._pool.ask(req_id)
        elif found is not None:
            entry.params, entry.found = found, True
        return found is not None

    def _may_go_on(self, request: Request) -> bool:
        """Whether continuing from prefill's first token is exact and leaves at least one token to compute here."""
        may = self._first_tokens is not None and not self._first_tokens.why_not(request)
        return may and request.max_tokens > 1

    def _go_on(self, request: Request, token: int | None) -> None:
        """Continue from ``token``, or end the request: the client may already have received that token."""
        if token is None or self._first_tokens is None or not self._first_tokens.append(request, token):
            logger.warning("request %s can't go on from the first token that prefill gave out", request.request_id)
            give_up(request)

    # -- decode --------------------------------------------------------------------------------------------------

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Number of tokens beyond ``computed`` that prefill or the pool can supply, and whether they load
        asynchronously.

        The number is None if it is not known yet: vLLM asks again.
        """
        if self._stale.begins_on(request.request_id, computed):
            self._set_apart(request.request_id)
        entry = self._consuming.get(request.request_id)
        if entry is not None and not self._find(request.request_id, entry):
            return None, False
        entry = self._consuming.get(request.request_id)
        if self._pool is not None and (entry is None or entry.state == "done"):
            return self._pool.matched_tokens(request, computed)
        if entry is None or entry.state != "waiting" or request.num_output_tokens:
            return 0, False
        # The last prompt token is always computed here: its logits give the first output token.
        if entry.tokens - computed <= 1:
            return 0, False
        return entry.tokens - computed, True

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        entry = self._consuming.get(request.request_id)
        if self._pool is not None and (entry is None or entry.state == "done"):
            fetch = self._pool.allocated(request, blocks.get_block_ids()[0], external_tokens)
            if fetch is not None:
                self._before.append(fetch)
                self._awaited.add(request.request_id)
        if entry is None or entry.state != "waiting":
            return
        if external_tokens == 0:
            self._release(request.request_id, entry)
            return
        entry.state = "loading"
        p = entry.params
        hosts = entry.named, p.remote_host
        if self._withheld.takes(request, hosts, p.remote_port, p.tp_size) and self._pool is not None:
            self._pool.keep_out(request.request_id)
        self._awaited.add(request.request_id)
        first = (entry.tokens - external_tokens) // self._block_size
        end = -(-entry.tokens // self._block_size)
        self._take(request.request_id, entry, first, blocks.get_block_ids()[0][first:end], entry.first_token)

    def _release(self, req_id: str, entry: _Consuming) -> None:
        """Let prefill free its pages: decode already has all blocks of the prompt."""
        entry.state = "done"
        self._take(req_id, entry, -(-entry.tokens // self._block_size), [])

    def _decline(self, params: ConsumeParams, code: Code, reason: str) -> None:
        """Decline the transfer of a request that is gone, so that prefill can free its pages.

        vLLM's stub request also arrives for requests that were aborted or failed after they had started. Their
        transfer has already ended, so it is not declined again.
        """
        if params.transfer_id not in self._taken:
            self._note_taken(params.transfer_id)
            self._declining.append((params, code, reason))
            self._tell_declined()

    def _tell_declined(self) -> None:
        """Send the declines whose prefill host is resolved.

        If that host must not be connected to, the decline carries no address and only watchers of the transfer see it.
        """
        declining, self._declining = self._declining, []
        for params, code, reason in declining:
            found = self._callees.find(params)
            if found is None:
                self._declining.append((params, code, reason))
            elif isinstance(found, str):
                self._before.append(Decline(params.transfer_id, code, reason))
            else:
                where = found.remote_host, found.remote_port, found.tp_size
                self._before.append(Decline(params.transfer_id, code, reason, *where))

    def _note_taken(self, transfer: str) -> None:
        self._taken[transfer] = None
        if len(self._taken) > self._settings.tombstones:
            self._taken.popitem(last=False)

    def _take(
        self, req_id: str, entry: _Consuming, first_block: int, pages: list[int], first_token: bool = False
    ) -> None:
        p = entry.params
        self._note_taken(p.transfer_id)
        self._before.append(
            StartReceive(
                req_id,
                p.transfer_id,
                entry.prompt_digest,
                entry.tokens,
                first_block,
                list(pages),
                p.remote_host,
                p.remote_port,
                p.tp_size,
                first_token,
                entry.request.lora_request,
            )
        )

    def update_output(self, output: KVConnectorOutput) -> None:
        """Process the workers' report, and remove from it the requests that resumed ahead of it."""
        stale = self._stale_arrivals.intersection(output.finished_recving or ())
        # vLLM recomputes these already (see weights_changed). It has read `failed_recving` before this call, so adding
        # them here informs only the code below.
        if stale:
            self._stale_arrivals -= stale
            output.failed_recving = {*(output.failed_recving or ()), *stale}
        late = self._arrivals.reported(output.finished_recving or ())
        if late and output.finished_recving is not None:
            output.finished_recving = output.finished_recving - late
        self._awaited.difference_update(output.finished_sending or (), output.finished_recving or ())
        self._crowding.freed(output.finished_sending or ())
        if self._pool is not None:
            self._pool.freed(output.finished_sending or ())
        news = getattr(output, "kv_connector_worker_meta", None)
        if isinstance(news, WorkerReport):
            self._hear_cached(news)
            self._tokens.update(news.first_tokens)
            for req_id in late:  # it went on from its token already
                self._tokens.pop(req_id, None)
            for seconds in news.held.values():
                self._expectations.lead.learn(seconds, self._clock())
            self._hear(news.promised)
            if self._adapters is not None:
                self._adapters.hear(news.adapters)
            if self._pool is not None:
                self._pool.kept(news.kept)
                self._pool.stored(news.in_pool)
        failed = getattr(output, "failed_recving", ())
        for req_id in failed:
            if (entry := self._consuming.get(req_id)) is not None:
                self._usage.nothing_came(entry.request)
        if self._pool is not None:
            for req_id in late & set(failed):  # it started before its pages arrived, and is recomputed
                self._pool.ask(req_id)
        for req_id in output.finished_recving or ():
            self._expectations.forget(req_id)
            from_pool = self.from_pool(req_id)
            if self._pool is not None:
                self._pool.loaded(req_id, req_id not in failed)
            token = self._tokens.pop(req_id, None)
            entry = self._consuming.get(req_id)
            if entry is None or from_pool:
                continue
            entry.state = "done"
            if entry.first_token and req_id in failed:
                self._go_on(entry.request, None)
            elif token is not None:
                self._go_on(entry.request, token)
            elif self._pool is not None and req_id in failed:
                self._pool.ask(req_id)  # prefill may have stored the pages that it could not hand over

    def _hear_cached(self, news: WorkerReport) -> None:
        """Record how many tokens prefill had cached.

        Also called before :meth:`update_output`: vLLM calls that too late for the outputs of the same step.
        """
        for req_id, tokens in news.cached.items():
            entry = self._consuming.get(req_id)
            if entry is not None:
                self._usage.set(entry.request, tokens)

    def _hear(self, promised: set[str]) -> None:
        for req_id in promised & self._producing.keys():
            self._producing[req_id].promised = True

    # -- each step -----------------------------------------------------------------------------------------------

    def _begin(self, step: SchedulerHook) -> None:
        """Called when a step begins: let requests whose pages arrived resume in this very step."""
        if self._awaited and not self.has_pending_work() and step.idle():
            self._wait()
        begun = step.doubtful
        arrived = self._bell.arrivals()
        ready = self._arrivals.hear(arrived, self._awaited | begun)
        for (req_id, _), token in arrived.items():
            if token is not None and req_id in self._awaited:
                self._tokens[req_id] = token
        if step.early is not None and ready & begun:
            step.early.arrived()
            ready -= begun
        if ready:
            self._arrivals.went_on(step.go_on(ready))
        elif (almost := self._almost_there(step)) is not None and step.go_on_early(almost):
            self._arrivals.went_on({almost})
            self._hold.append(almost)

    def _almost_there(self, step: SchedulerHook) -> str | None:
        """A request that can begin: its last pages are expected by the time its first step could use them."""
        for (req_id, rank), when in self._bell.expected().items():
            entry = self._consuming.get(req_id)
            # A promised first token comes with a step's output.
            if entry is not None and entry.state == "loading" and not entry.first_token:
                self._expectations.hear(req_id, rank, when)
        almost = self._expectations.almost_there(self._clock())
        return almost if almost is not None and step.may_go_on_early(almost) else None

    def build(self, output: SchedulerOutput) -> Commands:
        after: list[Command] = []
        self._hear(self._bell.promises())
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
                # What was computed from pages that may yet fail to come is nobody's to keep.
                doubtful = self._start.doubtful if self._start is not None else set()
                after += self._pool.progress(output, {r: n for r, n in computed.items() if r not in doubtful})
                self._pool.hint()
                self._before += [ReleaseIfPooled(req_id) for req_id in self._pool.handed_over()]
        self._make_room(output)
        self._claim_waiting()
        self._tell_declined()
        before, self._before = self._before, []
        hold, self._hold = self._hold, []
        ahead = bool(hold) and self._start is not None and self._start.early is not None and self._start.early.known
        if output.total_num_scheduled_tokens:
            self._look_again = 1
        elif not before and not after and self._waits_here():
            self._wait()
        return Commands(before, after, self._bell.name, hold, ahead, take_news())

    def _make_room(self, output: SchedulerOutput) -> None:
        loads = any(self.from_pool(req_id) for req_id in self._producing)
        still = bool(self._producing) and not output.total_num_scheduled_tokens and not loads
        if (req_id := self._crowding.let_go(still)) is not None:
            logger.warning("request %s is not handed over: %s", req_id, REASON)
            self._before.append(ReleaseIfPooled(req_id, REASON))

    def _waits_here(self) -> bool:
        asking = self._pool is not None and self._pool.asking
        return asking or (bool(self._awaited) and self._start is None)

    def _wait(self) -> None:
        """Sleep until a wakeup or a client request comes, instead of letting the engine spin through empty steps.

        Called when the engine only waits for transfers or for a lookup in the pool. With asynchronous scheduling the
        engine reads a step's output one step later, so after a step that computed something, and after a wakeup, the
        next steps must not sleep.
        """
        if self._look_again:
            self._look_again -= 1
        elif self._bell.wait(*self._how_long()):
            self._look_again = 2

    def _how_long(self) -> tuple[float, Callable[[], bool] | None]:
        """Longest time to wait for a wakeup, and a condition that ends the wait early (None: no such condition)."""
        wait_s = self._settings.idle_wait_s
        step = self._start
        asked = step.clients_wait if step is not None else None
        if step is None or asked is None:
            return min(wait_s, BLIND_WAIT_S), None
        if step.early is None:
            return wait_s, asked
        return wait_s, lambda: asked() or self._almost_there(step) is not None

    def _progress(self, output: SchedulerOutput, computed: dict[str, int]) -> list[Command]:
        progress: list[Command] = []
        for req_id, before in computed.items():
            entry = self._producing.get(req_id)
            if entry is None or before >= entry.tokens:
                continue  # not handed over, or its prompt was complete before this step
            block_state = output.kv_connector_block_state
            ids = block_state.get_block_ids(req_id) if block_state is not None else None
            if ids is None:
                continue
            tokens = min(before + output.num_scheduled_tokens[req_id], entry.tokens)
            cached = None if entry.begun else self._usage.of(entry.request, before)
            entry.begun = True
            progress.append(Pages(req_id, list(ids[0][: -(-entry.tokens // self._block_size)]), tokens, before, cached))
        return progress

    def _claim_waiting(self) -> None:
        now = self._clock()
        for req_id, entry in list(self._consuming.items()):
            if entry.state == "waiting" and now >= entry.claim_at and self._find(req_id, entry) and entry.found:
                entry.claim_at = now + CLAIM_EVERY_S
                p = entry.params
                self._before.append(SendClaim(p.transfer_id, p.remote_host, p.remote_port, p.tp_size))

    def has_pending_work(self) -> bool:
        """Whether commands are queued that need a step to reach the workers."""
        return bool(self._before or self._declining)

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
        self._callees.close()

    # -- the end -------------------------------------------------------------------------------------------------

    def finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Clean up after a finished or aborted request.

        Returns:
            Whether vLLM must keep the blocks until ``finished_sending``, and the ``kv_transfer_params`` of the
            response (None if there are none).
        """
        req_id = request.request_id
        self._expectations.forget(req_id)
        self._stale.ended(req_id, block_ids)
        consuming = self._consuming.pop(req_id, None)
        if consuming is not None:
            if consuming.state == "loading":
                self._before.append(CancelLoad(req_id))
            elif consuming.state == "waiting":
                self._decline(consuming.params, Code.CANCELLED, LEFT)
        if self._adapters is not None and self._adapters.finished(req_id) and (consuming is not None or self._pool):
            self._before.append(CancelLoad(req_id))  # workers may still hold state for its first step
        self._hear(self._bell.promises())
        entry = self._producing.pop(req_id, None)
        # vLLM keeps the blocks until the end of the load is reported; the request must not be reported a second time.
        if self.from_pool(req_id):
            self._before.append(CancelLoad(req_id))
            if entry is not None:
                self._before.append(Drop(req_id, report=False))
                entry = None
        delivered = entry is not None and _delivered(request, entry.tokens)
        storing = self._pool is not None and self._pool.finished(req_id, hand_off=delivered)
        if entry is None:
            if storing:
                self._awaited.add(req_id)
                self._before.append(FinishStores(req_id))
            return storing, self._not_handed_over(req_id)
        self._awaited.add(req_id)
        if not delivered:
            self._before.append(Drop(req_id))
            return True, None
        token, declined = self._first_token_of(entry, request)
        self._before.append(Finish(req_id, token))
        self._crowding.keep(req_id)
        told: dict[str, Any] = {}
        if entry.first_token:
            told = {"first_token_declined": declined} if token is None else {"first_token": token}
        return True, {
            **told,
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": entry.transfer,
            "remote_engine_id": self._engine,
            "remote_request_id": marked(entry.transfer),
            "remote_block_ids": [list(block_ids)],
            "remote_host": self._settings.control.host,
            "remote_port": self._port,
            "tp_size": self._ranks,
        }

    def _not_handed_over(self, req_id: str) -> dict[str, Any] | None:
        """Response parameters of a prefill request that is not handed over; None unless the window is the reason."""
        if req_id not in self._unneeded:
            return None
        self._unneeded.remove(req_id)
        return {
            "do_remote_prefill": False,
            "do_remote_decode": False,
            "not_handed_over": CODE,
            "first_token_declined": CODE,
        }

    def _first_token_of(self, entry: _Producing, request: Request) -> tuple[int | None, str]:
        """The first token, if decode continues from it and the router may return it; else None and a reason code."""
        if not entry.first_token or self._first_tokens is None:
            return None, "unsupported"
        return self._first_tokens.of(request, entry.promised)


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


def _of_embeddings(request: Request) -> bool:
    """Whether any part of the prompt is embeddings, where its token ids (if any) do not identify the KV.

    Parts of a chat can be embeddings.
    """
    embedded = getattr(request, "prompt_embeds", None), getattr(request, "prompt_is_token_ids", None)
    return request.prompt_token_ids is None or any(each is not None for each in embedded)


def prompt_digest_of(request: Request) -> bytes:
    """Digest of what identifies the request's KV: tokens, multimodal inputs and the tenant's salt.

    The model is compared separately. Workers add the LoRA adapter's content, which only they know.
    """
    assert request.prompt_token_ids is not None
    extra: list[str] = []
    for feature in request.mm_features or ():
        extra.append(f"mm:{feature.identifier}:{feature.mm_position.offset}:{feature.mm_position.length}")
    return prompt_digest(request.prompt_token_ids, salt=request.cache_salt or "", extra=extra)
