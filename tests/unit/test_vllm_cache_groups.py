"""What kind of cache a model has is read off vLLM's specs: what can't be moved is refused when the server starts, and
what can be moved in part is known by its window."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1 import kv_cache_interface as specs
from vllm.v1.request import Request

from pdtransport.engine.commands import Open, StartReceive
from pdtransport.errors import SettingsError
from pdtransport.settings import Settings
from pdtransport.vllm.beyond_window import CODE, WindowRule
from pdtransport.vllm.cache_groups import refuse_caches, refuse_context_parallel, refuse_model, window_of
from pdtransport.vllm.connector import PDTransportConnector
from pdtransport.vllm.scheduler import SchedulerSide

SHAPE: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL = specs.FullAttentionSpec(**SHAPE)
SLIDING = specs.SlidingWindowSpec(**SHAPE, sliding_window=64)
STATE = specs.MambaSpec(block_size=1, shapes=((4, 2, 8, 16),), dtypes=(torch.float32,))


def caches(*groups: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in groups])


def model(**facts: Any) -> Any:
    usual = {"is_hybrid": False, "is_attention_free": False, "architecture": "SomeForCausalLM"}
    return SimpleNamespace(model_config=SimpleNamespace(**{**usual, **facts}))


def test_attention_of_one_kind_is_handed_over() -> None:
    for spec in (FULL, SLIDING):
        refuse_caches(caches(spec))
    refuse_caches(caches(specs.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": FULL})))


@pytest.mark.parametrize("groups", [(STATE,), (FULL, STATE), (specs.CrossAttentionSpec(**SHAPE),)])
def test_what_is_no_attention_cache_is_refused_by_its_kind(groups: tuple[Any, ...]) -> None:
    """Whatever the shape of its tensors: a state of four dimensions is a state."""
    with pytest.raises(SettingsError, match=rf"{type(groups[-1]).__name__}.*--kv-transfer-config") as refused:
        refuse_caches(caches(*groups))
    assert "\n" not in str(refused.value)


def test_a_state_hidden_in_a_group_of_many_specs_is_refused() -> None:
    with pytest.raises(SettingsError, match="MambaSpec"):
        refuse_caches(caches(specs.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": STATE})))


def test_groups_with_block_tables_of_their_own_are_refused() -> None:
    """Only the first group's blocks would be handed over."""
    with pytest.raises(SettingsError, match="2 groups"):
        refuse_caches(caches(FULL, SLIDING))


@pytest.mark.parametrize("facts", [{"is_hybrid": True}, {"is_attention_free": True}])
def test_models_with_a_state_are_refused_before_vllm_lays_out_their_cache(facts: dict[str, Any]) -> None:
    for hook in (refuse_model, PDTransportConnector.get_required_kvcache_layout):
        with pytest.raises(SettingsError, match=r"SomeForCausalLM.*state.*--kv-transfer-config"):
            hook(model(**facts))
        assert hook(model()) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_context_parallel_shards_are_refused(kind: str) -> None:
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(**{f"{kind}_context_parallel_size": 2}))
    with pytest.raises(SettingsError, match=f"--{kind}-context-parallel-size"):
        refuse_context_parallel(config)


def test_a_window_is_found_only_where_all_layers_have_one() -> None:
    assert window_of(caches(SLIDING)) == 64
    assert window_of(caches(specs.ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=32))) == 32
    assert window_of(caches(FULL)) is None
    assert window_of(caches(specs.FullAttentionSpec(**SHAPE, sliding_window=64))) is None  # kept whole


PRODUCE = {"do_remote_decode": True, "transfer_id": "t"}
CONSUME = {"do_remote_prefill": True, "transfer_id": "t", "remote_host": "127.0.0.1", "remote_port": 1}


def request(tokens: int, params: dict[str, Any], **sampling: Any) -> Request:
    wanted = {"max_tokens": 1, "extra_args": {"kv_transfer_params": params}, **sampling}
    return Request("r", list(range(tokens)), SamplingParams(**wanted), None)


@pytest.fixture
def side() -> SchedulerSide:
    return SchedulerSide(
        Settings(),
        producer=True,
        consumer=True,
        block_size=16,
        engine="e",
        port=7,
        ranks=1,
        window=WindowRule(64, Settings()),
    )


def told(side: SchedulerSide) -> list[Any]:
    """The commands of an empty step."""
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[])
    output = SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={},
        total_num_scheduled_tokens=0,
        preempted_req_ids=(),
    )
    return list(side.build(output).before)  # type: ignore[arg-type]


def test_a_prompt_within_the_window_is_handed_over(side: SchedulerSide) -> None:
    side.on_new_request(request(64, PRODUCE))
    assert any(isinstance(command, Open) for command in told(side))
    there = request(64, CONSUME)
    there.request_id = "d"
    side.on_new_request(there)
    assert side.matched_tokens(there, 0) == (64, True)


def test_a_prompt_beyond_the_window_is_computed_by_decode_at_once(side: SchedulerSide) -> None:
    there = request(65, CONSUME)
    side.on_new_request(there)
    assert side.matched_tokens(there, 0) == (0, False)
    assert there.num_prompt_tokens == 65
    assert not any(isinstance(command, StartReceive) for command in told(side))


def test_prefill_computes_next_to_nothing_of_it_and_says_why(side: SchedulerSide) -> None:
    """The prompt is computed once, by decode; prefill's answer names the reason."""
    here = request(1000, PRODUCE)
    side.on_new_request(here)
    assert not any(isinstance(command, Open) for command in told(side))
    assert here.num_tokens == here.num_prompt_tokens == 1
    keep, params = side.finished(here, [])
    assert not keep
    assert params is not None
    assert (params["not_handed_over"], params["do_remote_prefill"]) == (CODE, False)
    assert side.finished(here, []) == (False, None)  # once


@pytest.mark.parametrize("sampling", [{"max_tokens": 5}, {"prompt_logprobs": 1}])
def test_who_wants_more_of_prefill_gets_it(side: SchedulerSide, sampling: dict[str, Any]) -> None:
    here = request(1000, PRODUCE, **sampling)
    side.on_new_request(here)
    assert here.num_prompt_tokens == 1000


def test_prefill_that_would_move_its_window_past_the_prompt_hands_nothing_over(side: SchedulerSide) -> None:
    """Its first blocks could be given back while decode still reads them."""
    side.on_new_request(request(60, PRODUCE, max_tokens=6))
    assert not any(isinstance(command, Open) for command in told(side))
    again = request(60, PRODUCE, max_tokens=5)
    again.request_id = "again"
    side.on_new_request(again)
    assert any(isinstance(command, Open) for command in told(side))


def test_models_without_a_window_know_no_bound() -> None:
    window = WindowRule(None, Settings())
    long = request(100_000, PRODUCE)
    assert window.why_not(long) == window.why_not_held(long) == ""
