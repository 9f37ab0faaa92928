"""Single rules of the machines and books, each with the schedule that once broke it or would."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pdtransport.protocol.actions import (
    Action,
    BatchId,
    Failed,
    Fence,
    Limits,
    OfferBatch,
    ReadBatch,
    Ready,
    Release,
    Send,
)
from pdtransport.protocol.consumer_table import ConsumerTable, GrantedPart, TransferOver
from pdtransport.protocol.digest import commit_digest
from pdtransport.protocol.messages import (
    MAX_ATTEMPTS,
    Abort,
    Accept,
    Ack,
    Batch,
    Claim,
    Code,
    Commit,
    Grant,
    GrantedGroup,
    Message,
    Nack,
    Received,
    Revoke,
)
from pdtransport.protocol.producer_table import ProducerTable
from pdtransport.protocol.states import ConsumerState, ProducerState

BLOCK = 64
LIMITS = Limits(batch_bytes=BLOCK, window_bytes=4 * BLOCK)
DIGEST = bytes(16)
D, P, T = "decode", "prefill", "t"


def words(actions: list[Action], kind: type[Message]) -> list[Message]:
    return [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, kind)]


def of(actions: list[Action], kind: type) -> list[Action]:
    return [a for a in actions if isinstance(a, kind)]


def part(peer: str, blocks: int = 4) -> GrantedPart:
    return GrantedPart(peer, (GrantedGroup(0, blocks, 0, 1),), (BLOCK,))


def receiving(blocks: int = 4, *, limits: Limits = LIMITS, parts: int = 1) -> ConsumerTable:
    book = ConsumerTable(limits, first_generation=100)
    peers = [P, "prefill2"][:parts]
    book.begin(T, DIGEST, 4 * blocks or 1, [part(p, blocks) for p in peers], 0.0)
    return book


def grant(blocks: int = 4, generation: int = 100) -> Grant:
    return Grant(
        transfer=T,
        generation=generation,
        groups=(GrantedGroup(0, blocks, 0, 1),),
        tokens=4 * blocks or 1,
        prompt_digest=DIGEST,
        window_bytes=4 * BLOCK,
    )


def sending(blocks: int = 4, *, granted: bool = True, limits: Limits = LIMITS) -> ProducerTable:
    book = ProducerTable(limits, lambda group, lo, hi: (hi - lo) * BLOCK)
    book.open(T, DIGEST, 4 * blocks or 1, (blocks,), 0.0)
    if granted:
        book.on_message(D, grant(blocks), 0.0)
    return book


def batch(seq: int, attempt: int = 0, generation: int = 100) -> Batch:
    return Batch(
        transfer=T,
        generation=generation,
        seq=seq,
        attempt=attempt,
        first_block=seq,
        blocks=1,
        nbytes=BLOCK,
        checksums=bytes(8),
    )


def commit(batches: int, tokens: int = 16) -> Commit:
    digest = commit_digest(DIGEST, [(seq, 0, seq, 1, BLOCK) for seq in range(min(batches, 1000))])
    return Commit(transfer=T, generation=100, batches=batches, tokens=tokens, digest=digest)


def pushed(book: ProducerTable, seq: int, attempt: int = 0, now: float = 0.0) -> list[Action]:
    return book.pushed(BatchId(T, D, 100, seq, attempt), bytes(8), b"", now)


def received(*seqs: int) -> Received:
    return Received(transfer=T, generation=100, seqs=seqs)


def nack(*wants: tuple[int, int]) -> Nack:
    return Nack(transfer=T, generation=100, wants=wants)


# -- decode -----------------------------------------------------------------------------------------------------------


def test_a_commit_of_more_batches_than_blocks_is_refused_at_once() -> None:
    """A commit that names two billion batches costs decode neither time nor memory."""
    book = receiving()
    book.on_message(P, commit(1 << 31), 0.0)
    assert book.machines(T)[0].code is Code.MISMATCH
    assert not words(book.tick(1.0), Nack)


def test_an_old_accept_does_not_shorten_the_wait() -> None:
    """`known` said once stays: a late Accept from before the request arrived does not bring arrival_s back."""
    book = receiving()
    known = Accept(transfer=T, generation=100, known=True)
    book.on_message(P, known, 0.0)
    book.on_message(P, replace_known(known), 1.0)
    machine = book.machines(T)[0]
    book.tick(LIMITS.arrival_s + 2.0)
    assert machine.state is ConsumerState.WAITING
    book.tick(LIMITS.queue_s + 2.0)
    assert machine.state is ConsumerState.FENCING
    assert "queue_s" in machine.reason


def replace_known(accept: Accept) -> Accept:
    return accept.model_copy(update={"known": False})


def test_the_wait_in_prefills_queue_starts_when_the_request_arrives() -> None:
    """arrival_s runs until prefill knows the request, queue_s from then on: queueing burns no other deadline."""
    book = receiving()
    book.on_message(P, Accept(transfer=T, generation=100, known=False), 0.0)
    late = LIMITS.arrival_s - 0.1
    book.on_message(P, Accept(transfer=T, generation=100, known=True), late)
    book.tick(late + LIMITS.queue_s - 0.1)
    assert book.machines(T)[0].state is ConsumerState.WAITING


@pytest.mark.parametrize("progress", [True, False])
def test_word_of_no_progress_does_not_extend_the_wait_for_the_next_batch(progress: bool) -> None:
    """Prefill's engine hangs while its I/O thread answers each Grant: decode gives up after stall_s."""
    book = receiving()
    book.on_message(P, Accept(transfer=T, generation=100, known=True, tokens_done=4), 0.0)
    book.on_message(P, batch(0), 0.0)
    for second in range(1, int(LIMITS.stall_s)):
        done = 4 + second * progress
        book.on_message(P, Accept(transfer=T, generation=100, known=True, tokens_done=done), float(second))
    book.tick(LIMITS.stall_s + 0.1)
    (machine,) = book.machines(T)
    assert machine.code is (None if progress else Code.TIMEOUT)


