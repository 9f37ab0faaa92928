"""The wake-up socket and the calls of decode under attack: nobody else waits, nothing grows, one line of log."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from pdtransport.control.limits import MAX_TRIED
from pdtransport.engine import wakeups
from tests.siege import attacks_doors
from tests.siege.bystander import Effect, in_the_suite


@pytest.mark.skipif(os.getuid() != 0, reason="only root can attack as another user")
def test_another_user_costs_the_scheduler_nothing(tmp_path: Path) -> None:
    """The kernel takes none of its words, so a look at the bell is as short as ever."""
    in_the_suite(attacks_doors.another_user_floods_the_wake_up_socket, tmp_path)


def test_a_flood_of_words_costs_a_call_a_bounded_time(tmp_path: Path) -> None:
    """From this user's own processes, which are heard: a call reads so many of them and no more. It took 260 to 450 ms
    of the engine's step before."""
    in_the_suite(attacks_doors.this_user_floods_the_wake_up_socket, tmp_path)
    assert wakeups.MAX_HEARD == 1024


def test_hosts_elsewhere_cost_those_who_are_served_nothing(tmp_path: Path) -> None:
    """No worker hears of such a host, no name is looked up."""
    effect = in_the_suite(attacks_doors.a_client_names_hosts_elsewhere, tmp_path)
    assert len(effect.lines) == 1
    assert "control.peers" in effect.lines[0]


def test_dead_ports_cost_those_who_are_served_nothing(tmp_path: Path) -> None:
    """So many endpoints are tried at once, and hand-overs from prefill that is there go on beside them."""
    most = 0

    def attack(_folder: Path) -> Effect:
        nonlocal most
        effect, most = attacks_doors.dead_ports()
        return effect

    in_the_suite(attack, tmp_path)
    assert most <= MAX_TRIED + 1
