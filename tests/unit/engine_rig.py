"""vLLM's own scheduler, cache manager and engine step, with the connector's scheduler half; the workers' answers are
set."""

from __future__ import annotations

import queue
from collections import deque
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

from pdtransport.engine.wakeups import WakeupSender

MODEL = Path(__file__).parents[2] / "examples/models/tiny-lm"
BLOCK = 32
PROMPT = 10 * BLOCK
TOKEN = 7  # that every step samples


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
        self.launched: list[dict[str, int]] = []
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
        names = list(scheduler_output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=[[TOKEN] for _ in names],
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

    def reports(self, name: str = "r") -> None:
        """The next step's output says that its pages came."""
        self.answers[len(self.launched)] = KVConnectorOutput(finished_recving={name})

    def arrives(self, name: str = "r") -> None:
        """Its pages came: the worker rings at once, and reports it with the next step's output."""
        self.rope.arrived(name, 0)
        self.reports(name)

    def cached(self) -> int:
        """Tokens of the prompt that another request would find."""
        prompt = Request("other", [*range(PROMPT), 1], SamplingParams(), None, block_hasher=self._hasher)
        return self.scheduler.kv_cache_manager.get_computed_blocks(prompt)[1]

    def close(self) -> None:
        self.side.close()
        self.rope.close()
