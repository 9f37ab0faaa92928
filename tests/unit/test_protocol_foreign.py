"""A grant is bound to the peer that it was given to: another one that knows the transfer's id, or all of the grant,
changes nothing, and its messages are counted."""

from __future__ import annotations

from typing import Any

import pytest

from pdtransport.protocol.actions import Limits, Ready, Release, Send
from pdtransport.protocol.consumer_table import ConsumerTable, GrantedPart
from pdtransport.protocol.messages import (
    Abort,
    Accept,
    Ack,
    Batch,
    Claim,
    Code,
    Commit,
    Grant,
    GrantedGroup,
    Nack,
    Received,
    Revoke,
)
from pdtransport.protocol.producer_table import ProducerTable

TRANSFER, DIGEST, BLOCKS, TOKENS, BLOCK_BYTES = "t", bytes(16), 4, 64, 64


def batch(generation: int) -> Batch:
    return Batch(
        transfer=TRANSFER, generation=generation, seq=0, first_block=0, blocks=BLOCKS, nbytes=BLOCKS * BLOCK_BYTES,
        checksums=bytes(8 * BLOCKS), offer=b"here",
    )  # fmt: skip


def producer_words(generation: int) -> list[Any]:
    about = {"transfer": TRANSFER, "generation": generation}
    return [
        Accept(**about, known=True),
        batch(generation),
        Commit(**about, batches=1, tokens=TOKENS, digest=DIGEST),
        Abort(**about, code=Code.CANCELLED),
    ]


def consumer_words(generation: int) -> list[Any]:
    about = {"transfer": TRANSFER, "generation": generation}
    return [
        Received(**about, seqs=(0,)),
        Nack(**about, wants=((0, 1),)),
        Ack(**about),
        Revoke(**about, code=Code.CANCELLED),
        Grant(**grant_fields(generation), window_bytes=1 << 20),
        Grant(**{**grant_fields(generation), "prompt_digest": bytes(15) + b"x", "consumers": 3}, window_bytes=1),
    ]


def grant_fields(generation: int) -> dict[str, Any]:
    return {
        "transfer": TRANSFER, "generation": generation, "groups": (GrantedGroup(0, BLOCKS, 0, 4),), "tokens": TOKENS,
        "prompt_digest": DIGEST,
    }  # fmt: skip


@pytest.mark.parametrize("generation", [7, 8], ids=["right generation", "another"])
def test_decode_takes_nothing_from_whom_it_did_not_grant_to(generation: int) -> None:
    receiving = ConsumerTable(Limits(), first_generation=7)
    part = GrantedPart("p", (GrantedGroup(0, BLOCKS, 0, 4),), (BLOCK_BYTES,))
    receiving.begin(TRANSFER, DIGEST, TOKENS, [part], 0.0)
    (machine,) = receiving.machines(TRANSFER)
    before = (machine.state, machine.code, machine.next_deadline())
    for number, word in enumerate(producer_words(generation), 1):
        actions = receiving.on_message("m", word, 1.0)
        # It may hear that it has no grant here; nothing is fetched, fenced, ended, or told to "p".
        assert all(isinstance(action, Send) and action.peer == "m" for action in actions), word
        assert receiving.counters["stale_messages"] == number
        assert (machine.state, machine.code, machine.next_deadline()) == before
    fetched = receiving.on_message("p", batch(7), 1.0)
    assert fetched, "the grant's own peer is listened to"
    assert not any(isinstance(action, Ready) for action in fetched)


@pytest.mark.parametrize("arrived", [True, False], ids=["request first", "grant first"])
@pytest.mark.parametrize("generation", [7, 8], ids=["right generation", "another"])
def test_prefill_heeds_nobody_but_those_whose_grants_it_serves(generation: int, arrived: bool) -> None:
    """Once all decode workers that a transfer is for have granted, nobody else can end it, join it, or change it."""
    sending = ProducerTable(Limits(), lambda group, low, high: BLOCK_BYTES)

    def opened() -> None:
        sending.open(TRANSFER, DIGEST, TOKENS, (BLOCKS,), 0.0)

    if arrived:
        opened()
    sending.on_message("d", Grant(**grant_fields(7), window_bytes=1 << 20), 0.0)
    for number, word in enumerate(consumer_words(generation), 1):
        actions = sending.on_message("m", word, 1.0)
        assert all(isinstance(action, Send) and action.peer == "m" for action in actions), word
        assert sending.counters["stale_messages"] + sending.counters["foreign_messages"] == number, word
    sending.on_message("m", Claim(transfer=TRANSFER), 1.0)
    if not arrived:
        opened()
    assert [machine.peer for machine in sending.machines(TRANSFER)] == ["d"]
    actions = sending.pages_ready(TRANSFER, (BLOCKS,), TOKENS, 1.0)
    assert actions, "its pages go to whom they were granted by"
    assert not any(isinstance(action, Release) for action in actions)
    assert all(getattr(action, "peer", "d") == "d" for action in actions)


def test_a_worker_whose_grant_is_still_on_its_way_may_give_the_transfer_up() -> None:
    """Two decode workers share a prefill worker's pages; one's grant is here, the other one's was lost."""
    sending = ProducerTable(Limits(), lambda group, low, high: BLOCK_BYTES)
    sending.open(TRANSFER, DIGEST, TOKENS, (BLOCKS,), 0.0)
    sending.on_message("d0", Grant(**grant_fields(7), consumers=2, window_bytes=1 << 20), 0.0)
    sending.on_message("d1", Revoke(transfer=TRANSFER, generation=8, code=Code.TIMEOUT), 0.0)
    assert sending.counters["foreign_messages"] == 0
    assert sending._requests[TRANSFER].cancelled is not None
