"""Each hook into vLLM looks at what it holds; where that is another it stays off, says why, and all else works."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.request import Request

from pdtransport.engine.commands import Open
from pdtransport.errors import SettingsError
from pdtransport.launch.status import _rank_lines
from pdtransport.settings import Settings
from pdtransport.vllm.adapter_requests import AdapterRequests
from pdtransport.vllm.adapters import Adapters, AdapterUnknown
from pdtransport.vllm.first_token import FirstTokens
from pdtransport.vllm.patches import base, connector_loader, decode_stream, engine_probe, model_loading, packed_weights
from pdtransport.vllm.patches.base import PATCHES, Patch, Unexpected, announce, expect
from pdtransport.vllm.patches.cached_usage import CachedUsage
from pdtransport.vllm.patches.listed import PatchStates
from pdtransport.vllm.patches.poll_backoff import shorten_spins
from pdtransport.vllm.patches.stale_blocks import StaleBlocks
from pdtransport.vllm.patches.weight_watch import watch_executor
from tests.unit.engine_rig import TOKEN, Engine
from tests.unit.test_adapters import Worker, hashes, lora
from tests.unit.test_adapters import request as adapter_request
from tests.unit.test_vllm_decode_stream import text, tiny_lm
from tests.unit.test_vllm_first_token import engine_config
from tests.unit.test_vllm_poll_backoff import queue, receive  # noqa: F401 - a fixture

# Of each hook, something that it relies on.
HELD = {
    "adapter_digest": "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
    "adapter_generations": "vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
    "cached_usage": "vllm.v1.metrics.stats:PrefillStats.set",
    "connector_loader": "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.get_connector_class",
    "early_digest": "vllm.v1.worker.worker_base:WorkerWrapperBase.init_device",
    "engine_loop": "vllm.v1.engine.core:EngineCoreProc.__init__",
    "engine_probe": "vllm.entrypoints.serve.instrumentator.health:engine_client",
    "first_token": "vllm.v1.request:Request.update_block_hashes",
    "hold_back": "vllm.v1.request:Request.__init__",
    "late_caching": "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
    "packed_weights": "vllm._custom_ops:create_onednn_mm",
    "share_received": "vllm.v1.core.kv_cache_manager:KVCacheManager.cache_blocks",
    "short_priming": "vllm.v1.engine.detokenizer:FastIncrementalDetokenizer.__init__",
    "spin_s": "vllm.distributed.device_communicators.shm_broadcast:SpinCondition.wait",
    "stale_blocks": "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks",
    "step_ahead": "vllm.v1.core.sched.scheduler:Scheduler._update_from_kv_xfer_finished",
    "watch_weights": "vllm.v1.core.sched.scheduler:Scheduler._update_waiting_for_remote_kv",
}

Change = Callable[[str], Any]


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of hooks are the process's."""
    for patch in PATCHES.values():
        for state in ("_noted", "_told", "_sent"):
            monkeypatch.setattr(patch, state, None)


class Records(logging.Handler):
    """What hooks log, wherever an engine sent our records."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append(record)


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    records, level = Records(), base.logger.level
    base.logger.setLevel(logging.INFO)
    base.logger.addHandler(records)
    yield records.all
    base.logger.removeHandler(records)
    base.logger.setLevel(level)


def held(name: str) -> tuple[Any, str]:
    """The owner and the attribute of what a hook relies on."""
    module, _, path = HELD[name].partition(":")
    owner, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module), attribute


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Change:
    """Puts a function of another signature and body in the place of vLLM's, that does the same; returns it."""

    def changed(name: str) -> Any:
        owner, attribute = held(name)
        theirs = inspect.getattr_static(owner, attribute)
        function = inspect.unwrap(getattr(theirs, "__func__", theirs))

        def other(*given: Any, **named: Any) -> Any:
            return function(*given, **named)

        other.__qualname__ = function.__qualname__
        monkeypatch.setattr(owner, attribute, classmethod(other) if isinstance(theirs, classmethod) else other)
        return inspect.getattr_static(owner, attribute)

    return changed


