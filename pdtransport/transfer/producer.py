"""The producer driver (prefill side): carries out the actions of the producer state machines.

Offers batches on the peers' links and sends messages on the control channel. A transfer's owner is called back exactly
once, when nothing reads its source pages any more.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from pdtransport.control.channel import PeerId
from pdtransport.errors import LinkError
from pdtransport.kv.groups import GONE, CacheGroups
from pdtransport.links.base import Channel, LinkBusy, Prepared, Runs
from pdtransport.protocol import actions as act
from pdtransport.protocol.consumer_table import TransferOver
from pdtransport.protocol.messages import (
    REQUEST_ENDED,
    Ack,
    BatchHint,
    Code,
    Commit,
    ConsumerMessage,
    Grant,
)
from pdtransport.protocol.producer_table import ProducerTable
from pdtransport.transfer.audit import Audit
from pdtransport.transfer.control import Control
from pdtransport.transfer.outcome import OnOutcome, OnPromise, Outcome, tell
from pdtransport.transfer.peers import Peers
from pdtransport.transfer.timeline import Timeline, TransferRecord

logger = logging.getLogger(__name__)

Pages = Sequence[list[int]]  # of a request: page ids by cache group, in order of the blocks
MAX_PUSHES_A_TURN = 8  # staging a batch takes about 1 ms: handle control messages in between


class _GivenBack(Exception):
    """A granted page does not exist any more; the text is for both sides."""


@dataclass(frozen=True)
class _PreparedBatch:
    """A batch planned before its pages are final. Valid for exactly these pages and this channel."""

    pages: list[int]
    channel: Channel
    runs: Runs
    what: Prepared


@dataclass
class OutgoingTransfer:
    """A transfer that this worker sends. ``pages[group][i]`` holds block i of the request's cache group; only ``owner``
    may change it. ``final`` and ``foreseen`` are by group, too."""

    owner: object
    pages: Pages
    tokens: int
    on_end: OnOutcome
    record: TransferRecord
    final: tuple[int, ...]  # leading blocks that are final
    foreseen: tuple[int, ...]  # leading blocks that prepare() has planned
    on_promise: OnPromise | None = None  # None once called
    nbytes: int = 0
    prepared: dict[tuple[PeerId, int, int, int], _PreparedBatch] = field(default_factory=dict)  # group, first, blocks


class ProducerDriver:
    """Runs the transfers that this worker sends. All methods are called in the I/O thread.

    Calls for a transfer are ignored if the transfer is over, or if the given ``owner`` is not its owner.
    """

    def __init__(
        self,
        limits: act.Limits,
        groups: CacheGroups,
        control: Control,
        peers: Peers,
        timeline: Timeline,
        counters: Counter[str],
        audit: Audit | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sending = ProducerTable(limits, groups.checked_block_bytes, self._batch_bytes)
        self._checksums = limits.checksums
        self._groups = groups
        self._control = control
        self._peers = peers
        self._timeline = timeline
        self._counters = counters
        self._audit = audit
        self._clock = clock
        self._no_pages: Pages = ([],) * len(groups)
        self._none = (0,) * len(groups)
        self._sources: dict[str, OutgoingTransfer] = {}
        self._staged: dict[act.BatchId, tuple[Channel, int]] = {}
        self._queue: deque[act.OfferBatch] = deque()
        self._next_key = 1

    def _batch_bytes(self, peer_id: PeerId) -> int:
        peer = self._peers.get(peer_id)
        return (Channel if peer is None or peer.outbound is None else peer.outbound).max_batch_bytes

    # -- calls of the engine -------------------------------------------------------------------------------------

    def open(
        self,
        owner: object,
        transfer: str,
        prompt_digest: bytes,
        tokens: int,
        on_end: OnOutcome,
        on_promise: OnPromise | None = None,
        adapter: str = "",
    ) -> None:
        blocks = self._groups.blocks(tokens)
        try:
            actions = self.sending.open(transfer, prompt_digest, tokens, blocks, self._clock(), adapter)
        except TransferOver as over:
            self._counters[f"opens_refused_{over.code.value}"] += 1
            tell(on_end, Outcome(transfer, False, over.code.value, over.reason))
            return
        record = self._timeline.open(transfer, "producer")
        record.mark("opened")
        self._sources[transfer] = OutgoingTransfer(
            owner, self._no_pages, tokens, on_end, record, self._none, self._none, on_promise
        )
        for machine in self.sending.machines(transfer):  # granted before the request arrived here
            record.mark("granted")
            record.peer = machine.peer.engine
        self._see_promise(transfer)
        self.run(actions)

    def pages_ready(self, owner: object, transfer: str, pages: Pages, tokens_done: int) -> None:
        """Send what is final: the first ``tokens_done`` tokens of ``pages``.

        ``pages`` are, by cache group, the page ids of all the request's blocks so far; ``GONE`` is one that the engine
        has given back. Fewer tokens than before, or no pages, mean that the engine took pages back (preemption).
        """
        source = self._owned(owner, transfer)
        if source is None:
            return
        source.pages = pages
        if tokens_done >= source.tokens:
            source.record.mark("computed", latest=True)
        blocks = self._final_blocks(source, pages, tokens_done)
        if any(now < before for now, before in zip(blocks, source.final, strict=True)) or not any(pages):  # preempted
            source.foreseen = blocks
            source.prepared.clear()
        source.final = blocks
        self.run(self.sending.pages_ready(transfer, blocks, tokens_done, self._clock()))
        self.push_some()

    def cached(self, owner: object, transfer: str, tokens: int) -> None:
        if self._owned(owner, transfer) is not None:
            self.sending.cached(transfer, tokens)

    def prepare(self, owner: object, transfer: str, pages: Pages, tokens_done: int, event: int) -> None:
        """Plan the batches that :meth:`pages_ready` will send once ``event``, a raw ``cudaEvent_t``, has passed.

        Plans and hints are made now, while the engine waits for its GPU. After the event the engine needs the GIL, and
        the consumer waits for the pages.
        """
        source = self._owned(owner, transfer)
        if source is None:
            return
        blocks = self._final_blocks(source, pages, tokens_done)
        for machine, group, first, count in self.sending.upcoming(transfer, source.foreseen, blocks):
            peer = self._peers.get(machine.peer)
            ids = pages[group][first : first + count]
            if peer is None or peer.outbound is None or GONE in ids:
                continue
            wanted = machine.grant.groups[group]
            runs = self._groups[group].runs(ids, wanted.head_lo, wanted.head_hi)
            prepared = peer.outbound.prepare(runs, count if self._checksums else 0, event)
            if prepared is not None:
                source.prepared[machine.peer, group, first, count] = _PreparedBatch(ids, peer.outbound, runs, prepared)
                self._control.send(
                    peer.id,
                    BatchHint(
                        transfer=transfer,
                        generation=machine.grant.generation,
                        group=group,
                        first_block=first,
                        blocks=count,
                        offer=prepared.offer,
                    ),
                )
        source.foreseen = tuple(map(max, source.foreseen, blocks))

    def _final_blocks(self, source: OutgoingTransfer, pages: Pages, tokens_done: int) -> tuple[int, ...]:
        return tuple(map(min, self._groups.final_blocks(tokens_done, source.tokens), map(len, pages)))

    def finish(self, owner: object, transfer: str, first_token: int | None = None) -> None:
        source = self._owned(owner, transfer)
        if source is not None:
            source.record.mark("finished")
            self.run(self.sending.finish(transfer, self._clock(), first_token))

    def cancel(self, owner: object, transfer: str, code: Code, reason: str) -> None:
        if self._owned(owner, transfer) is not None:
            self.run(self.sending.cancel(transfer, code, reason))

    def cancel_all(self, code: Code, reason: str) -> set[str]:
        """Cancel all transfers and return their ids."""
        transfers = set(self._sources)
        for transfer in transfers:
            self.run(self.sending.cancel(transfer, code, reason))
        return transfers

    def live_of(self, transfers: set[str]) -> set[str]:
        return transfers & self._sources.keys()

    def let_go(self, owner: object, transfer: str, reason: str) -> None:
        """Cancel the transfer, unless a consumer has granted it already."""
        source = self._owned(owner, transfer)
        if source is not None and "granted" not in source.record.events:
            self.run(self.sending.cancel(transfer, Code.CANCELLED, reason))

    def _owned(self, owner: object, transfer: str) -> OutgoingTransfer | None:
        """The transfer; None if it is over, or belongs to another owner because this owner's offer was refused."""
        source = self._sources.get(transfer)
        return source if source is not None and source.owner is owner else None

    # -- messages, lost peers, time ------------------------------------------------------------------------------

    def on_message(self, peer: PeerId, message: ConsumerMessage, now: float) -> None:
        source = self._sources.get(message.transfer)
        if source is not None and isinstance(message, (Grant, Ack)):
            source.record.mark("granted" if isinstance(message, Grant) else "acked")
            source.record.peer = peer.engine
        actions = self.sending.on_message(peer, message, now)
        if isinstance(message, Grant):
            self._see_promise(message.transfer)
        self.run(actions)

    def _see_promise(self, transfer: str) -> None:
        source = self._sources.get(transfer)
        if source is not None and source.on_promise is not None and self.sending.promised(transfer):
            said, source.on_promise = source.on_promise, None
            said()

    def peer_lost(self, peer: PeerId, reason: str) -> None:
        """Forget what was offered to ``peer``. The caller has closed its channels."""
        for batch in [batch for batch in self._staged if batch.peer == peer]:
            del self._staged[batch]
        self._queue = deque(push for push in self._queue if push.id.peer != peer)
        self.run(self.sending.peer_lost(peer, reason))

    def tick(self, now: float) -> None:
        self.run(self.sending.tick(now))

    def end_all(self, code: Code, reason: str) -> None:
        """Report all transfers as ended with ``code``; called when the transport closes, after its links."""
        sources, self._sources = self._sources, {}
        for transfer, source in sources.items():
            tell(source.on_end, Outcome(transfer, False, code.value, reason))

    def live(self) -> dict[str, int]:
        return {
            "producing": self.sending.live,
            "early_grants": self.sending.early,
            "staged": len(self._staged),
            "queued_pushes": len(self._queue),
        }

    # -- actions -------------------------------------------------------------------------------------------------

    def run(self, actions: Sequence[act.Action]) -> None:
        for action in actions:
            if isinstance(action, act.Send):
                source = self._sources.get(getattr(action.message, "transfer", ""))
                if source is not None and isinstance(action.message, Commit):
                    source.record.mark("committed")
                self._control.send(action.peer, action.message)
            elif isinstance(action, act.OfferBatch):
                self._queue.append(action)
            elif isinstance(action, act.WithdrawBatch):
                self._unstage(action)
            elif isinstance(action, act.Release):
                self._end(action)

    def push_some(self) -> bool:
        """Offer up to ``MAX_PUSHES_A_TURN`` queued batches on their links; True if more can be offered right away.

        A batch that finds no free staging slot stays queued without holding up other peers' batches.
        """
        waiting: list[act.OfferBatch] = []
        busy: set[PeerId] = set()
        answers: list[Callable[[], list[act.Action]]] = []
        while self._queue and len(answers) < MAX_PUSHES_A_TURN:
            push = self._queue.popleft()
            if push.id.peer in busy:
                waiting.append(push)
                continue
            try:
                offer, checksums = self._push(push)
            except _GivenBack as given_back:
                cancelled = partial(self.sending.cancel, push.id.transfer, Code.MISMATCH, str(given_back))
                answers.append(cancelled)
            except LinkBusy:
                busy.add(push.id.peer)
                waiting.append(push)
            except LinkError as error:
                answers.append(partial(self.sending.push_failed, push.id, f"link: {error}"))
            else:
                answers.append(partial(self.sending.pushed, push.id, checksums, offer, self._clock()))
        more = bool(self._queue)
        self._queue.extendleft(reversed(waiting))
        for answer in answers:  # after the queue is restored: their actions may withdraw batches from it
            self.run(answer())
        return more

    def _push(self, push: act.OfferBatch) -> tuple[bytes, bytes]:
        """Offer a batch on its peer's link and return ``(offer, checksums)`` for its announcement.

        The offer begins with the batch's link key (8 bytes, little-endian).

        Raises:
            LinkBusy: no staging slot is free.
            _GivenBack: a page of it does not exist any more.
            LinkError: the peer has no link, or it is broken.
        """
        source, peer = self._sources.get(push.id.transfer), self._peers.get(push.id.peer)
        if source is None or peer is None or peer.outbound is None:
            raise LinkError("no link to the decode worker was agreed on")
        pages = source.pages[push.group][push.first_block : push.first_block + push.blocks]
        if GONE in pages:
            raise _GivenBack(
                f"decode granted block {push.first_block + pages.index(GONE)} of cache group {push.group}, which "
                "prefill has given back: it lies behind the attention window"
            )
        key, self._next_key = self._next_key, self._next_key + 1
        blocks = push.blocks if self._checksums else 0
        early = source.prepared.pop((push.id.peer, push.group, push.first_block, push.blocks), None)
        if early is not None and early.pages == pages and early.channel is peer.outbound and not push.id.attempt:
            runs = early.runs
            offer, checksums = peer.outbound.send(key, runs, blocks, early.what)
        else:
            runs = self._groups[push.group].runs(pages, push.head_lo, push.head_hi)
            offer, checksums = peer.outbound.send(key, runs, blocks)
        self._staged[push.id] = (peer.outbound, key)
        nbytes = int(runs[:, 1].sum())
        source.nbytes += nbytes
        source.record.link = peer.outbound.link
        source.record.mark("first_batch")
        source.record.mark("last_batch", latest=True)
        self._counters["bytes_sent"] += nbytes
        self._counters["blocks_sent"] += push.blocks
        if self._audit is not None:
            for block, page in enumerate(pages, push.first_block):
                who = peer.id.engine, peer.id.rank
                heads = push.head_lo, push.head_hi
                self._audit.block(push.id.transfer, "producer", *who, push.group, block, page, *heads)
        return key.to_bytes(8, "little") + offer, checksums

    def _unstage(self, action: act.WithdrawBatch) -> None:
        staged = self._staged.pop(action.id, None)
        if staged is not None:
            channel, key = staged
            channel.release(key)
        else:
            self._queue = deque(push for push in self._queue if push.id != action.id)

    def _end(self, action: act.Release) -> None:
        source = self._sources.pop(action.transfer, None)
        if source is None:
            return
        code, record = action.code, source.record
        record.bytes, record.blocks = source.nbytes, sum(map(len, source.pages))
        record.state = "given up" if code else "delivered"
        if code is not None:
            record.code, record.reason = code.value, action.reason
            record.mark("failed")
            level = logging.INFO if code in REQUEST_ENDED else logging.WARNING
            logger.log(level, "transfer %s was not delivered (%s): %s", action.transfer, code.value, action.reason)
        self._counters["handovers_failed" if code else "handovers_ok"] += 1
        tell(
            source.on_end,
            Outcome(
                transfer=action.transfer,
                ok=code is None,
                code=code.value if code else "",
                reason=action.reason,
                blocks=sum(map(len, source.pages)),
                nbytes=source.nbytes,
                link=record.link,
                events=dict(record.events),
            ),
        )
