"""The consumer driver (decode side): connects to the producers, grants pages to them and reads their batches.

Carries out the actions of the consumer state machines. A transfer's owner is called back exactly once: with success
after every byte is in place and verified, with a failure once nothing can write the pages any more.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from pdtransport.control.channel import Identity, PeerId
from pdtransport.errors import LinkError
from pdtransport.kv.fingerprint import plain
from pdtransport.kv.geometry import HeadSource, consumers_of, head_sources
from pdtransport.kv.groups import CacheGroups
from pdtransport.links.base import Runs
from pdtransport.protocol import actions as act
from pdtransport.protocol.consumer_table import ConsumerTable, GrantedPart, TransferOver
from pdtransport.protocol.messages import (
    MAX_REASON,
    REQUEST_ENDED,
    Accept,
    Batch,
    BatchHint,
    Claim,
    Code,
    Commit,
    Ended,
    GrantedGroup,
    ProducerMessage,
)
from pdtransport.system.log_limits import LogLimiter
from pdtransport.transfer.audit import Audit
from pdtransport.transfer.control import Control
from pdtransport.transfer.outcome import OnOutcome, Outcome, tell
from pdtransport.transfer.peers import Endpoint, Peers, TransferPeer
from pdtransport.transfer.timeline import Timeline, TransferRecord

logger = logging.getLogger(__name__)

NOBODY_THERE = frozenset({Code.PEER_LOST, Code.REFUSED})  # before the grant: no producer could be reached
NOBODY_PAUSE_S = 10.0  # between two log lines about such transfers


class WantedBlocks(NamedTuple):
    """What to receive of one cache group: ``pages[i]`` is for block ``first_block + i``."""

    first_block: int
    pages: list[int]


@dataclass(frozen=True)
class ReceiveRequest:
    """What to receive: blocks of a request, by cache group.

    The blocks come from ``ranks`` producer workers on ``host``, which listen at ``port``, ``port + 1``, ...
    """

    transfer: str
    host: str
    port: int
    ranks: int
    prompt_digest: bytes
    tokens: int
    groups: tuple[WantedBlocks, ...]
    first_token: bool = False  # promise to continue from the first token, if prefill names it

    @property
    def blocks(self) -> int:
        return sum(len(group.pages) for group in self.groups)


class _Source(NamedTuple):
    """A producer worker to ask, and the heads of each cache group that come from it, if any do."""

    endpoint: Endpoint
    rank: int
    heads: tuple[HeadSource | None, ...]
    consumers: int  # that grant to it


@dataclass
class IncomingTransfer:
    """A transfer that this worker receives. Only ``owner`` may cancel it."""

    owner: object
    wanted: ReceiveRequest
    on_end: OnOutcome
    record: TransferRecord
    asked: dict[PeerId, tuple[GrantedGroup, ...]] = field(default_factory=dict)  # what was granted to each producer
    placing: dict[PeerId, set[int]] = field(default_factory=dict)  # keys of batches that the link may still write
    nbytes: int = 0
    granted: bool = False  # a grant may have been sent


class ConsumerDriver:
    """Runs the transfers that this worker receives. All methods are called in the I/O thread."""

    def __init__(
        self,
        limits: act.Limits,
        groups: CacheGroups,
        me: Identity,
        control: Control,
        peers: Peers,
        timeline: Timeline,
        counters: Counter[str],
        audit: Audit | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Incarnations never share a generation: 31 bits of the incarnation, then a 31-bit counter.
        self.receiving = ConsumerTable(limits, first_generation=((me.incarnation & 0x7FFFFFFF) << 31) | 1)
        self._groups = groups
        self._checksums = limits.checksums
        self._me = me
        self._control = control
        self._peers = peers
        self._timeline = timeline
        self._counters = counters
        self._audit = audit
        self._clock = clock
        self._sinks: dict[str, IncomingTransfer] = {}
        self.limiter = LogLimiter(logger, NOBODY_PAUSE_S, clock=clock)  # clients choose the hosts to connect to

    # -- calls of the engine -------------------------------------------------------------------------------------

    def claim(self, transfer: str, host: str, port: int, ranks: int) -> None:
        """Ask the producers to hold a transfer that this worker can't grant yet. Best effort."""

        def say(peer: TransferPeer | None, _why: object) -> None:
            if peer is not None:
                self._control.send(peer.id, Claim(transfer=transfer))

        for source in self._producers(host, port, ranks):
            self._peers.want(source.endpoint, say)

    def decline(self, transfer: str, code: Code, reason: str, host: str, port: int, ranks: int) -> None:
        """Report that ``transfer`` will not be received: to watchers, and to the producers if ``host`` is not empty.

        Best effort. Ignored for a transfer that is or was being received.
        """
        if transfer in self._sinks or self.receiving.knows(transfer):
            return
        self.report(transfer, code, reason)
        if not host:
            return
        record = self._timeline.open(transfer, "consumer")
        record.mark("declined")
        record.state, record.code, record.reason = "declined", code.value, reason

        def say(peer: TransferPeer | None, _why: object) -> None:
            if peer is not None:
                self.run(self.receiving.decline(transfer, peer.id, code, reason))

        for source in self._producers(host, port, ranks):
            self._peers.want(source.endpoint, say)

    def fetch(self, owner: object, wanted: ReceiveRequest, on_end: OnOutcome) -> None:
        transfer = wanted.transfer
        if transfer in self._sinks or self.receiving.knows(transfer):
            self._counters["fetches_refused_reused"] += 1
            why = "this transfer id was used before; mint one per dispatch"
            logger.warning("transfer %s refused: %s", transfer, why)
            tell(on_end, Outcome(transfer, False, Code.REUSED.value, why))
            self.report(transfer, Code.REUSED, why)
            return
        if not wanted.blocks:  # no page will come and no engine waits: report the end to watchers at once
            self.report(transfer)
        record = self._timeline.open(transfer, "consumer")
        record.mark("asked")
        record.blocks, record.skipped_blocks = wanted.blocks, sum(group.first_block for group in wanted.groups)
        sink = self._sinks[transfer] = IncomingTransfer(owner, wanted, on_end, record)
        producers = self._producers(wanted.host, wanted.port, wanted.ranks)
        found: dict[int, TransferPeer] = {}

        def on_peer(rank: int, peer: TransferPeer | None, why: tuple[Code, str] | None) -> None:
            if self._sinks.get(transfer) is not sink or sink.granted:
                return
            if peer is None:
                self._end(transfer, *(why or (Code.PEER_LOST, "the peer is gone")))
            elif (peer.world, peer.id.rank) != (wanted.ranks, rank):
                found_text = f"{wanted.host}:{wanted.port + rank} is rank {peer.id.rank} of {peer.world}"
                self._end(transfer, Code.REFUSED, f"tp_size: {found_text}, the request says {rank} of {wanted.ranks}")
            else:
                found[rank] = peer
                if len(found) == len(producers):
                    self._grant(sink, [(found[source.rank], source) for source in producers])

        for source in producers:
            self._peers.want(source.endpoint, partial(on_peer, source.rank))

    def cancel(self, owner: object, transfer: str, code: Code, reason: str) -> None:
        sink = self._sinks.get(transfer)
        if sink is not None and sink.owner is owner:
            self._cancel(sink, code, reason)

    def cancel_all(self, code: Code, reason: str) -> set[str]:
        """Cancel all transfers and return their ids."""
        sinks = list(self._sinks.values())
        for sink in sinks:
            self._cancel(sink, code, reason)
        return {sink.wanted.transfer for sink in sinks}

    def live_of(self, transfers: set[str]) -> set[str]:
        return transfers & self._sinks.keys()

    def _cancel(self, sink: IncomingTransfer, code: Code, reason: str) -> None:
        if not sink.granted:
            self._end(sink.wanted.transfer, code, reason)
        else:
            self.run(self.receiving.cancel(sink.wanted.transfer, code, reason))

    def report(
        self, transfer: str, code: Code | None = None, reason: str = "", sink: IncomingTransfer | None = None
    ) -> None:
        """Tell watchers how a transfer ended, or that it will not begin."""
        if not self._control.watched:
            return
        times = sink.record.events if sink is not None else {}
        end = times.get("verified", 0.0)
        self._control.publish(
            Ended(
                transfer=transfer,
                code=code,
                reason=plain(reason, MAX_REASON),
                blocks=sink.wanted.blocks if sink is not None else 0,
                nbytes=sink.nbytes if sink is not None else 0,
                link=sink.record.link if sink is not None else "",
                exposed_us=_us(end - times.get("committed", end)),
                taken_us=_us(end - times.get("first_batch", end)),
            )
        )

    def _producers(self, host: str, port: int, ranks: int) -> list[_Source]:
        by_group = [
            {source.rank: source for source in head_sources(g.head_lo, g.head_hi, ranks, g.total_heads, self._me.rank)}
            for g in self._groups
        ]
        return [
            _Source((host, port + rank), rank, tuple(sources.get(rank) for sources in by_group), len(takers))
            for rank in range(ranks)
            if self._me.rank in (takers := self._takers(rank, ranks))
        ]

    def _takers(self, rank: int, ranks: int) -> set[int]:
        """Consumer workers that grant to the producer worker ``rank``.

        If another one sends all its heads, one consumer grants it nothing, so that it need not hold its pages.
        """
        world = self._me.world
        takers = {taker for g in self._groups for taker in consumers_of(rank, ranks, world, g.total_heads)}
        return takers or {rank % world}

    def _grant(self, sink: IncomingTransfer, producers: list[tuple[TransferPeer, _Source]]) -> None:
        wanted = sink.wanted
        parts = []
        for peer, source in producers:
            channel = peer.inbound
            if channel is None:  # this peer was lost while we waited for another one
                self._end(wanted.transfer, Code.PEER_LOST, f"{peer.id} is gone")
                return
            asked = tuple(
                GrantedGroup(blocks.first_block, len(blocks.pages), heads.head_lo, heads.head_hi)
                if heads is not None
                else GrantedGroup(blocks.first_block, 0, 0, 0)
                for blocks, heads in zip(wanted.groups, source.heads, strict=True)
            )
            block_bytes = tuple(
                g.block_bytes(group.head_lo, group.head_hi) for g, group in zip(self._groups, asked, strict=True)
            )
            parts.append(GrantedPart(peer.id, asked, block_bytes, source.consumers))
            sink.asked[peer.id] = asked
            sink.placing[peer.id] = set()
            sink.record.link, sink.record.peer = channel.link, peer.id.engine
        try:
            actions = self.receiving.begin(
                wanted.transfer,
                wanted.prompt_digest,
                wanted.tokens,
                parts,
                self._clock(),
                wanted.first_token,
            )
        except TransferOver as over:
            self._end(wanted.transfer, over.code, over.reason)
            return
        sink.granted = True
        sink.record.mark("granted")
        self.run(actions)

    # -- messages, lost peers, time ------------------------------------------------------------------------------

    def on_message(self, peer: PeerId, message: ProducerMessage, now: float) -> None:
        sink = self._sinks.get(message.transfer)
        if sink is not None:
            if isinstance(message, Accept):
                sink.record.mark("accepted")
            elif isinstance(message, Batch):
                sink.record.mark("first_batch")
                sink.record.mark("last_batch", latest=True)
            elif isinstance(message, Commit):
                sink.record.mark("committed")
        self.run(self.receiving.on_message(peer, message, now))

    def coming(self, peer_id: PeerId, message: BatchHint) -> None:
        """Plan the read of a batch that is not computed yet. Hints that don't fit the transfer are ignored."""
        sink, peer = self._sinks.get(message.transfer), self._peers.get(peer_id)
        if sink is None or peer is None or peer.inbound is None or peer_id not in sink.asked:
            return
        runs = self._runs(sink, peer_id, message)
        if runs is None:
            return
        self._counters["batches_foreseen"] += 1
        peer.inbound.prepare_read(message.offer, runs, message.blocks if self._checksums else 0)

    def peer_lost(self, peer: PeerId, reason: str) -> None:
        """End what ``peer`` was sending. The caller has closed its channels."""
        self.run(self.receiving.peer_lost(peer, reason))

    def tick(self, now: float) -> None:
        self.run(self.receiving.tick(now))

    def end_all(self, code: Code, reason: str) -> None:
        """Report all transfers as ended with ``code``; called when the transport closes, after its links."""
        sinks, self._sinks = self._sinks, {}
        for transfer, sink in sinks.items():
            tell(sink.on_end, Outcome(transfer, False, code.value, reason, never_granted=not sink.granted))

    def live(self) -> dict[str, int]:
        return {"consuming": len(self._sinks)}

    # -- actions -------------------------------------------------------------------------------------------------

    def run(self, actions: Sequence[act.Action]) -> None:
        for action in actions:
            if isinstance(action, act.Send):
                self._control.send(action.peer, action.message)
            elif isinstance(action, act.ReadBatch):
                self._place(action)
            elif isinstance(action, act.Fence):
                self._fence(action)
            elif isinstance(action, act.Ready):
                self._end(action.transfer, None, "", action)
            elif isinstance(action, act.Failed):
                self._end(action.transfer, action.code, action.reason)

    def _place(self, action: act.ReadBatch) -> None:
        batch, peer = action.batch, self._peers.get(action.id.peer)
        sink = self._sinks[action.id.transfer]
        done = partial(self._placed, action)
        if peer is None or peer.inbound is None:
            done("link: the peer's link is gone")
            return
        if len(batch.offer) < 8:
            done("link: the batch came without an offer")
            return
        runs = self._runs(sink, action.id.peer, batch)
        assert runs is not None, "the state machine checked the batch against the grant"
        key = _key(batch)
        sink.placing[action.id.peer].add(key)
        try:
            peer.inbound.receive(key, batch.offer[8:], runs, batch.checksums, batch.blocks, done)
        except LinkError as error:
            done(f"link: {error}")

    def _runs(self, sink: IncomingTransfer, peer: PeerId, what: Batch | BatchHint) -> Runs | None:
        """Byte runs of the pages for these blocks; None if they are not within what was granted to ``peer``."""
        if what.group >= len(sink.wanted.groups):
            return None
        wanted, asked = sink.wanted.groups[what.group], sink.asked[peer][what.group]
        first = what.first_block - wanted.first_block
        pages = wanted.pages[first : first + what.blocks] if first >= 0 and asked.blocks else []
        if len(pages) != what.blocks:
            return None
        return self._groups[what.group].runs(pages, asked.head_lo, asked.head_hi)

    def _placed(self, action: act.ReadBatch, error: str | None) -> None:
        batch, sink = action.batch, self._sinks.get(action.id.transfer)
        if sink is not None:
            sink.placing[action.id.peer].discard(_key(batch))
            if error is None:
                sink.nbytes += batch.nbytes
                self._counters["bytes_received"] += batch.nbytes
                self._counters["blocks_received"] += batch.blocks
            else:
                logger.warning("transfer %s, batch %d: %s", batch.transfer, batch.seq, error)
        self.run(self.receiving.placed(action.id, error, self._clock()))

    def _fence(self, action: act.Fence) -> None:
        sink, peer = self._sinks.get(action.transfer), self._peers.get(action.peer)
        keys = list(sink.placing.get(action.peer, ())) if sink else []

        def fenced() -> None:
            self.run(self.receiving.fenced(action.transfer, action.peer, action.generation))

        if peer is None or peer.inbound is None or not keys:
            fenced()
        else:
            peer.inbound.fence(keys, fenced)

    def _end(self, transfer: str, code: Code | None, reason: str, ready: act.Ready | None = None) -> None:
        sink = self._sinks.pop(transfer, None)
        if sink is None:
            return
        record = sink.record
        record.bytes = sink.nbytes
        record.state = "failed" if code else "ready"
        record.mark("failed" if code else "verified")
        if code is not None:
            record.code, record.reason = code.value, reason
            self._log_failure(sink, code, reason)
        elif self._audit is not None:
            self._audit_blocks(self._audit, sink)
        self._counters["fetches_failed" if code else "fetches_ok"] += 1
        tell(
            sink.on_end,
            Outcome(
                transfer=transfer,
                ok=code is None,
                code=code.value if code else "",
                reason=reason,
                blocks=sink.wanted.blocks,
                nbytes=sink.nbytes,
                link=record.link,
                first_token=ready.first_token if ready else None,
                never_granted=not sink.granted,
                cached_tokens=ready.cached_tokens if ready else None,
                events=dict(record.events),
            ),
        )
        if sink.wanted.blocks:  # after the engine's callback, for which the engine's next step waits
            self.report(transfer, code, reason, sink)

    def _log_failure(self, sink: IncomingTransfer, code: Code, reason: str) -> None:
        text = f"transfer {sink.wanted.transfer} failed ({code.value}): {reason}"
        if code in NOBODY_THERE and not sink.granted:
            self.limiter.warn(text)
        else:
            logger.log(logging.INFO if code in REQUEST_ENDED else logging.WARNING, "%s", text)

    @staticmethod
    def _audit_blocks(audit: Audit, sink: IncomingTransfer) -> None:
        for peer, asked in sink.asked.items():
            for group, (wanted, heads) in enumerate(zip(sink.wanted.groups, asked, strict=True)):
                for block, page in enumerate(wanted.pages if heads.blocks else (), wanted.first_block):
                    who = peer.engine, peer.rank
                    audit.block(
                        sink.wanted.transfer, "consumer", *who, group, block, page, heads.head_lo, heads.head_hi
                    )


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


def _key(batch: Batch) -> int:
    """The producer's link key: the first 8 bytes of the offer."""
    return int.from_bytes(batch.offer[:8], "little")
