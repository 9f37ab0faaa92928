"""Rules of the protocol, each broken on purpose, and bugs in its drivers: what the simulator must find.

A mutant patches one rule of the real code. *Rogue* ones pair a peer that misbehaves with the rule that should have
stopped it; the rogue alone must not break a promise of its victim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest

from pdtransport.protocol import consumer as consumer_module
from pdtransport.protocol import consumer_table, producer_table
from pdtransport.protocol import producer as producer_module
from pdtransport.protocol.actions import Action, Failed, Fence, Ready, Release, Send
from pdtransport.protocol.consumer import ConsumerMachine
from pdtransport.protocol.consumer_table import ConsumerTable
from pdtransport.protocol.messages import Batch, Code, Commit, Grant, Nack
from pdtransport.protocol.producer import ProducerMachine
from pdtransport.protocol.producer_table import ProducerTable
from pdtransport.protocol.states import ConsumerState, ProducerState
from tests.sim import cases
from tests.sim.driver_bugs import DRIVER_BUGS
from tests.sim.group_bugs import GROUP_BUGS
from tests.sim.plan import Plan, plan_of

Patch = pytest.MonkeyPatch
MAX_SEEDS = 1500


@dataclass(frozen=True)
class Mutant:
    name: str
    apply: Callable[[Patch], None]
    rogue: Callable[[Patch], None] | None = None


def plans() -> Iterator[Plan]:
    """Hand-made cases first, then seeds."""
    for group in (
        cases.lost_once,
        cases.windows,
        cases.shapes,
        cases.foretold,
        cases.set_up,
        cases.claimed,
        cases.gone,
        cases.copied,
        cases.overtaken,
        cases.of_groups,
        cases.given_back_early,
    ):
        for _, plan in group():
            yield plan
    for _, plan, _ in cases.endings():
        yield plan
    for seed in range(MAX_SEEDS):
        yield plan_of(seed)


def _after(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Let ``change(self, result, *args)`` replace what ``owner.name`` returned."""
    original = getattr(owner, name)

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(self, original(self, *args, **kwargs), *args)

    patch.setattr(owner, name, wrapper)


def _without(kind: type, condition: Callable[[Any], bool] = lambda _: True) -> Callable[..., list[Action]]:
    """Forget to send messages of ``kind``."""

    def change(self: Any, actions: list[Action], *_: Any) -> list[Action]:
        return [a for a in actions if not (isinstance(a, Send) and isinstance(a.message, kind) and condition(self))]

    return change


# -- giving pages back ------------------------------------------------------------------------------------------------


def free_on_revoke(patch: Patch) -> None:
    def give_up(self: ConsumerMachine, code: Code, reason: str, tell: bool = True) -> list[Action]:
        actions = original(self, code, reason, tell)
        return [a for a in actions if not isinstance(a, Fence)] + self.fenced()

    original = ConsumerMachine._give_up
    patch.setattr(ConsumerMachine, "_give_up", give_up)


def serve_a_grant_that_was_revoked(patch: Patch) -> None:
    def on_revoke(self: ProducerTable, request: Any, machine: Any, peer: Any, message: Any) -> list[Action]:
        early = self._early.get((message.transfer, peer))
        if early is not None and early[0].generation == message.generation:
            del self._early[message.transfer, peer]
            self._timers.set((message.transfer, peer), None)
        return []

    patch.setattr(ProducerTable, "_on_revoke", on_revoke)


# -- bytes ------------------------------------------------------------------------------------------------------------


def skip_checksum(patch: Patch) -> None:
    original = ConsumerMachine.placed

    def placed(self: ConsumerMachine, seq: int, attempt: int, error: str | None, now: float) -> list[Action]:
        return original(self, seq, attempt, None if error and error.startswith("damaged") else error, now)

    patch.setattr(ConsumerMachine, "placed", placed)


def ack_before_verify(patch: Patch) -> None:
    original = ConsumerMachine._check_complete

    def check(self: ConsumerMachine) -> list[Action]:
        if self._commit is not None and len(self._slots) == self._commit.batches:
            for slot in self._slots.values():
                slot.verified = True
        return original(self)

    patch.setattr(ConsumerMachine, "_check_complete", check)


