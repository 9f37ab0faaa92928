"""Ties protocol, control and links together, in the I/O thread: actions of the state machines become messages, copies
and callbacks, and what comes of those goes back in as events."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import zmq

from pdtransport.control.channel import (
    ConnectFailed,
    ControlChannel,
    Event,
    Identity,
    PeerDown,
    PeerId,
    PeerUp,
    Received,
    StatusAsked,
)
from pdtransport.errors import LinkError
from pdtransport.kv.geometry import KVGeometry, consumers_of, head_sources
from pdtransport.links.base import Channel, Link, LinkBusy
from pdtransport.observe.audit import Audit
from pdtransport.observe.timeline import Timeline, TransferRecord
from pdtransport.peers import Peer, Peers, bandwidth
from pdtransport.protocol import actions as act
from pdtransport.protocol.messages import (
    Abort,
    Accept,
    Ack,
    Batch,
    Claim,
    Code,
    Commit,
    Grant,
    LinkCall,
    Message,
    Nack,
    Revoke,
    Revoked,
)
from pdtransport.protocol.messages import Received as ReceivedBatches
from pdtransport.protocol.receiving import Part, Receiving, TransferOver
from pdtransport.protocol.sending import Sending
from pdtransport.settings import Settings

logger = logging.getLogger(__name__)

MAX_PUSHES_A_TURN = 8  # staging a batch takes about a millisecond: control messages get their turn in between
CONSUMER_WORDS = (Claim, Grant, ReceivedBatches, Nack, Ack, Revoke)
PRODUCER_WORDS = (Accept, Batch, Commit, Revoked, Abort)


@dataclass(frozen=True)
class Outcome:
    """How a transfer ended on this worker. ``code`` and ``reason`` are empty if it ended well."""

    transfer: str
    ok: bool
    code: str = ""
    reason: str = ""
    blocks: int = 0
    nbytes: int = 0
    link: str = ""
    events: dict[str, float] = field(default_factory=dict, repr=False)  # step -> wall-clock second


OnOutcome = Callable[[Outcome], None]


@dataclass
class _Source:
    """Pages that we hand over: ``pages[i]`` holds block i of the request."""

    pages: list[int]
    tokens: int
    on_end: OnOutcome
    record: TransferRecord
    nbytes: int = 0


@dataclass
class _Sink:
    """Pages that we take: ``pages[i]`` is for block ``first_block + i``."""

    pages: Sequence[int]
    first_block: int
    on_end: OnOutcome
    record: TransferRecord
    heads: dict[PeerId, tuple[int, int]] = field(default_factory=dict)
    placing: dict[PeerId, set[int]] = field(default_factory=dict)
    nbytes: int = 0
    started: bool = False
    cancelled: tuple[Code, str] | None = None


@dataclass(frozen=True)
class Fetch:
    """What a decode worker asks for: blocks ``first_block ..`` of a request, into ``pages``, from ``ranks`` prefill
    workers that listen at ``port``, ``port + 1``, ..."""

    transfer: str
    host: str
    port: int
    ranks: int
    digest: bytes
    tokens: int
    first_block: int
    pages: Sequence[int]


class Exchange:
    """See the module's docstring. Implements :class:`pdtransport.reactor.Work`."""

    def __init__(
        self,
        settings: Settings,
        me: Identity,
        geometry: KVGeometry,
        links: dict[str, Link],
        unavailable: dict[str, str],
        role: str,
        port: int | None = None,
    ) -> None:
        self._settings = settings
        self._me = me
        self._role = role
        self._geometry = geometry
        self._links = links
        self._control = ControlChannel(settings.control, me)
        self.endpoint = self._control.bind(port)
        self._peers = Peers(self._control, links, unavailable, settings.links, me)
        limits = limits_of(settings)
        self._sending = Sending(limits, geometry.checked_block_bytes)
        # Generations of different incarnations never meet: 31 bits of incarnation above 31 bits of count.
        self._receiving = Receiving(limits, first_generation=((me.incarnation & 0x7FFFFFFF) << 31) | 1)
        self._sources: dict[str, _Source] = {}
        self._sinks: dict[str, _Sink] = {}
        self._staged: dict[tuple[str, Any, int, int, int], tuple[Channel, int]] = {}
        self._push_queue: deque[act.Push] = deque()
        self._withdrawn: set[tuple[str, Any, int, int, int]] = set()
        self._next_key = 1
        self._counters: Counter[str] = Counter()
        self._timeline = Timeline(settings.observe.recent_transfers)
        audit = settings.observe.audit_dir
        self._audit = Audit(audit, me.engine, me.rank, geometry) if audit else None
        self._started_at = time.time()

    # -- reactor.Work --------------------------------------------------------------------------------------------

    def sockets(self) -> list[zmq.Socket[bytes]]:
        return self._control.sockets()

    def descriptors(self) -> list[int]:
        return [fd for fd in (link.fileno() for link in self._links.values()) if fd >= 0]

    def turn(self, now: float) -> bool:
        events = self._control.receive(now)
        for event in events:
            self._on_event(event, now)
        busy = bool(events)
        for link in self._links.values():
            busy = link.progress() or busy
        busy = self._push_some() or busy
        for event in self._control.tick(now):
            self._on_event(event, now)
        self._do_sending(self._sending.tick(now))
        self._do_receiving(self._receiving.tick(now))
        return busy

    def arm(self) -> bool:
        return all(link.arm() for link in self._links.values())

    def next_deadline(self) -> float | None:
        times = (self._control.next_deadline(), self._sending.next_deadline(), self._receiving.next_deadline())
        known = [t for t in times if t is not None]
        return min(known) if known else None

    def close(self) -> None:
        self._peers.close()
        for link in self._links.values():
            link.close()
        self._control.close()
        if self._audit:
            self._audit.close()
        why = Code.CANCELLED.value, "the transport was closed"
        for name, entry in [*self._sources.items(), *self._sinks.items()]:
            self._tell(entry.on_end, Outcome(name, False, *why))
        self._sources.clear()
        self._sinks.clear()

    # -- prefill -------------------------------------------------------------------------------------------------

    def open(self, transfer: str, digest: bytes, tokens: int, on_end: OnOutcome) -> None:
        blocks = -(-tokens // self._geometry.block_size)
        try:
            actions = self._sending.open(transfer, digest, tokens, blocks, time.monotonic())
        except TransferOver as over:
            self._counters[f"opens_refused_{over.code.value}"] += 1
            self._tell(on_end, Outcome(transfer, False, over.code.value, over.reason))
            return
        record = self._timeline.open(transfer, "producer")
        record.mark("opened")
        self._sources[transfer] = _Source([], tokens, on_end, record)
        self._do_sending(actions)

    def pages_ready(self, transfer: str, pages: Sequence[int], tokens_done: int) -> None:
        """``pages``: page ids of all the request's blocks so far; their first ``tokens_done`` tokens are final."""
        source = self._sources.get(transfer)
        if source is None:
            return
        source.pages = list(pages)
        block_size = self._geometry.block_size
        whole = tokens_done >= source.tokens
        blocks = -(-source.tokens // block_size) if whole else tokens_done // block_size
        actions = self._sending.pages_ready(transfer, min(blocks, len(source.pages)), tokens_done, time.monotonic())
        self._do_sending(actions)
        self._push_some()

    def finish(self, transfer: str) -> None:
        source = self._sources.get(transfer)
        if source is not None:
            source.record.mark("finished")
            self._do_sending(self._sending.finish(transfer, time.monotonic()))

    def cancel_source(self, transfer: str, code: Code, reason: str) -> None:
        self._do_sending(self._sending.cancel(transfer, code, reason))

    # -- decode --------------------------------------------------------------------------------------------------

    def claim(self, transfer: str, host: str, port: int, ranks: int) -> None:
        """Ask prefill to hold a transfer that we can't grant yet. Best effort."""

        def say(peer: Peer | None, _why: object) -> None:
            if peer is not None:
                self._control.send(peer.id, Claim(transfer=transfer))

        for endpoint, *_ in self._producers(host, port, ranks):
            self._peers.want(endpoint, say)

    def fetch(self, wanted: Fetch, on_end: OnOutcome) -> None:
        if wanted.transfer in self._sinks:
            why = "this transfer id is in use; mint one per dispatch"
            self._tell(on_end, Outcome(wanted.transfer, False, Code.REUSED.value, why))
            return
        record = self._timeline.open(wanted.transfer, "consumer")
        record.mark("asked")
        record.blocks, record.skipped_blocks = len(wanted.pages), wanted.first_block
        sink = _Sink(list(wanted.pages), wanted.first_block, on_end, record)
        self._sinks[wanted.transfer] = sink
        producers = self._producers(wanted.host, wanted.port, wanted.ranks)
        found: dict[int, Peer] = {}

        def on_peer(rank: int, peer: Peer | None, why: tuple[Code, str] | None) -> None:
            if self._sinks.get(wanted.transfer) is not sink or sink.started:
                return
            problem = why or (peer and self._wrong_peer(peer, rank, wanted.ranks))
            if problem or peer is None:
                code, reason = problem or (Code.PEER_LOST, "peer lost")
                self._end_sink(wanted.transfer, code, reason)
                return
            found[rank] = peer
            if len(found) == len(producers):
                sink.started = True
                self._grant(wanted, sink, [(found[source.rank], source) for _, source in producers])

        for endpoint, source in producers:
            self._peers.want(endpoint, partial(on_peer, source.rank))

    def cancel_fetch(self, transfer: str, code: Code, reason: str) -> None:
        sink = self._sinks.get(transfer)
        if sink is not None and not sink.started:
            self._end_sink(transfer, code, reason)
            return
        self._do_receiving(self._receiving.cancel(transfer, code, reason))

    def _producers(self, host: str, port: int, ranks: int) -> list[Any]:
        g = self._geometry
        sources = head_sources(g.head_lo, g.head_hi, ranks, g.total_heads, self._me.rank)
        return [((host, port + source.rank), source) for source in sources]

    @staticmethod
    def _wrong_peer(peer: Peer, rank: int, ranks: int) -> tuple[Code, str] | None:
        if peer.world != ranks or peer.id.rank != rank:
            text = f"tp_size: {peer.host} is rank {peer.id.rank} of {peer.world}, the request says {rank} of {ranks}"
            return Code.REFUSED, text
        return None

    def _grant(self, wanted: Fetch, sink: _Sink, producers: list[Any]) -> None:
        g = self._geometry
        parts = []
        for peer, source in producers:
            channel = peer.inbound
            assert channel is not None
            takers = consumers_of(source.rank, wanted.ranks, self._me.world, g.total_heads)
            parts.append(
                Part(
                    peer=peer.id,
                    head_lo=source.head_lo,
                    head_hi=source.head_hi,
                    consumers=len(takers),
                    block_bytes=g.block_bytes(source.head_lo, source.head_hi),
                    one_sided=channel.one_sided,
                )
            )
            sink.heads[peer.id] = (source.head_lo, source.head_hi)
            sink.placing[peer.id] = set()
            sink.record.link = channel.link
            sink.record.peer = peer.id.engine
        try:
            actions = self._receiving.begin(
                wanted.transfer,
                wanted.digest,
                wanted.tokens,
                wanted.first_block,
                len(wanted.pages),
                parts,
                time.monotonic(),
            )
        except TransferOver as over:
            self._end_sink(wanted.transfer, over.code, over.reason)
            return
        sink.record.mark("granted")
        self._do_receiving(actions)

    # -- events --------------------------------------------------------------------------------------------------

    def _on_event(self, event: Event, now: float) -> None:
        if isinstance(event, Received):
            self._on_message(event.peer, event.message, now)
        elif isinstance(event, PeerUp):
            self._peers.up(event)
        elif isinstance(event, PeerDown):
            logger.warning("peer %s rank %d is gone: %s", event.peer.engine, event.peer.rank, event.reason)
            self._counters["peers_lost"] += 1
            self._peers.down(event.peer, event.reason)
            self._drop_staged(event.peer)
            self._do_sending(self._sending.peer_lost(event.peer, event.reason))
            self._do_receiving(self._receiving.peer_lost(event.peer, event.reason))
        elif isinstance(event, ConnectFailed):
            logger.error("no connection to %s:%d: %s", event.host, event.port, event.reason)
            self._counters["connects_failed"] += 1
            self._peers.connect_failed((event.host, event.port), event.reason, event.refused)
        elif isinstance(event, StatusAsked):
            event.reply(json.dumps(self.status(event.transfer)))

    def _on_message(self, peer: PeerId, message: Message, now: float) -> None:
        if isinstance(message, CONSUMER_WORDS):
            if isinstance(message, Grant):
                self._mark_source(message.transfer, "granted", peer)
            elif isinstance(message, Ack):
                self._mark_source(message.transfer, "acked", peer)
            self._do_sending(self._sending.on_message(peer, message, now))
        elif isinstance(message, PRODUCER_WORDS):
            self._mark_sink(message)
            self._do_receiving(self._receiving.on_message(peer, message, now))
        elif isinstance(message, LinkCall):
            self._peers.link_call(peer, message)

    def _mark_source(self, transfer: str, event: str, peer: PeerId) -> None:
        source = self._sources.get(transfer)
        if source is not None:
            source.record.mark(event)
            source.record.peer = peer.engine

    def _mark_sink(self, message: Accept | Batch | Commit | Revoked | Abort) -> None:
        sink = self._sinks.get(message.transfer)
        if sink is None:
            return
        if isinstance(message, Accept):
            sink.record.mark("accepted")
        elif isinstance(message, Batch):
            sink.record.mark("first_batch")
            sink.record.mark("last_batch", latest=True)
        elif isinstance(message, Commit):
            sink.record.mark("committed")

    # -- actions: decode -----------------------------------------------------------------------------------------

    def _do_receiving(self, actions: Sequence[act.Action]) -> None:
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, act.Send):
                self._control.send(action.peer, action.message)
            elif isinstance(action, act.Place):
                self._place(action)
            elif isinstance(action, act.Fence):
                self._fence_sink(action)
            elif isinstance(action, act.Ready):
                self._end_sink(action.transfer, None, "")
            elif isinstance(action, act.Failed):
                self._end_sink(action.transfer, action.code, action.reason)

    def _place(self, action: act.Place) -> None:
        batch, peer = action.batch, self._peers.get(action.peer)
        sink = self._sinks[action.transfer]
        done = partial(self._placed, action.transfer, action.peer, batch)
        if peer is None or peer.inbound is None or len(batch.offer) < 8:
            done("link: the peer's link is gone" if peer is None else "link: the batch has no offer")
            return
        first = batch.first_block - sink.first_block
        head_lo, head_hi = sink.heads[action.peer]
        runs = self._geometry.runs(sink.pages[first : first + batch.blocks], head_lo, head_hi)
        key = int.from_bytes(batch.offer[:8], "little")
        sink.placing[action.peer].add(key)
        try:
            peer.inbound.receive(key, batch.offer[8:], runs, batch.checksums, batch.blocks, done)
        except LinkError as error:
            done(f"link: {error}")

    def _placed(self, transfer: str, peer: PeerId, batch: Batch, error: str | None) -> None:
        sink = self._sinks.get(transfer)
        if sink is not None:
            sink.placing[peer].discard(int.from_bytes(batch.offer[:8], "little"))
            if error is None:
                sink.nbytes += batch.nbytes
                self._counters["bytes_received"] += batch.nbytes
                self._counters["blocks_received"] += batch.blocks
            else:
                logger.warning("transfer %s, batch %d: %s", transfer, batch.seq, error)
        self._do_receiving(
            self._receiving.placed(transfer, peer, batch.generation, batch.seq, batch.attempt, error, time.monotonic())
        )

    def _fence_sink(self, action: act.Fence) -> None:
        sink = self._sinks.get(action.transfer)
        peer = self._peers.get(action.peer)
        keys = list(sink.placing.get(action.peer, ())) if sink else []

        def fenced() -> None:
            self._do_receiving(self._receiving.fenced(action.transfer, action.peer, action.generation))

        if peer is None or peer.inbound is None or not keys:
            fenced()
        else:
            peer.inbound.fence(keys, fenced)

    def _end_sink(self, transfer: str, code: Code | None, reason: str) -> None:
        sink = self._sinks.pop(transfer, None)
        if sink is None:
            return
        record = sink.record
        record.bytes = sink.nbytes
        record.state = "failed" if code else "ready"
        record.mark("failed" if code else "verified")
        if code is None:
            self._audit_blocks(transfer, sink)
            self._log_rates()
        else:
            record.code, record.reason = code.value, reason
            if code is not Code.CANCELLED:
                logger.warning("transfer %s failed (%s): %s", transfer, code.value, reason)
        self._counters["fetches_failed" if code else "fetches_ok"] += 1
        outcome = Outcome(
            transfer,
            code is None,
            code.value if code else "",
            reason,
            len(sink.pages),
            sink.nbytes,
            record.link,
            dict(record.events),
        )
        self._tell(sink.on_end, outcome)

    # -- actions: prefill ----------------------------------------------------------------------------------------

    def _do_sending(self, actions: Sequence[act.Action]) -> None:
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, act.Send):
                if isinstance(action.message, Commit):
                    self._mark_source(action.message.transfer, "committed", action.peer)
                self._control.send(action.peer, action.message)
            elif isinstance(action, act.Push):
                self._push_queue.append(action)
            elif isinstance(action, act.Unstage):
                self._unstage(action)
            elif isinstance(action, act.Fence):
                todo.extend(self._fence_source(action))
            elif isinstance(action, act.Release):
                self._end_source(action)

    def _push_some(self) -> bool:
        """Stage queued batches, a few a turn; what finds no slot waits for the next turn."""
        for _ in range(min(len(self._push_queue), MAX_PUSHES_A_TURN)):
            push = self._push_queue.popleft()
            ident = (push.transfer, push.peer, push.generation, push.seq, push.attempt)
            if ident in self._withdrawn:
                self._withdrawn.discard(ident)
                continue
            try:
                self._push(push, ident)
            except LinkBusy:
                self._push_queue.appendleft(push)
                return False
            except LinkError as error:
                self._do_sending(self._sending.push_failed(*ident, f"link: {error}"))
        return bool(self._push_queue)

    def _push(self, push: act.Push, ident: tuple[str, Any, int, int, int]) -> None:
        source, peer = self._sources.get(push.transfer), self._peers.get(push.peer)
        if source is None or peer is None or peer.outbound is None:
            raise LinkError("the decode worker agreed on no link")
        pages = source.pages[push.first_block : push.first_block + push.blocks]
        runs = self._geometry.runs(pages, push.head_lo, push.head_hi)
        key, self._next_key = self._next_key, self._next_key + 1
        wanted = push.blocks if self._settings.integrity.checksum == "full" else 0
        offer, checksums = peer.outbound.send(key, runs, wanted, lambda error: None)
        self._staged[ident] = (peer.outbound, key)
        nbytes = int(runs[:, 1].sum())
        source.nbytes += nbytes
        source.record.link = peer.outbound.link
        source.record.mark("first_batch")
        source.record.mark("last_batch", latest=True)
        self._counters["bytes_sent"] += nbytes
        self._counters["blocks_sent"] += push.blocks
        if self._audit:
            for block, page in enumerate(pages, push.first_block):
                who = peer.id.engine, peer.id.rank
                self._audit.block(push.transfer, "producer", *who, block, page, push.head_lo, push.head_hi)
        offer = key.to_bytes(8, "little") + offer
        self._do_sending(self._sending.pushed(*ident, checksums, offer, time.monotonic()))

    def _unstage(self, action: act.Unstage) -> None:
        ident = (action.transfer, action.peer, action.generation, action.seq, action.attempt)
        staged = self._staged.pop(ident, None)
        if staged is not None:
            channel, key = staged
            channel.release(key)
        elif any(self._ident(push) == ident for push in self._push_queue):
            self._withdrawn.add(ident)

    def _fence_source(self, action: act.Fence) -> list[act.Action]:
        """All that a link of ours still does for this grant was unstaged before; it only ever reads."""
        return self._sending.fenced(action.transfer, action.peer, action.generation)

    def _drop_staged(self, peer: PeerId) -> None:
        for ident in [ident for ident in self._staged if ident[1] == peer]:
            del self._staged[ident]  # its channel is closed
        self._push_queue = deque(push for push in self._push_queue if push.peer != peer)
        self._withdrawn = {ident for ident in self._withdrawn if ident[1] != peer}

    def _end_source(self, action: act.Release) -> None:
        source = self._sources.pop(action.transfer, None)
        if source is None:
            return
        code = action.code
        source.record.bytes = source.nbytes
        source.record.blocks = len(source.pages)
        source.record.state = "given up" if code else "delivered"
        if code is not None:
            source.record.code, source.record.reason = code.value, action.reason
            source.record.mark("failed")
            if code not in (Code.CANCELLED, Code.PEER_CANCELLED):
                logger.warning("transfer %s was not delivered (%s): %s", action.transfer, code.value, action.reason)
        self._counters["handovers_failed" if code else "handovers_ok"] += 1
        outcome = Outcome(
            action.transfer,
            code is None,
            code.value if code else "",
            action.reason,
            len(source.pages),
            source.nbytes,
            source.record.link,
            dict(source.record.events),
        )
        self._tell(source.on_end, outcome)

    # -- watching ------------------------------------------------------------------------------------------------

    def status(self, transfer: str = "") -> dict[str, Any]:
        """What this worker is doing: counters, peers with their links, and recent transfers; JSON values only."""
        counters = self._counters + self._sending.counters + self._receiving.counters
        for name, count in self._control.counters.items():
            counters[f"control_{name}"] = count
        return {
            "engine": self._me.engine,
            "rank": self._me.rank,
            "world": self._me.world,
            "role": self._role,
            "incarnation": self._me.incarnation,
            "uptime_s": time.time() - self._started_at,
            "counters": dict(counters),
            "live": {
                "producing": self._sending.live,
                "consuming": len(self._sinks),
                "early_grants": self._sending.early,
                "staged": len(self._staged),
                "queued_pushes": len(self._push_queue),
            },
            "peers": [peer.status() for peer in self._peers],
            "transfers": [record.as_dict() for record in self._timeline.records(transfer)][-self.MAX_STATUS_RECORDS :],
        }

    MAX_STATUS_RECORDS = 512

    def _log_rates(self) -> None:
        for peer in self._peers:
            channel = peer.inbound
            if channel is None or peer.logged_rate or channel.stats.bytes_received < 1 << 20:
                continue
            peer.logged_rate = True
            rate = bandwidth(channel) or 0.0
            logger.info(
                "pages from %s rank %d: %s at %.2f GB/s", peer.id.engine, peer.id.rank, channel.link, rate / 1e9
            )

    def _audit_blocks(self, transfer: str, sink: _Sink) -> None:
        if self._audit is None:
            return
        for peer, (lo, hi) in sink.heads.items():
            for block, page in enumerate(sink.pages, sink.first_block):
                self._audit.block(transfer, "consumer", peer.engine, peer.rank, block, page, lo, hi)

    @staticmethod
    def _ident(push: act.Push) -> tuple[str, Any, int, int, int]:
        return push.transfer, push.peer, push.generation, push.seq, push.attempt

    @staticmethod
    def _tell(on_end: OnOutcome, outcome: Outcome) -> None:
        try:
            on_end(outcome)
        except Exception:
            logger.exception("error in a transfer's callback")


def limits_of(settings: Settings) -> act.Limits:
    """The settings that the state machines need."""
    deadlines, links = settings.deadlines, settings.links
    return act.Limits(
        **deadlines.model_dump(),
        batch_bytes=links.batch_bytes,
        window_bytes=links.window_bytes,
        max_transfers=settings.max_transfers,
        tombstones=settings.tombstones,
        checksums=settings.integrity.checksum == "full",
    )
