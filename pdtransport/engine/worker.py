"""The worker's half of an engine's adapter: passes the scheduler's commands to the transport and the pool, and collects
the results.

The worker's thread runs the commands; callbacks from the I/O thread and the pool client's threads record what ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pdtransport.engine.adapted import Adapted, LoadedAdapters, named
from pdtransport.engine.block_tables import Blocks
from pdtransport.engine.commands import (
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
from pdtransport.engine.results import Results
from pdtransport.engine.stats import TransferStats
from pdtransport.errors import InvalidCall
from pdtransport.kv.geometry import HOST
from pdtransport.kv.groups import GONE
from pdtransport.pool.tiers.codecs import Lossy
from pdtransport.protocol.messages import Code
from pdtransport.settings import PoolUse, Settings
from pdtransport.transfer.outcome import Outcome
from pdtransport.transport import Offer, Receipt, Transport

if TYPE_CHECKING:
    import torch

    from pdtransport.engine.pool_worker import PoolWorker

logger = logging.getLogger(__name__)

REWIND_S = 10.0  # the I/O thread must release pages within this time; otherwise the engine must not overwrite them
CHANGE_S = 10.0  # on a change of weights, links must release the pages of the ended transfers within this time


@dataclass(frozen=True)
class GroupPages:
    """Where a cache group's pages are in the engine's block tables.

    Args:
        table: number of the table.
        ratio: pages per block; their ids lie next to one another.
    """

    table: int
    ratio: int = 1

    def pages(self, blocks: Blocks) -> list[int]:
        ids = blocks[self.table]
        if self.ratio == 1:
            return ids
        return [GONE if block == GONE else block * self.ratio + i for block in ids for i in range(self.ratio)]


class EngineWorker:
    """Worker's half, one per tensor-parallel rank. Call :meth:`open` before the first command.

    :meth:`before_forward` and :meth:`after_forward` run a step's commands before and after the launch of its forward
    pass. After each step :meth:`collect` returns what ended, for the scheduler's half.

    Args:
        stats: makes the statistics of one reporting interval.
    """

    def __init__(self, settings: Settings, stats: Callable[[], TransferStats] = TransferStats) -> None:
        self._settings = settings
        self._transport: Transport | None = None
        self._rank = 0
        self._pages: tuple[GroupPages, ...] = ()
        self._offers: dict[str, Offer] = {}
        self._finished: dict[str, Offer] = {}  # offers of finished requests, until decode has their pages
        self._receipts: dict[str, Receipt] = {}
        self._forward: torch.cuda.Event | None = None  # recorded after the forward pass that was launched last
        self._results = Results(stats, self._forget_adapter)
        self._pool: PoolWorker | None = None
        self._adapters: LoadedAdapters | None = None
        self._adapted: Adapted | None = None

    def open(self, transport: Transport, pages: Sequence[GroupPages] = ()) -> None:
        """Use ``transport`` for hand-offs from now on; :meth:`close` closes it.

        Args:
            pages: for each of the transport's cache groups, where its pages are in the engine's block tables. Default:
                group i has table i, and a page is a block.
        """
        self._transport = transport
        self._pages = tuple(pages) or tuple(GroupPages(table) for table in range(len(transport.groups)))
        self._rank = self._results.rank = transport.rank

    def open_pool(
        self,
        use: PoolUse,
        parts: Sequence[tuple[int, int]],
        *,
        who: str,
        lossy: Lossy | None = None,
        tell_stored: bool = False,
    ) -> None:
        """Use a pool from now on; call after :meth:`open`.

        Args:
            parts: ranges of KV heads; the pool stores each as a chunk of its own.
            who: the engine's name in the pool's lists of clients.
            lossy: how the pool's tiers may compress these chunks with loss; None: not at all.
            tell_stored: report which chunks are in the pool.

        Raises:
            PoolUnavailable: the GPU has no memory left for the scratch buffer.
        """
        from pdtransport.engine.pool_worker import PoolWorker

        assert self._transport is not None
        self._pool = PoolWorker(
            use,
            self._transport.groups[0],
            parts=parts,
            ratio=self._pages[0].ratio,
            rank=self._rank,
            on_loaded=self._results.loaded,
            on_kept=self._results.kept,
            count=self._results.count_chunks,
            lossy=lossy,
            on_stored=self._results.in_pool if tell_stored else None,
            settings=self._settings,
            who=who,
        )

    def use_adapters(self, adapters: LoadedAdapters, block_size: int) -> None:
        """Allow requests to use LoRA adapters.

        Args:
            block_size: tokens per scheduler block.
        """
        self._adapters = adapters
        self._adapted = Adapted(adapters, self._refuse, block_size, self._settings.deadlines.arrival_s)

    def announce_weights(self, identity: str, reason: str) -> None:
        """End transfers and loads of the old weights, and announce the new weights to peers."""
        if self._transport is not None:
            try:
                self._transport.change_fingerprint({"weights": identity}, reason, CHANGE_S)
            except FutureTimeout as error:  # these requests wait until nothing uses their pages
                logger.error("pdtransport: %s", error)
        if self._pool is not None:
            self._pool.end_loads()

    def end_transfers(self, reason: str) -> None:
        """End everything that uses KV pages: their memory is about to be freed.

        Raises:
            TimeoutError: a link or the pool still uses pages after ``CHANGE_S``.
        """
        if self._transport is not None:
            self._transport.change_fingerprint({}, reason, CHANGE_S)
        if self._pool is not None:
            self._pool.end_all(CHANGE_S)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._transport is not None:
            self._transport.close()
        self._results.rope.close()

    # -- commands ------------------------------------------------------------------------------------------------

    def before_forward(self, commands: Commands) -> None:
        """Run the ``before`` commands. Idempotent."""
        self._results.rope.name = commands.bell
        todo, commands.before = commands.before, []
        # Kernels of earlier steps may still use the pages to be filled, on behalf of requests that have ended since.
        earlier = self._mark() if any(isinstance(command, (StartReceive, LoadChunks)) for command in todo) else None
        for command in todo:
            self._do(command, earlier)

    def launched(self, commands: Commands) -> None:
        """Record a CUDA event after the forward pass; called before sampling is launched.

        The ``after`` commands themselves run later, in :meth:`after_forward`: the I/O thread would compete for the GIL
        with this thread's launches.
        """
        self._forward = self._mark() if commands.after else None

    def after_forward(self, commands: Commands) -> None:
        """Run the ``after`` commands, once all kernels of the step are launched. Idempotent."""
        todo, commands.after = commands.after, []
        forward, self._forward = self._forward, None
        if self._adapted is not None:
            for waited in self._adapted.load(todo):
                self._do_now(waited, self._mark())
        computed = (forward or self._mark()) if todo else None
        for command in todo:
            self._do(command, computed)

    def _mark(self) -> torch.cuda.Event | None:
        """Record an event after everything launched on this thread's stream; None if KV is in host memory."""
        assert self._transport is not None
        if self._transport.groups.device == HOST:
            return None
        import torch

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._transport.groups.device))
        return event

    def _do(self, command: Command, after: torch.cuda.Event | None) -> None:
        ready: Command | None = command if self._adapted is None else self._adapted.ready(command)
        if ready is not None:
            self._do_now(ready, after)

    def _do_now(self, command: Command, after: torch.cuda.Event | None) -> None:
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
                pages = [of.pages(command.pages)[:most] for of, most in zip(self._pages, offer.blocks, strict=True)]
                offer.ready(pages, command.tokens, after)
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
            self._results.end(command.req_id)
        elif isinstance(command, ReleaseIfPooled):
            offer = self._finished.get(command.req_id)
            if offer is not None:
                offer.let_go(command.reason)
        elif self._pool is not None:
            self._do_pool(self._pool, command, after)

    def _open(self, transport: Transport, command: Open) -> None:
        ended = partial(self._offer_ended, command.req_id)
        promised = partial(self._results.promised, command.req_id)
        self._results.use(command.req_id)
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
        self._do_now(command, None)
        if isinstance(command, Open):
            offer = self._offers.get(command.req_id)
            if offer is not None:
                offer.cancel(reason, Code.MISMATCH)
            return
        receipt = self._receipts.get(command.req_id)
        if receipt is not None:
            receipt.cancel(reason, Code.MISMATCH)

    def take_invalid(self) -> set[int]:
        """Blocks whose KV the finished step must not have used; see :mod:`pdtransport.engine.adapted`."""
        return self._adapted.take_invalid() if self._adapted is not None else set()

    def _do_pool(self, pool: PoolWorker, command: Command, after: torch.cuda.Event | None) -> None:
        if isinstance(command, StoreChunks):
            self._results.use(command.req_id)
            pool.keep(command, after)
        elif isinstance(command, LoadChunks):
            pool.fetch(command, after)

    def _close_offer(self, command: Finish | Drop) -> None:
        if self._adapted is not None:
            self._adapted.finished(command.req_id)
        if isinstance(command, Finish) or command.report:
            self._results.end(command.req_id)
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
        self._results.declined(Outcome(it.transfer, False, it.code.value, it.reason))
        transport.decline(it.transfer, it.code, it.reason, host=it.host, port=it.port, ranks=it.ranks)

    def _take(self, transport: Transport, take: StartReceive, after: torch.cuda.Event | None) -> None:
        counts = transport.groups.blocks(take.tokens)
        firsts = [
            min(take.first_block[of.table] * of.ratio, most) for of, most in zip(self._pages, counts, strict=True)
        ]
        pages = [
            of.pages(take.pages)[: most - first] for of, first, most in zip(self._pages, firsts, counts, strict=True)
        ]

        def ended(outcome: Outcome) -> None:
            self._receipts.pop(take.req_id, None)
            if any(take.pages):
                self._results.receipt_ended(take.req_id, outcome)

        receipt = transport.receive(
            take.transfer,
            take.prompt_digest,
            take.tokens,
            pages,
            host=take.host,
            port=take.port,
            ranks=take.ranks,
            first_block=firsts,
            first_token=take.first_token,
            on_end=ended,
            after=after,
        )
        self._receipts[take.req_id] = receipt
        if receipt.future.done():  # it ended in the I/O thread before this thread stored it
            self._receipts.pop(take.req_id, None)

    # -- results -------------------------------------------------------------------------------------------------

    def _offer_ended(self, req_id: str, outcome: Outcome) -> None:
        self._finished.pop(req_id, None)
        self._results.offer_ended(req_id, outcome)

    def _forget_adapter(self, req_id: str) -> None:
        if self._adapted is not None:
            self._adapted.failed(req_id)

    def collect(self) -> tuple[set[str], set[str], set[str]]:
        """``(finished sending, finished receiving, failed receiving)`` since the last call.

        The engine may free the pages of sent requests and run received ones; it recomputes failed ones. Each request is
        reported once. Failed requests are also in ``finished receiving``.
        """
        return self._results.take_ended()

    def take_news(self) -> WorkerReport | None:
        """The report since the last call; None if it is empty.

        A first token is reported no later than the end of its request's transfer.
        """
        news = self._results.take_news()
        if self._adapters is not None:
            news.adapters = self._adapters.take_news()
        return news if news != WorkerReport() else None

    def take_stats(self) -> TransferStats | None:
        """Statistics since the last call; None if they are empty."""
        return self._results.take_stats()
