"""Actions that the state machines request from the drivers, and the limits they work within. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from pdtransport.protocol.messages import Batch, Code, Message

Peer = Any  # identifies one run of one worker process: any hashable value, opaque to the protocol


class BatchId(NamedTuple):
    """One attempt at one batch of a grant."""

    transfer: str
    peer: Peer
    generation: int
    seq: int
    attempt: int = 0


@dataclass(frozen=True)
class Limits:
    """Deadlines (seconds) and bounds. :mod:`pdtransport.settings` explains each."""

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
    """Consumer: read ``batch`` into the granted pages and verify it; answer with ``placed``."""

    id: BatchId
    batch: Batch


@dataclass(frozen=True)
class Fence:
    """Consumer: stop placing batches of this grant; answer with ``fenced`` once no write of it is in flight."""

    transfer: str
    peer: Peer
    generation: int


@dataclass(frozen=True)
class Ready:
    """Consumer: every page of ``transfer`` is here and verified. The last action of a transfer.

    Args:
        first_token: token that prefill sampled, to continue from; None: sample it here.
        cached_tokens: prompt tokens that prefill found in its caches; None: not reported.
    """

    transfer: str
    first_token: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True)
class Failed:
    """Consumer: ``transfer`` failed, and nothing can write its pages any more. The last action of a transfer."""

    transfer: str
    code: Code
    reason: str


@dataclass(frozen=True)
class OfferBatch:
    """Producer: offer these blocks on the link; answer with ``pushed`` or ``push_failed``."""

    id: BatchId
    group: int
    first_block: int
    blocks: int
    head_lo: int
    head_hi: int


@dataclass(frozen=True)
class WithdrawBatch:
    """Producer: the link may forget this batch: the consumer has received it, or never will.

    An :class:`OfferBatch` of this batch that is still unanswered needs no answer any more.
    """

    id: BatchId


@dataclass(frozen=True)
class Release:
    """Producer: nothing reads the source pages of ``transfer`` any more. The last action of a transfer.

    ``code`` is None if every consumer acked.
    """

    transfer: str
    code: Code | None
    reason: str


Action = Send | ReadBatch | Fence | Ready | Failed | OfferBatch | WithdrawBatch | Release
