"""A first step may begin before its request's pages are there, but never gives out what it computed without them.

vLLM's own scheduler, cache manager and engine step, with the connector's scheduler half; the workers' answers are set.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
from vllm.config import (
    CacheConfig,
    CompilationConfig,
    CUDAGraphMode,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from pdtransport.engine.commands import WorkerReport
from pdtransport.engine.wakeups import WakeupSender
from pdtransport.vllm.early import FIRST_LEAD_S, HELD_S, LEAST_LEAD_S, LONG_S, MOST_LEAD_S, REST_S, Lead

MODEL = Path(__file__).parents[2] / "examples/models/tiny-lm"
BLOCK = 32
PROMPT = 10 * BLOCK
GARBAGE, GOOD = 666, 7


def config(policy: str, graphs: CUDAGraphMode, settings: dict[str, Any], prefixes: bool) -> VllmConfig:
    model = ModelConfig(model=str(MODEL), dtype="float32", max_model_len=1024)
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=prefixes)
    cache.num_gpu_blocks = 64
    return VllmConfig(
        model_config=model,
        cache_config=cache,
        scheduler_config=SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=1024, max_model_len=1024, is_encoder_decoder=False
        ),
        device_config=DeviceConfig("cpu"),
        compilation_config=CompilationConfig(cudagraph_mode=graphs),
        kv_transfer_config=KVTransferConfig(
            kv_connector="PDTransportConnector",
            kv_connector_module_path="pdtransport.vllm",
            kv_role="kv_consumer",
            kv_load_failure_policy=policy,
            kv_connector_extra_config=settings,
        ),
    )


class Engine(UniProcExecutor):
    """vLLM's step over its own scheduler; as executor it notes what is launched, and answers as it was told."""

    def __init__(
        self,
        kind: type[Scheduler] = AsyncScheduler,
        policy: str = "recompute",
        graphs: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE,
        prefixes: bool = True,
        **settings: Any,
    ) -> None:
        vllm_config = config(policy, graphs, {"control": {"port": 0}, **settings}, prefixes)
        vllm_config.compilation_config.cudagraph_mode = graphs  # the CPU platform has none
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        caches = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = kind(vllm_config, caches, StructuredOutputManager(vllm_config), block_size=BLOCK)
        assert self.scheduler.connector is not None
        self.side = self.scheduler.connector.scheduler
        self.rope = WakeupSender()
        self.rope.name = self.side._bell.name
        self.answers: dict[int, KVConnectorOutput] = {}  # by step
        self.says: dict[int, str] = {}  # whose arrival the worker tells of while it holds this step
        self.tokens: dict[int, int] = {}
        self.launched: list[dict[str, int]] = []
        self.held: list[list[str]] = []
        self.ahead: list[bool] = []  # of the steps that were held
        self.outputs: list[Any] = []
        self.core: Any = object.__new__(EngineCoreProc)
        vars(self.core).update(
            scheduler=self.scheduler, model_executor=self, input_queue=queue.Queue(),
            batch_queue=deque(maxlen=2) if kind is AsyncScheduler else None, batch_queue_size=2,
            is_mm_encoder_only=False, is_pooling_model=False, aborts_queue=queue.Queue(), vllm_config=vllm_config,
            log_error_detail=lambda output: nullcontext(), capture_iteration_details=lambda output: nullcontext(),
            _attach_iteration_details=lambda *_: None, _attach_weight_version=lambda *_: None,
            _should_throttle_prefills=lambda: False, use_spec_decode=False,
        )  # fmt: skip
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)

    def request(
        self, name: str = "r", first: int = 0, max_tokens: int = 8, transfer: bool = True, more: int = 0, **asks: Any
    ) -> Request:
        params = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **asks})
        where = {
            "do_remote_prefill": True,
            "transfer_id": name,
            "remote_host": "127.0.0.1",
            "remote_port": 1,
            "tp_size": 1,
        }
        params.extra_args = {"kv_transfer_params": where} if transfer else None
        made = Request(name, list(range(first, first + PROMPT + more)), params, None, block_hasher=self._hasher)
        self.scheduler.add_request(made)
        return made

    # -- the executor ----------------------------------------------------------------------------------------------

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:  # type: ignore[override]
        step = len(self.launched)
        self.launched.append(dict(scheduler_output.num_scheduled_tokens))
        metadata = scheduler_output.kv_connector_metadata
        self.held.append(list(metadata.hold))
        if metadata.hold:
            self.ahead.append(metadata.ahead)
        if step in self.says:
            self.rope.arrived(self.says[step], 0)
        names = list(scheduler_output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=[[self.tokens.get(step, GOOD)] for _ in names],
            kv_connector_output=self.answers.get(step, KVConnectorOutput()),
        )
        self._result: Future[ModelRunnerOutput] = Future()
        self._result.set_result(result)
        return self._result if non_block else result

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:  # type: ignore[override]
        return self._result if non_block else self._result.result()

    # -- the engine ------------------------------------------------------------------------------------------------

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            outputs, _ = self.core.step() if self.core.batch_queue is None else self.core.step_with_batch_queue()
            for output in (outputs or {}).values():
                self.outputs += output.outputs

    def tokens_of(self, name: str) -> list[int]:
        return [token for output in self.outputs if output.request_id == name for token in output.new_token_ids]

    def waiting(self, name: str = "r", **how: Any) -> Request:
        """A request whose pages were asked for."""
        made = self.request(name, **how)
        self.step()
        assert made.status is RequestStatus.WAITING_FOR_REMOTE_KVS
        return made

    def expect(self, name: str = "r", within: float = 0.0) -> None:
        self.rope.expected(name, 0, time.monotonic() + within)

    def comes(self, name: str = "r", after: int = 0) -> int:
        """Its pages come while the worker holds the step after ``after`` others; the step's number."""
        step = len(self.launched) + after
        self.answers[step] = KVConnectorOutput(finished_recving={name})
        self.says[step] = name
        return step

    def fails(self, name: str = "r") -> int:
        step = len(self.launched)
        self.answers[step] = KVConnectorOutput(finished_recving={name}, failed_recving={name})
        self.tokens[step] = GARBAGE
        return step

    def comes_late(self, name: str = "r") -> int:
        """Its pages come, but after its first step was computed."""
        step = len(self.launched)
        self.answers[step] = KVConnectorOutput(
            finished_recving={name}, kv_connector_worker_meta=WorkerReport(void={name})
        )
        self.tokens[step] = GARBAGE
        return step

    def cached(self) -> int:
        """Tokens of the prompt that another request would find."""
        prompt = Request("other", [*range(PROMPT), 1], SamplingParams(), None, block_hasher=self._hasher)
        return self.scheduler.kv_cache_manager.get_computed_blocks(prompt)[1]

    def close(self) -> None:
        self.side.close()
        self.rope.close()


