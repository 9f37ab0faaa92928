"""The connector's use of the shared pool, without an engine: what the scheduler's half asks for, and what a worker's
half does with real pages and a real pool."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from pdtransport.engine.block_refs import BlockRefCounts
from pdtransport.engine.commands import (
    CancelLoad,
    Drop,
    FinishStores,
    LoadChunks,
    ReleaseIfPooled,
    Rewind,
    StoreChunks,
    WorkerReport,
)
from pdtransport.engine.pool_worker import PoolWorker
from pdtransport.engine.worker import GroupPages
from pdtransport.errors import PoolUnavailable, SettingsError
from pdtransport.kernels import quant
from pdtransport.kernels.quant import Grid
from pdtransport.kv.geometry import HOST, KVGeometry
from pdtransport.kv.keys import KeySpace, chunk_keys
from pdtransport.pool.client.pool_client import Pending, PrefixFound
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import PoolSettings, RemoteSettings
from pdtransport.pool.tiers.codecs import Lossy
from pdtransport.settings import PoolUse, Settings
from pdtransport.vllm.geometry import Described
from pdtransport.vllm.pool_scheduler import PoolScheduler
from pdtransport.vllm.pool_space import Shard, check_use, head_parts, loss_of, salt_of, why_no_pool
from tests.rig import twin_gpu
from tests.rig.ports import Ports
from tests.unit.test_vllm_cache_groups import FULL, SLIDING, caches
from tests.unit.test_vllm_scheduler import BLOCK, CONSUME, PRODUCE, Clock, blocks, request, scheduler_half, step

SPACE = KeySpace(model="m", revision="r", dtype="d", layout="l", shard="heads 0-2 of 4", chunk_tokens=2 * BLOCK)
OTHER_HALF = KeySpace(model="m", revision="r", dtype="d", layout="l", shard="heads 2-4 of 4", chunk_tokens=2 * BLOCK)
PROMPT = 10 * BLOCK + 5  # five chunks of two blocks
PLAIN: dict[str, Any] = {"prompt_embeds": None, "prompt_is_token_ids": None, "resumable": False, "sampling_params": 1}
PLAIN |= {"skip_reading_prefix_cache": False}
IDS = [10, 11, 12, 13, 14]  # what tests.unit.test_vllm_scheduler.step says the first blocks are


class Asked:
    """A pool client whose answers the test gives."""

    def __init__(self) -> None:
        self.asked: list[tuple[Sequence[bytes], Future[PrefixFound]]] = []
        self.hinted: list[Sequence[bytes]] = []

    def lookup(self, keys: Sequence[bytes]) -> Pending[PrefixFound]:
        future: Future[PrefixFound] = Future()
        self.asked.append((keys, future))
        return Pending(future, 1.0)

    def manage(self, keys: Sequence[bytes], action: str) -> None:
        assert action == "hint"
        self.hinted.append(keys)

    def answer(self, there: int | None, in_memory: int | None = None) -> None:
        """To the oldest question; None: there is no pool."""
        _, future = self.asked.pop(0)
        if there is None:
            future.set_exception(PoolUnavailable("no pool"))
        else:
            future.set_result(PrefixFound(there, there if in_memory is None else in_memory))

    def close(self) -> None:
        pass


class Half:
    """A scheduler's half with a pool."""

    def __init__(self, ranks: int = 1, **use: Any) -> None:
        self.clock = Clock()
        settings = Settings(pool=PoolUse(chunk_blocks=2, **use))
        self.side = scheduler_half(settings, ranks=ranks, clock=self.clock)
        self.pool = Asked()
        assert isinstance(self.side._pool, PoolScheduler)
        self.side._pool._client = self.pool  # type: ignore[assignment]
        self.side.start_pool({rank: Shard([(SPACE, OTHER_HALF)[rank]]) for rank in range(ranks)})

    def arrive(self, params: Any = None, name: str = "r", **more: Any) -> Any:
        made = request(params, PROMPT, name, **{**PLAIN, **more})
        self.side.on_new_request(made)
        return made

    def counts(self) -> dict[str, int]:
        stats = self.side.take_stats()
        return stats.data["chunks"] if stats is not None else {}

    def admit(self, made: Any, there: int, held: int = 0) -> list[Any]:
        """The pool's answer, then room for the request; the commands before the next step."""
        while self.pool.asked:
            self.pool.answer(there)
        external, later = self.side.matched_tokens(made, held)
        assert later == bool(external)
        self.side.allocated(made, blocks(*range(20, 31)), external or 0)
        return step(self.side).before


@pytest.fixture
def half() -> Iterator[Half]:
    made = Half()
    yield made
    made.side.close()