def test_a_copy_of_a_damaged_batch_is_not_read_again() -> None:
    """Only a new attempt is: a copy that the network or prefill's own retry brings counts as no further damage."""
    book = receiving()
    book.on_message(P, batch(0), 0.0)
    assert words(book.placed(BatchId(T, P, 100, 0), "damaged: a bit", 0.0), Nack)
    for _ in range(LIMITS.resends + 1):
        assert not of(book.on_message(P, batch(0), 0.1), ReadBatch)
    assert of(book.on_message(P, batch(0, attempt=1), 0.2), ReadBatch)


def test_a_failure_without_words_still_has_a_reason() -> None:
    """A peer's Abort with an empty reason does not make a silent failure."""
    book = receiving()
    book.on_message(P, Abort(transfer=T, generation=100, code=Code.PREEMPTED), 0.0)
    (failed,) = of(book.fenced(T, P, 100), Failed)
    assert failed == Failed(T, Code.PREEMPTED, "preempted")


def test_decode_is_ready_only_after_every_part() -> None:
    """With two prefill workers, the first complete part is acked, and Ready waits for the second."""
    book = receiving(blocks=1, parts=2)
    said: list[Action] = []
    for index, peer in enumerate((P, "prefill2")):
        generation = 100 + index
        said = book.on_message(peer, batch(0, generation=generation), 0.0)
        assert of(said, ReadBatch)
        book.on_message(peer, commit(1, tokens=4).model_copy(update={"generation": generation}), 0.0)
        said = book.placed(BatchId(T, peer, generation, 0), None, 0.0)
        assert words(said, Ack)
        assert bool(of(said, Ready)) == (peer == "prefill2")


def test_a_failed_part_fails_all_parts_once_all_are_fenced() -> None:
    """One lost prefill worker ends the transfer; Failed comes after the fence of every part, once, with the cause."""
    book = receiving(parts=2)
    actions = book.peer_lost(P, "it died")
    assert len(of(actions, Fence)) == 2
    assert words(actions, Revoke)
    assert not of(book.fenced(T, P, 100), Failed)
    assert of(book.fenced(T, "prefill2", 101), Failed) == [Failed(T, Code.PEER_LOST, "it died")]
    assert book.live == 0
    assert book.next_deadline() is None