def ready_without_all_batches(patch: Patch) -> None:
    def check(self: ConsumerMachine) -> list[Action]:
        if self._commit is None or not all(slot.verified for slot in self._slots.values()):
            return []
        self._move(ConsumerState.READY)
        return [Send(self.peer, self._ack()), Ready(self.grant.transfer, self._commit.first_token)]

    patch.setattr(ConsumerMachine, "_check_complete", check)


def ready_with_one_part_of_two(patch: Patch) -> None:
    def change(self: ConsumerTable, actions: list[Action], machine: ConsumerMachine, *_: Any) -> list[Action]:
        live = self._live.get(machine.grant.transfer)
        if live is not None and machine.state is ConsumerState.READY:
            actions.append(self._end(machine.grant.transfer, live))
        return actions

    _after(patch, ConsumerTable, "_run", change)


def another_prompt_will_do(patch: Patch) -> None:
    def change(self: ProducerTable, problem: str, *_: Any) -> str:
        return "" if "different prompts" in problem else problem

    _after(patch, ProducerTable, "_problem_with", change)


def ignore_preemption(patch: Patch) -> None:
    patch.setattr(ProducerMachine, "_rewind", lambda self, now: [])


# -- generations ------------------------------------------------------------------------------------------------------


def consumer_believes_any_generation(patch: Patch) -> None:
    def on_message(self: ConsumerTable, peer: Any, message: Any, now: float) -> list[Action]:
        machine = self._machine(message.transfer, peer)
        if machine is None:
            return self._answer_for_the_ended(peer, message)
        return self._run(machine, machine.on_message(message, now))

    patch.setattr(ConsumerTable, "on_message", on_message)


def producer_believes_any_generation(patch: Patch) -> None:
    original = ProducerTable.on_message

    def on_message(self: ProducerTable, peer: Any, message: Any, now: float) -> list[Action]:
        request = self._requests.get(message.transfer)
        machine = request.grants.get(peer) if request else None
        if machine is not None and hasattr(message, "generation"):
            return self._run(machine, machine.on_message(message, now))
        return original(self, peer, message, now)

    patch.setattr(ProducerTable, "on_message", on_message)


# -- holding and releasing --------------------------------------------------------------------------------------------


def release_before_ack(patch: Patch) -> None:
    patch.setattr(producer_table, "PRODUCER_ENDS", producer_table.PRODUCER_ENDS | {ProducerState.COMMITTING})


def release_twice(patch: Patch) -> None:
    def change(self: ProducerTable, actions: list[Action], *_: Any) -> list[Action]:
        return [*actions, *(a for a in actions if isinstance(a, Release))]

    _after(patch, ProducerTable, "_maybe_release", change)


def never_release(patch: Patch) -> None:
    def change(self: ProducerTable, actions: list[Action], *_: Any) -> list[Action]:
        return [a for a in actions if not isinstance(a, Release)]

    _after(patch, ProducerTable, "_maybe_release", change)


def claims_are_kept_for_ever(patch: Patch) -> None:
    original = ProducerTable._on_claim

    def on_claim(self: ProducerTable, request: Any, peer: Any, message: Any, now: float) -> list[Action]:
        actions = original(self, request, peer, message, now)
        if request is None:
            self._timers.set((message.transfer, producer_table._Claimant(peer)), None)
        return actions

    patch.setattr(ProducerTable, "_on_claim", on_claim)


def early_grants_are_kept_for_ever(patch: Patch) -> None:
    def change(self: ProducerTable, actions: list[Action], *_: Any) -> list[Action]:
        for key in self._early:
            self._timers.set(key, None)
        return actions

    _after(patch, ProducerTable, "_on_grant", change)


def holds_never_end(patch: Patch) -> None:
    patch.setattr(ProducerTable, "_hold_ended", lambda self, transfer, request, now: [])


# -- backpressure -----------------------------------------------------------------------------------------------------


def ignore_window(patch: Patch) -> None:
    def change(self: ProducerMachine, _: None, *__: Any) -> None:
        self._window = 1 << 60

    _after(patch, ProducerMachine, "__init__", change)


def credit_is_given_twice(patch: Patch) -> None:
    def change(self: ProducerMachine, actions: list[Action], message: Any, *_: Any) -> list[Action]:
        self._in_flight -= self.block_bytes[0] * len(message.seqs)
        return actions

    _after(patch, ProducerMachine, "_on_received", change)


# -- words that get lost ----------------------------------------------------------------------------------------------


def grant_is_said_once(patch: Patch) -> None:
    _after(patch, ConsumerMachine, "_send_again", _without(Grant))


