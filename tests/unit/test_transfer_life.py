"""One transfer through both halves of an exchange: hints, promises, owners, and every way to end early."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pdtransport.links.base import LinkBusy
from pdtransport.protocol.messages import Accept, Batch, BatchHint, Claim, Code, Grant
from pdtransport.protocol.producer_table import ProducerTable
from tests.unit.transfer_rig import (
    BLOCK_BYTES,
    DIGEST,
    LIMITS,
    TOKENS,
    TRANSFER,
    PreparingChannel,
    PreparingLink,
    Worker,
    carry,
    meet,
    pair,
)


def hints(said: list[Any]) -> list[BatchHint]:
    return [message for message in said if isinstance(message, BatchHint)]


def preparing() -> tuple[Worker, Worker]:
    return Worker("p", link=PreparingLink), Worker("d", port=2, link=PreparingLink)


# -- what is prepared -------------------------------------------------------------------------------------------------


def test_what_is_foreseen_is_told_to_decode_once_and_used_when_it_is_final() -> None:
    """Each batch once, with the offer that its announcement will have; nothing of it is announced before."""
    p, d = preparing()
    with pair(p, d):
        d.fetch(3 * TOKENS, [5, 6, 7])
        p.open(3 * TOKENS)
        carry(p, d)
        p.producer.prepare(p, TRANSFER, ([0, 1, 2],), 2 * TOKENS + 3, event=1)
        said = carry(p, d)
        assert [(hint.first_block, hint.blocks, bool(hint.offer)) for hint in hints(said)] == [
            (0, 1, True),
            (1, 1, True),
        ]
        assert not any(isinstance(message, Batch) for message in said)
        inbound, outbound = d.peer(p).inbound, p.peer(d).outbound
        assert isinstance(inbound, PreparingChannel)
        assert isinstance(outbound, PreparingChannel)
        assert [blocks for _, blocks in inbound.foreseen] == [1, 1]
        p.producer.prepare(p, TRANSFER, ([0, 1, 2],), 3 * TOKENS, event=2)
        assert [hint.first_block for hint in hints(carry(p, d))] == [2]
        p.ready([0, 1, 2], 3 * TOKENS)
        assert [each is not None for each in outbound.used] == [True] * 3
        p.producer.finish(p, TRANSFER)
        carry(p, d)
        assert [outcome.ok for outcome in d.outcomes] == [True]


def test_a_preemption_forgets_what_was_prepared() -> None:
    p, d = preparing()
    with pair(p, d):
        d.fetch(TOKENS, [0])
        p.open(TOKENS)
        carry(p, d)
        p.producer.prepare(p, TRANSFER, ([3],), TOKENS, event=1)
        p.ready([], 0)
        p.ready([3], TOKENS)
        outbound = p.peer(d).outbound
        assert isinstance(outbound, PreparingChannel)
        assert outbound.used == [None]
        p.producer.prepare(p, "unknown", ([3],), TOKENS, event=1)  # changes nothing


# -- the first token --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("asks", [False, True])
def test_prefill_hears_once_of_a_promise_and_its_token_reaches_decode(early: bool, asks: bool) -> None:
    """Whether the grant or the request came first; without the promise no token is named."""
    promises: list[str] = []
    with pair() as (p, d):
        if early:
            d.fetch(TOKENS, [0], first_token=asks)
            carry(p, d)
        p.producer.open(p, TRANSFER, DIGEST, TOKENS, p.outcomes.append, lambda: promises.append("said"))
        if not early:
            d.fetch(TOKENS, [0], first_token=asks)
        carry(p, d)
        assert promises == ["said"] * asks
        p.ready([0], TOKENS)
        p.producer.finish(p, TRANSFER, 77)
        carry(p, d)
        assert promises == ["said"] * asks
        assert [(outcome.ok, outcome.first_token) for outcome in d.outcomes] == [(True, 77 if asks else None)]


@pytest.mark.parametrize("ends", ["refused", "cancelled", "overloaded", "closed"])
def test_an_end_before_the_grant_says_that_nothing_was_promised(ends: str) -> None:
    """Decode may then sample the first token itself: no prefill worker can have heard of the promise."""
    d = Worker("d", port=2)
    d.fetch(TOKENS, [0], first_token=True)
    if ends == "refused":
        d.peers.connect_failed(("127.0.0.1", 1), "block_size differs", True)
    elif ends == "cancelled":
        d.consumer.cancel(d, TRANSFER, Code.CANCELLED, "the client left")
    elif ends == "overloaded":
        d.consumer.receiving.limits = replace(LIMITS, max_transfers=0)
        meet(Worker("p"), d)
    else:
        d.consumer.end_all(Code.CANCELLED, "closed")
    assert [(outcome.ok, outcome.never_granted) for outcome in d.outcomes] == [(False, True)]
    assert d.mail.letters == []


@pytest.mark.parametrize("ends", ["cancelled", "lost", "closed", "reused"])
def test_a_promise_stands_once_its_grant_may_have_left(ends: str) -> None:
    """Nobody knows whether a letter arrived. Also for a second request with the id of one that granted."""
    with pair() as (p, d):
        d.fetch(TOKENS, [0], first_token=True)
        p.open(TOKENS)
        if ends == "cancelled":
            d.consumer.cancel(d, TRANSFER, Code.CANCELLED, "the client left")
        elif ends == "lost":
            d.mail.letters.clear()
            d.peers.down(p.id, "killed")
            d.consumer.peer_lost(p.id, "killed")
        elif ends == "closed":
            d.consumer.end_all(Code.CANCELLED, "closed")
        else:
            d.fetch(TOKENS, [1], first_token=True)
        assert [(outcome.ok, outcome.never_granted) for outcome in d.outcomes] == [(False, False)]


# -- owners -----------------------------------------------------------------------------------------------------------


def test_only_its_owner_says_more_of_a_transfer() -> None:
    """Two requests may come with one transfer id: the second is refused, and what is said of it changes nothing of the
    first."""
    second: list[Any] = []
    other = object()
    with pair() as (p, d):
        d.fetch(TOKENS, [0])
        p.open(TOKENS)
        p.producer.open(other, TRANSFER, DIGEST, TOKENS, second.append)
        assert [outcome.code for outcome in second] == [Code.REUSED.value]
        carry(p, d)
        p.producer.pages_ready(other, TRANSFER, ([1],), TOKENS)
        p.producer.cancel(other, TRANSFER, Code.CANCELLED, "mine")
        p.producer.let_go(other, TRANSFER, "mine")
        p.producer.finish(other, TRANSFER)
        assert carry(p, d) == []
        d.consumer.fetch(other, d.consumer._sinks[TRANSFER].wanted, second.append)
        d.consumer.cancel(other, TRANSFER, Code.CANCELLED, "mine")
        assert [outcome.code for outcome in second] == [Code.REUSED.value] * 2
        assert (p.outcomes, d.outcomes) == ([], [])
        p.ready([0], TOKENS)
        p.producer.finish(p, TRANSFER)
        carry(p, d)
        assert [outcome.ok for outcome in p.outcomes + d.outcomes] == [True, True]
        p.ready([0], TOKENS)  # over
        p.producer.finish(p, TRANSFER)
        assert carry(p, d) == []


# -- early ends -------------------------------------------------------------------------------------------------------


def test_prefill_that_gives_up_tells_decode_and_holds_nothing() -> None:
    with pair() as (p, d):
        d.fetch(2 * TOKENS, [0, 1])
        p.open(2 * TOKENS)
        carry(p, d)
        p.ready([0, 1], TOKENS)
        p.producer.cancel(p, TRANSFER, Code.CANCELLED, "aborted")
        carry(p, d)
        assert [(outcome.ok, outcome.code) for outcome in p.outcomes] == [(False, Code.CANCELLED.value)]
        assert [outcome.code for outcome in d.outcomes] == [Code.PEER_CANCELLED.value]
        assert not any({**p.producer.live(), **d.consumer.live()}.values())


@pytest.mark.parametrize("granted", ["", "before", "after"])
def test_prefill_lets_go_only_of_what_nobody_granted_room_for(granted: str) -> None:
    """The pool has it, and decode may have it from there: but not once decode waits for prefill, whichever had the
    request first."""
    with pair() as (p, d):
        if granted == "before":
            d.fetch(TOKENS, [0])
            carry(p, d)
        p.open(TOKENS)
        if granted == "after":
            d.fetch(TOKENS, [0])
            carry(p, d)
        p.ready([0], TOKENS)
        p.producer.let_go(p, TRANSFER, "in the pool")
        carry(p, d)
        assert [outcome.ok for outcome in p.outcomes] == ([] if granted else [False])


def test_decode_that_gives_up_frees_both_sides_after_its_fence() -> None:
    """Before a batch is placed: the link is fenced, prefill hears Revoke, and both end."""
    with pair() as (p, d):
        d.kv[:] = 255
        d.fetch(TOKENS, [0])
        p.open(TOKENS)
        carry(p, d)
        p.ready([0], TOKENS)
        letters, p.mail.letters = p.mail.letters, []
        (batch,) = [message for _, message in letters if isinstance(message, Batch)]
        d.hear(p.id, batch)  # its bytes wait in the link
        d.consumer.cancel(d, TRANSFER, Code.CANCELLED, "aborted")
        assert [outcome.code for outcome in d.outcomes] == [Code.CANCELLED.value]
        while d.link.progress():
            pass
        assert (d.kv == 255).all(), "the link was fenced"
        p.producer.finish(p, TRANSFER)
        carry(p, d)
        assert [outcome.code for outcome in p.outcomes] == [Code.PEER_CANCELLED.value]
        assert not any({**p.producer.live(), **d.consumer.live()}.values())


def test_decode_that_gives_up_before_prefill_is_up_grants_nothing() -> None:
    d = Worker("d")
    d.fetch(TOKENS, [0], port=9)
    d.consumer.cancel(d, TRANSFER, Code.CANCELLED, "aborted")
    d.consumer.cancel(d, TRANSFER, Code.CANCELLED, "again")
    assert [(outcome.code, outcome.reason) for outcome in d.outcomes] == [(Code.CANCELLED.value, "aborted")]
    with pair(decode=d, prefill=Worker("p", port=9)) as (p, _):
        assert not any(isinstance(message, Grant) for message in carry(p, d))


@pytest.mark.parametrize("lost", ["prefill", "decode"])
def test_a_lost_peer_ends_the_transfers_with_it(lost: str) -> None:
    with pair() as (p, d):
        d.fetch(2 * TOKENS, [0, 1])
        p.open(2 * TOKENS)
        carry(p, d)
        p.ready([0, 1], TOKENS)
        survivor, half, dead = (d, d.consumer, p) if lost == "prefill" else (p, p.producer, d)
        survivor.peers.down(dead.id, "killed")
        half.peer_lost(dead.id, "killed")
        if lost == "decode":
            p.producer.finish(p, TRANSFER)
        assert [(outcome.code, outcome.reason) for outcome in survivor.outcomes] == [(Code.PEER_LOST.value, "killed")]
        assert not any(half.live().values())


def test_a_closed_transport_tells_each_request_its_end() -> None:
    with pair() as (p, d):
        d.fetch(TOKENS, [0])
        p.open(TOKENS)
        p.producer.end_all(Code.CANCELLED, "closed")
        d.consumer.end_all(Code.CANCELLED, "closed")
        assert [(outcome.code, outcome.reason) for outcome in p.outcomes + d.outcomes] == [("cancelled", "closed")] * 2


# -- links that are busy, break or lie --------------------------------------------------------------------------------


def test_a_batch_that_finds_no_slot_waits_and_holds_up_no_other_peer() -> None:
    """It is staged once there is room, in its order."""
    p, d, other = Worker("p"), Worker("d", port=2), Worker("other", port=3)
    with pair(p, d), pair(p, other):
        busy, link = p.peer(d).outbound, {"busy": True}
        assert busy is not None
        send = busy.send

        def sometimes(*args: Any) -> Any:
            if link["busy"]:
                raise LinkBusy("no slot")
            return send(*args)

        busy.send = sometimes  # type: ignore[method-assign]
        for worker, transfer in ((d, TRANSFER), (other, "u")):
            worker.fetch(2 * TOKENS, [0, 1], transfer=transfer)
            p.open(2 * TOKENS, transfer)
            carry(p, d, other)
        for transfer in (TRANSFER, "u"):
            p.ready([0, 1], 2 * TOKENS, transfer)
        assert p.producer.live()["queued_pushes"] == 2
        assert {peer for peer, message in p.mail.letters if isinstance(message, Batch)} == {other.id}
        link["busy"] = False
        said = carry(p, d, other)
        assert [m.first_block for m in said if isinstance(m, Batch) and m.transfer == TRANSFER] == [0, 1]


def test_a_link_that_breaks_while_staging_fails_the_transfer_by_name() -> None:
    with pair() as (p, d):
        d.fetch(TOKENS, [0])
        p.open(TOKENS)
        carry(p, d)
        outbound = p.peer(d).outbound
        assert outbound is not None
        outbound.close()
        p.ready([0], TOKENS)
        p.producer.finish(p, TRANSFER)
        carry(p, d)
        assert [outcome.code for outcome in p.outcomes + d.outcomes] == [Code.LINK.value] * 2
        assert "link: the channel is closed" in d.outcomes[0].reason


@pytest.mark.parametrize("offer", [b"", b"1234567", b"12345678", b"12345678garbage"])
def test_a_batch_whose_offer_is_none_fails_the_transfer(offer: bytes) -> None:
    with pair() as (p, d):
        d.fetch(TOKENS, [0])
        said = carry(p, d)
        (grant,) = [message for message in said if isinstance(message, Grant)]
        batch = Batch(
            transfer=TRANSFER,
            generation=grant.generation,
            seq=0,
            first_block=0,
            blocks=1,
            nbytes=BLOCK_BYTES,
            checksums=bytes(8),
            offer=offer,
        )
        d.hear(p.id, batch)
        while d.link.progress():
            pass
        assert [outcome.code for outcome in d.outcomes] == [Code.LINK.value]
        why = "the batch came without an offer" if len(offer) < 8 else "not an offer of this kind of link"
        assert d.outcomes[0].reason.startswith(f"link: {why}")


def test_damaged_pages_are_asked_for_again_and_replaced() -> None:
    """Prefill writes into a page after it was announced: decode finds the checksum wrong, and takes another attempt."""
    with pair() as (p, d):
        d.fetch(TOKENS, [0])
        p.open(TOKENS)
        carry(p, d)
        p.ready([0], TOKENS)
        p.kv[:, 0] = 5
        p.producer.finish(p, TRANSFER)
        carry(p, d)
        assert [outcome.ok for outcome in p.outcomes + d.outcomes] == [True, True]
        assert (d.kv[:, 0] == 5).all()
        assert d.consumer.receiving.counters["batches_damaged"] == 1


def test_without_checksums_none_are_made() -> None:
    limits = type(LIMITS)(**{**vars(LIMITS), "checksums": False})
    with pair(Worker("p", limits=limits), Worker("d", port=2, limits=limits)) as (p, d):
        d.fetch(TOKENS, [0])
        p.open(TOKENS)
        carry(p, d)
        p.ready([0], TOKENS)
        p.producer.finish(p, TRANSFER)
        said = carry(p, d)
        assert [message.checksums for message in said if isinstance(message, Batch)] == [b""]
        assert [outcome.ok for outcome in d.outcomes] == [True]


# -- claims -----------------------------------------------------------------------------------------------------------


def test_a_claim_reaches_every_prefill_worker_that_is_up() -> None:
    with pair() as (p, d):
        d.consumer.claim(TRANSFER, "127.0.0.1", 1, 1)
        d.consumer.claim("u", "127.0.0.1", 9, 1)  # nobody there
        d.peers.connect_failed(("127.0.0.1", 9), "nobody", refused=False)
        assert [message for message in carry(p, d) if isinstance(message, Claim)] == [Claim(transfer=TRANSFER)]
        p.open(TOKENS)
        request = p.producer.sending._requests[TRANSFER]
        assert list(request.claimed_by) == [d.id]


def test_what_the_producer_says_of_its_transfers_is_kept_in_order() -> None:
    """Both sides' timelines name the steps that people read."""
    with pair() as (p, d):
        p.open(TOKENS)
        d.fetch(TOKENS, [0])
        said = carry(p, d)
        assert any(isinstance(message, Accept) for message in said)
        p.ready([0], TOKENS)
        p.producer.finish(p, TRANSFER)
        carry(p, d)
        producer, consumer = p.outcomes[0].events, d.outcomes[0].events
        assert {"opened", "granted", "computed", "first_batch", "last_batch", "committed", "finished", "acked"} <= {
            *producer
        }
        assert {"asked", "granted", "accepted", "first_batch", "last_batch", "committed", "verified"} <= {*consumer}