def now(name: str) -> Any:
    owner, attribute = held(name)
    return inspect.getattr_static(owner, attribute)


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PATCHES))
def test_the_installed_vllm_is_as_expected(name: str) -> None:
    """No hook is off by mistake: on the vLLM that this is tested with, all checks pass."""
    assert PATCHES[name].check() == ""


def test_no_hook_is_left_out() -> None:
    """Each has its test here, what it needs exists, and so does its switch."""
    assert set(HELD) == set(PATCHES)
    for patch in PATCHES.values():
        assert set(patch.needs) <= set(PATCHES)
        assert patch.costs
        value: Any = Settings()
        for part in patch.setting.split(".") if patch.setting else ():
            value = getattr(value, part)
        assert value is True or not patch.setting, patch.name


@pytest.mark.parametrize("name", sorted(PATCHES))
def test_another_function_is_not_taken_hold_of(name: str, change: Change, logged: list[logging.LogRecord]) -> None:
    """The state says what differs, and the log too: once, as a warning, with what it costs."""
    change(name)
    patch = PATCHES[name]
    # The CPU platform has no need of all of them, and no engine is asked for.
    settings = Settings(spin_s=0.001, share_received="none")
    if patch.state(settings)["state"] == base.UNNEEDED:
        pytest.skip("this build of vLLM does not need it")
    assert not patch.allowed(settings)
    assert not patch.allowed(settings)
    status = patch.state()
    assert status["state"] == base.FAILED
    _, attribute = held(name)
    assert attribute in status["why"] or "request whose prompt is changed" in status["why"]
    (record,) = logged
    assert record.levelno == logging.WARNING
    assert patch.costs in record.getMessage()
    assert status["why"] in record.getMessage()


@pytest.mark.parametrize("name", sorted(name for name, patch in PATCHES.items() if patch.setting))
def test_each_switch_switches_its_hook_off(name: str) -> None:
    """And no other one; who switched it off reads the setting's name in the status."""
    patch = PATCHES[name]
    section, _, key = patch.setting.rpartition(".")
    settings = Settings.parse({section: {key: False}} if section else {key: False})
    assert not patch.allowed(settings)
    assert patch.state() == {"name": name, "state": base.OFF, "why": f"{patch.setting}: false"}
    for other in PATCHES.values():
        if other is not patch and name not in other.needs and other.name != "stale_blocks":
            assert other.state(settings)["state"] in (base.ACTIVE, base.UNNEEDED), other.name


def test_a_hook_is_off_without_those_that_it_needs() -> None:
    """Also if it was active, and another one is found to be impossible only when vLLM is taken hold of."""
    late, ahead = PATCHES["late_caching"], PATCHES["step_ahead"]
    assert late.state(Settings(step_ahead=False))["why"] == "it needs step_ahead"
    assert late.allowed(Settings())
    assert late.active
    ahead.fail("its scheduler was not found")
    assert not late.active


def test_a_check_minds_what_the_hook_relies_on_alone() -> None:
    """Comments, form, other names and further parameters are no matter; a parameter, a call or its place are."""

    def plain(self: Any, first: int) -> None:
        self.begin(first)
        self.end()

    def harmless(self: Any, first: int, second: int = 0, *, third: bool = False) -> None:
        # begin: of another comment
        there = self.wrapped
        there.begin(
            first,
        )
        there.more()
        there.end()

    def renamed(self: Any, other: int) -> None:
        self.begin(other)
        self.end()

    def gone(self: Any, first: int) -> None:
        """Does not begin()."""
        self.end()

    def turned(self: Any, first: int) -> None:
        self.end()
        self.begin(first)

    for same in (plain, harmless):
        expect(same, takes=["self", "first"], order=["begin", "end"])
    with pytest.raises(Unexpected, match=r"renamed takes \(self, other\), not \(self, first, ...\)"):
        expect(renamed, takes=["self", "first"])
    with pytest.raises(Unexpected, match="gone does not use begin"):
        expect(gone, uses=["begin", "end"])
    with pytest.raises(Unexpected, match="in this order"):
        expect(turned, order=["begin", "end"])
    with pytest.raises(Unexpected, match="no parameter second"):
        expect(plain, accepts=["second"])
    with pytest.raises(Unexpected, match="can't be read"):
        expect(len, uses=["begin"])


