"""Worker half of the connector: passes the scheduler's commands to the transport and the pool, and collects results.

The worker's thread runs the commands; callbacks from the I/O thread and the pool client's threads record what ended.
"""

from __future__ import annotations

import logging
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import TYPE_CHECKING

from pdtransport.engine.block_refs import BlockRefCounts
from pdtransport.engine.wakeups import WakeupSender
from pdtransport.errors import InvalidCall, PoolUnavailable
from pdtransport.kv.geometry import HOST
from pdtransport.protocol.messages import Code
from pdtransport.settings import Settings
from pdtransport.transfer.outcome import Outcome
from pdtransport.transport import Offer, Receipt, Transport
from pdtransport.vllm.adapted import Adapted
from pdtransport.vllm.adapters import Adapters, named
from pdtransport.vllm.checkpoint import checkpoint_identity
from pdtransport.vllm.geometry import Described, KVCaches, describe
from pdtransport.vllm.holding import REWIND_S, Holding
from pdtransport.vllm.metadata import (
    CancelLoad,
    Command,
    Commands,
    Decline,
    Drop,
    Finish,
    FinishStores,
    LoadChunks,
    Open,
    Pages,
    ReleaseIfPooled,
    Rewind,
    SendClaim,
    StartReceive,
    StoreChunks,
    WorkerReport,
)
from pdtransport.vllm.model_stream import model_stream
from pdtransport.vllm.patches.base import announce
from pdtransport.vllm.patches.listed import PatchStates
from pdtransport.vllm.patches.model_loading import report_loading
from pdtransport.vllm.patches.poll_backoff import shorten_spins
from pdtransport.vllm.stats import PDTransportStats
from pdtransport.vllm.step_times import Chunk, Step, StepTimes
from pdtransport.vllm.weight_rpc import sides

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from pdtransport.vllm.pool_space import Shard
    from pdtransport.vllm.pool_worker import PoolWorker

logger = logging.getLogger(__name__)

# vLLM's threads spin through short waits, and a thread that wants the GIL from a spinning one waits a switch interval
# each time. The default of 5 ms would be most of a hand-off. On a GPU host the worker runs in the engine's own process,
# and a hand-off takes the GIL about ten times.
SWITCH_INTERVAL_S = 0.00002

CHANGE_S = 10.0  # on a change of weights, links must release the pages of the ended transfers within this time


