"""Bugs in the connector."""

from __future__ import annotations

from tests.mutants.place import Mutant, bugs

BUGS: list[Mutant] = [
    *bugs(
        "pdtransport.engine.crowding",
        "engine_crowding",
        (
            "a_crowded_prefill_keeps_all_it_has",
            "Crowding.let_go",
            "not still or not self._kept",
            "True",
            "prefill_that_stands_still_lets_go_of_the_newest_finished_prompts_one_by_one",
        ),
        (
            "what_decode_took_is_let_go",
            "Crowding.freed",
            "self._kept.pop(req_id, None)",
            "pass",
            "what_decode_took_is_not_let_go",
        ),
    ),
    *bugs(
        "pdtransport.vllm.patches.base",
        "vllm_patches",
        (
            "hook_takes_hold_of_whatever_is_there",
            "Patch._examine",
            "why = self.check()",
            'why = ""',
            "another_function_is_not_taken_hold_of",
        ),
        (
            "hook_can_not_be_switched_off",
            "Patch._examine",
            "is False",
            "is None",
            "each_switch_switches_its_hook_off",
        ),
        (
            "calls_may_come_in_any_order",
            "expect",
            "places != sorted(places)",
            "False",
            "a_check_minds_what_the_hook_relies_on_alone",
        ),
    ),
    *bugs(
        "pdtransport.vllm.patches.stale_blocks",
        "vllm_patches",
        (
            "cache_that_may_not_be_emptied_is_trusted",
            "StaleBlocks._evict",
            '(status := PATCH.state())["state"] == FAILED',
            "False",
            "without_stale_blocks_what_the_cache_holds_after_a_change_is_nobodys",
        ),
    ),
    *bugs(
        "pdtransport.vllm.patches.engine_probe",
        "vllm_engine_probe",
        (
            "whoever_asks_puts_a_question_to_the_engine",
            "EngineProbe.answers",
            "self._asked is None or self._asked.done()",
            "True",
            "one_question_is_with_the_engine_however_many_ask",
        ),
    ),
    *bugs(
        "pdtransport.vllm.patches.withheld",
        "vllm_received",
        (
            "blocks_of_an_untrusted_producer_are_cached",
            "Withheld.bind",
            "None if request in self._requests else enter(request, *how, **more)",
            "enter(request, *how, **more)",
            "blocks_of_untrusted_producers_never_enter_the_prefix_cache",
        ),
    ),
    *bugs(
        "pdtransport.engine.trusted_producers",
        "vllm_received",
        (
            "one_rank_of_a_trusted_producer_is_enough",
            "Producers.cover",
            "range(port, port + ranks)",
            "(port,)",
            "producers_are_known_by_where_they_are_reached",
        ),
    ),
    *bugs(
        "pdtransport.engine.wakeups",
        "engine_wakeups",
        (
            "words_are_read_as_long_as_they_come",
            "_heard",
            "range(MAX_HEARD)",
            "iter(int, 1)",
            "a_call_reads_a_bounded_number_of_words",
        ),
    ),
    *bugs(
        "pdtransport.engine.params",
        "engine_params",
        ("last_rank_has_no_port", "ConsumeParams._has_ports", "last > MAX_PORT", "False", "all_ranks_have_a_port"),
    ),
    *bugs(
        "pdtransport.engine.consuming",
        "vllm_callees",
        (
            "who_leaves_has_anybody_told",
            "ConsumingRequests._tell_declined",
            "found.remote_host, found.remote_port",
            "params.remote_host, found.remote_port",
            "prefill_that_is_named_hears_of_a_request_that_is_gone",
        ),
    ),
    *bugs(
        "pdtransport.engine.consuming",
        "vllm_scheduler",
        (
            "fewer_tokens_than_offered_are_the_last_ones",
            "ConsumingRequests.allocated",
            "handed - expected if whole else 0",
            "handed - expected",
            "fewer_tokens_than_offered_end_neither_the_engine_nor_in_a_gap",
        ),
    ),
    *bugs(
        "pdtransport.engine.callees",
        "vllm_callees",
        (
            "heads_need_not_divide",
            "Callees.find",
            "self._heads % params.tp_size",
            "False",
            "a_model_is_split_over_ranks_that_divide_its_heads",
        ),
    ),
    *bugs(
        "pdtransport.vllm.request_reader",
        "vllm_bounds",
        (
            "content_key_is_without_salt",
            "prompt_digest_of",
            "request.cache_salt",
            "None",
            "a_tenants_salt_is_part_of_what_a_prompt_is",
        ),
        (
            "keys_are_without_adapter",
            "RequestReader.read",
            "request.num_prompt_tokens, request.lora_request",
            "request.num_prompt_tokens, None",
            "an_adapter_goes_with_what_asks_for_a_key",
        ),
        (
            "embeddings_are_handed_over",
            "_of_embeddings",
            "request.prompt_token_ids is None or",
            "",
            "a_prompt_of_embeddings_is_not_handed_over",
        ),
        (
            "request_of_one_token_goes_on_from_prefills",
            "RequestReader._may_go_on",
            "request.max_tokens > 1",
            "True",
            "a_request_of_one_token_computes_it_itself",
        ),
    ),
    *bugs(
        "pdtransport.engine.producing",
        "vllm_bounds",
        (
            "prefills_key_is_without_adapter",
            "ProducingRequests.add",
            "tokens, adapter)",
            "tokens, None)",
            "an_adapter_goes_with_what_asks_for_a_key",
        ),
    ),
    *bugs(
        "pdtransport.engine.consuming",
        "vllm_bounds",
        (
            "decodes_key_is_without_adapter",
            "ConsumingRequests._take",
            "entry.adapter",
            "None",
            "an_adapter_goes_with_what_asks_for_a_key",
        ),
        (
            "taken_transfers_are_remembered_for_ever",
            "ConsumingRequests._note_taken",
            "len(self._taken) > self._tombstones",
            "False",
            "transfers_that_were_taken_are_remembered_within_a_bound",
        ),
    ),
    *bugs(
        "pdtransport.vllm.scheduler",
        "vllm_bounds",
        (
            "last_token_need_not_be_computed",
            "_delivered",
            "request.num_computed_tokens >= tokens",
            "request.num_computed_tokens >= tokens - 1",
            "only_a_prompt_that_was_computed_to_its_last_token_is_handed_over",
        ),
    ),
    *bugs(
        "pdtransport.vllm.scheduler",
        "vllm_first_token",
        (
            "promise_that_nobody_heard_binds",
            "SchedulerSide.update_output",
            "entry.first_token and promised and",
            "entry.first_token and",
            "a_promise_that_nobody_can_have_heard_binds_nobody",
        ),
        (
            "one_worker_without_a_grant_unbinds_all",
            "SchedulerSide.update_output",
            "< self._ranks",
            "< 1",
            "a_promise_counts_if_one_worker_may_have_sent_it",
        ),
    ),
    *bugs(
        "pdtransport.engine.adapted",
        "adapters",
        (
            "prompt_digest_is_without_adapter",
            "Adapted._complete",
            "with_adapter(command.prompt_digest, digest)",
            "command.prompt_digest",
            "keys_wait_for_the_adapter_and_are_of_its_content",
        ),
    ),
]
