"""Data-parallel replicas of one server: each has control ports of its own, and its answers name them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.config import ParallelConfig

from pdtransport.settings import Settings
from pdtransport.vllm.geometry import control_port

BASE = 7400


def replica(index: int, *, moe: bool, tp: int = 1) -> ParallelConfig:
    """As vLLM's engine process sets up its replica (``EngineCoreProc.run_engine_core``)."""
    parallel = ParallelConfig(data_parallel_size=2, data_parallel_size_local=2, tensor_parallel_size=tp)
    parallel.data_parallel_index = index
    if moe:
        parallel.data_parallel_rank = index
    else:
        parallel.reconfigure_for_independent_dp_rank()
    return parallel


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_replicas_of_a_server_share_no_control_port(moe: bool, tp: int) -> None:
    """Dense replicas all have data_parallel_rank 0: two of them must not bind the same ports."""
    settings = Settings.model_validate({"control": {"port": BASE}})
    ports = [
        control_port(
            settings,
            SimpleNamespace(parallel_config=replica(index, moe=moe, tp=tp), kv_transfer_config=None),  # type: ignore[arg-type]
        )
        for index in (0, 1)
    ]
    assert ports == [BASE, BASE + tp]