def nack_is_not_answered(patch: Patch) -> None:
    patch.setattr(ProducerMachine, "_on_nack", lambda self, message, now: [])


def nack_is_said_never(patch: Patch) -> None:
    _after(patch, ConsumerMachine, "_send_again", _without(Nack))
    _after(patch, ConsumerMachine, "placed", _without(Nack))


def batch_is_said_once(patch: Patch) -> None:
    _after(patch, ProducerMachine, "_send_again", _without(Batch))


def commit_is_said_once(patch: Patch) -> None:
    _after(patch, ProducerMachine, "_send_again", _without(Commit))


def ack_is_said_once(patch: Patch) -> None:
    patch.setattr(ConsumerTable, "_answer_for_the_ended", lambda self, peer, message: [])


def commit_before_the_first_token(patch: Patch) -> None:
    """Prefill commits once its pages are out, and tells its router a token that no commit names."""
    original = ProducerMachine._maybe_commit

    def maybe_commit(self: ProducerMachine, now: float) -> list[Action]:
        self._finished = True
        return original(self, now)

    patch.setattr(ProducerMachine, "_maybe_commit", maybe_commit)


def first_token_is_lost(patch: Patch) -> None:
    def change(self: ConsumerMachine, actions: list[Action], *_: Any) -> list[Action]:
        return [replace(a, first_token=None) if isinstance(a, Ready) else a for a in actions]

    _after(patch, ConsumerMachine, "_check_complete", change)


def no_deadlines(patch: Patch) -> None:
    def change(self: ConsumerMachine, _: Any, *__: Any) -> Any:
        self._deadline = float("inf")
        return _

    for name in ("start", "on_message", "placed"):
        _after(patch, ConsumerMachine, name, change)


def silent_failure(patch: Patch) -> None:
    def change(self: ConsumerTable, action: Action, *_: Any) -> Action:
        return replace(action, reason="") if isinstance(action, Failed) else action

    _after(patch, ConsumerTable, "_end", change)


# -- peers that misbehave ---------------------------------------------------------------------------------------------


def rogue_overlap(patch: Patch) -> None:
    """Prefill says its second batch again under a sequence number of its own, over blocks that it sent before."""

    def change(self: ProducerMachine, actions: list[Action], *_: Any) -> list[Action]:
        extra = [
            Send(a.peer, a.message.model_copy(update={"seq": a.message.seq + 100}))
            for a in actions
            if isinstance(a, Send) and isinstance(a.message, Batch) and a.message.seq == 1
        ]
        return actions + extra

    _after(patch, ProducerMachine, "pushed", change)


def skip_overlap_check(patch: Patch) -> None:
    def change(self: ConsumerMachine, problem: str, *_: Any) -> str:
        return "" if "overlap" in problem else problem

    _after(patch, ConsumerMachine, "_problem_with", change)


def rogue_outside(patch: Patch) -> None:
    """Prefill announces blocks that were not granted: before the first one, or behind the last."""

    def change(self: ProducerMachine, actions: list[Action], *_: Any) -> list[Action]:
        return [
            Send(a.peer, a.message.model_copy(update={"first_block": _outside(self.grant, a.message)}))
            if isinstance(a, Send) and isinstance(a.message, Batch) and a.message.seq == 0
            else a
            for a in actions
        ]

    _after(patch, ProducerMachine, "pushed", change)


def _outside(grant: Grant, batch: Batch) -> int:
    before = batch.first_block - batch.blocks - 1
    return before if before >= 0 else batch.first_block + grant.groups[batch.group].blocks


def skip_grant_check(patch: Patch) -> None:
    def change(self: ConsumerMachine, problem: str, *_: Any) -> str:
        return "" if "outside" in problem else problem

    _after(patch, ConsumerMachine, "_problem_with", change)


def rogue_swap(patch: Patch) -> None:
    """Prefill commits its first batch only, and calls that everything."""
    original = producer_module.commit_digest

    def digest(prompt_digest: bytes, places: Any, first_token: int | None) -> bytes:
        return original(prompt_digest, list(places)[:1], first_token)

    patch.setattr(producer_module, "commit_digest", digest)
    commit = ProducerMachine._maybe_commit

    def maybe_commit(self: ProducerMachine, now: float) -> list[Action]:
        actions = commit(self, now)
        if self._commit is not None and self._commit.batches > 1:
            self._commit = self._commit.model_copy(update={"batches": 1})
            actions = [
                Send(self.peer, self._commit) if isinstance(a, Send) and isinstance(a.message, Commit) else a
                for a in actions
            ]
        return actions

    patch.setattr(ProducerMachine, "_maybe_commit", maybe_commit)


