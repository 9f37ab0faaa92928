"""The peers of one worker, and the link that carries pages to or from each of them.

The receiver of pages chooses the link: it offers its links in order of preference, and the sender confirms or declines
each. The receiver measures a confirmed link (:mod:`link_setup`) before it receives pages over that link.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
from pydantic import BaseModel, ConfigDict, Field

from pdtransport.control.channel import PeerId, PeerUp
from pdtransport.errors import LinkError, LinkUnavailable
from pdtransport.links.base import Channel, Link
from pdtransport.links.negotiate import choose
from pdtransport.observe.status import PeerStatus
from pdtransport.protocol.messages import Code, LinkCall
from pdtransport.settings import LinkSettings
from pdtransport.transfer.control import Control
from pdtransport.transfer.link_setup import Answering, Asking, Scratch

logger = logging.getLogger(__name__)

Endpoint = tuple[str, int]
# Called with (peer, None) once the peer can send us pages, or with (None, (code, reason)) if it can't.
OnPeer = Callable[["TransferPeer | None", "tuple[Code, str] | None"], None]

MAX_WAITERS = 1 << 14  # transfers that wait for one peer to come up
MAX_WHY = 400  # characters
REFUSED_S = 2.0  # if no link reached a peer, its links are tried again after this time: the cause may be gone
ANSWER_S = 5.0  # a sender that does not answer within this time counts as unable to use the link


class _Words(BaseModel):
    """Link setup message, the body of a :class:`LinkCall`.

    ``op`` of the receiver: ``use`` (can you use this link?), ``probe`` (offer me a scratch batch of ``nbytes``),
    ``probed`` (measurement over). ``op`` of the sender: ``ok`` or ``no`` in answer to ``use``, ``offer`` in answer to
    ``probe``; ``why`` is set if the answer is negative.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    op: str = Field("", max_length=16)
    why: str = Field("", max_length=MAX_WHY)
    nbytes: int = Field(0, ge=0, lt=1 << 40)
    key: int = Field(0, ge=0, lt=1 << 56)
    offer: bytes = Field(b"", max_length=1 << 16)


@dataclass
class TransferPeer:
    """One live worker process that we exchange pages with, and the state of its link setup."""

    id: PeerId
    host: str
    world: int
    exports: dict[str, bytes]
    inbound: Channel | None = None  # receives pages from the peer
    outbound: Channel | None = None  # sends pages to the peer
    excluded: dict[str, str] = field(default_factory=dict)  # links that failed with this peer -> why
    offered: Channel | None = None  # chosen by us as the receiver; not yet confirmed and measured
    answer_by: float = float("inf")
    asking: Asking | None = None  # measures `offered`
    answering: Answering | None = None  # the peer, as the receiver, measures `outbound`
    answering_until: float = float("inf")
    measured: float | None = None  # bytes per second, as measured for `inbound`
    refused: tuple[Code, str] | None = None
    refused_until: float = 0.0

    def channels(self) -> list[Channel]:
        """The peer's channels; one that serves both directions is listed once."""
        unique = {id(c): c for c in (self.inbound, self.outbound, self.offered) if c is not None}
        return list(unique.values())

    def status(self) -> PeerStatus:
        channel = self.inbound or self.outbound
        stats = channel.stats if channel else None
        return {
            "engine": self.id.engine,
            "rank": self.id.rank,
            "host": self.host,
            "link": channel.link if channel else "",
            "why": channel.why if channel else (self.refused[1] if self.refused else "no link chosen yet"),
            "bandwidth_bytes_s": (stats.bandwidth if stats else None) or self.measured,
            "probe_bytes_s": self.measured,
            "bytes_sent": stats.bytes_sent if stats else 0,
            "bytes_received": stats.bytes_received if stats else 0,
            "batches_sent": stats.batches_sent if stats else 0,
            "batches_received": stats.batches_received if stats else 0,
            "link_errors": stats.errors if stats else 0,
        }