def ended(name: str = "r", ok: bool = True) -> Any:
    failed = set() if ok else {name}
    return SimpleNamespace(finished_recving={name}, finished_sending=None, failed_recving=failed)


def told(**kept: int) -> Any:
    news = WorkerReport(kept=Counter(kept))
    return SimpleNamespace(finished_recving=None, finished_sending=None, kv_connector_worker_meta=news)


def test_without_a_pool_nothing_is_hashed_or_asked() -> None:
    side = scheduler_half()
    made = request(None, PROMPT)  # has none of the fields that the pool looks at
    side.on_new_request(made)
    assert side.matched_tokens(made, 0) == (0, False)
    assert (step(side).before, step(side, {"r": (0, PROMPT)}).after, side.take_stats()) == ([], [], None)


def test_an_answer_that_is_out_is_not_waited_for(half: Half) -> None:
    """The scheduler asks again later; other requests go on meanwhile."""
    made = half.arrive()
    assert half.side.matched_tokens(made, 0) == (None, False)
    half.pool.answer(3)
    assert [half.side.matched_tokens(made, 0) for _ in range(2)] == [(3 * 2 * BLOCK, True)] * 2


def test_a_pool_that_does_not_answer_costs_lookup_s_once(half: Half) -> None:
    """Then the request goes without, and so does everyone until the answer has come."""
    first = half.arrive()
    assert half.side.matched_tokens(first, 0) == (None, False)
    half.clock.now += 0.2
    assert half.side.matched_tokens(first, 0) == (0, False)
    second = half.arrive(name="s")
    assert half.side.matched_tokens(second, 0) == (0, False)
    assert half.counts() == {"failed": 10}
    half.pool.answer(5)
    assert half.side.matched_tokens(first, 0) == (0, False)
    third = half.arrive(name="t")
    half.pool.answer(5)
    assert half.side.matched_tokens(third, 0) == (5 * 2 * BLOCK, True)


def test_the_pool_hears_of_requests_that_wait_for_their_turn(half: Half) -> None:
    """Of what lies below memory, once, and of all that wait. Who is scheduled at once asks for its chunks itself."""
    first, second, third, fourth = (half.arrive(name=name) for name in "abcd")
    questions = [keys for keys, _ in half.pool.asked]
    half.pool.answer(4, in_memory=0)
    assert half.side.matched_tokens(first, 0)[1]
    half.side.allocated(first, blocks(*range(20, 31)), 4 * 2 * BLOCK)
    half.pool.answer(3, in_memory=1)  # the scheduler did not come to ask for these
    half.pool.answer(3, in_memory=3)
    step(half.side)
    assert half.pool.hinted == [questions[1][:3]]
    half.pool.answer(2, in_memory=0)
    for _ in range(2):
        assert half.side.matched_tokens(fourth, 0) == (2 * 2 * BLOCK, True)  # and found no room
        step(half.side)
    assert half.pool.hinted == [questions[1][:3], questions[3][:2]]
    for made in (second, third):
        assert half.side.matched_tokens(made, 0)[1]


def test_chunks_that_the_engine_holds_are_not_hinted_at(half: Half) -> None:
    made = half.arrive()
    ((question, _),) = half.pool.asked
    half.pool.answer(5, in_memory=0)
    half.side.matched_tokens(made, 2 * 2 * BLOCK)
    step(half.side)
    assert half.pool.hinted == [question[2:5]]


def test_no_hints_where_the_setting_says_so_or_the_pool_is_gone() -> None:
    for use, there in (({"hint": False}, 3), ({}, None)):
        half = Half(**use)
        half.arrive()
        half.pool.answer(there, in_memory=0)
        step(half.side)
        assert half.pool.hinted == []


def test_no_pool_is_a_miss(half: Half) -> None:
    made = half.arrive()
    half.pool.answer(None)
    assert half.side.matched_tokens(made, 0) == (0, False)


@pytest.mark.parametrize(
    ("held", "first", "left_out", "pages"),
    [(0, 0, 0, range(20, 28)), (BLOCK, 0, 1, range(21, 28)), (4 * BLOCK, 2, 0, range(24, 28)), (9 * BLOCK, 4, 0, ())],
)
def test_what_the_engine_holds_is_not_loaded(half: Half, held: int, first: int, left_out: int, pages: Any) -> None:
    """The pool brings what lies beyond, also from the middle of a chunk on."""
    commands = half.admit(half.arrive(), there=4, held=held)
    if not pages:
        assert commands == []
        return
    (command,) = commands
    assert isinstance(command, LoadChunks)
    assert (command.held, command.pages) == (left_out, list(pages))
    assert len(command.keys[0]) == 4 - first


