"""Bugs in the router."""

from __future__ import annotations

from tests.mutants.place import Mutant, bugs

BUGS: list[Mutant] = [
    *bugs(
        "pdtransport.router.health",
        "router_engines",
        (
            "engines_are_never_asked",
            "Prober._silence",
            "not seconds or endpoint in self._mute",
            "True",
            "stopped_engine_makes_its_server_unhealthy_although_its_health_path_says_200",
        ),
        (
            "stopped_engines_are_asked_ever_more_rarely",
            "Prober._watch",
            "endpoint in self._silent",
            "False",
            "stopped_engine_is_asked_again_without_growing_pauses",
        ),
    ),
    *bugs(
        "pdtransport.router.relay",
        "router_stops",
        (
            "streams_end_without_a_word_when_the_router_stops",
            "Relay._told_stopped",
            "not stopped()",
            "True",
            "open_stream_ends_with_an_error_event_when_the_router_stops",
        ),
    ),
    *bugs(
        "pdtransport.serving.errors",
        "router_stops",
        (
            "requests_end_without_an_answer_when_the_router_stops",
            "json_errors",
            "not stopped()",
            "True",
            "pending_requests_get_a_503_when_the_router_stops",
        ),
    ),
    *bugs(
        "pdtransport.router.tenants",
        "router_tenants",
        (
            "keys_without_tenants_share_prefixes",
            "Tenants.__init__",
            "len(keys) > 1 and not share",
            "False",
            "keys_without_tenants_share_nothing_unless_told_so",
        ),
    ),
    *bugs(
        "pdtransport.router.ladder",
        "router_bounds",
        (
            "fallback_forgets_which_decode_it_tried",
            "FallbackPolicy._after_decode",
            "rungs.avoid.add(error.endpoint)",
            "pass",
            "a_retry_goes_to_another_server_though_the_prefix_is_on_the_one_that_failed",
        ),
        (
            "fallback_goes_to_the_decode_that_failed",
            "FallbackPolicy._place",
            "usable(self._fleet.decode, rungs.avoid) or ",
            "",
            "a_retry_goes_to_another_server_though_the_prefix_is_on_the_one_that_failed",
        ),
        (
            "fallback_goes_to_the_prefill_that_failed",
            "FallbackPolicy._place",
            "usable(fit, rungs.avoid) or ",
            "",
            "a_retry_goes_to_another_server_though_the_prefix_is_on_the_one_that_failed",
        ),
    ),
    *bugs(
        "pdtransport.router.admission",
        "router_bounds",
        (
            "bytes_of_bodies_are_unbounded",
            "Admission.reserve",
            "self.buffered + nbytes > self._settings.max_buffered_bytes",
            "False",
            "bodies_under_way_hold_no_more_bytes_than_their_bound",
        ),
    ),
    *bugs(
        "pdtransport.router.placement.least_loaded",
        "router_placement",
        (
            "margin_of_affinity_is_ignored",
            "LeastLoaded.choose",
            "had.load - least.load <= self._margin[role]",
            "True",
            "shared_prefix_returns_to_its_server_until_that_is_a_margin_busier",
        ),
    ),
    *bugs(
        "pdtransport.router.policy_thread",
        "router_policies",
        (
            "every_request_waits_for_a_policy_that_hangs",
            "PolicyThread.choose",
            "self._late is not None and not self._late.answer.done()",
            "False",
            "a_late_policy_holds_up_one_request_and_is_asked_again_once_it_is_through",
        ),
        (
            "questions_that_were_given_up_are_answered_all_the_same",
            "PolicyThread._ask",
            "question.given_up",
            "False",
            "a_late_policy_holds_up_one_request_and_is_asked_again_once_it_is_through",
        ),
    ),
    *bugs(
        "pdtransport.router.placer",
        "router_policies",
        (
            "any_answer_of_a_policy_will_do",
            "_named",
            "endpoint.view.name == name",
            "True",
            "an_answer_that_names_no_candidate_is_not_followed",
        ),
    ),
    *bugs(
        "pdtransport.router.attempt",
        "router_bounds",
        (
            "clients_faults_eject_a_server",
            "Attempt._blame",
            "error.status not in _CLIENT_FAULTS",
            "True",
            "a_clients_own_fault_counts_against_no_server",
        ),
    ),
    *bugs(
        "pdtransport.router.endpoints",
        "router_failures",
        (
            "learned_address_outlives_its_process",
            "Endpoint.failed",
            "self.forget()",
            "pass",
            "unreachable_prefill_is_marked_and_does_not_cost_the_request",
        ),
    ),
    *bugs(
        "pdtransport.router.hints",
        "router_bounds",
        (
            "hints_hold_any_number_of_bytes",
            "Hinter.offer",
            "self._bytes + len(body) > MAX_QUEUED_BYTES",
            "False",
            "hints_that_wait_hold_no_more_bytes_than_their_bound",
        ),
    ),
    *bugs(
        "pdtransport.router.tenants",
        "router_tenants",
        (
            "clients_salt_replaces_the_tenants",
            "_salter",
            "hmac.new(of_tenant,",
            "hmac.new(secret.encode(),",
            "salts_differ_by_tenant_by_secret_and_by_the_clients_own_and_are_stable",
        ),
    ),
    *bugs(
        "pdtransport.router.health",
        "router_bounds",
        (
            "redirect_of_a_server_is_healthy",
            "Prober.check",
            "status == 200",
            "status < 400",
            "only_200_says_that_a_server_is_healthy",
        ),
    ),
]