def test_what_is_active_is_logged_once_in_one_line(logged: list[logging.LogRecord]) -> None:
    settings = Settings.parse({"patches": {"late_caching": False}})
    for name in ("step_ahead", "late_caching", "hold_back"):
        PATCHES[name].allowed(settings)
    announce()
    announce()
    (record,) = logged
    assert record.levelno == logging.INFO
    assert "active: hold_back, step_ahead; off: late_caching (patches.late_caching: false)" in record.getMessage()


def test_workers_show_what_the_scheduler_says_of_its_hooks() -> None:
    """It is told once, with a step's commands. Until then a worker shows what it finds itself: all processes of an
    engine have one vLLM."""
    config: Any = SimpleNamespace(lora_config=None)
    states = PatchStates(Settings(), config)
    shown = {status["name"]: status for status in states.all()}
    assert set(shown) == set(PATCHES)
    assert shown["step_ahead"]["state"] == base.ACTIVE
    assert shown["adapter_digest"] == {"name": "adapter_digest", "state": base.UNNEEDED, "why": "no LoRA adapters"}
    PATCHES["step_ahead"].fail("its scheduler was not found")
    told = base.take_news()
    assert base.take_news() == []
    PATCHES["step_ahead"]._noted = None  # in the worker's process
    states.hear(told)
    shown = {status["name"]: status for status in states.all()}
    assert shown["step_ahead"] == {"name": "step_ahead", "state": base.FAILED, "why": "its scheduler was not found"}


def test_pdlaunch_tells_of_hooks_that_are_not_active() -> None:
    """A line each; of those that are, or that nobody needs here, none."""
    states = [("a", "active", ""), ("b", "off", "b: false"), ("c", "failed", "f takes (x)"), ("d", "unneeded", "no d")]
    patches = [{"name": name, "state": state, "why": why} for name, state, why in states]
    _, off, failed = _rank_lines({"status": {"patches": patches}})
    assert off == "hook b into vLLM is not active: off, b: false"
    assert failed == "hook c into vLLM is not active: failed, f takes (x)"


# -- what depends on each of them --------------------------------------------------------------------------------------


def serve(**settings: Any) -> Engine:
    """An engine that answered a request whose pages came."""
    engine = Engine(**settings)
    made = engine.waiting()
    engine.arrives()
    engine.step(20)
    assert made.is_finished()
    assert engine.tokens_of("r") == [TOKEN] * 8
    engine.close()
    return engine


def test_without_step_ahead_requests_go_on_by_vllms_report(change: Change) -> None:
    change("step_ahead")
    engine = serve()
    assert engine.side._start is None
    assert engine.launched.count({}) > 0, "vLLM's own way takes empty steps"
    assert "new_step_starts" not in vars(engine.scheduler.kv_cache_manager)


def test_without_late_caching_blocks_are_cached_as_vllm_does(change: Change) -> None:
    change("late_caching")
    start = serve().side._start
    assert start is not None
    assert start._caching is None


def test_without_hold_back_no_launch_waits_for_a_first_token(change: Change) -> None:
    change("hold_back")
    engine = serve(graphs=CUDAGraphMode.NONE)
    assert engine.side._start is not None
    assert engine.launched[1:3] == [{"r": 1}, {"r": 1}]


def test_without_engine_loop_idle_steps_wait_for_milliseconds(change: Change) -> None:
    change("engine_loop")
    engine = serve()
    assert engine.side._start is not None
    assert engine.side._start.clients_wait is None


