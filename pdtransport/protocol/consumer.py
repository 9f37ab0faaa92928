"""The consumer's (decode) side of one grant: a pure state machine. Messages, link results and time in, actions out.

Invariants: a grant is READY only if every batch of the commit is verified and the batches together cover the grant
exactly. A grant is FAILED, and its pages are free, only once this side's link can no longer write them; nothing else
ever writes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pdtransport.protocol.actions import Action, BatchId, Failed, Fence, Limits, Peer, ReadBatch, Ready, Send
from pdtransport.protocol.digest import commit_digest
from pdtransport.protocol.messages import (
    Abort,
    Accept,
    Ack,
    Batch,
    Code,
    Commit,
    Grant,
    Message,
    Nack,
    Received,
    Revoke,
)
from pdtransport.protocol.states import CONSUMER_ENDS, ConsumerState, check_consumer_move

MAX_WANTS = 256  # missing batches that one Nack asks for
POLL_EVERY = 4  # an accepted grant is sent again every POLL_EVERY * retry_s, to notice a lost Abort


@dataclass
class _Slot:
    """One announced batch and how far it has come."""

    batch: Batch
    placing: bool = True
    verified: bool = False
    damage: int = 0  # times it arrived damaged


class ConsumerMachine:
    """Receives the blocks of one grant from one producer.

    Args:
        grant: the grant; its generation identifies this machine.
        peer: the producer.
        block_bytes: by cache group, bytes of one block of this grant (all layers, the granted heads).
    """

    def __init__(self, grant: Grant, peer: Peer, block_bytes: Sequence[int], limits: Limits) -> None:
        self.grant = grant
        self.peer = peer
        self.block_bytes = block_bytes
        self.limits = limits
        self.state = ConsumerState.GRANTING
        self.code: Code | None = None
        self.reason = ""
        self.bytes_verified = 0
        self._slots: dict[int, _Slot] = {}
        self._commit: Commit | None = None
        self._known = False
        self._tokens_done = 0
        self._revoking = False
        self._deadline = 0.0  # of the current state
        self._resend_at = 0.0

    # -- events --------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        """Send the grant. Call once."""
        self._deadline = now + self.limits.answer_s
        self._resend_at = now + self.limits.retry_s
        return [Send(self.peer, self.grant)]

    def on_message(self, message: Message, now: float) -> list[Action]:
        """Handle a message of this machine's generation. Late or repeated messages change nothing."""
        if self.state in CONSUMER_ENDS:
            return self._answer_after_end(message)
        if self.state is ConsumerState.FENCING:
            return []
        if isinstance(message, Accept):
            return self._on_accept(message, now)
        if isinstance(message, Batch):
            return self._on_batch(message, now)
        if isinstance(message, Commit):
            return self._on_commit(message, now)
        if isinstance(message, Abort):
            return self._give_up(message.code, message.reason, tell=False)
        return []

    def placed(self, seq: int, attempt: int, error: str | None, now: float) -> list[Action]:
        """The link has placed and verified a batch, or failed: if ``error`` begins with "damaged", try again."""
        slot = self._slots.get(seq)
        if self.state not in (ConsumerState.RECEIVING, ConsumerState.VERIFYING):
            return []
        if slot is None or not slot.placing or slot.batch.attempt != attempt:
            return []
        slot.placing = False
        self._extend(now)
        if error is None:
            slot.verified = True
            self.bytes_verified += slot.batch.nbytes
            received: Action = Send(self.peer, self._received((seq,)))
            return [received, *self._check_complete()]
        if not error.startswith("damaged"):
            return self._give_up(Code.LINK, error)
        slot.damage += 1
        if slot.damage > self.limits.resends:
            return self._give_up(Code.DAMAGED, f"batch {seq}: {error}, {slot.damage} times")
        self._resend_at = now + self.limits.retry_s
        return [Send(self.peer, self._nack(((seq, attempt + 1),), error))]

    def fenced(self) -> list[Action]:
        """This side's link will no longer write for this grant."""
        if self.state is not ConsumerState.FENCING:
            return []
        self._move(ConsumerState.FAILED)
        assert self.code is not None
        return [Failed(self.grant.transfer, self.code, self.reason)]

    def cancel(self, code: Code, reason: str) -> list[Action]:
        """Give up for a reason on this side: fence, and send Revoke."""
        if self.state in CONSUMER_ENDS or self.state is ConsumerState.FENCING:
            return []
        return self._give_up(code, reason)

    def peer_lost(self, reason: str, code: Code = Code.PEER_LOST) -> list[Action]:
        """The producer is lost; its link channel is closed already."""
        if self.state in CONSUMER_ENDS or self.state is ConsumerState.FENCING:
            return []
        return self._give_up(code, reason, tell=False)

    def tick(self, now: float) -> list[Action]:
        """Send unanswered messages again; give up after a deadline."""
        if self.state in CONSUMER_ENDS:
            return []
        if self.state is not ConsumerState.FENCING and now >= self._deadline:
            return self._give_up(Code.TIMEOUT, self._timeout_text())
        if now < self._resend_at:
            return []
        return self._send_again(now)

    def next_deadline(self) -> float | None:
        if self.state in CONSUMER_ENDS:
            return None
        if self.state is ConsumerState.FENCING:
            return self._resend_at if self._revoking else None
        return min(self._deadline, self._resend_at)

    # -- what messages mean --------------------------------------------------------------------------------------

    def _on_accept(self, accept: Accept, now: float) -> list[Action]:
        first = self.state is ConsumerState.GRANTING
        if first:
            self._move(ConsumerState.WAITING)
            self._resend_at = now + POLL_EVERY * self.limits.retry_s
        known = accept.known or self._known  # Accepts may arrive out of order
        if self.state is ConsumerState.WAITING and (first or known != self._known):
            # First wait for the request to arrive on prefill (arrival_s), then for its turn in the queue (queue_s).
            self._deadline = now + (self.limits.queue_s if known else self.limits.arrival_s)
        if accept.tokens_done > self._tokens_done and self.state is ConsumerState.RECEIVING:
            self._extend(now)
        self._known = known
        self._tokens_done = max(self._tokens_done, accept.tokens_done)
        return []

    def _on_batch(self, batch: Batch, now: float) -> list[Action]:
        slot = self._slots.get(batch.seq)
        if slot is None:
            problem = self._problem_with(batch)
            if problem:
                return self._give_up(Code.MISMATCH, problem)
            self._slots[batch.seq] = _Slot(batch)
        elif slot.verified:
            return [Send(self.peer, self._received((batch.seq,)))]
        elif slot.placing or batch.attempt <= slot.batch.attempt:
            return []
        else:
            if self._shape(batch) != self._shape(slot.batch) or self._problem_with_checksums(batch):
                return self._give_up(Code.MISMATCH, f"batch {batch.seq} changed its shape between attempts")
            slot.batch, slot.placing = batch, True
        if self.state in (ConsumerState.GRANTING, ConsumerState.WAITING):
            self._move(ConsumerState.RECEIVING)
        self._extend(now)
        return [ReadBatch(BatchId(batch.transfer, self.peer, batch.generation, batch.seq, batch.attempt), batch)]

    def _on_commit(self, commit: Commit, now: float) -> list[Action]:
        if self._commit is not None:
            return [] if commit == self._commit else self._give_up(Code.MISMATCH, "two different commits")
        if commit.tokens != self.grant.tokens:
            return self._give_up(
                Code.MISMATCH, f"prefill committed {commit.tokens} tokens, decode asked for {self.grant.tokens}"
            )
        if commit.first_token is not None and not self.grant.first_token:
            return self._give_up(Code.MISMATCH, "the commit names a first token that this side did not ask for")
        if commit.cached_tokens is not None and commit.cached_tokens > commit.tokens:
            return self._give_up(
                Code.MISMATCH, f"the commit names {commit.cached_tokens} cached tokens of {commit.tokens}"
            )
        if commit.batches > self.grant.blocks:
            return self._give_up(
                Code.MISMATCH, f"the commit names {commit.batches} batches for {self.grant.blocks} blocks"
            )
        self._commit = commit
        self._move(ConsumerState.VERIFYING)
        self._deadline = now + self.limits.verify_s
        self._resend_at = now + self.limits.retry_s
        return self._check_complete()

    def _answer_after_end(self, message: Message) -> list[Action]:
        if self.state is ConsumerState.READY and isinstance(message, (Commit, Batch)):
            return [Send(self.peer, self._ack())]
        if self.state is ConsumerState.FAILED and isinstance(message, (Accept, Batch, Commit)):
            return [Send(self.peer, self._revoke())]
        return []

    # -- completion ----------------------------------------------------------------------------------------------

    def _check_complete(self) -> list[Action]:
        commit = self._commit
        if commit is None or len(self._slots) < commit.batches or not all(s.verified for s in self._slots.values()):
            return []
        batches = [self._slots[seq].batch for seq in sorted(self._slots)]
        covered = sum(batch.blocks for batch in batches)
        if len(batches) != commit.batches or (batches and batches[-1].seq != commit.batches - 1):
            return self._give_up(Code.MISMATCH, f"{len(batches)} batches came, the commit names {commit.batches}")
        if covered != self.grant.blocks:
            return self._give_up(Code.MISMATCH, f"{covered} of {self.grant.blocks} granted blocks were committed")
        places = ((batch.seq, *self._shape(batch)) for batch in batches)
        if commit_digest(self.grant.prompt_digest, places, commit.first_token) != commit.digest:
            return self._give_up(Code.MISMATCH, "the commit's digest is not that of the batches received")
        self._move(ConsumerState.READY)
        return [Send(self.peer, self._ack()), Ready(self.grant.transfer, commit.first_token, commit.cached_tokens)]

    def _problem_with(self, batch: Batch) -> str:
        if batch.group >= len(self.grant.groups):
            return f"batch {batch.seq} is of cache group {batch.group}, the grant has {len(self.grant.groups)}"
        granted, end = self.grant.groups[batch.group], batch.first_block + batch.blocks
        if batch.first_block < granted.first_block or end > granted.first_block + granted.blocks:
            return f"batch {batch.seq} holds blocks {batch.first_block}..{end}, outside the grant"
        expected = batch.blocks * self.block_bytes[batch.group]
        if batch.nbytes != expected:
            return f"batch {batch.seq} holds {batch.nbytes} bytes, {expected} were expected"
        for slot in self._slots.values():
            other = slot.batch
            if (
                batch.group == other.group
                and batch.first_block < other.first_block + other.blocks
                and other.first_block < end
            ):
                return f"batches {other.seq} and {batch.seq} overlap"
        return self._problem_with_checksums(batch)

    def _problem_with_checksums(self, batch: Batch) -> str:
        if self.limits.checksums and len(batch.checksums) != 8 * batch.blocks:
            return f"batch {batch.seq} came without its checksums; set integrity.checksum alike on both sides"
        return ""

    @staticmethod
    def _shape(batch: Batch) -> tuple[int, int, int, int]:
        return batch.group, batch.first_block, batch.blocks, batch.nbytes

    # -- giving up -----------------------------------------------------------------------------------------------

    def _give_up(self, code: Code, reason: str, tell: bool = True) -> list[Action]:
        self._move(ConsumerState.FENCING)
        self.code, self.reason = code, reason or code.value
        self._revoking = tell
        actions: list[Action] = [Fence(self.grant.transfer, self.peer, self.grant.generation)]
        if tell:
            actions.append(Send(self.peer, self._revoke()))
        return actions

    def _send_again(self, now: float) -> list[Action]:
        wait = self.limits.retry_s
        actions: list[Action] = []
        if self.state is ConsumerState.FENCING:
            if self._revoking:
                actions = [Send(self.peer, self._revoke())]
        elif self.state is ConsumerState.GRANTING:
            actions = [Send(self.peer, self.grant)]
        else:
            wants = self._wants()
            if wants:
                actions = [Send(self.peer, self._nack(wants, "missing or damaged"))]
            elif self.state is not ConsumerState.VERIFYING:
                wait *= POLL_EVERY
                actions = [Send(self.peer, self.grant)]
        self._resend_at = now + wait
        return actions

    def _wants(self) -> tuple[tuple[int, int], ...]:
        """``(seq, attempt)`` to ask for: damaged batches, and after the commit also those never announced."""
        wants = [
            (seq, slot.batch.attempt + 1) for seq, slot in self._slots.items() if not slot.placing and not slot.verified
        ]
        if self._commit is not None:
            missing = ((seq, 0) for seq in range(self._commit.batches) if seq not in self._slots)
            wants += itertools.islice(missing, MAX_WANTS)
        return tuple(wants)

    def _timeout_text(self) -> str:
        waits = {
            ConsumerState.GRANTING: f"prefill did not answer for {self.limits.answer_s} s (deadlines.answer_s)",
            ConsumerState.RECEIVING: f"no page came for {self.limits.stall_s} s (deadlines.stall_s)",
            ConsumerState.VERIFYING: f"pages not complete {self.limits.verify_s} s after commit (deadlines.verify_s)",
        }
        if self.state is ConsumerState.WAITING:
            if self._known:
                return f"the request queued on prefill for {self.limits.queue_s} s (deadlines.queue_s)"
            return f"the request did not reach prefill within {self.limits.arrival_s} s (deadlines.arrival_s)"
        return waits[self.state]

    # -- small helpers -------------------------------------------------------------------------------------------

    def _extend(self, now: float) -> None:
        """Progress: restart the current deadline."""
        self._deadline = now + (self.limits.verify_s if self.state is ConsumerState.VERIFYING else self.limits.stall_s)

    def _move(self, new: ConsumerState) -> None:
        check_consumer_move(self.state, new)
        self.state = new

    def _ack(self) -> Ack:
        return Ack(transfer=self.grant.transfer, generation=self.grant.generation)

    def _received(self, seqs: tuple[int, ...]) -> Received:
        return Received(transfer=self.grant.transfer, generation=self.grant.generation, seqs=seqs)

    def _nack(self, wants: tuple[tuple[int, int], ...], reason: str) -> Nack:
        return Nack(transfer=self.grant.transfer, generation=self.grant.generation, wants=wants, reason=reason[:200])

    def _revoke(self) -> Revoke:
        return Revoke(
            transfer=self.grant.transfer,
            generation=self.grant.generation,
            code=self.code or Code.CANCELLED,
            reason=self.reason[:200],
        )
