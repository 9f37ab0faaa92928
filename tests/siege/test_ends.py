"""What ends beside those who are served: none of it is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.siege import attacks_ends
from tests.siege.attacks_ends import EndsEffect
from tests.siege.bystander import in_the_suite

pytestmark = pytest.mark.xdist_group("launch")  # takes ports of the same range


def test_connections_to_the_pools_api_leave_descriptors_to_clients(tmp_path: Path) -> None:
    """More connections than descriptors: engines' lookups go on, the next engine gets in (libzmq would end the process
    if no descriptor were left for it), and the log stays empty."""
    effect = in_the_suite(attacks_ends.pool_api_without_descriptors, tmp_path)
    assert isinstance(effect, EndsEffect)
    assert effect.kept
    assert effect.lines == []


@pytest.mark.long  # tests/processes/test_launch_ends.py has the short form
def test_a_killed_pool_ends_nobodys_request(tmp_path: Path) -> None:
    """Every request beside the pool's death is answered; what is said of it are its end and its new beginning, and no
    memory is left behind."""
    effect = in_the_suite(attacks_ends.pool_killed_under_a_launch, tmp_path, lines_at_most=2)
    assert isinstance(effect, EndsEffect)
    assert set(effect.answers) == {200}
    assert "was ended by SIGKILL" in effect.lines[0]
    assert effect.shared == []


def test_a_second_launch_takes_nothing_of_the_first(tmp_path: Path) -> None:
    """A launch that fails for its pool runs already has changed no file of the one that has it."""
    effect = in_the_suite(attacks_ends.second_launch_of_a_pool, tmp_path, lines_at_most=0)
    assert isinstance(effect, EndsEffect)
    assert set(effect.answers) == {200}
    assert effect.kept
