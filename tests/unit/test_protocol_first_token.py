"""The first token that prefill sampled: who promised to go on from it learns it with the commit, nobody else does."""

from __future__ import annotations

import pytest

from pdtransport.protocol.actions import Action, BatchId, Failed, Limits, ReadBatch, Ready, Send
from pdtransport.protocol.consumer_table import ConsumerTable
from pdtransport.protocol.digest import commit_digest
from pdtransport.protocol.messages import Ack, Batch, Code, Commit, Grant
from pdtransport.protocol.producer_table import ProducerTable
from pdtransport.protocol.states import ConsumerState
from tests.unit.test_protocol_rules import part

BLOCK, TOKEN = 64, 1234
LIMITS = Limits(batch_bytes=4 * BLOCK, window_bytes=4 * BLOCK)
DIGEST = bytes(16)
D, P, T = "decode", "prefill", "t"


def receiving(promised: bool, peers: tuple[str, ...] = (P,)) -> ConsumerTable:
    book = ConsumerTable(LIMITS, first_generation=100)
    book.begin(T, DIGEST, 16, [part(p) for p in peers], 0.0, first_token=promised)
    return book


def grant_of(promised: bool) -> Grant:
    book = ConsumerTable(LIMITS, first_generation=100)
    (said,) = book.begin(T, DIGEST, 16, [part(P)], 0.0, first_token=promised)
    assert isinstance(said, Send)
    assert isinstance(said.message, Grant)
    return said.message


def commits(actions: list[Action]) -> list[int | None]:
    return [a.message.first_token for a in actions if isinstance(a, Send) and isinstance(a.message, Commit)]


def all_pushed(book: ProducerTable) -> list[Action]:
    book.pages_ready(T, (4,), 16, 0.0)
    return book.pushed(BatchId(T, D, 100, 0), bytes(32), b"", 0.0)


@pytest.mark.parametrize(("promised", "told"), [(True, TOKEN), (True, None), (False, TOKEN), (False, None)])
def test_the_commit_names_the_token_to_those_who_promised(promised: bool, told: int | None) -> None:
    """A promise holds the commit back until the engine is through; without one it leaves at once, and names nothing."""
    book = ProducerTable(LIMITS, lambda group, lo, hi: BLOCK)
    book.open(T, DIGEST, 16, (4,), 0.0)
    book.on_message(D, grant_of(promised), 0.0)
    assert book.promised(T) == promised
    early = commits(all_pushed(book))
    late = commits(book.finish(T, 1.0, told))
    assert (early, late) == (([], [told]) if promised else ([None], []))


def test_a_promise_that_comes_after_the_end_gets_what_the_router_got() -> None:
    """The engine finished before decode granted: the router was told nothing, and the commit names nothing."""
    book = ProducerTable(LIMITS, lambda group, lo, hi: BLOCK)
    book.open(T, DIGEST, 16, (4,), 0.0)
    book.pages_ready(T, (4,), 16, 0.0)
    assert not book.promised(T)
    book.finish(T, 0.0, None)
    book.on_message(D, grant_of(True), 1.0)
    assert commits(book.pushed(BatchId(T, D, 100, 0), bytes(32), b"", 1.0)) == [None]


def commit(token: int | None, named: int | None) -> Commit:
    digest = commit_digest(DIGEST, [(0, 0, 0, 4, 4 * BLOCK)], token)
    return Commit(transfer=T, generation=100, batches=1, tokens=16, digest=digest, first_token=named)


def took_all(book: ConsumerTable, peer: str = P, generation: int = 100) -> None:
    batch = Batch(
        transfer=T, generation=generation, seq=0, first_block=0, blocks=4, nbytes=4 * BLOCK, checksums=bytes(32)
    )
    assert any(isinstance(a, ReadBatch) for a in book.on_message(peer, batch, 0.0))
    book.placed(BatchId(T, peer, generation, 0), None, 0.0)


@pytest.mark.parametrize("token", [None, 0, TOKEN])
def test_decode_learns_the_token_once_it_has_all_pages(token: int | None) -> None:
    """Ready says which token to go on from; None leaves the sampling to decode."""
    book = receiving(promised=True)
    took_all(book)
    ready = [a for a in book.on_message(P, commit(token, token), 0.0) if isinstance(a, Ready)]
    assert ready == [Ready(T, token)]


@pytest.mark.parametrize(
    ("promised", "digest_of", "named"), [(False, TOKEN, TOKEN), (True, TOKEN, TOKEN + 1), (True, TOKEN, None)]
)
def test_a_token_that_was_not_asked_for_or_not_meant_is_refused(
    promised: bool, digest_of: int, named: int | None
) -> None:
    """Decode takes no token without its promise, and none that the digest does not confirm."""
    book = receiving(promised)
    took_all(book)
    actions = book.on_message(P, commit(digest_of, named), 0.0)
    assert not any(isinstance(a, Send) and isinstance(a.message, Ack) for a in actions)
    (machine,) = book.machines(T)
    assert (machine.state, machine.code) == (ConsumerState.FENCING, Code.MISMATCH)


@pytest.mark.parametrize("other_token", [TOKEN + 1, None])
def test_workers_that_name_different_tokens_hand_nothing_over(other_token: int | None) -> None:
    """All parts of a transfer must go on from one token, or all from none."""
    book = receiving(True, (P, "prefill2"))
    took_all(book, P, 100)
    took_all(book, "prefill2", 101)
    book.on_message(P, commit(TOKEN, TOKEN), 0.0)
    other = commit(other_token, other_token).model_copy(update={"generation": 101})
    failed = [a for a in book.on_message("prefill2", other, 0.0) if isinstance(a, (Ready, Failed))]
    assert [type(a) for a in failed] == [Failed]
    assert failed[0].code is Code.MISMATCH  # type: ignore[union-attr]
