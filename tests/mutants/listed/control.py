"""Bugs in who is whom on the control channel."""

from __future__ import annotations

from tests.mutants.place import Mutant, bugs

BUGS: list[Mutant] = [
    *bugs(
        "pdtransport.control.handshake",
        "control_channel",
        (
            "rank_equal_to_world_is_welcome",
            "check",
            "theirs.rank >= theirs.world",
            "theirs.rank > theirs.world",
            "a_rank_is_one_of_its_world",
        ),
    ),
    *bugs(
        "pdtransport.control.directory",
        "directory",
        (
            "another_key_comes_as_a_live_process",
            "Directory.refusal",
            "route.key != key",
            "False",
            "a_process_comes_with_one_key",
        ),
        (
            "what_is_left_of_a_restarted_process_counts_as_live",
            "Directory._look_at_names",
            "each.heard_after(shared.since + SHARED_NAME_AFTER_S)",
            "True",
            "of_two_live_processes_of_one_name_both_are_told_and_named_once",
        ),
        (
            "claimants_of_a_name_are_not_told",
            "Directory._complain",
            "self.send(each.id, frame)",
            "None",
            "of_two_live_processes_of_one_name_both_are_told_and_named_once",
        ),
        (
            "one_peer_too_many",
            "Directory.refusal",
            "len(self._peers) >= MAX_PEERS",
            "len(self._peers) > MAX_PEERS",
            "peers_are_bounded_but_a_restart_finds_its_place",
        ),
        (
            "silent_peer_counts_as_dead",
            "Directory.tick",
            "ended=not silent",
            "ended=True",
            "silence_ends_a_peer_when_its_last_connection_is_silent",
        ),
    ),
    *bugs(
        "pdtransport.control.listener",
        "control_channel",
        (
            "ping_of_another_incarnation_is_answered",
            "ControlListener._on_ping",
            "ping.incarnation != connection.peer.incarnation",
            "False",
            "a_ping_in_another_process_name_is_no_heartbeat",
        ),
    ),
    *bugs(
        "pdtransport.control.reach",
        "reach",
        (
            "address_of_a_name_is_not_checked",
            "Reach._ask_name",
            "named=name in self._names",
            "named=True",
            "a_name_that_is_not_listed_counts_by_its_address",
        ),
        (
            "everybody_is_called_where_no_peer_is_named",
            "Reach.__init__",
            "self._peers is None and not strict",
            "self._peers is None",
            "no_other_machine_is_called_where_none_is_named",
        ),
        (
            "mapped_addresses_are_others",
            "Reach._why_not",
            'getattr(where, "ipv4_mapped", None) or where',
            "where",
            "addresses_are_called_that_the_setting_covers",
        ),
    ),
    *bugs(
        "pdtransport.control.dialer",
        "control_channel",
        (
            "queue_of_a_lost_peer_is_kept",
            "Dialer.unbind",
            "self._dial_at = -math.inf  #",
            "pass  #",
            "words_for_a_peer_that_fell_silent_are_dropped_with_its_connection",
        ),
    ),
    *bugs(
        "pdtransport.control.status",
        "directory",
        (
            "status_is_answered_without_limit",
            "Allowance.take",
            "return False",
            "return True",
            "an_allowance_is_spent_and_comes_back",
        ),
    ),
    *bugs(
        "pdtransport.control.handshake",
        "control_channel",
        (
            "protocol_of_another_version_is_welcome",
            "check",
            "theirs.protocol != PROTOCOL_VERSION",
            "False",
            "a_hello_of_another_protocol_version_or_of_our_own_name_is_refused",
        ),
        (
            "two_workers_have_one_name",
            "check",
            "(theirs.engine, theirs.rank) == (me.engine, me.rank)",
            "False",
            "a_hello_of_another_protocol_version_or_of_our_own_name_is_refused",
        ),
        (
            "hello_that_no_peer_reads_is_said",
            "checked_identity",
            "size > MAX_STRANGER_FRAME",
            "False",
            "a_worker_that_no_peer_could_welcome_does_not_start",
        ),
    ),
    *bugs(
        "pdtransport.control.listener",
        "control_channel",
        (
            "long_frame_of_a_stranger_is_decoded",
            "ControlListener._on_stranger",
            "len(body) > MAX_STRANGER_FRAME",
            "False",
            "a_stranger_is_not_listened_to_before_it_said_hello",
        ),
        (
            "stranger_speaks_of_transfers",
            "ControlListener._on_stranger",
            "kind in _FROM_PEERS",
            "False",
            "a_stranger_is_not_listened_to_before_it_said_hello",
        ),
    ),
]