class WorkerSide:
    """Worker half of the connector, one per tensor-parallel rank."""

    def __init__(self, settings: Settings, config: VllmConfig, role: str, caches: KVCacheConfig | None = None) -> None:
        self._settings = settings
        self._config = config
        self._caches = caches
        self._role = role
        self._transport: Transport | None = None
        self._rank = 0
        self._ratio = 1
        self._offers: dict[str, Offer] = {}
        self._finished: dict[str, Offer] = {}  # offers of finished requests, until decode has their pages
        self._receipts: dict[str, Receipt] = {}
        self._holding = Holding(self)
        self._times = StepTimes()
        self._step: Step | None = None  # that is being launched
        self._forward: torch.cuda.Event | None = None  # recorded behind the forward pass just launched
        self._lock = threading.Lock()
        self._rope = WakeupSender()
        self._patches = PatchStates(settings, config)
        self._pool: PoolWorker | None = None
        self._adapters: Adapters | None = None
        self._adapted: Adapted | None = None
        self.shard: Shard | None = None  # key spaces of this worker's chunks in the pool; None: it uses no pool
        self.checkpoint = ""  # identity of the checkpoint that its weights were loaded from; empty: none
        self._described: Described | None = None
        # Written by the worker's, the I/O and the pool client's threads, under the lock:
        self._held = BlockRefCounts()
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._stats = PDTransportStats()
        self._news = WorkerReport()

    def register(self, kv_caches: KVCaches) -> None:
        """Open the transport and the pool for this KV cache; called once.

        Args:
            kv_caches: layer name -> ``[blocks, heads, tokens, content]`` view of its cache.
        """
        described = self._described = describe(kv_caches, self._config, self._settings)
        self.checkpoint = checkpoint_identity(self._config, self._settings)
        # Without weight files, the identity comes from checksums over all workers' weights, before the first request.
        # Until then the weights match no peer's.
        described.fingerprint["weights"] = self.checkpoint or f"unknown:{secrets.token_hex(16)}"
        shorten_spins(self._settings)
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        self._rank, self._ratio = described.rank, described.kernel_blocks_per_block
        transfer_config = self._config.kv_transfer_config
        assert transfer_config is not None
        self._transport = Transport(
            described.geometry,
            self._settings.calling_anyone(),  # the scheduler half has checked and resolved each address
            engine=str(transfer_config.engine_id),
            rank=described.rank,
            world=described.ranks,
            role=self._role,
            fingerprint=described.fingerprint,
            regions=described.regions,
            port=described.port,
        )
        logger.info(
            "pdtransport: rank %d of %d listens on %s:%d",
            described.rank,
            described.ranks,
            self._transport.host,
            self._transport.port,
        )
        if self._settings.early_step and self._role != "kv_producer":
            stream = model_stream(described.geometry.device)
            if stream is not None:
                self._holding.use(stream)
        self._open_pool(described)
        if self._config.lora_config is not None:
            self._adapters = Adapters.of_this_worker()
            self._adapted = Adapted(
                self._adapters,
                self._refuse,
                self._config.cache_config.block_size,
                self._settings.deadlines.arrival_s,
            )
        sides.add(self)
        report_loading(self._settings, self._config)
        announce()
        self._transport.show_patches(self._patches.all())

    def _open_pool(self, described: Described) -> None:
        use = self._settings.pool
        if use is None:
            return
        from pdtransport.vllm.pool_space import Shard, head_parts, key_spaces, kv_events_on, loss_of, why_no_pool
        from pdtransport.vllm.pool_worker import PoolWorker

        assert self._caches is not None
        problem = why_no_pool(described, self._config, self._caches, use)
        if problem:
            logger.warning("pdtransport: the pool is not used: %s", problem)
            return
        try:
            self._pool = PoolWorker(
                use,
                described.geometry,
                parts=head_parts(described.geometry, use.shards or described.ranks),
                ratio=self._ratio,
                rank=described.rank,
                on_loaded=self._loaded,
                on_kept=self._kept,
                count=self._count_chunks,
                lossy=loss_of(described, use),
                on_stored=self._in_pool if kv_events_on(self._config) else None,
                settings=self._settings,
            )
        except PoolUnavailable as error:
            logger.warning("pdtransport: the pool is not used: %s", error)
            return
        self.shard = Shard(key_spaces(described, self._config, use))

    def change_weights(self, identity: str, reason: str) -> tuple[int, Shard | None]:
        """End transfers and loads of the old weights, and announce the new weights to peers.

        Returns:
            The rank, and the new key spaces of this worker's chunks in the pool (None: it uses no pool).
        """
        described, use = self._described, self._settings.pool
        assert described is not None
        described.fingerprint["weights"] = identity
        if self._transport is not None:
            try:
                self._transport.change_fingerprint({"weights": identity}, reason, CHANGE_S)
            except FutureTimeout as error:  # the requests concerned go on waiting until nothing uses their pages
                logger.error("pdtransport: %s", error)
        if self._pool is not None and use is not None:
            from pdtransport.vllm.pool_space import Shard, key_spaces

            self._pool.end_loads()
            self.shard = Shard(key_spaces(described, self._config, use))
        return self._rank, self.shard

    def end_transfers(self, reason: str) -> None:
        """End everything that uses KV pages, whose memory is about to be freed.

        Raises:
            TimeoutError: a link or the pool still uses pages after ``CHANGE_S``.
        """
        if self._transport is not None:
            self._transport.change_fingerprint({}, reason, CHANGE_S)
        if self._pool is not None:
            self._pool.end_all(CHANGE_S)

    def close(self) -> None:
        sides.discard(self)
        self._holding.close()
        if self._pool is not None:
            self._pool.close()
        if self._transport is not None:
            self._transport.close()
        self._rope.close()

    # -- commands ------------------------------------------------------------------------------------------------

    def before_forward(self, commands: Commands) -> None:
        """Run the ``before`` commands. Idempotent: vLLM's two model runners call it from different hooks."""
        self._rope.name = commands.bell
        if commands.patches and self._transport is not None:
            self._patches.hear(commands.patches)
            commands.patches = []
            self._transport.show_patches(self._patches.all())
        todo, commands.before = commands.before, []
        # Kernels of earlier steps may still use the pages to be filled, for requests that have ended since.
        earlier = self._mark() if any(isinstance(command, (StartReceive, LoadChunks)) for command in todo) else None
        for command in todo:
            self._do(command, earlier)
        if self._step is None and commands.after:
            self._step = self._foretell(commands.after)

    def hold(self, commands: Commands) -> None:
        """Until the pages that this step's forward pass reads have arrived, or failed to, or only the GPU until then:
        which one it was, the step's own output says.

        Raises:
            RuntimeError: the I/O thread does not let go of the pages.
        """
        self._holding.before_forward(commands.hold, commands.ahead)

    def give_up(self, req_id: str, reason: str) -> None:
        receipt = self._receipts.get(req_id)
        if receipt is not None:
            receipt.cancel(reason)

    def held(self, req_id: str, seconds: float, *, void: bool, usual: bool) -> None:
        with self._lock:
            if seconds > 0:
                self._stats.held(seconds)
            if usual:
                self._news.held[req_id] = seconds
            if void:
                self._news.void.add(req_id)

    def launched(self, commands: Commands) -> None:
        """Record an event behind the forward pass; called before sampling is launched.

        The ``after`` commands themselves run later, in :meth:`after_forward`: the I/O thread would compete for the GIL
        with this thread's launches.
        """
        self._forward = self._mark() if commands.after else None

    def after_forward(self, commands: Commands) -> None:
        """Run the ``after`` commands, once all kernels of the step are launched. Idempotent."""
        todo, commands.after = commands.after, []
        forward, self._forward = self._forward, None
        step, self._step = self._step, None
        if self._adapted is not None:
            for waited in self._adapted.load(todo):
                self._do_now(waited, self._mark(), None)
        computed = (forward or self._mark()) if todo else None
        for command in todo:
            self._do(command, computed, step)
        self._holding.after_launch()

    def _foretell(self, commands: Sequence[Command]) -> Step | None:
        """When the step that is about to be launched is expected to end: decode hears of it now, to be ready then."""
        if self._transport is None or self._transport.geometry.device == HOST:
            return None  # the step is over when it was launched
        said = [each for each in commands if isinstance(each, Pages) and each.req_id in self._offers]
        if not said:
            return None
        step = self._times.begin([Chunk(each.before, each.tokens - each.before) for each in said], time.monotonic())
        if step.due is not None:
            for each in said:
                self._offers[each.req_id].expect(each.tokens, step.due)
        return step

    def _mark(self) -> torch.cuda.Event | None:
        """Record an event behind everything launched on this thread's stream; None if KV is in host memory."""
        assert self._transport is not None
        if self._transport.geometry.device == HOST:
            return None
        import torch

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._transport.geometry.device))
        return event

    def _do(self, command: Command, after: torch.cuda.Event | None, step: Step | None = None) -> None:
        ready: Command | None = command if self._adapted is None else self._adapted.ready(command)
        if ready is not None:
            self._do_now(ready, after, step)

    def _do_now(self, command: Command, after: torch.cuda.Event | None, step: Step | None) -> None:
        transport = self._transport
        assert transport is not None, "commands before register_kv_caches"
        if isinstance(command, Open):
            self._open(transport, command)
        elif isinstance(command, Pages):
            offer = self._offers.get(command.req_id)
            problem = self._adapted.why_not(command) if self._adapted is not None else ""
            if offer is not None and problem:
                offer.cancel(problem, Code.MISMATCH)
            elif offer is not None:
                if command.cached is not None:
                    offer.cached(command.cached)
                passed = step.ended if step is not None else None
                pages = self._kernel_pages(command.pages)[: offer.blocks]
                offer.ready(pages, command.tokens, after, passed)
        elif isinstance(command, Rewind):
            offer = self._offers.get(command.req_id)
            if offer is not None:
                offer.withdraw(REWIND_S)
            if self._pool is not None:
                self._pool.rewind(command.req_id, REWIND_S)
        elif isinstance(command, (Finish, Drop)):
            self._close_offer(command)
        elif isinstance(command, SendClaim):
            transport.claim(command.transfer, host=command.host, port=command.port, ranks=command.ranks)
        elif isinstance(command, Decline):
            self._decline(transport, command)
        elif isinstance(command, StartReceive):
            self._take(transport, command, after)
        elif isinstance(command, CancelLoad):
            receipt = self._receipts.get(command.req_id)
            if receipt is not None:
                receipt.cancel("the request was aborted on decode")
            elif self._pool is not None:
                self._pool.cancel(command.req_id)
        elif isinstance(command, FinishStores):
            self._end(command.req_id)
        elif isinstance(command, ReleaseIfPooled):
            offer = self._finished.get(command.req_id)
            if offer is not None:
                offer.let_go(command.reason)
        elif self._pool is not None:
            self._do_pool(self._pool, command, after)

    def _open(self, transport: Transport, command: Open) -> None:
        ended = partial(self._source_ended, command.req_id)
        promised = partial(self._promised, command.req_id)
        with self._lock:
            self._held.use(command.req_id)
        adapter = named(command.adapter) if command.adapter is not None else ""
        try:
            offer = transport.offer(command.transfer, command.prompt_digest, command.tokens, ended, promised, adapter)
        except InvalidCall as error:  # a router reused its transfer id
            logger.warning("request %s is not handed over: %s", command.req_id, error)
            ended(Outcome(command.transfer, False, Code.REUSED.value, str(error)))
        else:
            self._offers[command.req_id] = offer

    def _refuse(self, command: Open | StartReceive | LoadChunks, reason: str) -> None:
        """End a command's transfer or load because its LoRA adapter can't be used; the peer is told why.

        A transfer is started and then cancelled, so that both sides see it end with this reason.
        """
        logger.warning("request %s is not handed over: %s", command.req_id, reason)
        if isinstance(command, LoadChunks):
            if self._pool is not None:
                self._pool.refuse(command)
            return
        self._do_now(command, None, None)
        if isinstance(command, Open):
            offer = self._offers.get(command.req_id)
            if offer is not None:
                offer.cancel(reason, Code.MISMATCH)
            return
        receipt = self._receipts.get(command.req_id)
        if receipt is not None:
            receipt.cancel(reason, Code.MISMATCH)

    def take_invalid(self) -> set[int]:
        """Blocks whose KV the finished step must not have used; see :mod:`pdtransport.vllm.adapted`."""
        return self._adapted.take_invalid() if self._adapted is not None else set()

    def _do_pool(self, pool: PoolWorker, command: Command, after: torch.cuda.Event | None) -> None:
        if isinstance(command, StoreChunks):
            with self._lock:
                self._held.use(command.req_id)
            pool.keep(command, after)
        elif isinstance(command, LoadChunks):
            pool.fetch(command, after)

    def _end(self, req_id: str) -> None:
        """The scheduler has finished the request: report it as sent once nothing uses its pages."""
        with self._lock:
            if self._held.end(req_id):
                self._sent.add(req_id)

    def _close_offer(self, command: Finish | Drop) -> None:
        if self._adapted is not None:
            self._adapted.finished(command.req_id)
        if isinstance(command, Finish) or command.report:
            self._end(command.req_id)
        offer = self._offers.pop(command.req_id, None)
        if offer is None:  # the offer was refused
            return
        if isinstance(command, Finish):
            self._finished[command.req_id] = offer
            offer.finish(command.first_token)
            if offer.future.done():  # it ended in the I/O thread before this thread stored it
                self._finished.pop(command.req_id, None)
        else:
            offer.cancel(command.reason)

    def _decline(self, transport: Transport, it: Decline) -> None:
        with self._lock:
            self._stats.record("consumer", Outcome(it.transfer, False, it.code.value, it.reason))
        transport.decline(it.transfer, it.code, it.reason, host=it.host, port=it.port, ranks=it.ranks)

    def _take(self, transport: Transport, take: StartReceive, after: torch.cuda.Event | None) -> None:
        kernel_blocks = -(-take.tokens // transport.geometry.block_size)
        first = min(take.first_block * self._ratio, kernel_blocks)
        pages = self._kernel_pages(take.pages)[: kernel_blocks - first]

        arrival = self._holding.coming(take.req_id)
        early = bool(take.pages) and self._settings.early_step and not take.first_token

        def ended(outcome: Outcome) -> None:
            try:
                in_time = self._holding.ended(arrival)
                self._receipts.pop(take.req_id, None)
                if take.pages:
                    self._sink_ended(take.req_id, outcome, in_time)
            finally:
                self._holding.noted(take.req_id, arrival)

        receipt = transport.receive(
            take.transfer,
            take.prompt_digest,
            take.tokens,
            pages,
            host=take.host,
            port=take.port,
            ranks=take.ranks,
            first_block=first,
            first_token=take.first_token,
            on_end=ended,
            on_expected=partial(self._rope.expected, take.req_id, self._rank) if early else None,
            after=after,
        )
        self._receipts[take.req_id] = receipt
        if receipt.future.done():  # it ended in the I/O thread before this thread stored it
            self._receipts.pop(take.req_id, None)

    def _kernel_pages(self, blocks: list[int]) -> list[int]:
        """Split scheduler blocks into the attention kernel's blocks, ``ratio`` per scheduler block."""
        if self._ratio == 1:
            return blocks
        return [block * self._ratio + i for block in blocks for i in range(self._ratio)]

    # -- callbacks (run in the I/O thread or the pool client's threads) ------------------------------------------------

    def _source_ended(self, req_id: str, outcome: Outcome) -> None:
        self._finished.pop(req_id, None)
        with self._lock:
            self._stats.record("producer", outcome)
            if self._held.leave(req_id):
                self._sent.add(req_id)
        self._rope.pull()

    def _kept(self, req_id: str) -> None:
        with self._lock:
            self._news.kept[req_id] += 1
            if self._held.leave(req_id):
                self._sent.add(req_id)
        self._rope.pull()

    def _in_pool(self, chunks: list[bytes]) -> None:
        with self._lock:
            self._news.in_pool.update(chunks)

    def _loaded(self, req_id: str, ok: bool) -> None:
        with self._lock:
            self._received.add(req_id)
            if not ok:
                self._failed.add(req_id)
                self._forget_adapter(req_id)
        if ok:
            self._rope.arrived(req_id, self._rank)
        self._rope.pull()

    def _count_chunks(self, role: str, tally: Counter[str], nbytes: int) -> None:
        with self._lock:
            self._stats.count_chunks(tally, role, nbytes)

    def _promised(self, req_id: str) -> None:
        with self._lock:
            self._news.promised.add(req_id)
        self._rope.promised(req_id)

    def _sink_ended(self, req_id: str, outcome: Outcome, in_time: bool) -> None:
        with self._lock:
            self._stats.record("consumer", outcome)
            self._received.add(req_id)
            if outcome.cached_tokens is not None:
                self._news.cached[req_id] = outcome.cached_tokens
            if outcome.first_token is not None:
                self._news.first_tokens[req_id] = outcome.first_token
            if not outcome.ok:
                self._failed.add(req_id)
                self._forget_adapter(req_id)
        if outcome.ok and in_time:  # else its first step is void, which the step's output tells
            self._rope.arrived(req_id, self._rank, outcome.first_token)
        self._rope.pull()

    def _forget_adapter(self, req_id: str) -> None:
        if self._adapted is not None:
            self._adapted.failed(req_id)

    def collect(self) -> tuple[set[str], set[str], set[str]]:
        """``(finished sending, finished receiving, failed receiving)`` since the last call.

        Each request is reported once. Failed requests are also in ``finished receiving``.
        """
        with self._lock:
            sent, self._sent = self._sent, set()
            received, self._received = self._received, set()
            failed, self._failed = self._failed, set()
        return sent, received, failed

    def take_news(self) -> WorkerReport | None:
        """The report since the last call; None if it is empty.

        A first token is reported no later than the end of its request's transfer.
        """
        with self._lock:
            news, self._news = self._news, WorkerReport()
        if self._adapters is not None:
            news.adapters = self._adapters.take_news()
        return news if news != WorkerReport() else None

    def take_stats(self) -> PDTransportStats | None:
        """Statistics since the last call; None if they are empty."""
        with self._lock:
            if self._stats.is_empty():
                return None
            stats, self._stats = self._stats, PDTransportStats()
        return stats
