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
            "if name in elsewhere:",
            "if False:",
            "links_for_memory_of_the_other_kind_are_passed_over",
        ),
        (
            "others_are_opened_beside_the_required_link",
            "open_links",
            "if settings.require else dict.fromkeys(settings.order)",
            "if False else dict.fromkeys(settings.order)",
            "a_required_link_is_the_only_one_that_is_opened",
        ),
        (
            "links_stay_open_when_the_worker_does_not_start",
            "open_links",
            "link.close()",
            "pass",
            "ucx_can_be_left_out_or_insisted_on",
        ),
    ),
]
