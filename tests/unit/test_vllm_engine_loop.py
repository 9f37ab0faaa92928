"""What hastens an arrived request's first step: the engine's clients are not kept waiting for it, and the prefix cache
misses nothing."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from pdtransport.engine.wakeups import WakeupReceiver, WakeupSender
from pdtransport.vllm.patches.engine_loop import EngineLoop
from pdtransport.vllm.patches.late_caching import LateCaching

BLOCK = 16


class Core:
    """vLLM's own step over a scheduler and an executor that record what is asked of them."""

    def __init__(self, graphs: CUDAGraphMode | None = CUDAGraphMode.NONE) -> None:
        self.did: list[str] = []
        self.begins: list[Any] = []  # called in turn as steps begin
        self.scheduler = SimpleNamespace(
            has_requests=lambda: True,
            schedule=self._schedule,
            get_grammar_bitmask=lambda output: None,
            update_from_output=lambda scheduled, output: self.did.append(f"look {output}") or {0: output},
        )
        executor = SimpleNamespace(execute_model=self._execute, sample_tokens=self._execute)
        self.core: Any = object.__new__(EngineCoreProc)
        vars(self.core).update(
            scheduler=self.scheduler, model_executor=executor, input_queue=queue.Queue(), batch_queue=deque(maxlen=2),
            batch_queue_size=2, is_mm_encoder_only=False, is_pooling_model=False, aborts_queue=queue.Queue(),
            vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=graphs)),
            log_error_detail=lambda output: nullcontext(), capture_iteration_details=lambda output: nullcontext(),
            _attach_iteration_details=lambda *_: None, _attach_weight_version=lambda *_: None,
            _should_throttle_prefills=lambda: False, _process_aborts_queue=lambda: None,
        )  # fmt: skip
        self._steps = 0

    def _schedule(self, throttle: bool) -> Any:
        self._steps += 1
        self.did.append(f"launch {self._steps}")
        if self.begins:
            self.begins.pop(0)()
        return SimpleNamespace(total_num_scheduled_tokens=1, pending_structured_output_tokens=False)

    def _execute(self, _what: Any, non_block: bool) -> Future[int]:
        done: Future[int] = Future()
        done.set_result(self._steps)
        return done

    def loop(self) -> EngineLoop:
        """Found from within a step, as it is in an engine."""
        found: list[EngineLoop | None] = []
        self.begins.append(lambda: found.append(EngineLoop.of(self.scheduler)))  # type: ignore[arg-type]
        self.step()
        self.step()  # looks at the first one, or fills the queue
        self.core.batch_queue.clear()
        self.did.clear()
        self._steps = 0
        assert found[0] is not None
        return found[0]

    def step(self) -> Any:
        return self.core.step_with_batch_queue()[0]


@pytest.mark.parametrize(
    ("graphs", "slow"), [(CUDAGraphMode.NONE, True), (CUDAGraphMode.FULL_AND_PIECEWISE, False), (None, True)]
)
def test_launches_are_slow_without_cuda_graphs(graphs: Any, slow: bool) -> None:
    assert Core(graphs).loop().slow_launches is slow


def test_no_loop_is_found_from_outside_a_step_or_for_another_scheduler() -> None:
    core = Core()
    assert EngineLoop.of(core.scheduler) is None  # type: ignore[arg-type]
    found: list[Any] = []
    core.begins.append(lambda: found.append(EngineLoop.of(SimpleNamespace())))  # type: ignore[arg-type]
    core.step()
    assert found == [None]


def test_what_a_client_asks_ends_the_wait_for_the_bell() -> None:
    core = Core()
    loop, bell = core.loop(), WakeupReceiver()
    threading.Timer(0.05, core.core.input_queue.put, [("add", "request")]).start()
    began = time.monotonic()
    assert not bell.wait(60.0, loop.clients_wait)
    assert time.monotonic() - began < 30, "and not its whole length"
    assert not bell.wait(60.0, loop.clients_wait), "as long as nobody looked at it"
    bell.close()


def test_the_bell_ends_a_wait_for_clients() -> None:
    bell, rope = WakeupReceiver(), WakeupSender()
    rope.name = bell.name
    threading.Timer(0.05, rope.pull).start()
    assert bell.wait(60.0, lambda: False)
    assert not bell.wait(0.0, lambda: False), "it was heard"
    bell.close()
    rope.close()


