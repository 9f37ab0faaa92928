"""The transfer engine: connects the protocol with the control channel and the links. Runs in the I/O thread.

Dispatches events of the control channel to the producer or consumer driver, and gives each driver, link and timer its
share of every turn.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping

import zmq

from pdtransport.control.channel import (
    ConnectFailed,
    Event,
    Identity,
    MessageReceived,
    PeerDown,
    PeerId,
    PeerUp,
    StatusRequested,
)
from pdtransport.control.handshake import told_incarnation
from pdtransport.io.cuda_events import CudaEventQueue
from pdtransport.kv.geometry import HOST
from pdtransport.kv.groups import CacheGroups
from pdtransport.links.base import Link
from pdtransport.observe.status import PatchStatus, TransportStatus
from pdtransport.protocol.actions import Limits
from pdtransport.protocol.messages import (
    Abort,
    Accept,
    Ack,
    Batch,
    BatchHint,
    Claim,
    Code,
    Commit,
    FingerprintValue,
    Grant,
    LinkCall,
    Message,
    Nack,
    Received,
    Revoke,
)
from pdtransport.settings import Settings
from pdtransport.transfer.audit import Audit
from pdtransport.transfer.consumer import ConsumerDriver
from pdtransport.transfer.control import Control
from pdtransport.transfer.link_setup import Scratch
from pdtransport.transfer.peers import Peers
from pdtransport.transfer.producer import ProducerDriver
from pdtransport.transfer.timeline import Timeline

logger = logging.getLogger(__name__)

MAX_STATUS_RECORDS = 256  # transfers in one status reply: it must fit a control frame


class TransferEngine:
    """The work of a transport's I/O thread. Implements :class:`pdtransport.io.reactor.Work`.

    Args:
        clock: monotonic seconds, the same as ``now`` in :meth:`turn`.
        wall: wall-clock seconds, for the timelines.
    """

    def __init__(
        self,
        settings: Settings,
        me: Identity,
        groups: CacheGroups,
        control: Control,
        links: dict[str, Link],
        unavailable: dict[str, str],
        role: str,
        scratch: Scratch,
        cuda_events: CudaEventQueue,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._me = me
        self.cuda_events = cuda_events
        self._role = role
        self._links = links
        self._clock = clock
        self._started_at = clock()
        self.patches: list[PatchStatus] = []  # for the status; replaced as a whole, by any thread
        self._counters: Counter[str] = Counter()
        self._timeline = Timeline(settings.observe.recent_transfers, wall)
        self._control = control
        self._peers = Peers(control, links, unavailable, settings.links, scratch, clock)
        audit_dir = settings.observe.audit_dir
        self._audit = Audit(audit_dir, me.engine, me.rank, groups) if audit_dir else None
        limits = limits_of(settings, groups.device)
        common = (control, self._peers, self._timeline, self._counters, self._audit, clock)
        self.producer = ProducerDriver(limits, groups, *common)
        self.consumer = ConsumerDriver(limits, groups, me, *common)

    # -- reactor.Work --------------------------------------------------------------------------------------------

    def sockets(self) -> list[zmq.Socket[bytes]]:
        return self._control.sockets()

    def descriptors(self) -> list[int]:
        links = [fd for fd in (link.fileno() for link in self._links.values()) if fd >= 0]
        return links + self.cuda_events.descriptors()

    def turn(self, now: float) -> bool:
        events = self._control.receive(now)
        for event in events:
            self._on_event(event, now)
        busy = bool(events)
        busy = self.cuda_events.run() or busy
        for link in self._links.values():
            busy = link.progress() or busy
        busy = self.producer.push_some() or busy
        for event in self._control.tick(now):
            self._on_event(event, now)
        self._peers.tick(now)
        self.producer.tick(now)
        self.consumer.tick(now)
        return busy

    def arm(self) -> bool:
        return all(link.arm() for link in self._links.values())

    def next_deadline(self) -> float | None:
        times = (
            self._control.next_deadline(),
            self._peers.next_deadline(),
            self.producer.sending.next_deadline(),
            self.consumer.receiving.next_deadline(),
        )
        return min((t for t in times if t is not None), default=None)

    def close(self) -> None:
        self.cuda_events.flush()
        self._peers.close()
        for link in self._links.values():
            link.close()
        self._control.close()
        self.cuda_events.close()
        for half in (self.producer, self.consumer):
            half.end_all(Code.CANCELLED, "the transport was closed")
        if self._audit is not None:
            self._audit.close()

    # -- events --------------------------------------------------------------------------------------------------

    def _on_event(self, event: Event, now: float) -> None:
        if isinstance(event, MessageReceived):
            self._on_message(event.peer, event.message, now)
        elif isinstance(event, PeerUp):
            self._peers.up(event)
        elif isinstance(event, PeerDown):
            level = logging.WARNING if self._peers.linked(event.peer) else logging.INFO
            logger.log(level, "peer %s is gone: %s", event.peer, event.reason)
            self._counters["peers_lost"] += 1
            self._peers.down(event.peer, event.reason, ended=event.ended)
            self.producer.peer_lost(event.peer, event.reason)
            self.consumer.peer_lost(event.peer, event.reason)
        elif isinstance(event, ConnectFailed):
            self.consumer.limiter.warn(f"no connection to {event.host}:{event.port}: {event.reason}", now=now)
            self._counters["connects_failed"] += 1
            self._peers.connect_failed((event.host, event.port), event.reason, event.refused)
        elif isinstance(event, StatusRequested):
            event.reply(json.dumps(self.status(event.transfer)))

    def _on_message(self, peer: PeerId, message: Message, now: float) -> None:
        if isinstance(message, (Claim, Grant, Received, Nack, Ack, Revoke)):
            self.producer.on_message(peer, message, now)
        elif isinstance(message, (Accept, Batch, Commit, Abort)):
            self.consumer.on_message(peer, message, now)
        elif isinstance(message, BatchHint):
            self.consumer.coming(peer, message)
        elif isinstance(message, LinkCall):
            self._peers.link_call(peer, message)

    # -- changes of the fingerprint ----------------------------------------------------------------------------------

    def change_fingerprint(self, facts: Mapping[str, FingerprintValue], reason: str) -> set[str]:
        """Change ``facts`` of the fingerprint: end all transfers as refused and make every peer shake hands again.

        Returns ids of transfers that still use pages.
        """
        self.cuda_events.run()
        ending = self.producer.cancel_all(Code.REFUSED, reason) | self.consumer.cancel_all(Code.REFUSED, reason)
        for event in self._control.change_fingerprint(facts, reason):
            self._on_event(event, self._clock())
        return self.live_of(ending)

    def live_of(self, transfers: set[str]) -> set[str]:
        return self.producer.live_of(transfers) | self.consumer.live_of(transfers)

    # -- status --------------------------------------------------------------------------------------------------

    def status(self, transfer: str = "") -> TransportStatus:
        """Counters, peers with their links, and recent transfers of this worker; JSON values only.

        ``transfer`` limits the timelines to one transfer.
        """
        counters = self._counters + self.producer.sending.counters + self.consumer.receiving.counters
        counters.update({f"control_{name}": count for name, count in self._control.counters.items()})
        return {
            "engine": self._me.engine,
            "rank": self._me.rank,
            "world": self._me.world,
            "role": self._role,
            "incarnation": told_incarnation(self._me.incarnation),
            "uptime_s": self._clock() - self._started_at,
            "counters": dict(counters),
            "live": {**self.producer.live(), **self.consumer.live(), "waiting_for_gpu": self.cuda_events.waiting},
            "fingerprint": dict(self._control.fingerprint),
            "peers": [peer.status() for peer in self._peers],
            "shared_names": [
                {"engine": one.engine, "rank": one.rank, "at": where} for one, where in self._control.shared_names()
            ],
            "transfers": [record.as_dict() for record in self._timeline.records(transfer)[-MAX_STATUS_RECORDS:]],
            "patches": self.patches,
        }


def limits_of(settings: Settings, device: int = HOST) -> Limits:
    """The limits of the state machines, from ``settings``, for KV on ``device``."""
    links, gpu = settings.links, device != HOST
    return Limits(
        **settings.deadlines.model_dump(),
        batch_bytes=links.gpu_batch_bytes if gpu else links.batch_bytes,
        window_bytes=links.gpu_window_bytes if gpu else links.window_bytes,
        max_transfers=settings.max_transfers,
        tombstones=settings.tombstones,
        checksums=settings.integrity.checksum == "full",
    )
