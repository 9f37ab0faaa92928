"""What the control channel is told and what it tells: identities, peers, events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from pdtransport.protocol.messages import FingerprintValue, Hello, Message, Welcome


class Address(NamedTuple):
    """Where a control channel listens, as the one who connects to it says it."""

    host: str
    port: int


@dataclass(frozen=True)
class Identity:
    """Who we are. ``incarnation`` is new with every start of the process; ``links`` maps a link's name to what a
    peer needs to reach us over it."""

    engine: str
    rank: int
    world: int
    incarnation: int
    fingerprint: dict[str, FingerprintValue] = field(default_factory=dict)
    links: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class PeerId:
    """One run of one worker process."""

    engine: str
    rank: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.engine} rank {self.rank}"


@dataclass(frozen=True)
class PeerUp:
    """A peer is there and compatible. Reported once per peer, and once more for each endpoint that we connected to
    and that turns out to lead to a peer we know already (it may have connected to us before).

    ``host`` is where it is seen from here; ``endpoint`` is the one passed to ``connect``, None if it connected to us.
    """

    peer: PeerId
    host: str
    hello: Hello | Welcome
    endpoint: tuple[str, int] | None


@dataclass(frozen=True)
class PeerDown:
    """The peer is gone, or given up; ``reason`` is one line. It may come up again, then with new state. ``ended``: its
    process, or what connects us, is known to have ended; else it may only stand still."""

    peer: PeerId
    reason: str
    ended: bool = True


@dataclass(frozen=True)
class NameShared:
    """Several live processes call themselves alike; ``reason`` is one line with where each is and what to do. All of
    them are served: a peer is a process, and its name is for people."""

    peers: tuple[PeerId, ...]
    reason: str


@dataclass(frozen=True)
class ConnectFailed:
    """A wished-for connection did not come about: ``refused`` by the handshake (``field`` names what differs), or
    unanswered. Once per call of ``connect``; the channel goes on trying in the background for a while."""

    host: str
    port: int
    reason: str
    field: str = ""
    refused: bool = False


@dataclass(frozen=True)
class MessageReceived:
    """A message about a transfer or a link, from a peer that is up."""

    peer: PeerId
    message: Message


@dataclass(frozen=True)
class StatusRequested:
    """Someone wants the status; call ``reply`` with its JSON text, or never."""

    reply: Callable[[str], None]
    transfer: str


Event = PeerUp | PeerDown | NameShared | ConnectFailed | MessageReceived | StatusRequested