@pytest.mark.parametrize("ok", [True, False])
def test_who_watches_hears_once_how_a_transfer_ended(ok: bool) -> None:
    with pair() as (p, d):
        d.fetch(TOKENS, [0])
        p.open(TOKENS)
        carry(p, d)
        if ok:
            p.ready([0], TOKENS)
            p.producer.finish(p, TRANSFER)
        else:
            p.producer.cancel(p, TRANSFER, Code.PREEMPTED, "no room")
        carry(p, d)
        (ended,) = d.mail.ended
        assert (ended.transfer, ended.code, ended.reason) == (
            TRANSFER,
            *((None, "") if ok else (Code.PREEMPTED, "no room")),
        )
        assert ended.nbytes == (BLOCK_BYTES if ok else 0)


def test_the_rig_sends_what_it_is_told() -> None:
    """Bytes land where they belong whatever pages they come from; the two halves are the product's own."""
    with pair() as (p, d):
        assert isinstance(p.producer.sending, ProducerTable)
        p.kv[:] = np.arange(p.kv.size, dtype=np.uint8).reshape(p.kv.shape)
        d.fetch(2 * TOKENS, [9, 3])
        p.open(2 * TOKENS)
        p.ready([30, 2], 2 * TOKENS)
        p.producer.finish(p, TRANSFER)
        carry(p, d)
        assert (d.kv[:, [9, 3]] == p.kv[:, [30, 2]]).all()