def test_the_last_token_is_never_asked_for(half: Half) -> None:
    """Its logits give the first token: a prompt that ends with a chunk is loaded up to the chunk before."""
    made = request(None, 4 * BLOCK, **PLAIN)
    half.side.on_new_request(made)
    assert len(half.pool.asked[0][0]) == 1


def test_chunks_are_stored_as_they_are_computed_and_once(half: Half) -> None:
    """What the pool holds, and half a chunk, are not stored."""
    made = half.arrive()
    half.admit(made, there=0)
    (keep,) = step(half.side, {"r": (0, 3 * BLOCK)}).after
    assert isinstance(keep, StoreChunks)
    assert (keep.pages, len(keep.keys[0])) == (IDS[:2], 1)
    (more,) = step(half.side, {"r": (3 * BLOCK, BLOCK)}).after
    assert (more.pages, len(more.keys[0])) == (IDS[2:4], 1)
    assert step(half.side, {"r": (4 * BLOCK, 1)}).after == []


def speak(made: Any, tokens: int) -> None:
    """The request has so many answer tokens."""
    made.num_tokens, made.num_output_tokens = PROMPT + tokens, tokens
    made.all_token_ids = [*made.prompt_token_ids, *range(1000, 1000 + tokens)]


@pytest.mark.parametrize("params", [None, CONSUME])
def test_chunks_of_answers_are_stored_under_the_next_turns_keys(half: Half, params: Any) -> None:
    """Of plain requests and of decode's: once all their tokens are known and computed."""
    made = half.arrive(params)
    if params is None:
        half.admit(made, there=5)
        half.side.update_output(ended())
    grown = 2 * BLOCK - 5 + 1  # the sixth chunk is whole, and one token more is sampled
    speak(made, grown - 1)
    before = step(half.side, {"r": (PROMPT + grown - 2, 1)}).after
    assert sum(len(keep.keys[0]) for keep in before) == (0 if params is None else 5)
    speak(made, grown)
    (keep,) = step(half.side, {"r": (PROMPT + grown - 1, 1)}).after
    assert keep.keys == [chunk_keys(replace(SPACE, salt=salt_of("", made)), made.all_token_ids, tail=False)[5:6]]
    assert step(half.side, {"r": (PROMPT + grown, 1)}).after == []


def test_drafts_and_tokens_still_sampled_are_not_stored(half: Half) -> None:
    """The scheduler counts tokens as computed that it may take back."""
    made = half.arrive()
    half.admit(made, there=5)
    half.side.update_output(ended())
    speak(made, 2 * BLOCK - 5)
    assert step(half.side, {"r": (PROMPT + 3 * BLOCK, 4)}).after == []


def test_answers_are_not_stored_where_the_setting_says_so() -> None:
    half = Half(generated=False)
    made = half.arrive()
    half.admit(made, there=5)
    half.side.update_output(ended())
    speak(made, 4 * BLOCK)
    assert step(half.side, {"r": (PROMPT + 4 * BLOCK - 1, 1)}).after == []
    half.side.close()


def test_decode_asks_the_pool_nothing(half: Half) -> None:
    """Its pages come from prefill; it stores what it computes."""
    made = half.arrive(CONSUME)
    assert half.pool.asked == []
    assert half.side.matched_tokens(made, 0) == (PROMPT, True)


@pytest.mark.parametrize("there", [0, 3])
def test_what_prefill_could_not_hand_over_is_looked_for(half: Half, there: int) -> None:
    """Prefill died, and what it had stored did not: decode computes only what the pool lacks. Once: a load that fails
    is not tried again."""
    made = half.arrive(CONSUME)
    half.admit(made, there=0)
    half.side.update_output(ended(ok=False))
    assert half.side.matched_tokens(made, 0) == (None, False)
    commands = half.admit(made, there)
    assert [type(command) for command in commands] == ([LoadChunks] if there else [])
    if there:
        half.side.update_output(ended(ok=False))
        assert half.side.matched_tokens(made, 0) == (0, False)
        assert half.pool.asked == []
    assert len(step(half.side, {"r": (0, 4 * BLOCK)}).after) == 1


def test_an_abort_while_decode_loads_from_the_pool(half: Half) -> None:
    """One word to the workers, and one report to wait for."""
    made = half.arrive(CONSUME)
    half.admit(made, there=0)
    half.side.update_output(ended(ok=False))
    half.admit(made, there=3)
    made.status = None
    assert half.side.finished(made, ([],)) == (False, None)
    assert step(half.side).before == [CancelLoad("r")]