class Peers:
    """Connects to peers, sets up a link to each and keeps track of them. Runs in the I/O thread."""

    def __init__(
        self,
        control: Control,
        links: dict[str, Link],
        unavailable: dict[str, str],
        settings: LinkSettings,
        scratch: Scratch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._control = control
        self._links = links
        self._unavailable = unavailable
        self._settings = settings
        self._scratch = scratch
        self._clock = clock
        self._peers: dict[PeerId, TransferPeer] = {}
        self._by_endpoint: dict[Endpoint, PeerId] = {}
        self._waiting: dict[Endpoint, list[OnPeer]] = {}

    def __iter__(self) -> Any:
        return iter(self._peers.values())

    def get(self, peer: PeerId) -> TransferPeer | None:
        return self._peers.get(peer)

    def linked(self, peer: PeerId) -> bool:
        """Whether there is a channel to ``peer``, so that pages may have been sent or received."""
        known = self._peers.get(peer)
        return known is not None and bool(known.channels())

    def want(self, endpoint: Endpoint, on_peer: OnPeer) -> None:
        """Call ``on_peer`` once the worker at ``endpoint`` can send us pages, or can't."""
        peer = self._peers.get(self._by_endpoint.get(endpoint, PeerId("", -1, 0)))
        if peer is not None and peer.inbound is not None:
            on_peer(peer, None)
        elif peer is not None and peer.refused is not None and self._clock() < peer.refused_until:
            on_peer(None, peer.refused)
        else:
            waiting = self._waiting.setdefault(endpoint, [])
            if len(waiting) >= MAX_WAITERS:
                on_peer(None, (Code.OVERLOADED, f"{MAX_WAITERS} transfers wait for {endpoint[0]}:{endpoint[1]}"))
                return
            waiting.append(on_peer)
            self._control.connect(*endpoint)
            if peer is not None and peer.refused is not None:
                peer.refused = None
                peer.excluded.clear()
                self._offer_next_link(peer)

    # -- events of the control channel ---------------------------------------------------------------------------

    def up(self, event: PeerUp) -> None:
        peer = self._peers.get(event.peer)
        if peer is None:
            peer = TransferPeer(event.peer, event.host, event.hello.world, dict(event.hello.links))
            self._peers[event.peer] = peer
        if event.endpoint is not None:
            self._by_endpoint[event.endpoint] = event.peer
            if peer.inbound is not None:
                self._settle(peer)
            elif peer.offered is None:
                self._offer_next_link(peer)

    def down(self, peer_id: PeerId, reason: str, *, ended: bool = True) -> None:
        peer = self._peers.pop(peer_id, None)
        if peer is None:
            return
        channels = peer.channels()
        # Clear these before closing the channels: closing ends a measurement, whose callback checks `offered`. Besides,
        # transfers that still wait for other peers hold this object and must see that its channels are gone.
        peer.inbound = peer.outbound = peer.offered = None
        for channel in channels:
            if ended:
                channel.close()
            else:
                channel.give_up()
        for endpoint in [e for e, p in self._by_endpoint.items() if p == peer_id]:
            del self._by_endpoint[endpoint]
            self._fail_waiters(endpoint, (Code.PEER_LOST, reason))

    def connect_failed(self, endpoint: Endpoint, reason: str, refused: bool) -> None:
        self._fail_waiters(endpoint, (Code.REFUSED if refused else Code.PEER_LOST, reason))

    def link_call(self, peer_id: PeerId, call: LinkCall) -> None:
        """Handle a link setup message of the peer. Invalid messages are ignored."""
        peer = self._peers.get(peer_id)
        try:
            words = _Words.model_validate(msgpack.unpackb(call.body, raw=False))
        except Exception:  # noqa: BLE001 - whatever msgpack raises on garbage, or a wrong shape
            return
        if peer is None:
            return
        if words.op == "use":
            self._confirm(peer, call.link)
        elif words.op == "probe":
            self._answer_probe(peer, call.link, words.nbytes)
        elif words.op == "probed":
            self._end_answering(peer)
        elif peer.offered is None or peer.offered.link != call.link:
            return  # the message is about a link that is no longer offered
        elif words.op == "ok" and peer.asking is None:  # otherwise the measurement is already running
            self._measure(peer, peer.offered)
        elif words.op == "no":
            self._exclude(peer, call.link, f"the sender can't use it: {words.why}")
            self._offer_next_link(peer)
        elif words.op == "offer" and peer.asking is not None:
            peer.asking.offered(words.key, words.offer, words.why)

    def tick(self, now: float) -> None:
        for peer in [p for p in self._peers.values() if p.offered is not None and now >= p.answer_by]:
            assert peer.offered is not None
            self._exclude(peer, peer.offered.link, f"the sender did not answer for {ANSWER_S} s")
            self._offer_next_link(peer)
        for peer in [p for p in self._peers.values() if now >= p.answering_until]:
            self._end_answering(peer)  # `probed` never came, or another `probe` came after it

    def next_deadline(self) -> float | None:
        times = [p.answer_by for p in self._peers.values() if p.offered is not None]
        times += [p.answering_until for p in self._peers.values() if p.answering is not None]
        return min(times, default=None)

    def close(self) -> None:
        for peer in list(self._peers.values()):
            for channel in peer.channels():
                channel.close()
        self._peers.clear()

    # -- choosing a link -----------------------------------------------------------------------------------------

    def _offer_next_link(self, peer: TransferPeer) -> None:
        """As the receiver: open our end of the best remaining link and ask the sender to use it."""
        links = {name: link for name, link in self._links.items() if name not in peer.excluded}
        if peer.outbound is not None and peer.outbound.link in links:
            channel = peer.outbound  # one channel serves both directions
            try:
                channel.attach()
            except LinkUnavailable as error:
                self._exclude(peer, channel.link, str(error))
                self._offer_next_link(peer)
                return
        else:
            try:
                channel = choose(
                    links,
                    {**self._unavailable, **peer.excluded},
                    self._settings.order,
                    self._settings.require,
                    peer.exports,
                    peer.host,
                )
            except LinkUnavailable as error:
                peer.refused, peer.refused_until = (Code.REFUSED, str(error)), self._clock() + REFUSED_S
                logger.error("no link to %s rank %d: %s", peer.id.engine, peer.id.rank, error)
                self._settle(peer)
                return
        peer.offered, peer.answer_by = channel, self._clock() + ANSWER_S
        self._say(peer, channel.link, "use")

    def _confirm(self, peer: TransferPeer, name: str) -> None:
        """As the sender: open our end of the link that the receiver chose."""
        if peer.outbound is not None and peer.outbound.link == name:
            self._say(peer, name, "ok")
            return
        link = self._links.get(name)
        if link is None:
            self._say(peer, name, "no", self._unavailable.get(name, "it is not in links.order here"))
            return
        existing = next((c for c in (peer.inbound, peer.offered) if c is not None and c.link == name), None)
        self._end_answering(peer)  # a measurement of the previous link
        try:
            peer.outbound = existing or link.connect(peer.exports.get(name, b""), peer.host)
        except LinkUnavailable as error:
            self._say(peer, name, "no", str(error))
            return
        logger.info("pages to %s rank %d go over %s (%s)", peer.id.engine, peer.id.rank, name, peer.outbound.why)
        self._say(peer, name, "ok")

    # -- measuring it --------------------------------------------------------------------------------------------

    def _measure(self, peer: TransferPeer, channel: Channel) -> None:
        """As the receiver: time a few scratch batches before the first page."""
        if self._scratch.nbytes == 0:
            self._open(peer, channel, None, "links.probe_bytes is 0")
            return

        def ask(nbytes: int) -> None:
            if peer.offered is not channel:
                return  # given up meanwhile
            peer.answer_by = self._clock() + ANSWER_S
            self._say(peer, channel.link, "probe", nbytes=nbytes)

        def done(rate: float | None, why: str) -> None:
            if peer.offered is channel:
                self._say(peer, channel.link, "probed")
                self._open(peer, channel, rate, why)

        peer.asking = Asking(channel, self._scratch, ask, done, self._clock)
        peer.asking.start()

    def _open(self, peer: TransferPeer, channel: Channel, rate: float | None, why: str) -> None:
        """As the receiver: receive pages over ``channel`` from now on, or exclude its link if it is too slow."""
        peer.asking = None
        floor = self._settings.min_bandwidth_bytes_s
        if floor and (rate is None or rate < floor):
            found = f"moves {rate / 1e9:.2f} GB/s" if rate is not None else f"could not be measured ({why})"
            wanted = f"links.min_bandwidth_bytes_s wants {floor / 1e9:.2f} GB/s"
            self._exclude(peer, channel.link, f"{found}, {wanted}")
            self._offer_next_link(peer)
            return
        peer.inbound, peer.offered, peer.measured = channel, None, rate
        speed = f"{rate / 1e9:.2f} GB/s" if rate is not None else f"not measured: {why}"
        logger.info("pages from %s come over %s, %s (%s)", peer.id, channel.link, speed, channel.why)
        self._settle(peer)

    def _answer_probe(self, peer: TransferPeer, link: str, nbytes: int) -> None:
        """As the sender: offer ``nbytes`` of scratch memory."""
        if peer.outbound is None or peer.outbound.link != link or nbytes > self._scratch.nbytes:
            self._say(peer, link, "offer", "links.probe_bytes differs, or the link is not open here")
            return
        if peer.answering is None:
            peer.answering = Answering(peer.outbound, self._scratch)
        peer.answering_until = self._clock() + ANSWER_S
        try:
            key, offer = peer.answering.offer(nbytes)
        except LinkError as error:
            self._say(peer, link, "offer", str(error))
            return
        self._say(peer, link, "offer", key=key, offer=offer)

    @staticmethod
    def _end_answering(peer: TransferPeer) -> None:
        if peer.answering is not None:
            peer.answering.end()
        peer.answering, peer.answering_until = None, float("inf")

    def _exclude(self, peer: TransferPeer, name: str, why: str) -> None:
        peer.excluded[name] = why
        if peer.offered is not None and peer.offered is not peer.outbound:
            peer.offered.close()
        peer.offered = peer.asking = None

    def _say(
        self,
        peer: TransferPeer,
        link: str,
        op: str,
        why: str = "",
        *,
        nbytes: int = 0,
        key: int = 0,
        offer: bytes = b"",
    ) -> None:
        words = _Words(op=op, why=why[:MAX_WHY], nbytes=nbytes, key=key, offer=offer)
        body = msgpack.packb(words.model_dump(exclude_defaults=True))
        self._control.send(peer.id, LinkCall(link=link, body=body))  # if lost, the wait ends after ANSWER_S

    def _settle(self, peer: TransferPeer) -> None:
        for endpoint in [e for e, p in self._by_endpoint.items() if p == peer.id]:
            for on_peer in self._waiting.pop(endpoint, []):
                if peer.refused is not None:
                    on_peer(None, peer.refused)
                else:
                    on_peer(peer, None)

    def _fail_waiters(self, endpoint: Endpoint, why: tuple[Code, str]) -> None:
        for on_peer in self._waiting.pop(endpoint, []):
            on_peer(None, why)
