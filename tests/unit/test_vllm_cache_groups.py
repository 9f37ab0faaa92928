"""What kind of cache a model has is read off vLLM's specs: what can't be moved is refused when the server starts; of a
group with a window, only the blocks that are still attended to are handed over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1 import kv_cache_interface as specs
from vllm.v1.request import Request

from pdtransport.engine.commands import Open, Pages, StartReceive
from pdtransport.errors import SettingsError
from pdtransport.kv.groups import GONE
from pdtransport.settings import Settings
from pdtransport.vllm.cache_groups import NULL_BLOCK, HandedGroups, refuse_caches, refuse_context_parallel, refuse_model
from pdtransport.vllm.connector import PDTransportConnector
from pdtransport.vllm.scheduler import SchedulerSide

SHAPE: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL = specs.FullAttentionSpec(**SHAPE)
SLIDING = specs.SlidingWindowSpec(**SHAPE, sliding_window=64)
CHUNKED = specs.ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=32)
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


def test_groups_with_block_tables_of_their_own_are_handed_over_unless_one_is_a_state() -> None:
    refuse_caches(caches(FULL, SLIDING))
    with pytest.raises(SettingsError, match="MambaSpec"):
        refuse_caches(caches(FULL, SLIDING, STATE))


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


def test_a_group_has_a_window_only_where_vllm_gives_its_blocks_back() -> None:
    def window(*groups: Any) -> int | None:
        return HandedGroups.of(caches(*groups)).tables.window

    assert window(SLIDING) == 64
    assert window(FULL, CHUNKED, SLIDING) == 32  # the smallest
    assert window(FULL) is None
    assert window(specs.FullAttentionSpec(**SHAPE, sliding_window=64)) is None  # kept whole


def test_only_blocks_of_a_group_with_a_window_can_be_given_back() -> None:
    """Block 0 is vLLM's placeholder for those; elsewhere no id has a meaning of its own."""
    groups = HandedGroups.of(caches(FULL, SLIDING))
    assert groups.blocks([[NULL_BLOCK, 5], [NULL_BLOCK, 6]]) == ([0, 5], [GONE, 6])
    assert groups.kinds == ("FullAttentionSpec", "SlidingWindowSpec:64")


PRODUCE = {"do_remote_decode": True, "transfer_id": "t"}
CONSUME = {"do_remote_prefill": True, "transfer_id": "t", "remote_host": "127.0.0.1", "remote_port": 1}


def request(tokens: int, params: dict[str, Any], **sampling: Any) -> Request:
    wanted = {"max_tokens": 1, "extra_args": {"kv_transfer_params": params}, **sampling}
    return Request("r", list(range(tokens)), SamplingParams(**wanted), None)


def made(*groups: Any) -> SchedulerSide:
    return SchedulerSide(
        Settings(),
        producer=True,
        consumer=True,
        groups=HandedGroups.of(caches(*groups)),
        engine="e",
        port=7,
        ranks=1,
    )


@pytest.fixture
def side() -> SchedulerSide:
    return made(FULL, SLIDING)


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


def given(*ids: list[int]) -> Any:
    return SimpleNamespace(get_block_ids=lambda: ids)


def test_decode_asks_for_live_blocks_only(side: SchedulerSide) -> None:
    """A prompt of 200 tokens, window 64: the last token, which decode computes, attends to tokens 136 and later: blocks
    8 and later of 16 tokens each."""
    there = request(200, CONSUME)
    side.on_new_request(there)
    assert side.matched_tokens(there, 0) == (199, True)
    full, sliding = list(range(100, 113)), [NULL_BLOCK] * 8 + list(range(208, 213))
    side.allocated(there, given(full, sliding), 199)
    (command,) = [each for each in told(side) if isinstance(each, StartReceive)]
    assert (command.tokens, command.first_block) == (199, (0, 8))
    assert command.pages == (full, [208, 209, 210, 211, 212])


