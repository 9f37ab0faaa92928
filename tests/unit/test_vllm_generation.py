"""What the scheduler kept of weights that are gone is nobody's: neither handed over nor stored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from pdtransport.settings import Settings
from pdtransport.vllm.patches.stale_blocks import StaleBlocks


class Manager:
    """A prefix cache of ten blocks."""

    def __init__(self) -> None:
        self.block_pool = SimpleNamespace(blocks=list(range(10)))
        self.evicted: list[set[int]] = []

    def evict_blocks(self, blocks: set[int]) -> None:
        self.evicted.append(blocks)


@pytest.fixture
def manager() -> Manager:
    return Manager()


@pytest.fixture
def stale(manager: Manager) -> StaleBlocks:
    made = StaleBlocks()
    made.bind(manager, Settings())
    return made


def test_without_a_change_nothing_is_done(stale: StaleBlocks, manager: Manager) -> None:
    """Requests begin on cached prefixes, and leave their blocks in the cache."""
    stale.began(["a"])
    assert not stale.begins_on("b", 64)
    stale.ended("a", [1, 2])
    assert manager.evicted == []


def test_a_change_empties_the_prefix_cache(stale: StaleBlocks, manager: Manager) -> None:
    """No prompt is computed on blocks of the old weights."""
    assert stale.change() == set()
    assert manager.evicted == [set(range(10))]
    assert not stale.begins_on("b", 64), "what is in the cache now is of the new weights"


def test_requests_of_both_weights_are_set_apart_and_their_blocks_with_them(
    stale: StaleBlocks, manager: Manager
) -> None:
    """One that runs through the change computes on; who begins on its blocks is one of them; both take their blocks out
    of the cache when they end, and then all is as before."""
    stale.began(["a"])
    assert stale.change() == {"a"}
    assert stale.begins_on("b", 32)
    assert not stale.begins_on("c", 0)
    stale.ended("a", [1, 2])
    assert stale.begins_on("d", 16), "b may have put blocks into the cache"
    stale.ended("b", [3])
    stale.ended("d", [4])
    stale.ended("c", [5])
    assert manager.evicted[1:] == [{1, 2}, {3}, {4}]
    assert not stale.begins_on("e", 16)


def test_a_cache_that_cannot_be_emptied_is_not_trusted(
    stale: StaleBlocks, manager: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Another vLLM: prompts that are found in its cache are not handed over any more, and one line says so."""
    manager.evict_blocks = None
    stale.change()
    assert stale.begins_on("a", 16)
    stale.ended("a", [1])
    assert stale.begins_on("b", 16)
    assert caplog.text.count("can't be emptied") == 1
