"""Bugs in how state machines and drivers tell the cache groups of a model apart, which the simulator must find."""

from __future__ import annotations

from pdtransport.engine.block_tables import BlockTables
from pdtransport.kv.groups import CacheGroups
from pdtransport.protocol.consumer import ConsumerMachine
from pdtransport.protocol.producer import ProducerMachine
from pdtransport.protocol.producer_table import ProducerTable
from pdtransport.transfer.consumer import ConsumerDriver
from pdtransport.transfer.producer import ProducerDriver
from tests.sim.driver_bugs import rewritten

# Name, class, method, what stands there, what stands there instead.
_BUGS: list[tuple[str, type, str, str, str]] = [
    (
        "overlap_is_looked_for_across_groups",
        ConsumerMachine,
        "_problem_with",
        "batch.group == other.group",
        "True",
    ),
    (
        "commit_once_the_first_group_is_out",
        ProducerMachine,
        "_maybe_commit",
        "self._next_block != self._end",
        "self._next_block[0] != self._end[0]",
    ),
    ("other_groups_blocks_are_final", ProducerMachine, "_has_pages", "self._ready[out.group]", "max(self._ready)"),
    (
        "pushed_as_far_as_the_first_group_is_final",
        ProducerMachine,
        "_next_batch",
        "min(self._ready[group], self._end[group])",
        "min(self._ready[0], self._end[group])",
    ),
    (
        "heads_of_the_first_group_are_pushed",
        ProducerMachine,
        "_push",
        "self.grant.groups[out.group]",
        "self.grant.groups[0]",
    ),
    (
        "bytes_of_the_first_group_are_counted",
        ProducerMachine,
        "_next_batch",
        "blocks * self.block_bytes[group]",
        "blocks * self.block_bytes[0]",
    ),
    (
        "first_group_alone_ends_with_the_prompt",
        ProducerTable,
        "_problem_with",
        "zip(grant.groups, request.blocks, strict=True)",
        "zip(grant.groups, request.blocks[:1] * len(request.blocks))",
    ),
    ("gone_is_not_looked_at", ProducerDriver, "_push", "if GONE in pages:", "if False:"),
    ("pages_of_the_first_group_are_sent", ProducerDriver, "_push", "source.pages[push.group]", "source.pages[0]"),
    ("runs_of_the_first_group_are_sent", ProducerDriver, "_push", "self._groups[push.group]", "self._groups[0]"),
    ("runs_of_the_first_group_are_read_into", ConsumerDriver, "_runs", "self._groups[what.group]", "self._groups[0]"),
    (
        "pages_of_the_first_group_are_read_into",
        ConsumerDriver,
        "_runs",
        "sink.wanted.groups[what.group]",
        "sink.wanted.groups[0]",
    ),
    (
        "heads_of_the_first_group_alone",
        ConsumerDriver,
        "_producers",
        "for sources in by_group)",
        "for sources in by_group[:1] * len(by_group))",
    ),
    (
        "final_by_the_first_groups_block_size",
        CacheGroups,
        "final_blocks",
        "tokens // group.block_size for",
        "tokens // self.groups[0].block_size for",
    ),
    ("all_tokens_are_handed_over", BlockTables, "handed", "max(1, tokens - 1)", "tokens"),
    ("blocks_behind_the_window_are_asked_for", BlockTables, "missing", "ids[first] == GONE", "False"),
]

GROUP_BUGS = {name: rewritten(*where) for name, *where in _BUGS}
