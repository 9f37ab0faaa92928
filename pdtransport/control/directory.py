"""The directory of peers: which are up, and over which connections. Pure: facts and times are passed in.

A *peer* is one run of one worker process; a *route* is one connection over which it can be reached. Invariant: a peer
is up from its first compatible handshake until its last route is given up.

A peer is identified by its incarnation, which only its peers know; engine and rank are just its name. Peers of the same
name never affect each other: a worker that restarted is served at once, while its former run ends like any lost peer.
Several live peers of one name are all served, and a warning is logged and sent to each.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from pdtransport.control import handshake
from pdtransport.control.events import Address, Event, NameShared, PeerDown, PeerId, PeerUp
from pdtransport.control.limits import (
    MAX_BREAKS,
    MAX_PEERS,
    MAX_ROUTES_PER_PEER,
    MAX_SHARED_NAMES,
    SHARED_NAME_AFTER_S,
    SHARED_NAME_AGAIN_S,
)
from pdtransport.kv.fingerprint import plain
from pdtransport.protocol.messages import MAX_REASON, Hello, Refused, Welcome, encode

NAME = "name"  # field of a refusal that is only a warning: another live process uses the receiver's name


class Sent(Enum):
    """Result of sending a frame."""

    OK = "ok"
    FULL = "full"  # the connection's queue is full
    GONE = "gone"  # the connection is down


class Route:
    """One connection. It belongs to ``peer`` from the handshake until :meth:`unbind`."""

    inbound = False
    key = ""  # the CURVE key at the other end
    where = ""  # the other end, for logs
    peer: PeerId | None = None
    last_heard = 0.0
    broken_until: float | None = None  # set if TCP is down: the peer must be back by then

    def send(self, frame: bytes) -> Sent:
        raise NotImplementedError

    def unbind(self, *, silent: bool) -> None:
        """The peer was given up, or replaced on this connection. ``silent``: it was given up for its silence."""
        raise NotImplementedError


@dataclass
class Peer:
    """A worker process that is up."""

    id: PeerId
    since: float = 0.0
    routes: list[Route] = field(default_factory=list)
    endpoints: set[Address] = field(default_factory=set)

    @property
    def where(self) -> str:
        return self.routes[0].where if self.routes else "nowhere"

    def heard_after(self, moment: float) -> bool:
        return any(route.last_heard > moment for route in self.routes)


_Name = tuple[str, int]  # engine and rank


@dataclass
class _Shared:
    """A name that several processes have used; the latest one since ``since``."""

    since: float
    again_at: float = 0.0  # no further warning before this
    lives: tuple[PeerId, ...] = ()  # peers of this name that sent something a while after `since`, so they are alive


@dataclass
class _Breaks:
    """How often we gave up a peer (``ours``), and how often it gave us up (``theirs``)."""

    ours: int = 0
    theirs: int = 0


class Directory:
    def __init__(self, liveness_s: float, counters: Counter[str]) -> None:
        self._liveness_s = liveness_s
        self._counters = counters
        self._peers: dict[PeerId, Peer] = {}
        self._shared: OrderedDict[_Name, _Shared] = OrderedDict()  # names that several processes have used
        self._breaks: OrderedDict[PeerId, _Breaks] = OrderedDict()

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def __len__(self) -> int:
        return len(self._peers)

    # -- handshakes ----------------------------------------------------------------------------------------------

    def refusal(self, theirs: Hello | Welcome, key: str = "") -> Refused | None:
        """Why a compatible peer can't be admitted over a connection with CURVE key ``key``; None if it can."""
        peer_id = handshake.peer_of(theirs)
        name = handshake.shown(peer_id.engine, peer_id.rank)
        peer = self._peers.get(peer_id)
        if peer is not None and any(route.key != key for route in peer.routes):
            return handshake.refusal("incarnation", reason=f"{name} connected with a different CURVE key than before")
        if peer is None and len(self._peers) >= MAX_PEERS and not self._broken_of(peer_id):
            return handshake.refusal("peers", reason=f"{name} exceeds the maximum of {MAX_PEERS} peers")
        return None

    def our_breaks(self, peer_id: PeerId | None) -> int:
        """How often we have given up this peer."""
        known = self._breaks.get(peer_id) if peer_id is not None else None
        return known.ours if known else 0

    def admit(
        self, theirs: Hello | Welcome, host: str, route: Route, endpoint: Address | None, now: float
    ) -> list[Event]:
        """A compatible handshake arrived over ``route``: add the route to its peer, which is up from now on.

        ``endpoint`` is the address that we connected to; None if the peer connected to us.
        """
        peer_id = handshake.peer_of(theirs)
        events: list[Event] = []
        if route.peer is not None and route.peer != peer_id:
            events += self.leave(route, "its connection now belongs to another worker")
        events += self._heed_breaks(peer_id, handshake.breaks_of(theirs))
        peer = self._peers.get(peer_id)
        is_new = peer is None
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                events += self._make_room(peer_id)
            self._note_name(peer_id, now)
            peer = self._peers[peer_id] = Peer(peer_id, now)
        self._attach(peer, route, now)
        if is_new or (endpoint is not None and endpoint not in peer.endpoints):
            events.append(PeerUp(peer_id, host, handshake.without_breaks(theirs), endpoint))
        if endpoint is not None:
            peer.endpoints.add(endpoint)
        return events

    def _others_of(self, peer_id: PeerId) -> list[Peer]:
        """Other peers of the same name."""
        name = (peer_id.engine, peer_id.rank)
        return [each for each in self._peers.values() if (each.id.engine, each.id.rank) == name and each.id != peer_id]

    def _broken_of(self, peer_id: PeerId) -> list[Peer]:
        """Other peers of the same name of which every connection is broken."""
        return [
            each for each in self._others_of(peer_id) if all(route.broken_until is not None for route in each.routes)
        ]

    def _make_room(self, peer_id: PeerId) -> list[Event]:
        """The directory is full: drop the broken peers of this name, so that a restarted worker gets its place."""
        return [event for each in self._broken_of(peer_id) for event in self._down(each.id, "restarted")]

    def _heed_breaks(self, peer_id: PeerId, theirs: int) -> list[Event]:
        """If the peer has given us up since the last handshake, drop our state of it: the peer has dropped its own."""
        known = self._breaks_with(peer_id)
        if theirs <= known.theirs:
            return []
        known.theirs = theirs
        return self._down(peer_id, "it had given us up, and starts a new session", ended=False)

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
        # A broken connection that the peer opened never comes back as the same route; one that we opened may.
        peer.routes = [each for each in peer.routes if not (each.inbound and each.broken_until is not None)]
        if route not in peer.routes:
            peer.routes.append(route)
        while len(peer.routes) > MAX_ROUTES_PER_PEER:
            oldest = min((each for each in peer.routes if each is not route), key=lambda each: each.last_heard)
            peer.routes.remove(oldest)
            oldest.unbind(silent=False)

    # -- giving up -----------------------------------------------------------------------------------------------

    def leave(self, route: Route, reason: str) -> list[Event]:
        """Give up one connection; the peer goes down with its last one."""
        peer = self._peers.get(route.peer) if route.peer is not None else None
        if peer is None:
            return []
        self._detach(peer, route, silent=False)
        return [] if peer.routes else self._give_up(peer.id, reason)

    def give_up_all(self, reason: str) -> list[Event]:
        """Give up all peers: each must shake hands again, since our facts have changed."""
        return [event for peer in self for event in self._give_up(peer.id, reason, ended=False)]

    def tick(self, now: float) -> list[Event]:
        """Give up connections that were silent or broken for too long."""
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
        return events + self._look_at_names(now)

    def next_deadline(self) -> float | None:
        return min((self._limit(route) for peer in self._peers.values() for route in peer.routes), default=None)

    # -- names ---------------------------------------------------------------------------------------------------

    @property
    def shared_names(self) -> list[tuple[Peer, ...]]:
        """Groups of live peers that use the same name."""
        return [
            tuple(self._peers[one] for one in shared.lives) for shared in self._shared.values() if len(shared.lives) > 1
        ]

    def _note_name(self, peer_id: PeerId, now: float) -> None:
        name = (peer_id.engine, peer_id.rank)
        if not self._others_of(peer_id):
            return
        shared = self._shared.setdefault(name, _Shared(now))
        shared.since = now
        self._shared.move_to_end(name)
        while len(self._shared) > MAX_SHARED_NAMES:
            self._shared.popitem(last=False)

    def _look_at_names(self, now: float) -> list[Event]:
        """Find names that several live peers use, and warn about each now and then.

        A peer that sends something ``SHARED_NAME_AFTER_S`` after another one took its name is not left over from a
        restart: both are alive.
        """
        events: list[Event] = []
        for name, shared in list(self._shared.items()):
            same = [each for each in self._peers.values() if (each.id.engine, each.id.rank) == name]
            if len(same) < 2:
                shared.lives = ()
                if now >= shared.again_at:
                    del self._shared[name]
                continue
            lives = tuple(each for each in same if each.heard_after(shared.since + SHARED_NAME_AFTER_S))
            if len(lives) < 2:
                continue
            shared.lives = tuple(each.id for each in lives)
            if now >= shared.again_at:
                shared.again_at = now + SHARED_NAME_AGAIN_S
                events.append(self._complain(lives))
        return events

    def _complain(self, lives: tuple[Peer, ...]) -> NameShared:
        """Warn about peers of one name, and send them the warning: only their own settings can fix it."""
        self._counters["names_shared"] += 1
        first = lives[0].id
        reason = plain(
            f"{len(lives)} live processes call themselves {handshake.shown(first.engine, first.rank)}: "
            f"{', '.join(each.where for each in lives[:4])}; all are served; give each instance its own engine_id",
            MAX_REASON,
        )
        frame = encode(handshake.refusal(NAME, reason=reason))
        for each in lives:
            self.send(each.id, frame)
        return NameShared(tuple(each.id for each in lives), reason)

    def forgive(self, gap: float, now: float) -> None:
        """This process was paused for ``gap`` seconds: don't count them as silence of the peers."""
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
        """Take a peer down on our own decision, and count that: the next handshake informs the peer."""
        self._breaks_with(peer_id).ours += 1
        return self._down(peer_id, reason, ended=ended)

    def _down(self, peer_id: PeerId, reason: str, *, ended: bool = True) -> list[Event]:
        peer = self._peers.pop(peer_id, None)
        if peer is None:
            return []
        for shared in self._shared.values():
            shared.lives = tuple(one for one in shared.lives if one != peer_id)
        for route in list(peer.routes):
            self._detach(peer, route, silent=False)
        return [PeerDown(peer_id, reason, ended)]

    # -- sending -------------------------------------------------------------------------------------------------

    def send(self, peer_id: PeerId, frame: bytes) -> bool:
        """Send ``frame`` over the peer's first connection that is up; False if there is none, or its queue is full."""
        peer = self._peers.get(peer_id)
        if peer is None:
            return False
        for route in list(peer.routes):
            if route.broken_until is None:
                sent = route.send(frame)
                if sent is not Sent.GONE:
                    return sent is Sent.OK
        return False
