"""A worker's status, as returned by ``Transport.status`` and by a status request on the control channel."""

from __future__ import annotations

from typing import TypedDict


class PeerStatus(TypedDict):
    """One peer, and the link that carries pages to or from it. Rates in bytes per second, None while unknown."""

    engine: str
    rank: int
    host: str
    link: str
    why: str
    bandwidth_bytes_s: float | None
    probe_bytes_s: float | None
    bytes_sent: int
    bytes_received: int
    batches_sent: int
    batches_received: int
    link_errors: int


class SharedName(TypedDict):
    """A name that several live peers use, and their addresses."""

    engine: str
    rank: int
    at: list[str]


class TransferStatus(TypedDict):
    """One transfer. ``events`` maps a step to the wall-clock second at which it happened."""

    transfer: str
    role: str
    peer: str
    state: str
    code: str
    reason: str
    blocks: int
    skipped_blocks: int
    bytes: int
    link: str
    events: dict[str, float]


class PatchStatus(TypedDict):
    """One hook of the engine's adapter into the engine's own code.

    ``state``: active, off (by its setting), failed (the engine is not as expected), or unneeded. ``why``: empty if
    active.
    """

    name: str
    state: str
    why: str


class TransportStatus(TypedDict):
    """One worker.

    ``live`` counts what is in flight now, ``counters`` what happened since the start; ``fingerprint`` holds the facts
    that peers must agree on; ``incarnation`` tells two runs of a worker apart; ``patches`` is empty if no engine's
    adapter opened the transport.
    """

    engine: str
    rank: int
    world: int
    role: str
    incarnation: int
    uptime_s: float
    counters: dict[str, int]
    live: dict[str, int]
    fingerprint: dict[str, str | int | bool]
    peers: list[PeerStatus]
    shared_names: list[SharedName]
    transfers: list[TransferStatus]
    patches: list[PatchStatus]
