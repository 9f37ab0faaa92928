"""The control port under attack: a live peer is served on, and what the attackers get is counted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pdtransport.control import limits
from tests.siege import attacks_control as attacks
from tests.siege.attacks_control import Siege, besiege, worker_with_a_log
from tests.siege.bystander import Effect, in_the_suite

Besieged = Callable[..., Siege]


@pytest.fixture
def besieged(tmp_path: Path) -> Besieged:
    """Attacks a new worker."""

    def run(attack: Callable[[int], object], until: tuple[str, int]) -> Siege:
        sieges: list[Siege] = []

        def tried(folder: Path) -> Effect:
            with worker_with_a_log(folder) as (worker, log):
                sieges.append(besiege(attack, worker, log, until))
            return sieges[-1].effect

        in_the_suite(tried, tmp_path)
        return sieges[-1]

    return run


def test_hellos_in_a_live_peers_name(besieged: Besieged) -> None:
    """Whoever takes the name of a worker that lives changes nothing for it; the one line names both and the remedy."""
    siege = besieged(attacks._say_hello_in_a_live_peers_name, ("names_shared", 1))
    assert siege.counters["names_shared"] == 1
    (line,) = siege.effect.lines
    assert "live processes call themselves bystander rank 0: 127.0.0.1:" in line
    assert "its own engine_id" in line


def test_hellos_with_what_the_status_tells(besieged: Besieged) -> None:
    """An incarnation is known to peers alone: nobody passes for a live process, nor ends it by a count of breaks."""
    besieged(attacks._come_as_the_process_that_the_status_tells_of, ("frames_in", 100))


def test_large_frames_before_hello(besieged: Besieged) -> None:
    """What is just under the bound is decoded no further than a Hello goes, and a few of it end the connection."""
    siege = besieged(attacks._flood_with_large_frames, ("callers_cut", attacks.AT_ONCE))
    largest = limits.STRANGER_BYTES // limits.MAX_STRANGER_FRAME
    assert siege.counters["garbage"] <= (siege.counters["callers_cut"] + attacks.AT_ONCE) * (
        largest + limits.LISTEN_QUEUE_FRAMES
    )


def test_messages_without_an_end(besieged: Besieged) -> None:
    """Their bytes are counted where nobody sees a frame."""
    siege = besieged(attacks._send_messages_without_an_end, ("callers_cut", attacks.AT_ONCE))
    assert siege.counters["garbage"] == 0


def test_status_and_watches_without_a_pause(besieged: Besieged) -> None:
    """Askers have a budget of frames, too."""
    siege = besieged(attacks._ask_for_the_status_without_a_pause, ("callers_cut", attacks.AT_ONCE))
    assert siege.counters["status_limited"] > 0


def test_idle_connections(besieged: Besieged) -> None:
    """Two thousand of them take up a bounded part of a worker's descriptors, and a newcomer finds its place."""
    siege = besieged(attacks._hold_idle_connections, ("callers_cut", attacks.IDLE - limits.MAX_STRANGERS))
    assert siege.descriptors < attacks.IDLE


def test_connections_that_come_and_go(besieged: Besieged) -> None:
    """Nothing is kept of them."""
    besieged(attacks._connect_and_leave, ("handshakes_failed", 100))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user(besieged: Besieged) -> None:
    """Without keys a connection of another user's is closed at its first frame, which nobody decodes."""
    siege = besieged(attacks.come_as_another_user, ("callers_refused", attacks.AT_ONCE))
    assert siege.counters["garbage"] == siege.counters["refused"] == 0
    (line,) = siege.effect.lines
    assert f"it belongs to user {attacks.NOBODY}, this process to user 0" in line
    assert "pdlaunch keys" in line