# -- blocks enter the prefix cache later ----------------------------------------------------------------------------


def manager(caching: bool = True) -> KVCacheManager:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    config = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(config, 512, BLOCK, BLOCK, enable_caching=caching)


def request(name: str, tokens: int = 10 * BLOCK) -> Request:
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, list(range(tokens)), SamplingParams(max_tokens=4), None, block_hasher=hasher)


def hit(kv: KVCacheManager) -> int:
    """Tokens of the prompt that another request would find."""
    return kv.get_computed_blocks(request("other", 10 * BLOCK + 1))[1]


def arrived(kv: KVCacheManager, late: LateCaching | None) -> Request:
    """What vLLM's scheduler does with a request whose pages were loaded, in the step that goes on with it."""
    req = request("r")
    assert kv.allocate_slots(req, 0, num_external_computed_tokens=10 * BLOCK, delay_cache_blocks=True) is not None
    req.num_computed_tokens = 10 * BLOCK
    if late is not None:
        late.put_off(["r"])
    kv.cache_blocks(req, req.num_computed_tokens)
    req.num_computed_tokens -= 1
    assert kv.allocate_slots(req, 1) is not None
    return req


def test_a_later_step_finds_all_that_vllm_would_have_cached_before() -> None:
    plain = manager()
    arrived(plain, None)
    kv = manager()
    late = LateCaching(kv)
    req = arrived(kv, late)
    assert hit(kv) == 0, "not yet: that is what is saved"
    late.catch_up()
    assert hit(kv) == hit(plain) == 10 * BLOCK
    req.num_computed_tokens += 1
    req.append_output_token_ids(list(range(BLOCK)))
    assert kv.allocate_slots(req, BLOCK) is not None
    assert kv.coordinator.single_type_managers[0].num_cached_block["r"] == 11, "and from there as ever"


def test_usage_counts_what_is_cached_late() -> None:
    """vLLM tells a client what its request added to the cache, with its first output."""
    plain = manager()
    expected = plain.estimate_cached_tokens(arrived(plain, None))
    kv = manager()
    late = LateCaching(kv)
    req = arrived(kv, late)
    assert kv.estimate_cached_tokens(req) == expected == 10 * BLOCK
    late.catch_up()
    assert kv.estimate_cached_tokens(req) == expected


@pytest.mark.parametrize("way", ["free", "pop_blocks_for_free"])
def test_what_ends_within_its_first_step_stays_in_the_cache(way: str) -> None:
    """An answer of one token, an abort, a preemption: its blocks are good, and the next request's."""
    kv = manager()
    late = LateCaching(kv)
    req = arrived(kv, late)
    popped = getattr(kv, way)(req)
    if popped:
        kv.block_pool.free_blocks(reversed(popped))
    assert hit(kv) == 10 * BLOCK
    late.catch_up()
    assert kv.block_pool.get_num_free_blocks() == manager().block_pool.get_num_free_blocks()


def test_what_was_put_off_before_the_weights_changed_never_enters() -> None:
    """Its request ends before the next step begins: its blocks were taken out of the cache at the change, and would
    come back when they are freed, of weights that are gone."""
    kv = manager()
    late = LateCaching(kv)
    req = arrived(kv, late)
    late.forget()
    kv.free(req)
    late.catch_up()
    assert hit(kv) == 0


def test_nothing_is_put_off_for_longer_than_a_step() -> None:
    """One that did not get its turn in the step is cached by vLLM in the one that it gets."""
    kv = manager()
    late = LateCaching(kv)
    late.put_off(["r"])
    late.catch_up()
    arrived(kv, None)
    assert hit(kv) == 10 * BLOCK


def test_without_a_prefix_cache_nothing_changes() -> None:
    kv = manager(caching=False)
    late = LateCaching(kv)
    arrived(kv, late)
    late.catch_up()
    assert hit(kv) == 0


def test_another_cache_manager_is_left_alone() -> None:
    with pytest.raises(AttributeError):
        LateCaching(SimpleNamespace(coordinator=SimpleNamespace(cache_blocks=print)))  # type: ignore[arg-type]