def test_a_transfer_id_is_used_once() -> None:
    """The same id again, live or over, is refused with a reason."""
    book = receiving()
    parts = [part(P)]
    with pytest.raises(TransferOver, match="mint one per dispatch"):
        book.begin(T, DIGEST, 16, parts, 0.0)
    book.cancel(T, Code.CANCELLED, "gone")
    book.fenced(T, P, 100)
    with pytest.raises(TransferOver, match="mint one per dispatch") as error:
        book.begin(T, DIGEST, 16, parts, 0.0)
    assert error.value.code is Code.REUSED


def test_late_words_of_an_ended_grant_are_answered() -> None:
    """A producer that missed the Ack hears it again; one that missed the Revoke hears that."""
    book = receiving(blocks=1)
    book.on_message(P, batch(0), 0.0)
    book.on_message(P, commit(1, tokens=4), 0.0)
    assert of(book.placed(BatchId(T, P, 100, 0), None, 0.0), Ready)
    assert words(book.on_message(P, commit(1, tokens=4), 1.0), Ack)
    assert not words(book.on_message(P, commit(1, tokens=4).model_copy(update={"generation": 7}), 1.0), Ack)
    over = receiving()
    over.cancel(T, Code.CANCELLED, "gone")
    over.fenced(T, P, 100)
    assert words(over.on_message(P, batch(0), 1.0), Revoke)


# -- prefill ----------------------------------------------------------------------------------------------------------


def test_a_full_hit_is_committed_at_once() -> None:
    """Decode that holds every block need not wait for prefill to compute them."""
    book = ProducerTable(LIMITS, lambda group, lo, hi: BLOCK)
    book.open(T, DIGEST, 16, (4,), 0.0)
    full = grant(4).model_copy(update={"groups": (GrantedGroup(4, 0, 0, 1),)})
    (said,) = words(book.on_message(D, full, 0.0), Commit)
    assert said.batches == 0  # type: ignore[attr-defined]


def test_a_receipt_for_what_was_never_announced_is_not_believed() -> None:
    """Received for a batch that is still being staged gives no credit and does not mark it as delivered."""
    book = sending()
    book.pages_ready(T, (4,), 16, 0.0)
    assert book.on_message(D, received(0), 0.0) == []
    assert words(pushed(book, 0), Batch)


def test_a_push_that_ends_after_the_ack_says_nothing() -> None:
    """Decode verified the first attempt while the second was being staged: after its Ack there is nothing to say."""
    book = sending(1)
    book.pages_ready(T, (1,), 4, 0.0)
    pushed(book, 0)
    book.on_message(D, nack((0, 1)), 0.0)
    book.on_message(D, Ack(transfer=T, generation=100), 0.1)
    assert book.machines(T)[0].state is ProducerState.DONE
    assert pushed(book, 0, attempt=1, now=0.2) == []


def test_preemption_does_not_count_as_damage() -> None:
    """Attempts that prefill took back itself leave decode its resends."""
    book = sending(1, limits=replace(LIMITS, resends=1))
    for attempt in range(5):
        book.pages_ready(T, (1,), 4, 0.0)
        assert words(pushed(book, 0, attempt), Batch)
        book.pages_ready(T, (0,), 0, 0.0)
    book.pages_ready(T, (1,), 4, 0.0)
    pushed(book, 0, 5)
    assert of(book.on_message(D, nack((0, 6)), 0.0), OfferBatch)
    pushed(book, 0, 6)
    assert words(book.on_message(D, nack((0, 7)), 0.0), Abort)
    assert book.machines(T)[0].code is Code.DAMAGED


def test_endless_preemption_ends_the_transfer() -> None:
    """Attempts are bounded: the bound is an end with a reason, not an exception."""
    book = sending(1)
    for attempt in range(MAX_ATTEMPTS + 1):
        book.pages_ready(T, (1,), 4, 0.0)
        pushed(book, 0, attempt)
        book.pages_ready(T, (0,), 0, 0.0)
    assert book.machines(T)[0].state is ProducerState.ENDED
    assert book.machines(T)[0].code is Code.PREEMPTED


