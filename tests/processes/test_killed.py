"""Whoever survives a peer that is killed in the middle of its batches serves on, and holds nothing for it."""

from __future__ import annotations

import pytest

from tests.processes.killed import SIDES, Device, Survivor

KILLS = 2  # `python -m tests.processes.killed` does more of them


@pytest.mark.parametrize(
    ("link", "device"),
    [
        pytest.param("cma", "cpu", marks=pytest.mark.more),
        ("ucx", "cpu"),
        pytest.param("cuda_ipc", "twin", marks=pytest.mark.more),
    ],
)
def test_the_survivor_of_killed_peers_serves_on_and_leaks_nothing(link: str, device: Device) -> None:
    """Promises 1 to 3: wrong bytes are never accepted, no page is written once its transfer ended, every transfer ends
    by itself, nothing is held for the dead, and the next transfer with another peer goes well."""
    with Survivor(link, device, seed=1) as survivor:
        tallies = [survivor.round(SIDES[number % 2]) for number in range(KILLS)]
        survivor.no_leak()
    assert any(tally.cut for tally in tallies), f"no transfer was under way: nothing was shown: {tallies}"
