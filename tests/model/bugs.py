"""Deliberate bugs, each with the case in which the explorer has to find it. Most are those of the simulator, whose
schedules are drawn; here the shortest way to each is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

from pdtransport.protocol.actions import Action
from pdtransport.protocol.consumer import ConsumerMachine
from pdtransport.protocol.consumer_table import ConsumerTable
from pdtransport.protocol.producer import ProducerMachine
from pdtransport.protocol.producer_table import ProducerTable
from pdtransport.protocol.states import ConsumerState
from tests.model import cases
from tests.model.case import Case
from tests.model.explore import Explorer
from tests.sim import mutants as rules

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Bug:
    apply: Callable[[Patch], None]
    case: Case
    says: str  # of what is found

    @property
    def name(self) -> str:
        return self.apply.__name__


def a_generation_is_used_twice(patch: Patch) -> None:
    """Each grant has the same generation: words about an earlier grant of the id pass for words about this one."""
    original = ConsumerTable.begin

    def begin(self: ConsumerTable, *args: Any) -> list[Action]:
        self._generations = count(101)
        return original(self, *args)

    patch.setattr(ConsumerTable, "begin", begin)


def a_fence_is_not_waited_for(patch: Patch) -> None:
    """Pages are given back while the link still copies into them."""
    original = ConsumerTable._run

    def run(self: ConsumerTable, machine: ConsumerMachine, actions: list[Action]) -> list[Action]:
        done = original(self, machine, actions)
        if machine.state is ConsumerState.FENCING:
            done += self.fenced(machine.grant.transfer, machine.peer, machine.grant.generation)
        return done

    patch.setattr(ConsumerTable, "_run", run)


def a_restart_counts_from_the_first_generation(patch: Patch) -> None:
    original = ConsumerTable.__init__
    patch.setattr(ConsumerTable, "__init__", lambda self, limits, first_generation: original(self, limits, 101))


def words_queue_for_a_restarted_process(patch: Patch) -> None:
    """What was said to a process that died reaches the next one of its name."""
    patch.setattr(Explorer, "heard", lambda self, letter, view: letter.sender in view.up)
    patch.setattr(Explorer, "_kept_over_restart", lambda self, state, at: state.letters)


def a_grant_is_served_after_its_end(patch: Patch) -> None:
    """The producer remembers no transfer that is over."""
    patch.setattr(ProducerTable, "_add_tombstone", lambda self, transfer, code, reason: None)


def another_groups_blocks_are_final(patch: Patch) -> None:
    """After a preemption a batch goes out again once so many blocks of any group are computed."""
    patch.setattr(ProducerMachine, "_has_pages", lambda self, out: out.first_block + out.blocks <= max(self._ready))


def _case(name: str) -> Case:
    return next(case for case in cases.FULL if case.name == name)


_ONE, _AGAIN = _case(cases.ONE_NAME), _case(cases.AGAIN_NAME)
_REVOKED, _NOT_LIVE, _FOR_EVER = "after its grant was revoked", "a grant that is not live changed", "holds for ever"
BUGS = [
    Bug(a_fence_is_not_waited_for, _ONE, "while its pages are still written"),
    Bug(a_generation_is_used_twice, _AGAIN, "a second time"),
    Bug(a_restart_counts_from_the_first_generation, _case(cases.CONSUMER_NAME), "a second time"),
    Bug(words_queue_for_a_restarted_process, _case(cases.PRODUCER_NAME), _NOT_LIVE),
    Bug(a_grant_is_served_after_its_end, _ONE, _REVOKED),
    Bug(rules.serve_a_grant_that_was_revoked, _ONE, _REVOKED),
    Bug(rules.consumer_believes_any_generation, _AGAIN, _NOT_LIVE),
    Bug(rules.producer_believes_any_generation, _AGAIN, _NOT_LIVE),
    Bug(rules.skip_checksum, _ONE, "believes page 0"),
    Bug(rules.ready_with_one_part_of_two, _case(cases.PARTS_NAME), "believes page 0"),
    Bug(another_groups_blocks_are_final, _case(cases.GROUPS_NAME), "which it does not hold"),
    Bug(rules.release_twice, _ONE, "Release of t"),
    Bug(rules.early_grants_are_kept_for_ever, _ONE, _FOR_EVER),
    Bug(rules.holds_never_end, _ONE, _FOR_EVER),
    Bug(rules.no_deadlines, _ONE, _FOR_EVER),
]
