"""What the machines ask their surroundings to do, and the limits that they are given. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pdtransport.protocol.messages import Batch, Code, Message

# Names one worker process for as long as it lives: any hashable value, opaque here.
Peer = Any


@dataclass(frozen=True)
class Limits:
    """Deadlines in seconds, and bounds; the meaning of each stands in :mod:`pdtransport.settings`."""

    retry_s: float = 0.25
    answer_s: float = 5.0
    arrival_s: float = 15.0
    queue_s: float = 600.0
    stall_s: float = 60.0
    verify_s: float = 10.0
    hold_s: float = 30.0
    claim_s: float = 300.0
    ack_s: float = 30.0
    resends: int = 2
    batch_bytes: int = 4 << 20
    window_bytes: int = 64 << 20
    max_transfers: int = 4096
    tombstones: int = 16384
    checksums: bool = True


@dataclass(frozen=True)
class Send:
    """Send ``message`` to ``peer``; it may get lost."""

    peer: Peer
    message: Message


@dataclass(frozen=True)
class ReadBatch:
    """Consumer: bring ``batch`` into the granted pages and verify it; answer with ``placed``."""

    transfer: str
    peer: Peer
    batch: Batch


@dataclass(frozen=True)
class Fence:
    """Stop all work of this grant; answer with ``fenced`` once nothing of it can write any more."""

    transfer: str
    peer: Peer
    generation: int


@dataclass(frozen=True)
class Ready:
    """Consumer: every page of ``transfer`` is here and verified. Said once; nothing follows.

    ``first_token``: the request goes on from this token, which prefill sampled; None: it samples its own.
    ``cached_tokens``: how many of the prompt's tokens prefill did not have to compute, if it said so.
    """

    transfer: str
    first_token: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True)
class Failed:
    """Consumer: ``transfer`` failed and nothing can write its pages any more. Said once; nothing follows."""

    transfer: str
    code: Code
    reason: str


@dataclass(frozen=True)
class OfferBatch:
    """Producer: stage these blocks on the link; answer with ``pushed`` or ``push_failed``.

    One-sided links write the consumer's ``pages``, and answer once every byte has landed.
    """

    transfer: str
    peer: Peer
    generation: int
    seq: int
    attempt: int
    first_block: int
    blocks: int
    head_lo: int
    head_hi: int
    pages: bytes  # the consumer's page ids of these blocks (little-endian u32), where it gave them


@dataclass(frozen=True)
class WithdrawBatch:
    """Producer: the receiver has this batch, or never will: the link may forget it.

    If its Push has not been answered yet: withdraw it, no answer is needed. Only one-sided links answer even then,
    with ``push_failed`` if the write had not begun, or with ``pushed`` after it landed: a posted write can't be called
    back, and its successor must not start before.
    """

    transfer: str
    peer: Peer
    generation: int
    seq: int
    attempt: int


@dataclass(frozen=True)
class Release:
    """Producer: nobody reads the source pages of ``transfer`` any more. Said once; nothing follows.

    ``code`` is None if every consumer acked.
    """

    transfer: str
    code: Code | None
    reason: str


Action = Send | ReadBatch | Fence | Ready | Failed | OfferBatch | WithdrawBatch | Release
