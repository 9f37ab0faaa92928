"""The targets ``wire`` and ``exports``: what peers say, and what they say about their links."""

from __future__ import annotations

import contextlib

from pdtransport.errors import LinkError, LinkUnavailable
from pdtransport.links import cma, reading
from pdtransport.links.ucx import link as ucx
from pdtransport.links.ucx.wire import parsed_offer
from pdtransport.protocol.actions import Limits, Ready
from pdtransport.protocol.consumer_table import ConsumerTable, GrantedPart
from pdtransport.protocol.messages import (
    Abort,
    Accept,
    Batch,
    Commit,
    GrantedGroup,
    Message,
    TransferMessage,
    WireError,
    decode,
    encode,
)
from pdtransport.protocol.producer_table import ProducerTable
from tests.fuzz.split import SEPARATOR

TRANSFER, GENERATION, DIGEST = "t-1", 7, bytes(range(16))
BLOCKS, BLOCK_BYTES, BLOCK_TOKENS, HEADS, GROUPS = 5, 64, 16, 4, 2
MAX_FRAMES = 16  # of one input


def wire(data: bytes) -> None:
    """Frames from a peer: each decodes or is a WireError, survives the way back, and whatever the frames say together,
    no state machine breaks, and nothing counts as received that no link has verified."""
    receiving = ConsumerTable(Limits(), first_generation=GENERATION)
    part = GrantedPart("p", (GrantedGroup(0, BLOCKS, 0, HEADS),) * GROUPS, (BLOCK_BYTES,) * GROUPS)
    receiving.begin(TRANSFER, DIGEST, BLOCKS * BLOCK_TOKENS, [part], 0.0)
    sending = ProducerTable(Limits(), _block_bytes)
    sending.open(TRANSFER, DIGEST, BLOCKS * BLOCK_TOKENS, (BLOCKS,) * GROUPS, 0.0)
    sending.pages_ready(TRANSFER, (BLOCKS,) * GROUPS, BLOCKS * BLOCK_TOKENS, 0.0)
    for number, frame in enumerate(data.split(SEPARATOR)[:MAX_FRAMES]):
        try:
            message = decode(frame)
        except WireError:
            continue
        assert decode(encode(message)) == message
        if isinstance(message, TransferMessage):
            _tell(receiving, sending, message, float(number))
        if isinstance(message, Batch):
            _offers(message.offer)


def _block_bytes(group: int, head_lo: int, head_hi: int) -> int:
    if not 0 <= head_lo < head_hi <= HEADS:  # as KVGeometry.checked_block_bytes does
        raise ValueError("heads that are not held here")
    return BLOCK_BYTES * (head_hi - head_lo)


def _tell(receiving: ConsumerTable, sending: ProducerTable, message: Message, now: float) -> None:
    if isinstance(message, Accept | Batch | Commit | Abort):
        actions = receiving.on_message("p", message, now) + receiving.tick(now)
        assert not any(isinstance(action, Ready) for action in actions), "ready without a verified byte"
    else:
        sending.on_message("d", message, now)  # type: ignore[arg-type]
        sending.tick(now)


def _offers(data: bytes) -> None:
    for parse in (reading.unpack_offer, parsed_offer):
        with contextlib.suppress(LinkError):
            parse(data)


def exports(data: bytes) -> None:
    """What a peer says about its links, and a batch's offer: an error of the link's, or taken."""
    _offers(data)
    for parse in (cma._parse_export, ucx._parse_export):
        with contextlib.suppress(LinkUnavailable):
            parse(data)