def test_decode_asks_for_nothing_that_its_prefix_cache_holds(side: SchedulerSide) -> None:
    there = request(200, CONSUME)
    side.on_new_request(there)
    assert side.matched_tokens(there, 160) == (39, True)
    side.allocated(there, given(list(range(100, 113)), [NULL_BLOCK] * 8 + list(range(208, 213))), 39)
    (command,) = [each for each in told(side) if isinstance(each, StartReceive)]
    assert (command.first_block, command.pages) == ((10, 10), ([110, 111, 112], [210, 211, 212]))


@pytest.mark.parametrize("tokens", range(60, 100))
@pytest.mark.parametrize(("window", "chunk"), [(64, 32), (17, 33), (48, 16)])
def test_what_the_last_token_attends_to_is_handed_over(tokens: int, window: int, chunk: int) -> None:
    """For every position of the window's and the chunk's edges in a block: what decode asks for holds all that the
    last token of the prompt attends to, where decode has it allocated as vLLM does it."""
    sliding = specs.SlidingWindowSpec(**SHAPE, sliding_window=window)
    chunked = specs.ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=chunk)
    side, there = made(FULL, sliding, chunked), request(tokens, CONSUME)
    side.on_new_request(there)
    matched, _ = side.matched_tokens(there, 0)
    assert matched is not None
    skipped = [0, max(0, matched - window + 1), matched // chunk * chunk]  # of `get_num_skipped_tokens` there
    count = -(-matched // 16)
    ids = [[NULL_BLOCK] * (skip // 16) + list(range(1 + skip // 16, 1 + count)) for skip in skipped]
    side.allocated(there, given(*ids), matched)
    (command,) = [each for each in told(side) if isinstance(each, StartReceive)]
    last = tokens - 1
    needed = [0, max(0, last - window + 1), last // chunk * chunk]
    for first, pages, need in zip(command.first_block, command.pages, needed, strict=True):
        assert first * 16 <= need or need >= matched
        assert first + len(pages) == count
        assert NULL_BLOCK not in pages


def test_prefill_offers_what_decode_asks_for(side: SchedulerSide) -> None:
    """Both count the same tokens, and what vLLM gave back on prefill is no page."""
    here = request(200, PRODUCE)
    side.on_new_request(here)
    (opened,) = [command for command in told(side) if isinstance(command, Open)]
    assert opened.tokens == 199
    full, sliding = list(range(100, 113)), [NULL_BLOCK] * 6 + list(range(206, 213))
    step = SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(req_ids=["r"], num_computed_tokens=[160]),
        num_scheduled_tokens={"r": 40},
        total_num_scheduled_tokens=40,
        preempted_req_ids=(),
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda req_id: (full, sliding)),
    )
    (pages,) = [each for each in side.build(step).after if isinstance(each, Pages)]  # type: ignore[arg-type]
    assert (pages.pages, pages.tokens) == ((full, [GONE] * 6 + list(range(206, 213))), 199)


def test_prefill_that_would_move_its_window_past_the_prompt_hands_nothing_over(side: SchedulerSide) -> None:
    """Blocks that decode asks for could be given back before it has them."""
    side.on_new_request(request(60, PRODUCE, max_tokens=6))
    assert not any(isinstance(command, Open) for command in told(side))
    for number, (tokens, most) in enumerate([(60, 5), (1000, 1)]):
        again = request(tokens, PRODUCE, max_tokens=most)
        again.request_id = f"again{number}"
        side.on_new_request(again)
        assert any(isinstance(command, Open) for command in told(side))


def test_models_without_a_window_know_no_bound() -> None:
    side = made(FULL)
    side.on_new_request(request(1000, PRODUCE, max_tokens=100))
    (opened,) = [command for command in told(side) if isinstance(command, Open)]
    assert opened.tokens == 1000


def test_with_an_adapter_several_groups_are_not_handed_over(side: SchedulerSide) -> None:
    """Workers check which content wrote a block of one table only."""
    for params in (PRODUCE, CONSUME):
        adapted = request(100, params)
        adapted.lora_request = SimpleNamespace(lora_name="a", lora_path="/a", lora_int_id=1)  # type: ignore[assignment]
        adapted.request_id = str(params)
        side.on_new_request(adapted)
    assert not any(isinstance(command, (Open, StartReceive)) for command in told(side))
