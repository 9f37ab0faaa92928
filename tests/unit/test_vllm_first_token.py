"""Decode goes on from prefill's first token inside vLLM's own scheduler, or says that it did not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from pdtransport.engine.commands import Commands, Finish, StartReceive, WorkerReport
from pdtransport.engine.results import Results
from pdtransport.engine.stats import TransferStats
from pdtransport.engine.wakeups import WakeupSender
from pdtransport.settings import Settings
from pdtransport.transfer.outcome import Outcome
from pdtransport.vllm.cache_groups import HandedGroups
from pdtransport.vllm.first_token import FirstTokens
from pdtransport.vllm.patches.appended_token import LOST, append, give_up
from pdtransport.vllm.scheduler import SchedulerSide

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-lm"
BLOCK = 32
PROMPT = list(range(300, 400))  # whole characters
TOKEN = 300
CONSUME = {
    "do_remote_prefill": True, "transfer_id": "t", "remote_host": "127.0.0.1", "remote_port": 1, "tp_size": 1,
    "first_token": True,
}  # fmt: skip
PRODUCE = {"do_remote_decode": True, "transfer_id": "t", "first_token": True}
GO_ON = {"continue_from": TOKEN}


@cache
def engine_config(policy: str = "recompute") -> Any:
    from vllm.engine.arg_utils import EngineArgs

    transfer = {
        "kv_connector": "PDTransportConnector",
        "kv_connector_module_path": "pdtransport.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
    }
    args: dict[str, Any] = {
        "model": str(MODEL), "block_size": BLOCK, "max_model_len": 1024, "max_num_batched_tokens": 1024,
        "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 26, "dtype": "bfloat16", "kv_transfer_config": transfer,
    }  # fmt: skip
    return EngineArgs(**args).create_engine_config()


@pytest.fixture(scope="module")
def config() -> Any:
    return engine_config()


@pytest.fixture(scope="module")
def firsts(config: Any) -> FirstTokens:
    return FirstTokens(config, Settings())


def request(kv: Any = None, prompt: list[int] | None = None, hasher: Any = None, **sampling: Any) -> Request:
    extra = {"kv_transfer_params": kv} if kv is not None else None
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "extra_args": extra, **sampling})
    return Request("r", list(PROMPT) if prompt is None else prompt, params, None, block_hasher=hasher)


# -- which requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "code"),
    [
        ({}, ""),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}, ""),
        ({"ignore_eos": True, "stop_token_ids": [5], "skip_special_tokens": False}, ""),
        ({"seed": 1}, ""),
        ({"seed": 1, "temperature": 0.7}, "seed"),
        ({"presence_penalty": 0.5}, "penalties"),
        ({"frequency_penalty": 0.5}, "penalties"),
        ({"repetition_penalty": 1.2}, "penalties"),
        ({"logprobs": 0}, "logprobs"),
        ({"prompt_logprobs": 1}, "logprobs"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"stop": ["x"]}, "stop"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"logit_bias": {5: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"structured_outputs": StructuredOutputsParams(regex="a")}, "structured_output"),
        ({"thinking_token_budget": 5}, "reasoning"),
        ({"extra_args": {"mine": 1}}, "extra_args"),
        ({"spaces_between_special_tokens": False}, "sampling_params"),
        ({"detokenize": False}, "sampling_params"),
        ({"watermarking": True}, "sampling_params"),
        ({"watermarking": False}, ""),
    ],
)
def test_sampling_state_makes_it_inexact(firsts: FirstTokens, sampling: dict[str, Any], code: str) -> None:
    """As vLLM understood the request, its own defaults included; what is not known to be harmless is not."""
    assert firsts.why_not(request(**sampling)) == code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda c: setattr(c.model_config, "logits_processors", ["mine:Processor"]), "logits_processors"),
        (lambda c: setattr(c.structured_outputs_config, "reasoning_parser", "qwen3"), "reasoning"),
        (lambda c: setattr(c.model_config, "skip_tokenizer_init", True), "model"),
        (lambda c: None, ""),
    ],
)
def test_engines_that_look_at_earlier_tokens_take_no_part(config: Any, change: Any, code: str) -> None:
    other = copy.copy(config)
    other.model_config = copy.copy(config.model_config)
    other.structured_outputs_config = copy.copy(config.structured_outputs_config)
    change(other)
    assert FirstTokens(other, Settings()).unsupported == code


def test_another_vllm_takes_no_part(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its Request is not what this was made for."""
    monkeypatch.delattr(Request, "update_block_hashes")
    assert FirstTokens(config, Settings()).unsupported == "vllm_version"


