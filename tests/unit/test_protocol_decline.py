"""A request that ends before decode granted: prefill is told, lets go, and books what it was."""

from __future__ import annotations

import pytest

from pdtransport.protocol.actions import Limits, Release, Send
from pdtransport.protocol.consumer_table import ConsumerTable, TransferOver
from pdtransport.protocol.messages import Claim, Code, Grant, Revoke
from pdtransport.protocol.producer_table import ProducerTable
from tests.unit.test_protocol_rules import part

BLOCK, DIGEST = 64, bytes(16)
LIMITS = Limits(batch_bytes=BLOCK, window_bytes=4 * BLOCK)
D, P, T = "decode", "prefill", "t"
WHY = "the prompt is too long"


def declined(code: Code = Code.REJECTED, book: ConsumerTable | None = None) -> Revoke:
    (said,) = (book or ConsumerTable(LIMITS, first_generation=100)).decline(T, P, code, WHY)
    assert isinstance(said, Send)
    assert isinstance(said.message, Revoke)
    return said.message


def sending(*, opened: bool = True, finished: bool = True) -> ProducerTable:
    book = ProducerTable(LIMITS, lambda group, lo, hi: (hi - lo) * BLOCK)
    if opened:
        book.open(T, DIGEST, 16, (4,), 0.0)
        book.pages_ready(T, (4,), 16, 0.0)
    if finished:
        book.finish(T, 0.0)
    return book


@pytest.mark.parametrize(("said", "booked"), [(Code.REJECTED, Code.REJECTED), (Code.CANCELLED, Code.PEER_CANCELLED)])
def test_what_prefill_holds_is_free_at_once(said: Code, booked: Code) -> None:
    """Prefill has computed the prompt, and waits for a grant: no deadline has to pass."""
    book = sending()
    book.on_message(D, Claim(transfer=T), 0.0)
    actions = book.on_message(D, declined(said), 0.0)
    assert [a for a in actions if isinstance(a, Release)] == [Release(T, booked, WHY)]
    assert (book.live, book.next_deadline()) == (0, None)


def test_what_prefill_computes_is_free_once_it_is_through() -> None:
    """Its pages are the engine's until then; they are held for nobody afterwards."""
    book = sending(finished=False)
    assert not [a for a in book.on_message(D, declined(), 0.0) if isinstance(a, Release)]
    assert book.finish(T, 1.0) == [Release(T, Code.REJECTED, WHY)]


def test_a_request_that_comes_later_is_not_held() -> None:
    """Decode was faster: prefill's request finds that nobody will take its pages, and no claim waits for it."""
    book = sending(opened=False, finished=False)
    book.on_message(D, Claim(transfer=T), 0.0)
    book.on_message(D, declined(), 0.0)
    assert book.next_deadline() is None
    with pytest.raises(TransferOver) as over:
        book.open(T, DIGEST, 16, (4,), 1.0)
    assert (over.value.code, over.value.reason) == (Code.REJECTED, WHY)


def test_a_transfer_is_declined_once_and_never_one_that_was_begun() -> None:
    """vLLM's stub may come after the request itself."""
    book = ConsumerTable(LIMITS, first_generation=100)
    declined(book=book)
    assert book.decline(T, P, Code.REJECTED, WHY) == []
    with pytest.raises(TransferOver):
        book.begin(T, DIGEST, 16, [part(P)], 0.0)
    begun = ConsumerTable(LIMITS, first_generation=100)
    begun.begin(T, DIGEST, 16, [part(P)], 0.0)
    assert begun.decline(T, P, Code.REJECTED, WHY) == []


def test_all_prefill_workers_are_told() -> None:
    """Each of them holds its own pages."""
    book = ConsumerTable(LIMITS, first_generation=100)
    told = [action for peer in (P, "prefill2") for action in book.decline(T, peer, Code.REJECTED, WHY)]
    assert [action.peer for action in told if isinstance(action, Send)] == [P, "prefill2"]


def test_who_is_served_is_not_let_go_by_another() -> None:
    """All consumers granted: one that is none of them can't end the transfer."""
    book = sending(finished=False)
    (said,) = ConsumerTable(LIMITS, first_generation=100).begin(T, DIGEST, 16, [part(P)], 0.0)
    assert isinstance(said, Send)
    assert isinstance(said.message, Grant)
    book.on_message(D, said.message, 0.0)
    stranger = declined(book=ConsumerTable(LIMITS, first_generation=500))
    book.on_message("stranger", stranger, 0.0)
    assert book.counters["foreign_messages"] == 1
    assert len(book.machines(T)) == 1
