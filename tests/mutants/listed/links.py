"""Bugs in how bytes move, and which link moves them."""

from __future__ import annotations

from tests.mutants.place import Mutant, bugs

BUGS: list[Mutant] = [
    *bugs(
        "pdtransport.links.reading",
        "link_reading",
        (
            "checksum_is_compared_on_its_low_word",
            "PullChannel._place",
            "found != expected",
            "(found ^ expected) & 0xFFFFFFFF",
            "a_checksum_that_differs_in_any_bit_is_damage",
        ),
        (
            "offer_of_other_length_is_read",
            "PullChannel._start",
            "stream_bytes(remote) != total",
            "False",
            "an_offer_of_another_length_is_not_read",
        ),
        (
            "fence_lets_queued_reads_go_on",
            "PullChannel.fence",
            "read.key not in fenced",
            "True",
            "a_fenced_batch_is_never_written_and_others_are",
        ),
    ),
    *bugs(
        "pdtransport.links.negotiate",
        "link_choice",
        (
            "required_link_is_one_of_many",
            "choose",
            "[require] if require else",
            "[require] if False else",
            "a_required_link_is_the_only_one_that_is_tried",
        ),
        (
            "link_that_can_not_attach_is_left_open",
            "choose",
            "channel.close()",
            "pass",
            "a_link_that_can_not_attach_is_closed_before_the_next_is_tried",
        ),
    ),
    *bugs(
        "pdtransport.links.mapping",
        "link_choice",
        (
            "unsealed_memory_is_mapped",
            "_open",
            "if not sealed:",
            "if False:",
            "only_memory_that_can_not_shrink_is_mapped",
        ),
    ),
    *bugs(
        "pdtransport.links.negotiate",
        "link_choice",
        (
            "link_for_other_memory_is_opened",
            "open_links",
            "if memory not in kind.memory:",
            "if False:",
            "links_for_memory_of_the_other_kind_are_passed_over",
        ),
        (
            "links_stay_open_when_the_worker_does_not_start",
            "open_links",
            "link.close()",
            "pass",
            "a_link_that_crashes_leaves_no_other_open",
        ),
    ),
    *bugs(
        "pdtransport.links.registry",
        "link_choice",
        (
            "others_are_opened_beside_the_required_link",
            "wanted",
            "if settings.require else tuple",
            "if False else tuple",
            "a_required_link_is_the_only_one_that_is_opened",
        ),
    ),
    *bugs(
        "pdtransport.links.registry",
        "link_registry",
        (
            "link_that_needs_checksums_goes_without",
            "check_links",
            "if unsafe:",
            "if False:",
            "links_that_need_checksums_are_refused_without",
        ),
        (
            "pool_moves_chunks_unverified_over_links_that_need_checksums",
            "host_links",
            "(checksums or not kind.needs_checksums)",
            "True",
            "the_pools_chunks_take_links_for_host_memory",
        ),
        (
            "link_by_another_name_is_taken",
            "load",
            "stated[0] != name",
            "False",
            "a_class_that_does_not_say_what_it_can_is_refused",
        ),
    ),
]