@pytest.mark.parametrize("text", ["é", "日", "🙂"])
def test_half_a_character_is_not_given_out(firsts: FirstTokens, text: str) -> None:
    """Neither its beginning, nor its rest after a prompt that ends within it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.encode("x = 1\n", add_special_tokens=False).ids
    assert firsts.why_no_token(request(prompt=whole), whole[0]) == ""
    if len(ids) == 1:
        pytest.skip("one token of this model")
    assert firsts.why_no_token(request(prompt=whole), ids[0]) == "partial_character"
    assert firsts.why_no_token(request(prompt=whole + ids[:-1]), ids[-1]) == "partial_character"
    assert firsts.why_no_token(request(prompt=whole + ids[:-1]), whole[0]) == "partial_character"
    assert firsts.why_no_token(request(prompt=whole), 1) == "special_token"


# -- prefill's side ---------------------------------------------------------------------------------------------------


@pytest.fixture
def side(firsts: FirstTokens) -> SchedulerSide:
    return SchedulerSide(
        Settings(),
        producer=True,
        consumer=True,
        groups=HandedGroups.one(BLOCK),
        engine="e",
        port=7,
        ranks=1,
        first_tokens=firsts,
    )


def news(**more: Any) -> Any:
    return KVConnectorOutput(kv_connector_worker_meta=WorkerReport(**more))


@pytest.mark.parametrize(
    ("promised", "sampling", "status", "told"),
    [
        (True, {}, RequestStatus.FINISHED_LENGTH_CAPPED, {"first_token": TOKEN}),
        (False, {}, RequestStatus.FINISHED_LENGTH_CAPPED, {"first_token_declined": "no_promise"}),
        (True, {}, RequestStatus.FINISHED_STOPPED, {"first_token_declined": "stopped"}),
        (True, {"presence_penalty": 1.0}, RequestStatus.FINISHED_LENGTH_CAPPED, {"first_token_declined": "penalties"}),
    ],
)
def test_prefill_tells_decode_what_it_tells_the_router(
    side: SchedulerSide, promised: bool, sampling: dict[str, Any], status: RequestStatus, told: dict[str, Any]
) -> None:
    """One decision: the commit names the token if and only if the answer does."""
    r = request(PRODUCE, **sampling)
    side.on_new_request(r)
    side._before.clear()
    side.update_output(news(promised={"r"} if promised else set()))
    r.num_computed_tokens = len(PROMPT)
    r.append_output_token_ids(TOKEN)
    r.status = status
    kept, params = side.finished(r, ([1, 2, 3, 4],))
    assert kept
    assert params is not None
    assert {key: value for key, value in params.items() if key.startswith("first_token")} == told
    assert side._before == [Finish("r", told.get("first_token"))]


def test_who_does_not_ask_is_not_told(side: SchedulerSide) -> None:
    r = request({"do_remote_decode": True, "transfer_id": "t"})
    side.on_new_request(r)
    r.num_computed_tokens = len(PROMPT)
    r.append_output_token_ids(TOKEN)
    r.status = RequestStatus.FINISHED_LENGTH_CAPPED
    _, params = side.finished(r, ([],))
    assert params is not None
    assert not any(key.startswith("first_token") for key in params)


# -- decode's side, in vLLM's scheduler -------------------------------------------------------------------------------


class Engine:
    """vLLM's scheduler with our connector, and no workers: a test plays them."""

    def __init__(self, config: Any) -> None:
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        config.cache_config.num_gpu_blocks = 100
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=4, head_size=32, dtype=torch.bfloat16)
        cache = KVCacheConfig(100, [], [KVCacheGroupSpec(["layer"], spec)])
        manager = StructuredOutputManager(config)
        self.scheduler = Scheduler(
            vllm_config=config, kv_cache_config=cache, structured_output_manager=manager, block_size=BLOCK
        )
        self.scheduled: Any = None

    def add(self, kv: Any, **sampling: Any) -> Request:
        made = request(kv, hasher=self.hasher, **sampling)
        self.scheduler.add_request(made)
        return made

    def step(self, sampled: int | None = None, meanwhile: Any = None, **connector: Any) -> list[Any]:
        """Schedule, and report ``sampled`` for the one request if it ran; the outputs that clients get. ``meanwhile``
        is called while workers would compute."""
        from vllm.v1.outputs import ModelRunnerOutput

        self.scheduled = scheduled = self.scheduler.schedule()
        if meanwhile is not None:
            meanwhile(self.commands)
        ran = list(scheduled.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=ran,
            req_id_to_index={name: i for i, name in enumerate(ran)},
            sampled_token_ids=[[] if sampled is None else [sampled] for _ in ran],
            kv_connector_output=KVConnectorOutput(**connector) if connector else None,
        )
        outputs = self.scheduler.update_from_output(scheduled, output)
        return [one for per_client in outputs.values() for one in per_client.outputs]

    @property
    def commands(self) -> Commands:
        metadata = self.scheduled.kv_connector_metadata
        assert isinstance(metadata, Commands)
        return metadata

    def close(self) -> None:
        self.scheduler.shutdown()