def test_preemption_without_checksums_ends_the_transfer() -> None:
    """Nobody could tell the old bytes from new ones."""
    book = sending(limits=replace(LIMITS, checksums=False))
    book.pages_ready(T, (4,), 16, 0.0)
    pushed(book, 0)
    book.pages_ready(T, (0,), 0, 0.0)
    assert book.machines(T)[0].code is Code.PREEMPTED


def test_a_revoke_that_overtakes_its_grant_holds() -> None:
    """The Grant that comes in after its own Revoke is not served: decode gave the pages back long ago."""
    revoke = Revoke(transfer=T, generation=100, code=Code.CANCELLED)
    waiting = ProducerTable(LIMITS, lambda group, lo, hi: BLOCK)
    assert waiting.on_message(D, revoke, 0.0) == []
    assert words(waiting.on_message(D, grant(), 0.1), Abort)
    with pytest.raises(TransferOver) as error:
        waiting.open(T, DIGEST, 16, (4,), 0.2)
    assert error.value.code is Code.PEER_CANCELLED

    open_one = sending(granted=False)
    open_one.pages_ready(T, (4,), 16, 0.0)
    assert open_one.on_message(D, revoke, 0.0) == []
    late = open_one.on_message(D, grant(), 0.1)
    assert not of(late, OfferBatch)
    assert words(late, Abort)
    assert [r.code for r in of(open_one.finish(T, 0.2), Release)] == [Code.PEER_CANCELLED]  # type: ignore[attr-defined]


def test_prefill_need_not_hold_pages_that_decode_gave_up() -> None:
    """A Revoke whose Grant got lost ends the hold as well."""
    book = sending(granted=False)
    book.finish(T, 0.0)
    released = of(book.on_message(D, Revoke(transfer=T, generation=100, code=Code.CANCELLED), 1.0), Release)
    assert len(released) == 1
    assert book.next_deadline() is None


def test_a_refused_grant_stays_refused() -> None:
    """An early grant that found no place is void for good: decode took its pages back when it heard so."""
    book = ProducerTable(replace(LIMITS, max_transfers=1), lambda group, lo, hi: BLOCK)
    book.on_message(D, grant().model_copy(update={"transfer": "other"}), 0.0)
    assert words(book.on_message(D, grant(), 0.0), Abort)
    book.peer_lost("nobody", "")
    book.on_message(D, Revoke(transfer="other", generation=100, code=Code.CANCELLED), 0.1)  # there is a place again
    assert words(book.on_message(D, grant(), 0.2), Abort)


def test_claims_without_a_request_are_forgotten() -> None:
    """Claims for requests that never come do not pile up until none is accepted any more."""
    book = ProducerTable(LIMITS, lambda group, lo, hi: BLOCK)
    book.on_message(D, Claim(transfer=T), 0.0)
    assert book.next_deadline() is not None
    book.tick(10 * LIMITS.arrival_s)
    assert book.next_deadline() is None
    assert not book._early_claims


def test_a_claim_before_the_request_holds_its_pages() -> None:
    """A decode worker that claimed early gets claim_s, not hold_s."""
    book = ProducerTable(LIMITS, lambda group, lo, hi: BLOCK)
    book.on_message(D, Claim(transfer=T), 0.0)
    book.open(T, DIGEST, 16, (4,), 1.0)
    book.pages_ready(T, (4,), 16, 1.0)
    book.finish(T, 1.0)
    assert not of(book.tick(1.0 + LIMITS.hold_s + 1), Release)
    assert of(book.tick(1.0 + LIMITS.claim_s + 1), Release)


def test_claims_hold_finished_pages_no_longer_than_the_first_one() -> None:
    """Decode claims every few seconds while it has no room: prefill's pages go back claim_s after its first claim."""
    book = ProducerTable(LIMITS, lambda group, lo, hi: BLOCK)
    book.open(T, DIGEST, 16, (4,), 0.0)
    book.pages_ready(T, (4,), 16, 0.0)
    book.finish(T, 0.0)
    for now in range(0, int(LIMITS.claim_s), 2):
        book.on_message(D, Claim(transfer=T), float(now))
        assert not of(book.tick(float(now)), Release)
    assert of(book.tick(LIMITS.claim_s + 1), Release)


