"""How many tokens prefill found in its caches crosses with the commit, and changes nothing else."""

from __future__ import annotations

import pytest

from pdtransport.protocol.actions import Action, BatchId, Limits, Ready, Send
from pdtransport.protocol.consumer_table import ConsumerTable
from pdtransport.protocol.digest import commit_digest
from pdtransport.protocol.messages import Batch, Code, Commit, Grant
from pdtransport.protocol.producer_table import ProducerTable
from tests.unit.test_protocol_rules import part

BLOCK, DIGEST = 64, bytes(16)
LIMITS = Limits(batch_bytes=4 * BLOCK, window_bytes=4 * BLOCK)
D, P, T = "decode", "prefill", "t"


def granted(peers: tuple[str, ...] = (P,)) -> tuple[ConsumerTable, list[Grant]]:
    book = ConsumerTable(LIMITS, first_generation=100)
    actions = book.begin(T, DIGEST, 16, [part(p) for p in peers], 0.0)
    return book, [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, Grant)]


def commits(actions: list[Action]) -> list[Commit]:
    return [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, Commit)]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("cached", [None, 0, 8, 16])
def test_the_commit_says_what_prefill_found(cached: int | None, late: bool) -> None:
    """Whether decode granted before or after; None: the engine did not say."""
    _, (grant,) = granted()
    book = ProducerTable(LIMITS, lambda group, lo, hi: BLOCK)
    book.open(T, DIGEST, 16, (4,), 0.0)
    if not late:
        book.on_message(D, grant, 0.0)
    if cached is not None:
        book.cached(T, cached)
    book.pages_ready(T, (4,), 16, 0.0)
    if late:
        book.on_message(D, grant, 0.0)
    (commit,) = commits(book.pushed(BatchId(T, D, 100, 0), bytes(32), b"", 0.0))
    assert commit.cached_tokens == cached


def committed(book: ConsumerTable, cached: int | None, peer: str = P, generation: int = 100) -> list[Action]:
    batch = Batch(
        transfer=T, generation=generation, seq=0, first_block=0, blocks=4, nbytes=4 * BLOCK, checksums=bytes(32)
    )
    book.on_message(peer, batch, 0.0)
    book.placed(BatchId(T, peer, generation, 0), None, 0.0)
    digest = commit_digest(DIGEST, [(0, 0, 0, 4, 4 * BLOCK)], None)
    commit = Commit(transfer=T, generation=generation, batches=1, tokens=16, digest=digest, cached_tokens=cached)
    return book.on_message(peer, commit, 0.0)


@pytest.mark.parametrize(
    ("told", "believed"), [((None,), None), ((0,), 0), ((16,), 16), ((8, 8), 8), ((8, 4), 4), ((8, None), None)]
)
def test_decode_learns_it_with_its_pages(told: tuple[int | None, ...], believed: int | None) -> None:
    """Workers of one prefill say the same; if they don't, the least is told, and nothing if one is silent."""
    peers = (P, "prefill2")[: len(told)]
    book, _ = granted(peers)
    actions: list[Action] = []
    for number, (peer, cached) in enumerate(zip(peers, told, strict=True)):
        actions += committed(book, cached, peer, 100 + number)
    assert [a.cached_tokens for a in actions if isinstance(a, Ready)] == [believed]


def test_more_than_the_prompt_is_no_count() -> None:
    """What can't be is refused, like any other commit that contradicts itself."""
    book, _ = granted()
    committed(book, 17)
    (machine,) = book.machines(T)
    assert machine.code is Code.MISMATCH
