"""All states of a hand-off and all moves between them, as tables.

The machines in :mod:`consumer` and :mod:`producer` refuse a move that is not listed here.
:mod:`pdtransport.protocol.diagram` draws ``docs/protocol.md`` from these tables and from the states' comments.
"""

from __future__ import annotations

from enum import Enum


class ConsumerState(str, Enum):
    """States of one grant on the consumer: from one decode worker to one prefill worker."""

    GRANTING = "granting"  # the grant is sent; no answer yet
    WAITING = "waiting"  # accepted; no batch yet (the request is queued or being computed on prefill)
    RECEIVING = "receiving"  # batches are arriving
    VERIFYING = "verifying"  # committed; the last batches are being placed and verified
    READY = "ready"  # every page is here and verified: the pages belong to the engine
    FENCING = "fencing"  # given up; waiting until this side's link can no longer write the pages
    FAILED = "failed"  # given up; the pages are free


class ProducerState(str, Enum):
    """States of one grant on the producer: pages that a prefill worker owes one decode worker."""

    STREAMING = "streaming"  # announcing pages as prefill finishes them
    COMMITTING = "committing"  # all pages announced; waiting for the ack
    DONE = "done"  # acked
    ENDED = "ended"  # revoked, aborted or the peer is lost


CONSUMER_MOVES: dict[ConsumerState, dict[ConsumerState, str]] = {
    ConsumerState.GRANTING: {
        ConsumerState.WAITING: "Accept",
        ConsumerState.RECEIVING: "Batch",
        ConsumerState.VERIFYING: "Commit",
        ConsumerState.FENCING: "Abort, cancel, deadline, peer lost",
    },
    ConsumerState.WAITING: {
        ConsumerState.RECEIVING: "Batch",
        ConsumerState.VERIFYING: "Commit",
        ConsumerState.FENCING: "Abort, cancel, deadline, peer lost",
    },
    ConsumerState.RECEIVING: {
        ConsumerState.VERIFYING: "Commit",
        ConsumerState.FENCING: "Abort, damage, cancel, deadline, peer lost",
    },
    ConsumerState.VERIFYING: {
        ConsumerState.READY: "all verified / Ack",
        ConsumerState.FENCING: "Abort, damage, cancel, deadline, peer lost",
    },
    ConsumerState.FENCING: {ConsumerState.FAILED: "link fenced"},
    ConsumerState.READY: {},
    ConsumerState.FAILED: {},
}

PRODUCER_MOVES: dict[ProducerState, dict[ProducerState, str]] = {
    ProducerState.STREAMING: {
        ProducerState.COMMITTING: "last batch announced / Commit",
        ProducerState.ENDED: "Revoke, cancel, deadline, peer lost",
    },
    ProducerState.COMMITTING: {
        ProducerState.DONE: "Ack",
        ProducerState.ENDED: "Revoke, cancel, deadline, peer lost",
    },
    ProducerState.DONE: {},
    ProducerState.ENDED: {},
}

CONSUMER_ENDS = frozenset(state for state, moves in CONSUMER_MOVES.items() if not moves)
PRODUCER_ENDS = frozenset(state for state, moves in PRODUCER_MOVES.items() if not moves)


class IllegalMove(AssertionError):
    """A machine tried a move that its table does not list. Always a bug in this package."""


def check_consumer_move(old: ConsumerState, new: ConsumerState) -> None:
    if new not in CONSUMER_MOVES[old]:
        raise IllegalMove(f"consumer {old.value} -> {new.value}")


def check_producer_move(old: ProducerState, new: ProducerState) -> None:
    if new not in PRODUCER_MOVES[old]:
        raise IllegalMove(f"producer {old.value} -> {new.value}")