@pytest.fixture(params=["recompute", "fail"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = Engine(engine_config(request.param))
    yield made
    assert not made.scheduler.requests, "requests leaked"
    assert made.scheduler.kv_cache_manager.usage == 0
    made.close()


@pytest.mark.parametrize("when", ["before", "meanwhile", "never"])
def test_a_promise_counts_until_the_step_that_ends_the_prompt(engine: Engine, when: str) -> None:
    """Most prompts take one step, and vLLM looks at what its workers tell only after it ended that step's requests."""
    r = engine.add({**PRODUCE, "transfer_id": "t2"}, max_tokens=1)
    rope = WakeupSender()

    def tell(commands: Commands) -> None:
        rope.name = commands.bell
        if when != "never":
            rope.promised("somebody-else")
            rope.promised(r.request_id)

    if when == "before":
        side = engine.scheduler.connector.scheduler
        rope.name = side._bell.name
        rope.promised(r.request_id)
    (out,) = engine.step(sampled=TOKEN, meanwhile=None if when == "before" else tell)
    rope.close()
    assert out.kv_transfer_params.get("first_token") == (None if when == "never" else TOKEN)
    engine.step()
    finish = [command for command in engine.commands.before if isinstance(command, Finish)]
    assert finish == [Finish(r.request_id, None if when == "never" else TOKEN)]
    engine.step(finished_sending={r.request_id})
    engine.step()


def taken(engine: Engine, **sampling: Any) -> tuple[Request, StartReceive]:
    r = engine.add(CONSUME, **sampling)
    engine.step()
    (take,) = [command for command in engine.commands.before if isinstance(command, StartReceive)]
    return r, take


def test_decodes_next_step_computes_the_second_token(engine: Engine) -> None:
    """All of the prompt is computed, the first token is its last one, and the client is told of the others only."""
    r, take = taken(engine, max_tokens=3)
    assert take.first_token
    arrived = WorkerReport(first_tokens={r.request_id: TOKEN})
    engine.step(finished_recving={r.request_id}, kv_connector_worker_meta=arrived)
    (out,) = engine.step(sampled=401)
    (new,) = engine.scheduled.scheduled_new_reqs
    assert new.prompt_token_ids == [*PROMPT, TOKEN]
    assert (new.num_computed_tokens, engine.scheduled.num_scheduled_tokens) == (len(PROMPT), {r.request_id: 1})
    assert (out.new_token_ids, out.finish_reason) == ([401], None)
    (last,) = engine.step(sampled=402)
    assert str(last.finish_reason) == "length", "the first token counts towards max_tokens"
    engine.step()


def test_an_arrival_with_the_first_token_goes_on_in_the_step_that_begins_next(engine: Engine) -> None:
    """It does not wait for the report, two steps later, which is then no news."""
    r, _ = taken(engine, max_tokens=3)
    side, rope = engine.scheduler.connector.scheduler, WakeupSender()
    rope.name = side._bell.name
    rope.arrived(r.request_id, 0, TOKEN)
    rope.close()
    (out,) = engine.step(sampled=401)
    (new,) = engine.scheduled.scheduled_new_reqs
    assert new.prompt_token_ids == [*PROMPT, TOKEN]
    assert engine.scheduled.num_scheduled_tokens == {r.request_id: 1}
    assert out.new_token_ids == [401]
    report = WorkerReport(first_tokens={r.request_id: TOKEN})
    (last,) = engine.step(sampled=402, finished_recving={r.request_id}, kv_connector_worker_meta=report)
    assert str(last.finish_reason) == "length"
    assert list(r.output_token_ids) == [401, 402]
    assert not side._tokens, "the report's token is kept for nobody"
    engine.step()


def test_a_token_that_is_told_before_its_request_is_reported_is_kept_for_nobody(engine: Engine) -> None:
    """A worker collects what ended, then the news: what ends between the two is in two reports, the second without
    news. The request resumed by the wake-up."""
    r, _ = taken(engine, max_tokens=3)
    side, rope = engine.scheduler.connector.scheduler, WakeupSender()
    rope.name = side._bell.name
    rope.arrived(r.request_id, 0, TOKEN)
    rope.close()
    engine.step(sampled=401, kv_connector_worker_meta=WorkerReport(first_tokens={r.request_id: TOKEN}))
    engine.step(sampled=402, finished_recving={r.request_id})
    assert not side._tokens
    engine.step()


def test_the_first_token_may_fill_a_block(engine: Engine) -> None:
    """Its block's hash is of the prompt and the token, as in a server that computed both."""
    r = request(CONSUME, prompt=PROMPT[: 3 * BLOCK - 1], hasher=engine.hasher)
    engine.scheduler.add_request(r)
    engine.step()
    arrived = WorkerReport(first_tokens={"r": TOKEN})
    engine.step(finished_recving={"r"}, kv_connector_worker_meta=arrived)
    plain = request(prompt=[*PROMPT[: 3 * BLOCK - 1], TOKEN], hasher=engine.hasher)
    assert r.block_hashes == plain.block_hashes
    assert len(r.block_hashes) == 3
    engine.step(sampled=401)
    engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    engine.step()


def test_a_commit_without_a_token_leaves_the_sampling_here(engine: Engine) -> None:
    r, _ = taken(engine)
    engine.step(finished_recving={r.request_id})
    (out,) = engine.step(sampled=400)
    assert engine.scheduled.num_scheduled_tokens == {r.request_id: 1}
    assert (out.new_token_ids, list(r.output_token_ids), r.max_tokens) == ([400], [400], 8)
    engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    engine.step()


def test_a_failed_transfer_never_passes_for_an_answer(engine: Engine) -> None:
    """The token may be at a client already: the request ends in an error, or with an answer that says it is none; even
    if the token that is sampled instead would have stopped it."""
    r, _ = taken(engine, stop_token_ids=[400])
    outs = engine.step(finished_recving={r.request_id}, failed_recving={r.request_id})
    if not outs:
        outs = engine.step(sampled=400)
        assert engine.scheduled.num_scheduled_tokens == {r.request_id: len(PROMPT)}
        assert [(str(out.finish_reason), out.stop_reason) for out in outs] == [("length", LOST)]
    else:
        assert [str(out.finish_reason) for out in outs] == ["error"]
    engine.step()


def test_a_promise_that_nobody_can_have_heard_binds_nobody(engine: Engine) -> None:
    """No worker sent a grant, so prefill names no token: the failed transfer is the engine's own matter, as without a
    promise."""
    r, take = taken(engine)
    assert take.first_token
    unsent = WorkerReport(never_granted=Counter({r.request_id: 1}))
    outs = engine.step(finished_recving={r.request_id}, failed_recving={r.request_id}, kv_connector_worker_meta=unsent)
    if not outs:
        (out,) = engine.step(sampled=400)
        assert engine.scheduled.num_scheduled_tokens == {r.request_id: len(PROMPT)}
        assert (out.new_token_ids, out.finish_reason, out.stop_reason, r.max_tokens) == ([400], None, None, 8)
        engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    else:
        assert [str(out.finish_reason) for out in outs] == ["error"]
    assert not engine.scheduler.connector.scheduler._never_granted
    engine.step()


@pytest.mark.parametrize("together", [True, False])
def test_a_promise_counts_if_one_worker_may_have_sent_it(
    firsts: FirstTokens, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Of two workers one granted: prefill may have heard. Whether their reports come in one step or in two."""
    side = SchedulerSide(
        Settings(),
        producer=True,
        consumer=True,
        groups=HandedGroups.one(BLOCK),
        engine="e",
        port=7,
        ranks=2,
        first_tokens=firsts,
    )
    given_up: list[str] = []
    monkeypatch.setattr(side._reader, "go_on", lambda request, token: given_up.append(request.request_id))
    for name, sent in (("none", [False, False]), ("one", [False, True])):
        r = request({**CONSUME, "transfer_id": name})
        r.request_id = name
        side.on_new_request(r)
        reports = [said_by_a_worker(name, never_granted=not granted) for granted in sent]
        if together:
            reports = [reports[0].aggregate(reports[1])]
        *before, last = [KVConnectorOutput(kv_connector_worker_meta=report) for report in reports]
        last.finished_recving = last.failed_recving = {name}
        for output in (*before, last):
            side.update_output(output)
    assert given_up == ["one"]
    assert not side._never_granted
    side.close()


def said_by_a_worker(req_id: str, never_granted: bool) -> WorkerReport:
    results = Results(TransferStats, lambda _req_id: None)
    results.receipt_ended(req_id, Outcome("t", ok=False, code="refused", never_granted=never_granted))
    results.rope.close()
    return results.take_news()


def test_a_request_that_must_not_promise_does_not(engine: Engine) -> None:
    """Its failed transfer is then the engine's own matter, as ever."""
    r, take = taken(engine, min_tokens=2)
    assert not take.first_token
    engine.step(finished_recving={r.request_id}, failed_recving={r.request_id})
    outs = engine.step(sampled=400)
    assert all(out.stop_reason is None for out in outs)
    engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    engine.step()


def test_one_token_is_not_promised(engine: Engine) -> None:
    r, take = taken(engine, max_tokens=1)
    assert not take.first_token
    engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    engine.step(finished_recving={r.request_id})
    engine.step()


def test_decode_goes_on_from_a_token_that_it_is_told(engine: Engine) -> None:
    """Without any transfer: the prompt and the token are computed here."""
    r = engine.add(GO_ON, max_tokens=2)
    (out,) = engine.step(sampled=401)
    assert engine.scheduled.num_scheduled_tokens == {r.request_id: len(PROMPT) + 1}
    assert (out.new_token_ids, str(out.finish_reason)) == ([401], "length")
    engine.step()


@pytest.mark.parametrize(
    ("kv", "sampling"),
    [
        ({"continue_from": 1 << 30}, {}),
        ({"continue_from": "5"}, {}),
        ({"continue_from": -1}, {}),
        (GO_ON, {"presence_penalty": 1.0}),
    ],
)
def test_decode_that_can_not_go_on_says_so(engine: Engine, kv: Any, sampling: dict[str, Any]) -> None:
    """It never starts from a first token of its own, and a made-up token never reaches the model."""
    r = engine.add(kv, **sampling)
    (out,) = engine.step(sampled=400)
    assert engine.scheduled.num_scheduled_tokens == {r.request_id: len(PROMPT)}
    assert (str(out.finish_reason), out.stop_reason) == ("length", LOST)
    engine.step()


def test_the_clients_parameters_stay_its_own() -> None:
    """An engine in its client's process shares them with it."""
    r = request(stop_token_ids=[5])
    own = r.sampling_params
    assert own is not None
    give_up(r)
    assert (own.max_tokens, own.stop_token_ids) == (8, [5])
    r = request()
    prompt, own = r.prompt_token_ids, r.sampling_params
    append(r, TOKEN)
    assert prompt == PROMPT
    assert own is not None
    assert own.max_tokens == 8
