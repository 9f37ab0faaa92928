"""KV events of the pool: told once all parts are stored, never told of what went, taken back when it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from pdtransport.errors import PoolUnavailable
from pdtransport.vllm.pool_events import MAX_KNOWN, WATCH_S, PoolEvents
from tests.unit.pool_rig import key

SIZE = 4


class Watched:
    """A pool client that is only watched."""

    def __init__(self) -> None:
        self.heard: Callable[[Sequence[bytes] | None], None] | None = None
        self.there = True

    def watch(self, heard: Callable[[Sequence[bytes] | None], None]) -> None:
        if not self.there:
            raise PoolUnavailable("no pool")
        self.heard = heard

    def say(self, keys: Sequence[bytes] | None) -> None:
        assert self.heard is not None
        self.heard(keys)


class Rig:
    """Events of an engine with two workers, two parts and two blocks a chunk."""

    def __init__(self) -> None:
        self.time = 0.0
        self.pool: Any = Watched()
        self.events = PoolEvents(block_size=SIZE, chunk_blocks=2, ranks=2, clock=lambda: self.time)
        self.events.watch(self.pool)

    def request(self, blocks: int = 6, salt: str | None = None) -> Any:
        hashes = [b"h%d" % i for i in range(blocks)]
        return SimpleNamespace(
            block_hashes=hashes, all_token_ids=list(range(blocks * SIZE)), cache_salt=salt, lora_request=None,
            mm_features=[], prompt_embeds=None,
        )  # fmt: skip

    def told(self) -> list[tuple[str, list[Any]]]:
        return [(type(each).__name__, list(each.block_hashes)) for each in self.events.take()]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "0")  # hashes as they are
    return Rig()


def parts(*chunks: int) -> list[tuple[bytes, ...]]:
    return [(key(chunk), key(chunk + 100)) for chunk in chunks]


def test_a_chunk_is_told_of_once_every_worker_stored_its_parts(rig: Rig) -> None:
    """With vLLM's hashes, tokens and parent, and the salt where vLLM has it."""
    rig.events.storing(rig.request(salt="s"), 0, parts(0, 1))
    rig.events.stored({key(0): 1, key(1): 2})
    (event,) = rig.events.take()
    assert (event.block_hashes, event.parent_block_hash) == ([b"h2", b"h3"], b"h1")
    assert (event.token_ids, event.block_size, event.medium) == (list(range(8, 16)), SIZE, "CPU")
    rig.events.stored({key(0): 1, key(7): 2})
    (event,) = rig.events.take()
    assert (event.block_hashes, event.parent_block_hash, event.extra_keys) == ([b"h0", b"h1"], None, [("s",), None])


def test_chunks_in_a_row_are_one_event_each_time_that_they_are_found(rig: Rig) -> None:
    """Consumers that came later, or forgot, learn of them at the next hit."""
    for _ in range(2):
        rig.events.found(rig.request(), parts(0, 1, 2), rig.events.now)
        (event,) = rig.events.take()
        assert event.block_hashes == [b"h%d" % i for i in range(6)]
        assert (event.token_ids, len(event.extra_keys)) == (list(range(24)), 6)


def test_what_went_is_taken_back_whichever_part_it_was(rig: Rig) -> None:
    """And it can be told of again."""
    rig.events.found(rig.request(), parts(0, 1), rig.events.now)
    rig.told()
    rig.pool.say([key(101), key(55)])
    rig.pool.say([key(1)])
    assert rig.told() == [("BlockRemoved", [b"h2", b"h3"])]
    rig.events.found(rig.request(), parts(0, 1), rig.events.now)
    assert rig.told() == [("BlockStored", [b"h0", b"h1", b"h2", b"h3"])]
    rig.pool.say([key(0)])
    assert rig.told() == [("BlockRemoved", [b"h0", b"h1"])]


def test_what_went_before_its_report_came_is_not_told_of(rig: Rig) -> None:
    """Answers and reports that are older than what the pool said since change nothing."""
    asked = rig.events.now
    rig.events.storing(rig.request(), 0, parts(0))
    rig.pool.say([key(100)])
    rig.events.stored({key(0): 2})
    rig.events.found(rig.request(), parts(0), asked)
    assert rig.told() == []


def test_when_the_pool_ends_all_is_taken_back_and_the_watch_begins_anew(rig: Rig) -> None:
    """And nothing is told of while nobody would hear that it went."""
    rig.events.found(rig.request(), parts(0, 1, 2), rig.events.now)
    rig.told()
    rig.events.storing(rig.request(), 0, parts(3))
    rig.pool.there = False
    rig.pool.say(None)
    assert rig.told() == [("BlockRemoved", [b"h%d" % i for i in range(6)])]
    rig.events.found(rig.request(), parts(0), rig.events.now)
    rig.events.stored({key(3): 2})
    assert rig.told() == []
    rig.pool.there, rig.time = True, 2 * WATCH_S
    rig.events.watch(rig.pool)
    rig.events.found(rig.request(), parts(0), rig.events.now)
    assert rig.told() == [("BlockStored", [b"h0", b"h1"])]


def test_what_is_kept_in_mind_has_a_bound(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk that was told of longest ago is taken back: less is promised, never too much."""
    assert MAX_KNOWN > 1000
    monkeypatch.setattr("pdtransport.vllm.pool_events.MAX_KNOWN", 2)
    rig.events.found(rig.request(), parts(0, 1, 2), rig.events.now)
    assert rig.told()[-1] == ("BlockRemoved", [b"h0", b"h1"])


def test_without_hashes_nothing_is_told(rig: Rig) -> None:
    """vLLM without prefix caching has none."""
    rig.events.found(rig.request(blocks=3), parts(0, 1), rig.events.now)
    assert rig.told() == [("BlockStored", [b"h0", b"h1"])]
