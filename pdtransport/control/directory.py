"""Who is up, and over which connections. No sockets and no clock here: facts and times are passed in.

A *peer* is one run of one worker process; a *route* is one connection over which it can be reached. A peer is up from
its first compatible handshake until its last route is given up.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from pdtransport.control import handshake
from pdtransport.control.events import Endpoint, Event, PeerDown, PeerId, PeerUp
from pdtransport.control.limits import MAX_BREAKS, MAX_BURIED, MAX_PEERS, MAX_ROUTES_PER_PEER
from pdtransport.protocol.messages import Hello, Refused, Welcome


class Sent(Enum):
    """What became of a frame."""

    OK = "ok"
    FULL = "full"  # the connection's queue is full
    GONE = "gone"  # the connection does not stand


class Route:
    """One connection. It belongs to ``peer`` between handshake and :meth:`unbind`."""

    inbound = False
    peer: PeerId | None = None
    last_heard = 0.0
    broken_until: float | None = None  # set: TCP is down; the peer has until then to come back

    def send(self, frame: bytes) -> Sent:
        raise NotImplementedError

    def unbind(self, *, silent: bool) -> None:
        """The peer was given up, or replaced on this connection; ``silent``: because it said nothing."""
        raise NotImplementedError


@dataclass
class Peer:
    """A worker process that is up."""

    id: PeerId
    routes: list[Route] = field(default_factory=list)
    endpoints: set[Endpoint] = field(default_factory=set)


@dataclass
class _Breaks:
    """How often the two sides have given each other up."""

    ours: int = 0
    theirs: int = 0


class Directory:
    def __init__(self, liveness_s: float, counters: Counter[str]) -> None:
        self._liveness_s = liveness_s
        self._counters = counters
        self._peers: dict[PeerId, Peer] = {}
        self._current: dict[tuple[str, int], PeerId] = {}
        self._buried: OrderedDict[PeerId, None] = OrderedDict()
        self._breaks: OrderedDict[PeerId, _Breaks] = OrderedDict()

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def __len__(self) -> int:
        return len(self._peers)

    # -- handshakes ----------------------------------------------------------------------------------------------

    def refusal(self, theirs: Hello | Welcome) -> Refused | None:
        """Why there is no place for a peer that is compatible otherwise; None if there is."""
        peer_id = handshake.peer_of(theirs)
        name = handshake.shown(peer_id.engine, peer_id.rank)
        if peer_id in self._buried:
            return handshake.refusal(
                "incarnation",
                reason=f"a newer process has taken the place of {name}: give each instance its own engine_id",
            )
        if len(self._peers) >= MAX_PEERS and (peer_id.engine, peer_id.rank) not in self._current:
            return handshake.refusal("peers", reason=f"{MAX_PEERS} peers are up here already, {name} is one too many")
        return None

    def our_breaks(self, peer_id: PeerId | None) -> int:
        """How often we have given this peer up."""
        known = self._breaks.get(peer_id) if peer_id is not None else None
        return known.ours if known else 0

    def admit(
        self, theirs: Hello | Welcome, host: str, route: Route, endpoint: Endpoint | None, now: float
    ) -> list[Event]:
        """A compatible handshake arrived over ``route``."""
        peer_id = handshake.peer_of(theirs)
        events = self._replace_older(peer_id)
        if route.peer is not None and route.peer != peer_id:
            events += self.leave(route, "its connection now belongs to another worker")
        events += self._heed_breaks(peer_id, handshake.breaks_of(theirs))
        peer = self._peers.get(peer_id)
        is_new = peer is None
        if peer is None:
            peer = self._peers[peer_id] = Peer(peer_id)
            self._current[peer_id.engine, peer_id.rank] = peer_id
        self._attach(peer, route, now)
        if is_new or (endpoint is not None and endpoint not in peer.endpoints):
            events.append(PeerUp(peer_id, host, handshake.without_breaks(theirs), endpoint))
        if endpoint is not None:
            peer.endpoints.add(endpoint)
        return events

    def _replace_older(self, peer_id: PeerId) -> list[Event]:
        current = self._current.get((peer_id.engine, peer_id.rank))
        if current is None or current == peer_id:
            return []
        self._buried[current] = None
        while len(self._buried) > MAX_BURIED:
            self._buried.popitem(last=False)
        return self._down(current, "restarted")

    def _heed_breaks(self, peer_id: PeerId, theirs: int) -> list[Event]:
        """They have given us up since: what we keep of them is void over there."""
        known = self._breaks_with(peer_id)
        if theirs <= known.theirs:
            return []
        known.theirs = theirs
        return self._down(peer_id, "it had given us up, and starts afresh", ended=False)

    def _breaks_with(self, peer_id: PeerId) -> _Breaks:
        known = self._breaks.setdefault(peer_id, _Breaks())
        self._breaks.move_to_end(peer_id)
        while len(self._breaks) > MAX_BREAKS:
            self._breaks.popitem(last=False)
        return known

    def _attach(self, peer: Peer, route: Route, now: float) -> None:
        if any(each.broken_until is not None for each in peer.routes):
            self._counters["reconnects"] += 1
        route.peer, route.last_heard, route.broken_until = peer.id, now, None
        # Connections that they opened never come back under the same name; those that we opened may.
        peer.routes = [each for each in peer.routes if not (each.inbound and each.broken_until is not None)]
        if route not in peer.routes:
            peer.routes.append(route)
        while len(peer.routes) > MAX_ROUTES_PER_PEER:
            oldest = min((each for each in peer.routes if each is not route), key=lambda each: each.last_heard)
            peer.routes.remove(oldest)
            oldest.unbind(silent=False)

    # -- partings ------------------------------------------------------------------------------------------------

    def leave(self, route: Route, reason: str) -> list[Event]:
        """Give up one connection; the peer is down if it was the last."""
        peer = self._peers.get(route.peer) if route.peer is not None else None
        if peer is None:
            return []
        self._detach(peer, route, silent=False)
        return [] if peer.routes else self._give_up(peer.id, reason)

    def give_up_all(self, reason: str) -> list[Event]:
        """What we told all peers of ourselves holds no more: each must shake hands anew."""
        return [event for peer in self for event in self._give_up(peer.id, reason, ended=False)]

    def tick(self, now: float) -> list[Event]:
        """Give up connections that were silent, or broken, for too long."""
        events: list[Event] = []
        for peer in self:
            reason, silent = "", False
            for route in list(peer.routes):
                if now < self._limit(route):
                    continue
                silent = route.broken_until is None
                reason = f"silent for {self._liveness_s:g} s" if silent else "connection lost"
                self._detach(peer, route, silent=silent)
            if not peer.routes:
                events += self._give_up(peer.id, reason, ended=not silent)
        return events

    def next_deadline(self) -> float | None:
        return min((self._limit(route) for peer in self._peers.values() for route in peer.routes), default=None)

    def forgive(self, gap: float, now: float) -> None:
        """This process itself stood still for ``gap`` seconds: nobody was silent meanwhile."""
        for peer in self:
            for route in peer.routes:
                route.last_heard = min(now, route.last_heard + gap)
                if route.broken_until is not None:
                    route.broken_until += gap

    def _limit(self, route: Route) -> float:
        return route.last_heard + self._liveness_s if route.broken_until is None else route.broken_until

    def _detach(self, peer: Peer, route: Route, *, silent: bool) -> None:
        if route in peer.routes:
            peer.routes.remove(route)
        route.peer, route.broken_until = None, None
        route.unbind(silent=silent)

    def _give_up(self, peer_id: PeerId, reason: str, *, ended: bool = True) -> list[Event]:
        """Down by our own judgement: they must be told when they come back."""
        self._breaks_with(peer_id).ours += 1
        return self._down(peer_id, reason, ended=ended)

    def _down(self, peer_id: PeerId, reason: str, *, ended: bool = True) -> list[Event]:
        peer = self._peers.pop(peer_id, None)
        if peer is None:
            return []
        self._current.pop((peer_id.engine, peer_id.rank), None)
        for route in list(peer.routes):
            self._detach(peer, route, silent=False)
        return [PeerDown(peer_id, reason, ended)]

    # -- words ---------------------------------------------------------------------------------------------------

    def send(self, peer_id: PeerId, frame: bytes) -> bool:
        """Hand ``frame`` to the first connection of the peer that stands; False if there is none, or it is full."""
        peer = self._peers.get(peer_id)
        if peer is None:
            return False
        for route in list(peer.routes):
            if route.broken_until is None:
                sent = route.send(frame)
                if sent is not Sent.GONE:
                    return sent is Sent.OK
        return False