@pytest.fixture(params=[AsyncScheduler, Scheduler], ids=["async", "sync"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = Engine(request.param)
    yield made
    made.close()


def begun(engine: Engine, name: str = "r") -> bool:
    """The last step was that request's first one, and the worker was told to hold it."""
    return engine.launched[-1] == {name: 1} and engine.held[-1] == [name]


def test_a_step_begins_before_its_pages_and_its_token_is_given_out_once_they_are_there(engine: Engine) -> None:
    engine.waiting()
    engine.expect()
    engine.comes()
    engine.step()
    assert begun(engine)
    engine.step(4)
    assert engine.tokens_of("r")[:2] == [GOOD, GOOD]
    assert all(not held for held in engine.held[engine.held.index(["r"]) + 1 :]), "no other step is held"
    assert engine.cached() == PROMPT


@pytest.mark.parametrize("within", [10.0, MOST_LEAD_S + 1.0])
def test_no_step_begins_long_before_its_pages_are_expected(engine: Engine, within: float) -> None:
    engine.waiting()
    engine.expect(within=within)
    engine.step(3)
    assert not any(engine.launched)


@pytest.mark.parametrize(
    ("other", "known"),
    [({}, True), ({"logprobs": 3}, False), ({"temperature": 1.0}, False), ({"max_tokens": 5}, True)],
)
def test_launches_go_ahead_of_pages_where_the_same_was_launched_before(other: dict[str, Any], known: bool) -> None:
    """The first launch of a kernel waits for the GPU, which would wait for pages."""
    engine = Engine()
    for name, asks in (("r", {}), ("s", other)):
        engine.waiting(name, **asks)
        engine.expect(name)
        engine.comes(name)
        engine.step()
        assert begun(engine, name)
        engine.step(12)
    assert engine.ahead == [False, known]
    engine.close()


def test_what_was_computed_without_its_pages_is_never_given_out(engine: Engine) -> None:
    """The request is computed anew instead, in whole, and its answer is complete."""
    made = engine.waiting()
    engine.expect()
    engine.fails()
    engine.step()
    assert begun(engine)
    engine.step(14)
    assert made.is_finished()
    assert engine.tokens_of("r") == [GOOD] * 8
    again = [launched["r"] for launched in engine.launched if launched.get("r", 0) > 1]
    assert again == [PROMPT], "all of it, once"
    assert [held for held in engine.held if held] == [["r"]]


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("kind", [AsyncScheduler, Scheduler])
@pytest.mark.parametrize("prefixes", [True, False])
def test_a_step_that_was_over_before_its_pages_came_is_taken_again(
    kind: type[Scheduler], policy: str, prefixes: bool
) -> None:
    """Nothing of it is given out or found by others, but the pages are good: no more is computed than the block that
    the step itself wrote to (without a prefix cache, all), and no policy makes a failure of it."""
    engine = Engine(kind, policy=policy, prefixes=prefixes)
    made = engine.waiting()
    engine.expect()
    engine.comes_late()
    engine.step()
    assert begun(engine)
    engine.step(14)
    assert made.is_finished()
    assert made.status is RequestStatus.FINISHED_LENGTH_CAPPED
    assert engine.tokens_of("r") == [GOOD] * 8
    more = [launched["r"] for launched in engine.launched if launched.get("r", 0) > 1]
    assert more == [BLOCK if prefixes else PROMPT]
    assert [held for held in engine.held if held] == [["r"]]
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 63
    engine.close()


def test_a_request_with_a_void_step_can_be_aborted(engine: Engine) -> None:
    engine.waiting()
    engine.expect()
    engine.comes_late()
    engine.core.aborts_queue.put(["r"])
    engine.step(4)
    assert engine.tokens_of("r") == []
    assert not engine.scheduler.requests
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 63


def test_a_void_step_on_a_prefix_that_was_here_is_taken_again(engine: Engine) -> None:
    """Its pages came for the rest of the prompt alone."""
    engine.request("o", max_tokens=1, transfer=False)
    engine.step(6)
    assert engine.cached() == PROMPT
    made = engine.waiting("r", more=BLOCK + 5)
    engine.expect()
    engine.comes_late()
    engine.step()
    assert begun(engine)
    assert engine.cached() == PROMPT
    engine.step(14)
    assert made.is_finished()
    assert engine.tokens_of("r") == [GOOD] * 8
    again = [launched["r"] for launched in engine.launched if launched.get("r", 0) > 1]
    assert again == [5]
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 63


def test_no_second_step_goes_on_from_one_that_is_void() -> None:
    engine = Engine()
    engine.waiting()
    engine.expect()
    engine.comes_late()
    engine.step(2)
    assert [launched for launched in engine.launched if launched] == [{"r": 1}]
    assert engine.cached() == PROMPT - BLOCK, "the block that the void step wrote to is nobody's to find"
    engine.close()


def test_nobody_finds_pages_in_the_prefix_cache_that_did_not_come(engine: Engine) -> None:
    made = engine.waiting()
    engine.expect()
    engine.fails()
    engine.step()
    assert engine.cached() == 0
    engine.scheduler.finish_requests(["r"], RequestStatus.FINISHED_ABORTED)
    engine.step(3)
    assert made.is_finished()
    assert engine.cached() == 0
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 63


def test_a_request_that_is_aborted_while_its_first_step_is_held_leaves_nothing_behind(engine: Engine) -> None:
    engine.waiting()
    engine.expect()
    engine.comes()
    engine.core.aborts_queue.put(["r"])  # a client left: looked at before the step's outcome
    engine.step(4)
    assert engine.tokens_of("r") == []
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 63
    assert not engine.scheduler.requests


@pytest.mark.parametrize("kind", [AsyncScheduler, Scheduler])
def test_a_failed_load_fails_the_request_where_that_is_the_policy(kind: type[Scheduler]) -> None:
    engine = Engine(kind, policy="fail")
    made = engine.waiting()
    engine.expect()
    engine.fails()
    engine.step(4)
    assert made.status is RequestStatus.FINISHED_ERROR
    assert engine.tokens_of("r") == []
    assert engine.cached() == 0
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 63
    engine.close()


def test_no_second_step_is_launched_before_the_first_ones_pages_are_known_to_be_there() -> None:
    """With asynchronous scheduling it would be computed from a token that may be void."""
    engine = Engine()
    engine.waiting()
    engine.expect()
    engine.fails()
    engine.step(2)
    assert [launched for launched in engine.launched if launched] == [{"r": 1}]
    engine.close()


def test_a_second_step_is_launched_at_once_if_they_are() -> None:
    engine = Engine()
    engine.waiting()
    engine.expect()
    engine.comes()
    engine.step(2)
    assert engine.launched[-2:] == [{"r": 1}, {"r": 1}]
    engine.close()


def test_where_launches_are_slow_the_first_outcome_is_looked_at_before_the_second_launch() -> None:
    engine = Engine(graphs=CUDAGraphMode.NONE)
    engine.waiting()
    engine.expect()
    engine.comes()
    engine.step(2)
    assert engine.launched[-2:] == [{"r": 1}, {}]
    if not engine.tokens_of("r"):
        engine.step()
    assert engine.tokens_of("r") == [GOOD]
    engine.step(2)
    assert {"r": 1} in engine.launched[-2:]
    engine.close()


def test_a_request_that_is_not_alone_waits_for_its_pages(engine: Engine) -> None:
    """Others would wait with it."""
    engine.waiting("r")
    engine.waiting("s", first=1000)
    engine.expect("r")
    engine.step(2)
    assert not any(engine.held)
    other = engine.request("o", first=2000, max_tokens=4, transfer=False)
    engine.step(12)
    assert other.is_finished()
    assert not any(engine.held)


def test_switched_off_every_request_waits_for_its_pages() -> None:
    engine = Engine(early_step=False)
    engine.waiting()
    engine.expect()
    engine.step(3)
    assert not any(engine.launched)
    engine.close()


def test_an_expectation_of_a_stranger_changes_nothing(engine: Engine) -> None:
    engine.waiting()
    engine.expect("stranger")
    engine.rope.expected("r", 5, 0.0)
    engine.step(2)
    assert not any(engine.launched)


@pytest.mark.parametrize("needed", [0.001, 0.004, 0.009])
def test_how_early_to_begin_is_learned_from_how_long_steps_were_held(needed: float) -> None:
    """Whatever the machine needs, its pages are waited for, and not for long."""
    lead = Lead()
    for _ in range(60):
        lead.learn(max(0.0, lead.seconds - needed), 0.0)
    assert lead.seconds - needed == pytest.approx(HELD_S, abs=1e-4)


@pytest.mark.parametrize("needed", [0.01, 0.03, 0.04])
def test_who_begins_too_late_soon_begins_in_time(needed: float) -> None:
    """Without CUDA graphs launching takes that long, and the first token would wait for it."""
    lead = Lead()
    for _ in range(10):
        lead.learn(lead.seconds - needed, 0.0)
    assert lead.seconds - needed > 0
    for _ in range(60):
        lead.learn(lead.seconds - needed, 0.0)
    assert lead.seconds - needed == pytest.approx(HELD_S, abs=1e-4)


def test_no_machine_makes_requests_begin_long_before_their_pages_or_after_them() -> None:
    lead = Lead()
    for _ in range(1000):
        lead.learn(0.0, 0.0)
    assert lead.seconds == MOST_LEAD_S
    for _ in range(1000):
        lead.learn(60.0, 0.0)
    assert lead.seconds == LEAST_LEAD_S


def test_one_hiccup_makes_no_request_begin_long_before_its_pages() -> None:
    lead = Lead()
    lead.learn(-0.3, 0.0)
    assert lead.seconds < FIRST_LEAD_S + 0.001


def test_an_expectation_that_was_wrong_holds_no_engine_for_long_again() -> None:
    """What was expected long ago is not waited for, and after a long hold nothing is begun early for a while."""
    lead = Lead()
    assert lead.has_come(10.0, 10.0 - FIRST_LEAD_S / 2)
    assert lead.has_come(10.0, 10.0 + LONG_S / 2)
    assert not lead.has_come(10.0, 10.0 + 2 * LONG_S)
    lead.learn(2 * LONG_S, 20.0)
    assert not lead.has_come(20.0 + REST_S / 2, 20.0 + REST_S / 2)
    assert lead.has_come(20.0 + 2 * REST_S, 20.0 + 2 * REST_S)


class Keeper:
    """In place of the shared pool's half: notes what it is told to keep; knows nothing."""

    asking = False

    def __init__(self) -> None:
        self.offered: list[str] = []
        self.asked: list[str] = []

    def progress(self, output: Any, computed: dict[str, int]) -> list[Any]:
        self.offered += computed
        return []

    def matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        return 0, False

    def ask(self, req_id: str) -> None:
        self.asked.append(req_id)

    def handed_over(self) -> list[str]:
        return []

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.mark.parametrize("fails", [True, False])
def test_nothing_computed_from_pages_that_may_not_come_is_kept_in_the_pool(engine: Engine, fails: bool) -> None:
    """Its chunks would be found under the prompt's own keys, by this engine first of all."""
    keeper: Any = Keeper()
    engine.side._pool = keeper
    engine.waiting()
    engine.expect()
    _ = engine.fails() if fails else engine.comes()
    engine.step()
    assert begun(engine)
    assert keeper.offered == []
    engine.step(2)
    assert keeper.asked == (["r"] if fails else [])
    engine.step(2)
    assert "r" in keeper.offered, "once it is known that they are right"


def test_a_report_that_comes_with_the_step_before_counts() -> None:
    """The transfer ended while an empty step was taken, and the word of it was lost."""
    engine = Engine(policy="fail")
    made = engine.waiting()
    engine.answers[len(engine.launched)] = KVConnectorOutput(finished_recving={"r"})
    engine.core.batch_queue_size = 3  # that step's outcome is looked at later
    engine.core.batch_queue = deque(maxlen=3)
    engine.side._look_again = 2
    engine.step()
    engine.expect()
    engine.step(8)
    assert ["r"] in engine.held
    assert made.status is not RequestStatus.FINISHED_ERROR
    assert engine.tokens_of("r")[:1] == [GOOD]
    engine.close()


def test_workers_of_one_engine_are_heard_by_the_one_that_had_the_least_time() -> None:
    one, other = WorkerReport(held={"r": 0.004, "s": 0.1}), WorkerReport(held={"r": 0.001}, void={"s"})
    assert one.aggregate(other).held == other.aggregate(one).held == {"r": 0.001, "s": 0.1}
    assert one.aggregate(other).void == other.aggregate(one).void == {"s"}