def test_what_was_loaded_is_not_stored_and_what_failed_is(half: Half) -> None:
    loaded = half.arrive()
    half.admit(loaded, there=1)
    half.side.update_output(ended())
    (keep,) = step(half.side, {"r": (2 * BLOCK, 2 * BLOCK)}).after
    assert keep.pages == IDS[2:4]
    failed = half.arrive(name="s")
    half.admit(failed, there=1)
    half.side.update_output(ended("s", ok=False))
    assert half.side.matched_tokens(failed, 0) == (0, False), "a failed load is computed here"
    (keep,) = step(half.side, {"s": (0, 4 * BLOCK)}).after
    assert keep.pages == IDS[:4]


def test_pages_are_kept_until_their_stores_are_through(half: Half) -> None:
    """A request that ends before is held; one whose stores were reported is not."""
    slow, fast = half.arrive(), half.arrive(name="s")
    for made in (slow, fast):
        half.admit(made, there=0)
    assert len(step(half.side, {"r": (0, 4 * BLOCK), "s": (0, 4 * BLOCK)}).after) == 2
    half.side.update_output(told(s=1))
    assert half.side.finished(fast, ([],)) == (False, None)
    assert half.side.finished(slow, ([],)) == (True, None)
    assert step(half.side).before == [FinishStores("r")]


def through(half: Half, made: Any) -> None:
    """The prefill request has come to its regular end."""
    from vllm.v1.request import RequestStatus

    made.status, made.num_computed_tokens = RequestStatus.FINISHED_LENGTH_CAPPED, PROMPT
    assert half.side.finished(made, ([],))[0]


@pytest.mark.parametrize(("there", "ends"), [(5, [ReleaseIfPooled("r")]), (4, []), (None, [])])
def test_prefill_lets_go_of_pages_that_the_pool_has(there: int | None, ends: list[Any]) -> None:
    """Once decode has had its time to ask for them and its own stores are through, and only if all chunks are there."""
    half = Half(hand_off_s=2.0)
    made = half.arrive(PRODUCE)
    half.admit(made, there=0)
    assert len([c for c in step(half.side, {"r": (0, PROMPT)}).after if isinstance(c, StoreChunks)]) == 1
    through(half, made)
    step(half.side)
    half.clock.now += 3
    step(half.side)
    assert half.pool.asked == [], "its stores are not through"
    half.side.update_output(told(r=1))
    step(half.side)
    half.clock.now += 3
    assert step(half.side).before == []
    assert len(half.pool.asked[0][0]) == 5
    half.pool.answer(there)
    assert step(half.side).before == ends
    assert step(half.side).before == half.pool.asked == []
    half.side.close()


@pytest.mark.parametrize(
    ("there", "ends"), [((5, 5), [ReleaseIfPooled("r")]), ((5, 4), []), ((4, 5), []), ((5, None), [])]
)
def test_prefill_keeps_pages_of_which_the_pool_lacks_a_part(there: tuple[int | None, ...], ends: list[Any]) -> None:
    """With two ranks a chunk has two parts: prefill lets go only once the pool has both parts of all chunks."""
    half = Half(ranks=2, hand_off_s=2.0)
    made = half.arrive(PRODUCE)
    half.admit(made, there=5)
    half.side.update_output(ended())
    through(half, made)
    step(half.side)
    half.clock.now += 3
    step(half.side)
    assert [len(keys) for keys, _ in half.pool.asked] == [5, 5]
    for answer in there:
        half.pool.answer(answer)
    assert step(half.side).before == ends
    half.side.close()


def test_pages_that_decode_took_are_not_asked_for() -> None:
    half = Half(hand_off_s=2.0)
    made = half.arrive(PRODUCE)
    half.admit(made, there=5)
    half.side.update_output(ended())
    through(half, made)
    half.side.update_output(SimpleNamespace(finished_recving=None, finished_sending={"r"}))
    half.clock.now += 3
    assert step(half.side).before[1:] == half.pool.asked == []
    half.side.close()


def test_each_rank_has_its_keys_and_its_reports() -> None:
    """A chunk is there if all shards of it are; pages are free when every rank has reported."""
    half = Half(ranks=2)
    made = half.arrive()
    half.pool.answer(5)
    half.pool.answer(2)
    (fetch,) = half.admit(made, there=0)
    assert [len(keys) for keys in fetch.keys] == [2, 2]
    assert not set(fetch.keys[0]) & set(fetch.keys[1])
    half.side.update_output(ended())
    step(half.side, {"r": (4 * BLOCK, 2 * BLOCK)})
    half.side.update_output(told(r=1))
    assert half.side.finished(made, ([],))[0]
    half.side.close()


