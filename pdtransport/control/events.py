"""Identities, peers and events of the control channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from pdtransport.protocol.messages import FingerprintValue, Hello, Message, Welcome


class Address(NamedTuple):
    """Address of a listening control channel, as the connecting side gives it (a name is not resolved)."""

    host: str
    port: int


@dataclass(frozen=True)
class Identity:
    """This worker's identity. ``incarnation`` is new with every start of the process; ``links`` maps a link's name to
    what a peer needs to connect over it."""

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
    """A compatible peer is up.

    Reported once per peer, and again for each endpoint passed to ``connect`` that leads to a peer that is up already
    (it may have connected to us before).

    ``host`` is the peer's host as seen from here; ``endpoint`` is the one passed to ``connect``, None if the peer
    connected to us.
    """

    peer: PeerId
    host: str
    hello: Hello | Welcome
    endpoint: tuple[str, int] | None


@dataclass(frozen=True)
class PeerDown:
    """The peer is lost or was given up; ``reason`` is one line. It may come up again, with new state.

    ``ended``: its process or connection is known to have ended; if False, the process may only be paused.
    """

    peer: PeerId
    reason: str
    ended: bool = True


@dataclass(frozen=True)
class NameShared:
    """Several live processes use the same name; ``reason`` is one line with their addresses and the remedy.

    All of them are served: a peer is a process, its name is only for display.
    """

    peers: tuple[PeerId, ...]
    reason: str


@dataclass(frozen=True)
class ConnectFailed:
    """A connection failed: ``refused`` (``field`` names why) or unanswered.

    At most one per call of ``connect``; the channel keeps trying in the background for a while.
    """

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
    """A client asks for the status. Call ``reply`` with its JSON text, at any later time or never."""

    reply: Callable[[str], None]
    transfer: str


Event = PeerUp | PeerDown | NameShared | ConnectFailed | MessageReceived | StatusRequested