def rogue_other_group(patch: Patch) -> None:
    """Prefill says of what it sends that it is of the next cache group, or of one that does not exist."""

    def change(self: ProducerMachine, actions: list[Action], *_: Any) -> list[Action]:
        return [
            Send(a.peer, a.message.model_copy(update={"group": a.message.group + 1}))
            if isinstance(a, Send) and isinstance(a.message, Batch)
            else a
            for a in actions
        ]

    _after(patch, ProducerMachine, "pushed", change)


def take_batches_of_any_group(patch: Patch) -> None:
    """Decode checks each batch as one of the group that has what the batch names."""
    original = ConsumerMachine._problem_with

    def problem_with(self: ConsumerMachine, batch: Batch) -> str:
        each = [batch.model_copy(update={"group": group}) for group in range(len(self.grant.groups))]
        problems = [original(self, one) for one in each]
        return "" if "" in problems else problems[0]

    patch.setattr(ConsumerMachine, "_problem_with", problem_with)


def rogue_twins(patch: Patch) -> None:
    """Prefill takes one cache group for the other where they are alike: it says so of both, and of all batches."""

    def change(self: ProducerMachine, actions: list[Action], *_: Any) -> list[Action]:
        alike = len(self.grant.groups) == 2 and len({*self.grant.groups, *self.block_bytes}) == 2
        return [
            Send(a.peer, a.message.model_copy(update={"group": 1 - a.message.group}))
            if alike and isinstance(a, Send) and isinstance(a.message, Batch)
            else a
            for a in actions
        ]

    _after(patch, ProducerMachine, "pushed", change)


def digest_without_the_group(patch: Patch) -> None:
    for module in (consumer_module, producer_module):
        patch.setattr(module, "commit_digest", partial(_digest_without_the_group, module.commit_digest))


def _digest_without_the_group(digest: Callable[..., bytes], prompt_digest: bytes, places: Any, token: Any) -> bytes:
    return digest(prompt_digest, [(seq, 0, *rest) for seq, _, *rest in places], token)


def skip_completeness_check(patch: Patch) -> None:
    patch.setattr(consumer_table.ConsumerMachine, "_check_complete", _naive_complete)


def _naive_complete(self: ConsumerMachine) -> list[Action]:
    """What a machine without paired checks would do: believe the commit's count."""
    commit = self._commit
    verified = itertools.takewhile(lambda seq: seq in self._slots and self._slots[seq].verified, itertools.count())
    if commit is None or len(list(verified)) < commit.batches:
        return []
    self._move(ConsumerState.READY)
    return [Send(self.peer, self._ack()), Ready(self.grant.transfer, self._commit.first_token)]


MUTANTS = [
    *(
        Mutant(rule.__name__, rule)
        for rule in (
            free_on_revoke,
            serve_a_grant_that_was_revoked,
            skip_checksum,
            ack_before_verify,
            ready_without_all_batches,
            ready_with_one_part_of_two,
            another_prompt_will_do,
            ignore_preemption,
            consumer_believes_any_generation,
            producer_believes_any_generation,
            release_before_ack,
            release_twice,
            never_release,
            claims_are_kept_for_ever,
            early_grants_are_kept_for_ever,
            holds_never_end,
            ignore_window,
            credit_is_given_twice,
            grant_is_said_once,
            nack_is_not_answered,
            nack_is_said_never,
            batch_is_said_once,
            commit_is_said_once,
            ack_is_said_once,
            commit_before_the_first_token,
            first_token_is_lost,
            no_deadlines,
            silent_failure,
        )
    ),
    Mutant("skip_overlap_check", skip_overlap_check, rogue_overlap),
    Mutant("skip_grant_check", skip_grant_check, rogue_outside),
    Mutant("skip_completeness_check", skip_completeness_check, rogue_swap),
    Mutant("take_batches_of_any_group", take_batches_of_any_group, rogue_other_group),
    Mutant("digest_without_the_group", digest_without_the_group, rogue_twins),
    *(Mutant(name, apply) for name, apply in GROUP_BUGS.items()),
    *(Mutant(name, apply) for name, apply in DRIVER_BUGS.items()),
]