def test_parts_of_a_chunk_are_asked_for_and_stored_together() -> None:
    """One worker whose heads make two parts: a chunk is there if both are."""
    half = Half()
    half.side.start_pool({0: Shard([SPACE, OTHER_HALF])})
    made = half.arrive()
    keys = [asked for asked, _ in half.pool.asked]
    half.pool.answer(5)
    (fetch,) = half.admit(made, there=2)
    assert fetch.keys == [[keys[0][0], keys[1][0], keys[0][1], keys[1][1]]]
    half.side.update_output(ended())
    (keep,) = step(half.side, {"r": (4 * BLOCK, 2 * BLOCK)}).after
    assert keep.keys == [[keys[0][2], keys[1][2]]]
    assert half.counts() == {"miss": 6}
    half.side.close()


def test_a_preempted_request_takes_its_pages_back_and_stores_again(half: Half) -> None:
    made = half.arrive()
    half.admit(made, there=0)
    step(half.side, {"r": (0, 4 * BLOCK)})
    assert step(half.side, preempted=("r",)).before == [Rewind("r")]
    half.side.update_output(told(r=1))
    (keep,) = step(half.side, {"r": (0, 2 * BLOCK)}).after
    assert keep.pages == IDS[:2]


def test_an_abort_while_loading_is_reported_once(half: Half) -> None:
    """vLLM keeps the pages until the load's end is reported, and a second report would end the engine."""
    made = half.arrive(PRODUCE)
    half.admit(made, there=2)
    made.status = None
    assert half.side.finished(made, ([],)) == (False, None)
    assert step(half.side).before == [CancelLoad("r"), Drop("r", report=False)]


@pytest.mark.parametrize(
    "odd",
    [{"lora_request": 1}, {"mm_features": [1]}, {"prompt_embeds": 1}, {"sampling_params": None}, {"resumable": True}],
)
def test_what_has_no_key_passes_by(half: Half, odd: dict[str, Any]) -> None:
    made = half.arrive(**odd)
    assert half.pool.asked == []
    assert half.side.matched_tokens(made, 0) == (0, False)
    assert step(half.side, {"r": (0, 4 * BLOCK)}).after == []
    assert half.counts() == {"skipped": 5}


def test_salts_do_not_run_into_each_other(half: Half) -> None:
    """Neither the instance's and the request's, nor one request's and another's."""
    pairs = [("", "ab"), ("a", "b"), ("ab", ""), ("1:a", ""), ("", "1:a")]
    assert len({salt_of(ours, SimpleNamespace(cache_salt=theirs)) for ours, theirs in pairs}) == len(pairs)  # type: ignore[arg-type]
    for salt in (None, "x", "y"):
        half.arrive(name=str(salt), cache_salt=salt)
    assert len({keys[0] for keys, _ in half.pool.asked}) == 3


def test_loading_needs_an_engine_that_recomputes() -> None:
    with pytest.raises(SettingsError, match=r"pool\.load needs kv_load_failure_policy: recompute") as caught:
        check_use(PoolUse(), "fail")
    assert "\n" not in str(caught.value)
    check_use(PoolUse(load=False), "fail")
    with pytest.raises(SettingsError, match=r"pool\.address: 'far:1' is not tcp://HOST:PORT"):
        check_use(PoolUse(address="far:1"), "recompute")
    with pytest.raises(SettingsError, match="address and dir are both set"):
        PoolUse(address="tcp://far:1", dir=Path("/x"))
    with pytest.raises(SettingsError, match="dir is too long"):
        check_use(PoolUse(dir=Path("/x" * 60)), "recompute")


def test_a_lossy_codec_is_one_that_is_there_and_gets_heads_apart() -> None:
    """A name that is none, or a lossless codec's, is refused in one line; keys and values of each head have scales of
    their own, and the grid fits a chunk."""
    for name in ("fp9", "zstd"):
        with pytest.raises(SettingsError, match=rf"pool\.codec {name} is no lossy codec"):
            check_use(PoolUse(codec=name), "recompute")
    cache = np.zeros((3, 8, 4, 16, 64), dtype=np.float32)  # [layers, blocks, heads, tokens, keys and values]
    geometry = KVGeometry.of_array(cache)
    for backend, heads_first, grid in (
        ("CPU_ATTN:vec", True, Grid("float32", 1, 1, 16 * 32)),
        ("FLASH_ATTN", True, Grid("float32", 16, 2, 32)),
        ("FLASH_ATTN", False, Grid("float32", 16, 4, 32)),
    ):
        described = Described(
            groups=(replace(geometry, heads_first=heads_first),),
            pages=(GroupPages(0),),
            regions=[],
            fingerprint={"kv_cache_dtype": "auto/float32", "attention_backend": backend},
            rank=0,
            ranks=1,
            port=0,
        )
        assert loss_of(described, PoolUse()) is None
        assert loss_of(described, PoolUse(codec="int4", shards=2)) == Lossy("int4", grid)
        assert grid.outer(2 * geometry.block_bytes(0, 2))


