"""Deadlines that end each wait, and what one side refuses of the other's messages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pdtransport.protocol.actions import BatchId, Failed, Fence, OfferBatch, ReadBatch, Send
from pdtransport.protocol.messages import Abort, Accept, Batch, Claim, Code, Grant, GrantedGroup, Nack
from pdtransport.protocol.producer_table import ProducerTable
from pdtransport.protocol.states import ConsumerState, ProducerState
from tests.unit.test_protocol_rules import (
    BLOCK,
    DIGEST,
    LIMITS,
    D,
    P,
    T,
    batch,
    commit,
    grant,
    of,
    pushed,
    receiving,
    sending,
    words,
)


def test_a_prefill_that_answers_nothing_fails_the_transfer_in_time() -> None:
    """From the grant on decode waits answer_s, in which the grant is said again, and no longer."""
    book = receiving()
    assert words(book.tick(LIMITS.answer_s - 0.1), Grant)
    assert book.machines(T)[0].state is ConsumerState.GRANTING
    due = book.next_deadline()
    assert due is not None
    assert due <= LIMITS.answer_s
    book.tick(LIMITS.answer_s)
    (failed,) = of(book.fenced(T, P, 100), Failed)
    assert failed.code is Code.TIMEOUT  # type: ignore[attr-defined]
    assert "answer_s" in failed.reason  # type: ignore[attr-defined]


def test_pages_that_are_not_there_after_the_commit_fail_the_transfer_in_time() -> None:
    """verify_s runs from the commit, for a batch that never came as for one that is never placed."""
    for came in ((), (0,)):
        book = receiving(blocks=2)
        for seq in came:
            book.on_message(P, batch(seq), 1.0)
        book.on_message(P, commit(2, tokens=8), 2.0)
        book.tick(2.0 + LIMITS.verify_s - 0.1)
        assert book.machines(T)[0].state is ConsumerState.VERIFYING
        book.tick(2.0 + LIMITS.verify_s)
        (failed,) = of(book.fenced(T, P, 100), Failed)
        assert failed.code is Code.TIMEOUT  # type: ignore[attr-defined]
        assert "verify_s" in failed.reason  # type: ignore[attr-defined]


@pytest.mark.parametrize("tokens", [15, 17])
def test_a_commit_of_another_length_is_refused(tokens: int) -> None:
    """Prefill that computed more or fewer tokens than decode asked for computed another prompt."""
    book = receiving()
    for seq in range(4):
        book.on_message(P, batch(seq), 0.0)
        book.placed(BatchId(T, P, 100, seq), None, 0.0)
    actions = book.on_message(P, commit(4, tokens=tokens), 0.0)
    assert of(actions, Fence)
    (failed,) = of(book.fenced(T, P, 100), Failed)
    assert failed == Failed(T, Code.MISMATCH, f"prefill committed {tokens} tokens, decode asked for 16")


@pytest.mark.parametrize("nbytes", [BLOCK - 8, BLOCK + 8, 2 * BLOCK])
def test_a_batch_of_another_length_is_never_placed(nbytes: int) -> None:
    """Its blocks would not be those of this grant."""
    book = receiving()
    actions = book.on_message(P, batch(0).model_copy(update={"nbytes": nbytes}), 0.0)
    assert not of(actions, ReadBatch)
    assert book.machines(T)[0].code is Code.MISMATCH


def test_the_next_attempt_at_a_batch_is_of_the_same_blocks() -> None:
    """A batch that was checked as blocks 0 to 1 can't come back as others: they may belong to another batch."""
    book = receiving()
    book.on_message(P, batch(0), 0.0)
    book.placed(BatchId(T, P, 100, 0), "damaged: a bit", 0.0)
    again = batch(0, attempt=1)
    assert not of(book.on_message(P, again.model_copy(update={"first_block": 1}), 0.1), ReadBatch)
    assert book.machines(T)[0].code is Code.MISMATCH