def test_a_claim_of_the_other_consumer_still_counts_after_one_granted() -> None:
    """With two decode workers, one granting does not cut the hold for the one that queues."""
    book = sending(granted=False)
    book.on_message(D, grant().model_copy(update={"consumers": 2}), 0.0)
    book.finish(T, 0.0)
    book.on_message("decode2", Claim(transfer=T), 1.0)
    book.tick(LIMITS.hold_s + 1)
    assert book.machines(T)[0].state is ProducerState.STREAMING
    assert [r.code for r in of(book.tick(LIMITS.claim_s + 2), Release)] == [Code.TIMEOUT]  # type: ignore[attr-defined]


def test_an_engine_that_finishes_halfway_is_not_waited_for() -> None:
    """Every wait ends: pages that were never computed end the transfer after hold_s, with a reason."""
    book = sending()
    book.pages_ready(T, (2,), 8, 0.0)
    for seq in range(2):
        pushed(book, seq)
    book.on_message(D, received(0, 1), 0.0)
    book.finish(T, 0.0)
    (release,) = of(book.tick(LIMITS.hold_s + 1), Release)
    assert release.code is Code.CANCELLED  # type: ignore[attr-defined]
    assert "without computing" in release.reason  # type: ignore[attr-defined]


def test_a_lost_abort_is_said_again_after_release() -> None:
    """Decode that asks for batches of a transfer that prefill gave up hears so, instead of waiting out a deadline."""
    book = sending()
    assert of(book.cancel(T, Code.CANCELLED, "the client left"), Release)
    (abort,) = words(book.on_message(D, nack((0, 0)), 1.0), Abort)
    assert (abort.code, abort.reason) == (Code.PEER_CANCELLED, "the client left")  # type: ignore[attr-defined]


def test_a_revoke_of_decode_is_not_booked_as_our_own_cancel() -> None:
    """The side that did not abort reports peer_cancelled."""
    book = sending()
    book.on_message(D, Revoke(transfer=T, generation=100, code=Code.CANCELLED, reason="the client left"), 0.0)
    assert of(book.finish(T, 0.0), Release) == [Release(T, Code.PEER_CANCELLED, "the client left")]


def test_the_window_bounds_what_is_under_way() -> None:
    """No more than the window is staged or announced without a receipt, and a receipt opens it again."""
    book = sending(8, limits=replace(LIMITS, window_bytes=2 * BLOCK))
    assert len(of(book.pages_ready(T, (8,), 32, 0.0), OfferBatch)) == 2
    pushed(book, 0)
    assert not of(pushed(book, 1), OfferBatch)
    assert len(of(book.on_message(D, received(0), 0.0), OfferBatch)) == 1


def test_words_of_another_generation_change_nothing() -> None:
    """An Ack, receipt, Nack or Revoke of a generation that is not live leaves the transfer as it is."""
    book = sending()
    book.pages_ready(T, (4,), 16, 0.0)
    for seq in range(4):
        pushed(book, seq)
    machine = book.machines(T)[0]
    before = (machine.state, machine._in_flight)
    for message in (
        Ack(transfer=T, generation=99),
        Received(transfer=T, generation=99, seqs=(0, 1)),
        Nack(transfer=T, generation=101, wants=((0, 1),)),
        Revoke(transfer=T, generation=99, code=Code.CANCELLED),
    ):
        assert all(isinstance(action, Send) for action in book.on_message(D, message, 0.0))
    assert (machine.state, machine._in_flight) == before
    assert book.live == 1


def test_a_batch_is_no_larger_than_its_link_takes() -> None:
    """A link with smaller slots than the largest batch still gets its pages, in more batches."""
    book = ProducerTable(
        replace(LIMITS, batch_bytes=4 * BLOCK), lambda group, lo, hi: BLOCK, lambda peer: 2 * BLOCK + 1
    )
    book.open(T, DIGEST, 16, (4,), 0.0)
    book.on_message(D, grant(4), 0.0)
    pushes = of(book.pages_ready(T, (4,), 16, 0.0), OfferBatch)
    assert [push.blocks for push in pushes] == [2, 2]  # type: ignore[attr-defined]