def test_a_model_with_several_cache_groups_says_why_it_uses_no_pool() -> None:
    """It starts without the pool, and the log names the kinds of its groups."""
    geometry = KVGeometry.of_array(np.zeros((3, 8, 4, 16, 64), dtype=np.float32))
    described = Described(
        groups=(geometry, geometry),
        pages=(GroupPages(0), GroupPages(1)),
        regions=[],
        fingerprint={},
        rank=0,
        ranks=1,
        port=0,
    )
    said = why_no_pool(described, SimpleNamespace(), caches(FULL, SLIDING), PoolUse())  # type: ignore[arg-type]
    assert (
        said
        == "only full attention in one group of layers can be stored, not 2 of FullAttentionSpec, SlidingWindowSpec"
    )


def test_pages_are_reported_free_once_whoever_is_last() -> None:
    held = BlockRefCounts()
    for order in ("leave leave end", "leave end leave", "end leave leave"):
        held.use("r")
        held.use("r")
        assert [getattr(held, verb)("r") for verb in order.split()] == [False, False, True]
    assert held.end("never used")


# -- a worker's half -----------------------------------------------------------------------------------------------

LAYERS, PAGES, HEADS, TOKENS, SLOT = 3, 32, 2, 4, 64


class Engine:
    """Pages of a worker, and what its half reported."""

    def __init__(
        self, directory: Path | None, shards: int = 1, rank: int = 0, ranks: int = 1, device: int = HOST, **use: Any
    ) -> None:
        shape = (LAYERS, PAGES, HEADS // ranks, TOKENS, SLOT)
        self.memory = twin_gpu.DeviceMemory(int(np.prod(shape)), 0)
        self.kv = self.memory.array(shape)
        geometry = KVGeometry.of_array(self.kv, head_lo=rank * HEADS // ranks, total_heads=HEADS)
        geometry = replace(geometry, device=device)
        self.heard = threading.Condition()
        self.loaded: dict[str, bool] = {}
        self.kept: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.worker = PoolWorker(
            PoolUse(dir=directory, chunk_blocks=2, **use),
            geometry,
            parts=head_parts(geometry, shards),
            ratio=1,
            rank=0,
            on_loaded=self._on_loaded,
            on_kept=self._on_kept,
            count=lambda _role, tally, _nbytes: self.counts.update(tally),
            lossy=Lossy(use["codec"], Grid("bfloat16", 1, 1, TOKENS * SLOT // 4)) if "codec" in use else None,
        )

    def _on_loaded(self, name: str, ok: bool) -> None:
        with self.heard:
            self.loaded[name] = ok
            self.heard.notify_all()

    def _on_kept(self, name: str) -> None:
        with self.heard:
            self.kept[name] += 1
            self.heard.notify_all()

    def keep(self, keys: list[bytes], pages: list[int], name: str = "r", after: Any = None) -> None:
        self.worker.keep(StoreChunks(name, [keys], pages), after)

    def fetch(self, keys: list[bytes], pages: list[int], held: int = 0, name: str = "r", after: Any = None) -> bool:
        self.worker.fetch(LoadChunks(name, [keys], held, pages), after)
        with self.heard:
            assert self.heard.wait_for(lambda: name in self.loaded, 20)
            return self.loaded.pop(name)

    def wait_kept(self, times: int = 1, name: str = "r") -> None:
        with self.heard:
            assert self.heard.wait_for(lambda: self.kept[name] >= times, 20)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Pool]:
    with Pool(PoolSettings(dir=tmp_path, memory_bytes=8 << 20, frame_bytes=4096)) as pool:
        yield pool


def engine_of(tmp_path: Path | None, **use: Any) -> Engine:
    made = Engine(tmp_path, **use)
    made.kv[:] = np.random.default_rng(1).integers(1, 256, made.kv.shape, dtype=np.uint8)
    return made


def key(number: int) -> bytes:
    return bytes([number]) * 32


def test_what_a_tier_packed_with_loss_comes_back_decoded(tmp_path: Path) -> None:
    """An engine that asks for fp8 gets, after the pool's restart, what decoding its pages' codes gives."""
    settings = {"dir": tmp_path, "memory_bytes": 8 << 20, "frame_bytes": 4096}
    made = PoolSettings.parse(settings | {"disk": {"path": tmp_path / "disk", "bytes": 8 << 20}})
    engine = engine_of(tmp_path, codec="fp8")
    numbers = np.random.default_rng(2).standard_normal(engine.kv.size // 2).astype(np.float32)
    engine.kv[:] = quant.to_bytes(numbers, "bfloat16").reshape(engine.kv.shape)
    was = engine.kv.copy()
    with Pool(made) as pool:
        engine.keep([key(1)], [3, 4])
        engine.wait_kept()
        while pool.status()["writeback_bytes"]:
            time.sleep(0.01)
    with Pool(made) as pool:
        while not pool.status()["chunks"]:
            time.sleep(0.01)
        engine.kv[:] = 0
        assert engine.fetch([key(1)], [7, 9])
    engine.worker.close()
    grid, packed = Grid("bfloat16", 1, 1, TOKENS * SLOT // 4), np.ascontiguousarray(was[:, [3, 4]])
    codes = quant.pack("fp8", grid, packed.reshape(-1))
    assert codes is not None
    decoded = np.empty(packed.size, dtype=np.uint8)
    quant.unpack("fp8", grid, codes, decoded)
    assert np.array_equal(engine.kv[:, [7, 9]].reshape(-1), decoded)
    assert not np.array_equal(decoded, packed.reshape(-1))


def test_pages_come_back_into_other_pages_and_no_others(running: Pool, tmp_path: Path) -> None:
    """Also where a chunk's first block is the engine's already: nobody writes there."""
    engine = engine_of(tmp_path)
    engine.keep([key(1), key(2)], [3, 9, 4, 1])
    engine.wait_kept()
    assert engine.counts == {"stored": 2}
    before = engine.kv.copy()
    assert engine.fetch([key(1), key(2)], [20, 21, 22], held=1)
    assert np.array_equal(engine.kv[:, [20, 21, 22]], before[:, [9, 4, 1]])
    others = [page for page in range(PAGES) if page not in (20, 21, 22)]
    assert np.array_equal(engine.kv[:, others], before[:, others])
    engine.worker.close()


def test_pages_in_gpu_memory_are_used_behind_the_step_and_not_after_a_preemption(running: Pool, tmp_path: Path) -> None:
    """A store reads its pages when the step that fills them is through, a load writes when nobody uses them any more;
    a preemption waits for the copy that is under way."""
    with twin_gpu.installed():
        twin_gpu.strict = True
        engine = engine_of(tmp_path, device=0)
        try:
            step, earlier = twin_gpu.TwinEvent(), twin_gpu.TwinEvent()
            engine.keep([key(1), key(2)], [3, 9, 4, 1], after=step)
            engine.kv[:, 3] = 77
            step.happen()
            engine.wait_kept()
            before = engine.kv.copy()
            threading.Timer(0.1, earlier.happen).start()
            assert engine.fetch([key(1), key(2)], [20, 21, 22], held=1, after=earlier)
            assert np.array_equal(engine.kv[:, [20, 21, 22]], before[:, [9, 4, 1]])
            others = [page for page in range(PAGES) if page not in (20, 21, 22)]
            assert np.array_equal(engine.kv[:, others], before[:, others])
            assert engine.fetch([key(1)], [23, 24])
            assert (engine.kv[:, 23] == 77).all()
            step = twin_gpu.TwinEvent()
            engine.keep([key(3)], [5, 6], after=step, name="p")
            threading.Timer(0.1, step.happen).start()
            engine.worker.rewind("p", 5.0)
            engine.kv[:, [5, 6]] = 0
            engine.wait_kept(name="p")
            assert step.passed.is_set() or not engine.fetch([key(3)], [7, 8])
        finally:
            engine.worker.close()
            twin_gpu.strict = False


@pytest.mark.parametrize("device", [HOST, 0])
def test_an_engine_uses_a_pool_on_another_host(tmp_path: Path, device: int) -> None:
    """With one setting, from host memory and from a GPU's: by staging frames, which its kernels reach."""
    ports = Ports()
    port = ports.take(2)
    door = RemoteSettings(listen=f"127.0.0.1:{port}")
    with (
        Pool(PoolSettings(dir=tmp_path, memory_bytes=8 << 20, frame_bytes=4096, remote=door)),
        twin_gpu.installed(),
    ):
        twin_gpu.strict = True
        engine = engine_of(None, device=device, address=f"tcp://127.0.0.1:{port}", staging_bytes=1 << 20)
        near = Engine(tmp_path)
        try:
            engine.keep([key(1), key(2)], [3, 9, 4, 1])
            engine.wait_kept()
            before = engine.kv.copy()
            assert engine.fetch([key(1), key(2)], [20, 21, 22], held=1)
            assert np.array_equal(engine.kv[:, [20, 21, 22]], before[:, [9, 4, 1]])
            others = [page for page in range(PAGES) if page not in (20, 21, 22)]
            assert np.array_equal(engine.kv[:, others], before[:, others])
            assert near.fetch([key(2)], [5, 6])
            assert np.array_equal(near.kv[:, [5, 6]], before[:, [4, 1]])
        finally:
            near.worker.close()
            engine.worker.close()
            twin_gpu.strict = False
        assert not twin_gpu.registered
    ports.give_back([port, port + 1])


@pytest.mark.parametrize("held", [0, 1])
def test_engines_of_other_tensor_parallel_sizes_share_parts(running: Pool, tmp_path: Path, held: int) -> None:
    """One worker with all heads stores two parts of each chunk; two with a half each load their own; and back."""
    whole = engine_of(tmp_path, shards=2)
    parts = [key(1), key(11), key(2), key(12)]  # chunk by chunk
    whole.keep(parts, [3, 9, 4, 1])
    whole.wait_kept()
    assert whole.counts == {"stored": 4}
    for rank in range(2):
        half = engine_of(tmp_path, shards=2, rank=rank, ranks=2)
        before = half.kv.copy()
        assert half.fetch(parts[rank::2], [20, 21, 22, 23][held:], held=held)
        here, there = [20, 21, 22, 23][held:], [3, 9, 4, 1][held:]
        assert np.array_equal(half.kv[:, here], whole.kv[:, there, rank : rank + 1])
        others = [page for page in range(PAGES) if page not in here]
        assert np.array_equal(half.kv[:, others], before[:, others])
        half.keep([key(21 + rank)], [20 + held, 21 + held], name="s")
        half.wait_kept(name="s")
        half.worker.close()
    kept = whole.kv.copy()
    assert whole.fetch([key(21), key(22)], [6, 7])
    assert np.array_equal(whole.kv[:, 6], kept[:, [3, 9][held]])
    whole.worker.close()


def test_parts_are_whole_heads() -> None:
    """By default a worker's heads are one part, so that engines of another size find nothing; and no part is ever
    anything but the heads that its key names."""

    def parts(shards: int, heads: tuple[int, int], total: int = 4) -> list[tuple[int, int]]:
        kv = np.zeros((1, 1, heads[1] - heads[0], TOKENS, SLOT), dtype=np.uint8)
        return head_parts(KVGeometry.of_array(kv, head_lo=heads[0], total_heads=total), shards)

    assert parts(1, (0, 4)) == [(0, 4)]
    assert parts(2, (2, 4)) == [(2, 4)]
    assert parts(2, (0, 4)) == [(0, 2), (2, 4)]
    assert parts(4, (2, 4)) == [(2, 3), (3, 4)]
    assert parts(8, (1, 2)) == [(1, 2)]  # two workers hold it
    for shards, heads in ((1, (0, 2)), (3, (0, 4))):
        with pytest.raises(SettingsError, match=rf"pool\.shards {shards} makes no whole parts"):
            parts(shards, heads)


def test_one_chunk_that_is_gone_fails_the_load(running: Pool, tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    engine.keep([key(1)], [3, 9])
    engine.wait_kept()
    assert not engine.fetch([key(1), key(2)], [20, 21, 22, 23])
    assert engine.counts == {"stored": 1, "hit": 1, "failed": 1}
    engine.worker.close()


def test_without_a_pool_all_is_over_at_once(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    engine.keep([key(1)], [3, 9])
    engine.wait_kept()
    assert not engine.fetch([key(1)], [20, 21])
    assert engine.counts["failed"] == 2
    engine.worker.close()


def test_a_full_queue_skips_and_never_waits(tmp_path: Path) -> None:
    """A pool that hangs: what finds no place in the queue is counted and let go, the rest is let go by a deadline, and
    at once when the engine wants its pages back."""
    from tests.processes.pool_rig import daemon

    with daemon(tmp_path) as pool:
        engine = engine_of(tmp_path, max_queued_chunks=3, store_s=60.0)
        engine.keep([key(1)], [3, 9])
        engine.wait_kept()
        pool.kill(signal.SIGSTOP)
        engine.keep([key(2), key(3)], [0, 1, 2, 3], name="a")
        engine.keep([key(4), key(5)], [4, 5, 6, 7], name="b")
        engine.keep([key(6)], [8, 9], name="c")
        engine.wait_kept(name="c")
        assert engine.counts["skipped"] == 2
        assert not engine.kept["a"] + engine.kept["b"]
        for name in ("b", "a"):
            engine.worker.rewind(name, 5.0)
            engine.wait_kept(name=name)
        engine.worker.close()
