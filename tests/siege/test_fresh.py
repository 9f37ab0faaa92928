"""Attacks that were made up from the documentation alone: nobody waits for them, and nothing of them stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.siege import attacks_fresh as router
from tests.siege import attacks_fresh_peers as peers
from tests.siege.bystander import Effect, in_the_suite

Attack = Callable[[Path], Effect]
SHORT: list[Attack] = [router.names_without_end, router.tenants_salts, peers.planted_fifos]
LONG: list[Attack] = [
    router.expected_and_upgraded,
    router.half_closed,
    router.many_readers_of_state,
    router.odd_json,
    router.odd_keys,
    router.pipelined_and_unread,
    router.request_smuggling,
    peers.engines_without_end,
    peers.grants_without_end,
    peers.half_handshakes,
    peers.pool_clients_that_hold,
    peers.pool_hears_odd_words,
    peers.pool_locks_taken,
    peers.same_identity,
    peers.status_asked_without_end,
]


@pytest.mark.parametrize("attack", SHORT, ids=lambda attack: attack.__name__)
def test_nobody_is_held_up(attack: Attack, tmp_path: Path) -> None:
    """A bystander waits at most three times as long, memory comes back, and one line of log tells of it; that answers
    are right, and that nothing reaches whom it must not, is asserted by each attack itself."""
    in_the_suite(attack, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("attack", LONG, ids=lambda attack: attack.__name__)
def test_nobody_is_held_up_for_long(attack: Attack, tmp_path: Path) -> None:
    """The same promise, under attacks that take their time."""
    in_the_suite(attack, tmp_path)


@pytest.mark.long
def test_a_peer_that_lies_fails_its_own_transfers_alone(tmp_path: Path) -> None:
    """Each lie ends in a failed transfer or in the right bytes; those that a bystander takes meanwhile arrive. The log
    has a line or two for each transfer of the liar's."""
    effect = peers.peers_that_lie(tmp_path)
    assert not Effect(effect.attack, effect.idle_s, effect.under_s).complaint()
    assert len(effect.lines) <= 4 * len(peers.lies())


@pytest.mark.long
@pytest.mark.xfail(reason="a MiB a stream is still there seconds after its client has gone")
def test_nobody_waits_for_streams_that_are_hardly_read(tmp_path: Path) -> None:
    """The same promise; of memory it is not kept yet."""
    in_the_suite(router.unread_streams, tmp_path)


@pytest.mark.long
def test_nobody_waits_for_the_widest_bodies(tmp_path: Path) -> None:
    """The same promise."""
    in_the_suite(router.wide_bodies, tmp_path)
