"""Bugs in the state machines, their tables and messages. More, which the simulator must find: tests/sim/mutants.py."""

from __future__ import annotations

from tests.mutants.place import Mutant, bugs

BUGS: list[Mutant] = [
    *bugs(
        "pdtransport.protocol.consumer",
        "protocol_bounds",
        (
            "answer_deadline_is_never_armed",
            "ConsumerMachine.start",
            "now + self.limits.answer_s",
            'float("inf")',
            "a_prefill_that_answers_nothing_fails_the_transfer_in_time",
        ),
        (
            "verify_deadline_is_never_armed",
            "ConsumerMachine._on_commit",
            "now + self.limits.verify_s",
            'float("inf")',
            "pages_that_are_not_there_after_the_commit_fail_the_transfer_in_time",
        ),
        (
            "commit_of_other_token_count_is_believed",
            "ConsumerMachine._on_commit",
            "commit.tokens != self.grant.tokens",
            "False",
            "a_commit_of_another_length_is_refused",
        ),
        (
            "batch_of_other_length_is_placed",
            "ConsumerMachine._problem_with",
            "batch.nbytes != expected",
            "False",
            "a_batch_of_another_length_is_never_placed",
        ),
        (
            "batch_may_change_its_shape",
            "ConsumerMachine._on_batch",
            "self._shape(batch) != self._shape(slot.batch)",
            "False",
            "the_next_attempt_at_a_batch_is_of_the_same_blocks",
        ),
        (
            "one_resend_fewer",
            "ConsumerMachine.placed",
            "slot.damage > self.limits.resends",
            "slot.damage >= self.limits.resends",
            "a_damaged_batch_is_sent_again_as_often_as_is_set",
        ),
    ),
    *bugs(
        "pdtransport.protocol.producer",
        "protocol_bounds",
        (
            "decodes_window_is_ignored",
            "ProducerMachine.__init__",
            "min(limits.window_bytes, grant.window_bytes)",
            "limits.window_bytes",
            "prefill_sends_no_more_than_decodes_window",
        ),
    ),
    *bugs(
        "pdtransport.protocol.producer_table",
        "protocol_bounds",
        (
            "grant_of_fewer_blocks_is_served",
            "ProducerTable._problem_with",
            "wanted.first_block + wanted.blocks != blocks",
            "False",
            "a_grant_that_ends_elsewhere_than_the_prompt_is_refused",
        ),
        (
            "claims_are_unbounded",
            "ProducerTable._on_claim",
            "len(self._early_claims) < self.limits.max_transfers",
            "True",
            "claims_for_requests_that_never_come_are_bounded",
        ),
    ),
    *bugs(
        "pdtransport.protocol.consumer_table",
        "protocol_first_token",
        (
            "different_first_tokens_are_ready",
            "ConsumerTable._end",
            "len(live.first_tokens) > 1",
            "False",
            "workers_that_name_different_tokens_hand_nothing_over",
        ),
    ),
    *bugs(
        "pdtransport.protocol.timers",
        "protocol_rules",
        (
            "old_times_wake_again",
            "TimerQueue.due",
            "self._when.get(key) == when",
            "key in self._when",
            "a_claim_of_the_other_consumer_still_counts_after_one_granted",
        ),
    ),
    *bugs(
        "pdtransport.protocol.digest",
        "protocol_first_token",
        (
            "first_token_is_not_in_the_digest",
            "commit_digest",
            "first_token is not None",
            "False",
            "a_token_that_was_not_asked_for_or_not_meant_is_refused",
        ),
    ),
]