def test_all_hooks_of_a_scheduler_hold_each_other() -> None:
    """Else the tests above would show nothing: here the request goes on at once, and its first token is looked at
    before the next launch."""
    engine = serve(graphs=CUDAGraphMode.NONE)
    assert engine.side._start is not None
    assert engine.side._start._caching is not None
    assert engine.side._start.clients_wait is not None
    assert engine.launched[1:3] == [{"r": 1}, {}]


def test_without_cached_usage_vllms_own_number_stands(change: Change) -> None:
    stats = PrefillStats()
    stats.set(100, 10, 90)
    asked: Any = SimpleNamespace(prefill_stats=stats)
    change("cached_usage")
    usage = CachedUsage(Settings())
    usage.set(asked, 7)
    usage.nothing_came(asked)
    assert stats.num_cached_tokens == 100
    assert usage.of(asked, 12) == 12


def test_without_stale_blocks_what_the_cache_holds_after_a_change_is_nobodys(change: Change) -> None:
    """Closed: prompts that are found there are not handed over, since they may be of the old weights."""
    change("stale_blocks")
    stale = StaleBlocks()
    evicted: list[Any] = []
    stale.bind(SimpleNamespace(block_pool=SimpleNamespace(blocks=[1]), evict_blocks=evicted.append), Settings())
    assert not stale.begins_on("a", 16), "nothing changed yet"
    stale.change()
    assert stale.begins_on("b", 16)
    assert evicted == []


def test_without_watch_weights_the_start_is_refused(change: Change) -> None:
    """Closed: the error names the setting by which somebody vouches for the weights."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    rpc = UniProcExecutor.collective_rpc
    change("watch_weights")
    with pytest.raises(SettingsError, match="watch_weights: false"):
        watch_executor(engine_config(), lambda *_: None)
    assert UniProcExecutor.collective_rpc is rpc
    serve(watch_weights=False)


def test_without_share_received_the_start_is_refused(change: Change) -> None:
    """Closed where it is asked for; who shares with all needs no such hook."""
    change("share_received")
    with pytest.raises(SettingsError, match="can't be kept with this vLLM"):
        serve(share_received="none")
    serve()


def test_without_adapter_digest_prompts_with_an_adapter_are_not_handed_over(change: Change, tmp_path: Path) -> None:
    """Closed: nobody knows whose content a prompt was computed with. Both sides are told, and others are served."""
    change("adapter_digest")
    adapters = Adapters.of_this_worker()
    with pytest.raises(AdapterUnknown):
        adapters.held(1)
    worker = Worker(adapters)
    assert worker(Open("r", "t", b"k" * 32, 40, lora(tmp_path))) is None
    assert worker.adapted.load() == []
    ((refused, why),) = worker.refused
    assert isinstance(refused, Open)
    assert "LoRA adapter 'x'" in why
    plain = Open("s", "u", b"k" * 32, 40)
    assert worker(plain) == plain
    assert adapters.take_news() == {}


def test_without_adapter_generations_blocks_hash_as_vllm_does(change: Change) -> None:
    other = change("adapter_generations")
    side = AdapterRequests(16, Settings())
    assert now("adapter_generations") is other
    asked = adapter_request("a", 1, "/without")
    side.arrive(asked)
    plain = hashes(asked)
    side.hear({1: "one"})
    side.hear({1: "two"})
    assert hashes(asked) == plain
    assert side.content(asked) == "two", "workers still look"


def test_without_first_token_decode_promises_nothing(change: Change) -> None:
    change("first_token")
    firsts = FirstTokens(engine_config(), Settings())
    asked = Request("r", [1, 2, 3], SamplingParams(max_tokens=4), None)
    assert firsts.why_not(asked) == "vllm_version"
    serve()


def test_switched_off_first_token_is_declined() -> None:
    """With a reason of its own, that is not vLLM's fault."""
    settings = Settings.parse({"patches": {"first_token": False}})
    assert FirstTokens(engine_config(), settings).unsupported == "declined"