@pytest.mark.parametrize("resends", [0, 1, 2])
def test_a_damaged_batch_is_sent_again_as_often_as_is_set(resends: int) -> None:
    """integrity: `resends` more attempts, asked for one by one, then the transfer fails as damaged."""
    book = receiving(limits=replace(LIMITS, resends=resends))
    for attempt in range(resends + 1):
        assert book.machines(T)[0].code is None
        book.on_message(P, batch(0, attempt), 0.0)
        actions = book.placed(BatchId(T, P, 100, 0, attempt), "damaged: a bit", 0.0)
        assert bool(words(actions, Nack)) == (attempt < resends)
    assert book.machines(T)[0].code is Code.DAMAGED


def test_prefill_sends_no_more_than_decodes_window() -> None:
    """Backpressure: what a slow decode does not take stays with prefill, however large prefill's own window is."""
    book = sending(granted=False)
    book.on_message(D, grant().model_copy(update={"window_bytes": 2 * BLOCK}), 0.0)
    assert len(of(book.pages_ready(T, (4,), 16, 0.0), OfferBatch)) == 2
    assert [pushed(book, seq) for seq in (0, 1)]
    own = sending(limits=replace(LIMITS, window_bytes=3 * BLOCK))
    assert len(of(own.pages_ready(T, (4,), 16, 0.0), OfferBatch)) == 3


def test_a_group_that_is_not_asked_for_widens_no_window() -> None:
    """One batch may go beyond the window, the largest of those that were granted: 4 blocks of 24 bytes here, so 2 of 40
    and one of 24 are too many, whatever a batch of the third group could hold."""
    limits = replace(LIMITS, batch_bytes=104, window_bytes=8)
    groups = (GrantedGroup(0, 2, 0, 1), GrantedGroup(0, 1, 0, 1), GrantedGroup(0, 0, 0, 0))
    book = ProducerTable(limits, lambda group, lo, hi: (40, 24, 1)[group])
    book.open(T, DIGEST, 16, (2, 1, 4), 0.0)
    wanted = Grant(transfer=T, generation=100, groups=groups, tokens=16, prompt_digest=DIGEST, window_bytes=8)
    book.on_message(D, wanted, 0.0)
    offered = of(book.pages_ready(T, (2, 1, 4), 16, 0.0), OfferBatch)
    assert [(each.group, each.blocks) for each in offered] == [(0, 2)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("first", "blocks"), [(0, 3), (0, 5), (1, 2), (4, 1)])
def test_a_grant_that_ends_elsewhere_than_the_prompt_is_refused(first: int, blocks: int) -> None:
    """Decode would get the first blocks of a prompt and take them for all, or wait for blocks that are none."""
    book = sending(granted=False)
    book.pages_ready(T, (4,), 16, 0.0)
    wrong = grant().model_copy(update={"groups": (GrantedGroup(first, blocks, 0, 1),)})
    actions = book.on_message(D, wrong, 0.0)
    assert not of(actions, OfferBatch)
    (machine,) = book.machines(T)
    assert machine.code is Code.MISMATCH
    assert "the prompt has 4" in machine.reason
    assert [a.message.code for a in actions if isinstance(a, Send) and isinstance(a.message, Abort)] == [Code.MISMATCH]
    assert machine.state is ProducerState.ENDED


def test_claims_for_requests_that_never_come_are_bounded() -> None:
    """Whoever invents transfer ids costs prefill no more memory than max_transfers claims."""
    book = ProducerTable(replace(LIMITS, max_transfers=3), lambda group, lo, hi: BLOCK)
    for number in range(100):
        book.on_message(D, Claim(transfer=f"t{number}"), 0.0)
    assert len(book._early_claims) == 3
    book.tick(2 * LIMITS.arrival_s)
    assert (len(book._early_claims), book.next_deadline()) == (0, None)


def test_prefill_with_a_claim_of_its_own_request_serves_the_grant_that_follows() -> None:
    """A bound on claims is none on grants."""
    book = ProducerTable(replace(LIMITS, max_transfers=1), lambda group, lo, hi: BLOCK)
    book.on_message(D, Claim(transfer="other"), 0.0)
    book.on_message(D, Claim(transfer=T), 0.0)
    book.open(T, DIGEST, 16, (4,), 0.0)
    assert words(book.on_message(D, grant(), 0.0), Accept)
    assert of(book.pages_ready(T, (1,), 4, 0.0), OfferBatch)
    assert words(pushed(book, 0), Batch)
