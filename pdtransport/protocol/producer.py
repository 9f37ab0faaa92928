"""The producer's (prefill) side of one grant: a pure state machine. Messages, link results and time in, actions out.

Invariant: never more bytes in flight than the window that both sides allow (one batch may always go).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdtransport.protocol.actions import Action, BatchId, Limits, OfferBatch, Peer, Send, WithdrawBatch
from pdtransport.protocol.digest import commit_digest
from pdtransport.protocol.messages import (
    MAX_ATTEMPTS,
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
from pdtransport.protocol.states import PRODUCER_ENDS, ProducerState, check_producer_move

MAX_RETRY_FACTOR = 16  # an unanswered message is sent again with exponential backoff, up to this times retry_s


@dataclass
class _Out:
    """One batch and how far it has come."""

    seq: int
    group: int
    first_block: int
    blocks: int
    nbytes: int
    attempt: int = 0
    announced: Batch | None = None  # None while the link stages the batch, or until its pages are recomputed
    staging: bool = False
    said: bool = False  # at least one attempt was announced
    refused: int = 0  # attempts that arrived damaged
    received: bool = False


class ProducerMachine:
    """Sends the blocks of one grant to one consumer.

    Args:
        grant: the consumer's grant.
        block_bytes: by cache group, bytes of one block, all layers, for the granted heads.
        tokens: the request's prompt length.
    """

    def __init__(self, grant: Grant, peer: Peer, block_bytes: Sequence[int], tokens: int, limits: Limits) -> None:
        self.grant = grant
        self.peer = peer
        self.block_bytes = block_bytes
        self.tokens = tokens
        self.limits = limits
        self.state = ProducerState.STREAMING
        self.code: Code | None = None
        self.reason = ""
        self.bytes_pushed = 0
        self._batch_blocks = [max(1, limits.batch_bytes // nbytes) for nbytes in block_bytes]
        # One batch may always go: a window smaller than a batch would block forever.
        sizes = zip(self._batch_blocks, block_bytes, grant.groups, strict=True)
        largest = max((blocks * nbytes for blocks, nbytes, group in sizes if group.blocks), default=0)
        self._window = max(min(limits.window_bytes, grant.window_bytes), largest)
        # By cache group, as is `_ready`: leading blocks of the request whose KV is final.
        self._end = [group.first_block + group.blocks for group in grant.groups]
        self._next_block = [group.first_block for group in grant.groups]
        self._ready: Sequence[int] = [0] * len(grant.groups)
        self._out: list[_Out] = []
        self._in_flight = 0
        self._commit: Commit | None = None
        self._finished = False
        self._first_token: int | None = None
        self.cached_tokens: int | None = None  # prompt tokens that prefill found in its caches; goes into the commit
        self._tokens_done = 0
        self._deadline = float("inf")
        self._resend_at = float("inf")
        self._retry = limits.retry_s

    # -- events --------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        return [Send(self.peer, self._accept()), *self._advance(now)]

    def pages_ready(self, blocks: Sequence[int], tokens_done: int, now: float) -> list[Action]:
        """The first ``blocks[group]`` blocks of the request are final (fewer than before after a preemption)."""
        if self.state in PRODUCER_ENDS:
            return []
        self._tokens_done = tokens_done
        rewound = any(final < before for final, before in zip(blocks, self._ready, strict=True))
        self._ready = blocks
        if rewound:
            return self._rewind(now)
        return self._advance(now)

    def finish(self, first_token: int | None, now: float) -> list[Action]:
        """The engine has finished the request. Sends the commit if the commit waited for the first token."""
        self._finished = True
        if self.grant.first_token:
            self._first_token = first_token
        if self.state in PRODUCER_ENDS:
            return []
        return self._maybe_commit(now)

    def pushed(self, seq: int, attempt: int, checksums: bytes, offer: bytes, now: float) -> list[Action]:
        """The link has staged a batch: announce it."""
        out = self._find(seq)
        if self.state in PRODUCER_ENDS:
            return []
        if out is None or not out.staging or out.attempt != attempt:
            return []
        out.staging = False
        out.said = True
        out.announced = Batch(
            transfer=self.grant.transfer,
            generation=self.grant.generation,
            seq=seq,
            attempt=attempt,
            group=out.group,
            first_block=out.first_block,
            blocks=out.blocks,
            nbytes=out.nbytes,
            checksums=checksums,
            offer=offer,
        )
        self.bytes_pushed += out.announced.nbytes
        self._arm_retry(now)
        return [Send(self.peer, out.announced), *self._advance(now)]

    def push_failed(self, seq: int, attempt: int, error: str) -> list[Action]:
        out = self._find(seq)
        if out is None or not out.staging or out.attempt != attempt:
            return []
        return self.cancel(Code.LINK, error)

    def on_message(self, message: Message, now: float) -> list[Action]:
        """Handle a message of this machine's generation. Late or repeated messages change nothing."""
        if self.state in PRODUCER_ENDS:
            return self._answer_after_end(message)
        if isinstance(message, Grant):
            return [Send(self.peer, self._accept())]
        if isinstance(message, Received):
            return self._on_received(message, now)
        if isinstance(message, Nack):
            return self._on_nack(message, now)
        if isinstance(message, Ack):
            return self._on_ack()
        if isinstance(message, Revoke):
            code = Code.PEER_CANCELLED if message.code is Code.CANCELLED else message.code
            return self._stop(code, message.reason)
        return []

    def cancel(self, code: Code, reason: str) -> list[Action]:
        """Give up for a reason on this side: send Abort."""
        if self.state in PRODUCER_ENDS:
            return []
        return [*self._stop(code, reason), Send(self.peer, self._abort(code, reason))]

    def peer_lost(self, reason: str) -> list[Action]:
        """The consumer is lost; its link channel is closed already."""
        if self.state in PRODUCER_ENDS:
            return []
        return self._stop(Code.PEER_LOST, reason)

    def tick(self, now: float) -> list[Action]:
        if self.state in PRODUCER_ENDS:
            return []
        if now >= self._deadline:
            return self.cancel(Code.TIMEOUT, self._timeout_text())
        if now < self._resend_at:
            return []
        return self._send_again(now)

    def next_deadline(self) -> float | None:
        if self.state in PRODUCER_ENDS:
            return None
        soonest = min(self._deadline, self._resend_at)
        return None if soonest == float("inf") else soonest

    def upcoming(self, since: Sequence[int], blocks: Sequence[int]) -> list[tuple[int, int, int]]:
        """Batches, as ``(group, first block, blocks)``, that :meth:`pages_ready` would push for ``blocks``.

        Blocks before ``since``, by group, count as pushed already. Changes no state.
        """
        if self.state is not ProducerState.STREAMING:
            return []
        found = []
        for group, most in enumerate(self._batch_blocks):
            first, limit = max(self._next_block[group], since[group]), min(blocks[group], self._end[group])
            found += [(group, at, min(most, limit - at)) for at in range(first, limit, most)]
        return found

    # -- pushing -------------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> list[Action]:
        """Push the final blocks that fit into the window; commit after the last block."""
        actions: list[Action] = []
        for out in self._out:  # new attempts whose pages are recomputed by now
            if out.announced is None and not out.staging and not out.received and self._has_pages(out):
                actions.append(self._push(out))
        while (new := self._next_batch()) is not None:
            self._out.append(new)
            self._next_block[new.group] += new.blocks
            self._in_flight += new.nbytes
            actions.append(self._push(new))
        return actions + self._maybe_commit(now)

    def _next_batch(self) -> _Out | None:
        """The next batch of final blocks; None if there is none, or it does not fit into the window."""
        for group, first in enumerate(self._next_block):
            limit = min(self._ready[group], self._end[group])
            if first < limit:
                blocks = min(self._batch_blocks[group], limit - first)
                nbytes = blocks * self.block_bytes[group]
                fits = self._in_flight + nbytes <= self._window
                return _Out(len(self._out), group, first, blocks, nbytes) if fits else None
        return None

    def _push(self, out: _Out) -> OfferBatch:
        out.staging = True
        group = self.grant.groups[out.group]
        return OfferBatch(
            id=self._id(out),
            group=out.group,
            first_block=out.first_block,
            blocks=out.blocks,
            head_lo=group.head_lo,
            head_hi=group.head_hi,
        )

    def _maybe_commit(self, now: float) -> list[Action]:
        if self.state is not ProducerState.STREAMING or self._next_block != self._end:
            return []
        if any(out.announced is None and not out.received for out in self._out):
            return []
        if self.grant.first_token and not self._finished:
            return []  # the commit may have to name the first token, which only finish() brings
        places = [(out.seq, out.group, out.first_block, out.blocks, out.nbytes) for out in self._out]
        self._commit = Commit(
            transfer=self.grant.transfer,
            generation=self.grant.generation,
            batches=len(places),
            tokens=self.tokens,
            digest=commit_digest(self.grant.prompt_digest, places, self._first_token),
            first_token=self._first_token,
            cached_tokens=self.cached_tokens,
        )
        self._move(ProducerState.COMMITTING)
        self._deadline = now + self.limits.ack_s
        self._retry = self.limits.retry_s
        self._resend_at = now + self._retry
        return [Send(self.peer, self._commit)]

    def _rewind(self, now: float) -> list[Action]:
        """The engine took pages back (preemption).

        Batches that the consumer has received are safe. The others are staged again once their pages are recomputed; a
        consumer that still reads the old pages finds a wrong checksum. Without checksums it could not tell, so an
        announced batch ends the transfer.
        """
        lost = [out for out in self._out if not out.received and not self._has_pages(out)]
        if not self.limits.checksums and any(out.announced is not None for out in lost):
            return self.cancel(Code.PREEMPTED, "prefill was preempted before its pages were delivered")
        return self._restage(lost, now)

    def _restage(self, lost: list[_Out], now: float) -> list[Action]:
        """Withdraw the batches ``lost``, and push each again as a new attempt once its pages are final."""
        actions: list[Action] = []
        for out in lost:
            if out.announced is None and not out.staging:
                continue  # this attempt has not begun
            if out.attempt >= MAX_ATTEMPTS:
                return [*actions, *self.cancel(Code.PREEMPTED, f"batch {out.seq} was taken back {out.attempt} times")]
            actions.append(self._unstage(out))
            out.announced, out.staging = None, False
            out.attempt += 1
        return actions + self._advance(now)

    # -- what messages mean --------------------------------------------------------------------------------------

    def _on_received(self, message: Received, now: float) -> list[Action]:
        actions: list[Action] = []
        for seq in message.seqs:
            out = self._find(seq)
            if out is None or out.received or not out.said:
                continue  # never announced: the consumer can't have verified it
            out.received, out.staging = True, False
            self._in_flight -= out.nbytes
            actions.append(self._unstage(out))
            self._extend(now)
        return actions + self._advance(now)

    def _on_nack(self, message: Nack, now: float) -> list[Action]:
        actions: list[Action] = []
        for seq, wanted in message.wants:
            out = self._find(seq)
            if out is None or out.received or out.staging or out.announced is None:
                continue
            if wanted <= out.attempt:
                actions.append(Send(self.peer, out.announced))
            elif wanted == out.attempt + 1:
                out.refused += 1
                if out.refused > self.limits.resends:
                    return [*actions, *self.cancel(Code.DAMAGED, f"batch {seq} was refused {out.refused} times")]
                actions += self._restage([out], now)
        return actions

    def _on_ack(self) -> list[Action]:
        if self.state is not ProducerState.COMMITTING:
            return self.cancel(Code.MISMATCH, "decode acked what was not committed")
        self._move(ProducerState.DONE)
        return self._unstage_all()

    def _answer_after_end(self, message: Message) -> list[Action]:
        if self.state is ProducerState.ENDED and isinstance(message, (Grant, Nack, Received)):
            return [Send(self.peer, self._abort(self.code or Code.CANCELLED, self.reason))]
        return []

    # -- ending --------------------------------------------------------------------------------------------------

    def _stop(self, code: Code, reason: str) -> list[Action]:
        self._move(ProducerState.ENDED)
        self.code, self.reason = code, reason or code.value
        return self._unstage_all()

    def _unstage_all(self) -> list[Action]:
        left = [out for out in self._out if (out.staging or out.announced is not None) and not out.received]
        return [self._unstage(out) for out in left]

    def _unstage(self, out: _Out) -> WithdrawBatch:
        return WithdrawBatch(self._id(out))

    def _id(self, out: _Out) -> BatchId:
        return BatchId(self.grant.transfer, self.peer, self.grant.generation, out.seq, out.attempt)

    def _send_again(self, now: float) -> list[Action]:
        self._retry = min(self._retry * 2, MAX_RETRY_FACTOR * self.limits.retry_s)
        self._resend_at = now + self._retry
        if self._commit is not None:
            return [Send(self.peer, self._commit)]
        for out in self._out:  # the oldest batch without a receipt: its Batch or its Received may be lost
            if out.announced is not None and not out.received:
                return [Send(self.peer, out.announced)]
        self._resend_at, self._deadline = float("inf"), float("inf")
        return []

    def _timeout_text(self) -> str:
        if self.state is ProducerState.COMMITTING:
            return f"decode did not ack for {self.limits.ack_s} s (deadlines.ack_s)"
        return f"decode took no page for {self.limits.stall_s} s (deadlines.stall_s)"

    # -- small helpers -------------------------------------------------------------------------------------------

    def _arm_retry(self, now: float) -> None:
        """Start the timers of an announced batch that waits for its receipt, unless they are running."""
        if self._resend_at == float("inf"):
            self._retry = self.limits.retry_s
            self._resend_at = now + self._retry
        if self._deadline == float("inf"):
            self._deadline = now + self.limits.stall_s

    def _extend(self, now: float) -> None:
        """A receipt came: restart the timers if other batches still wait for theirs, else stop them."""
        self._retry = self.limits.retry_s
        self._resend_at = now + self._retry
        if self.state is ProducerState.COMMITTING:
            self._deadline = now + self.limits.ack_s
        elif any(out.announced is not None and not out.received for out in self._out):
            self._deadline = now + self.limits.stall_s
        else:
            self._resend_at = self._deadline = float("inf")

    def _has_pages(self, out: _Out) -> bool:
        return out.first_block + out.blocks <= self._ready[out.group]

    def _find(self, seq: int) -> _Out | None:
        return self._out[seq] if seq < len(self._out) else None

    def _move(self, new: ProducerState) -> None:
        check_producer_move(self.state, new)
        self.state = new

    def _accept(self) -> Accept:
        return Accept(
            transfer=self.grant.transfer, generation=self.grant.generation, known=True, tokens_done=self._tokens_done
        )

    def _abort(self, code: Code, reason: str) -> Abort:
        return Abort(
            transfer=self.grant.transfer,
            generation=self.grant.generation,
            code=Code.PEER_CANCELLED if code is Code.CANCELLED else code,
            reason=reason[:200],
        )