def test_without_short_priming_the_whole_prompt_is_decoded(change: Change) -> None:
    other = change("short_priming")
    assert not decode_stream.shorten_priming(Settings())
    assert now("short_priming") is other
    ids = tiny_lm().encode("Pages cross from prefill to decode. " * 30).ids
    assert "".join(text(tiny_lm(), ids, ids[:4], True))


def test_without_spin_s_readers_spin_as_vllm_lets_them(change: Change, queue: tuple[Any, Any]) -> None:  # noqa: F811
    change("spin_s")
    _, reader = queue
    before = reader._spin_condition.busy_loop_s, reader._spin_condition.poller
    assert shorten_spins(Settings(spin_s=0.001)) == 0
    assert (reader._spin_condition.busy_loop_s, reader._spin_condition.poller) == before
    receive(*queue)


def test_without_engine_probe_there_is_no_such_path(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers take the 404 for a server that does not know it."""
    from vllm.entrypoints.serve.instrumentator.health import router

    monkeypatch.setitem(sys.modules, engine_probe._HTTP_PROCESS, SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(router, "routes", list(router.routes))
    change("engine_probe")
    engine_probe.offer_probe()
    paths = [getattr(route, "path", "") for route in router.routes]
    assert engine_probe.PATH not in paths
    assert "/health" in paths


def test_without_connector_loader_the_connector_is_registered_all_the_same(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from pdtransport.vllm.connector import PDTransportConnector

    def load() -> tuple[Any, int]:
        called: list[None] = []
        monkeypatch.setattr(KVConnectorFactory, "_registry", {})
        for _ in range(2):
            connector_loader.register("PDTransportConnector", "pdtransport.vllm.connector", lambda: called.append(None))
        return KVConnectorFactory.get_connector_class_by_name("PDTransportConnector"), len(called)

    assert load() == (PDTransportConnector, 1)
    change("connector_loader")
    assert load() == (PDTransportConnector, 0)


def test_without_early_digest_it_begins_after_the_model_was_loaded(change: Change) -> None:
    """The connector asks for it then (``tests/unit/test_vllm_checkpoint.py``); the worker's status says why."""
    other = change("early_digest")
    model_loading.watch_loading()
    assert now("early_digest") is other
    model_loading.report_loading(Settings(), SimpleNamespace(lora_config=None))  # type: ignore[arg-type]
    assert model_loading.PATCH.state()["state"] == base.FAILED
    assert "init_device" in model_loading.PATCH.state()["why"]


def test_a_worker_that_was_not_seen_loading_says_so() -> None:
    """vLLM forked it before pdtransport was there, say."""
    model_loading.report_loading(Settings(), SimpleNamespace(lora_config=None))  # type: ignore[arg-type]
    assert "before the model was loaded" in model_loading.PATCH.state()["why"]


def test_without_packed_weights_what_is_packed_is_unseen(change: Change) -> None:
    """Closed: such weights are not taken for equal once something may have changed them (``WeightWatch``)."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    from pdtransport.engine.weight_sums import loaded_weights

    if not getattr(ops, "_supports_onednn", False):
        pytest.skip("this build of vLLM has no oneDNN")
    other = change("packed_weights")
    packed_weights.see_packed_weights(Settings())
    assert now("packed_weights") is other
    layer = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert loaded_weights([layer]).unseen


def test_a_check_that_passes_after_taking_hold_passes_again() -> None:
    """Hooks look through their own wrappers: an engine's second connector is no reason to be off."""
    serve()
    serve()
    assert decode_stream.shorten_priming(Settings())
    assert decode_stream.shorten_priming(Settings())
    assert isinstance(PATCHES["short_priming"], Patch)
    assert [patch.check() for patch in PATCHES.values()] == [""] * len(PATCHES)
