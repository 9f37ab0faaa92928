"""Every call that may change the weights is followed by a look at them, before the next step; ordinary ones by none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from pdtransport.errors import SettingsError
from pdtransport.vllm import weight_rpc
from pdtransport.vllm.patches import weight_watch
from pdtransport.vllm.patches.weight_watch import FIRST_LOOK, HARMLESS, STEPS, WeightWatch, watch_executor
from pdtransport.vllm.weight_rpc import WeightReport, adopt_weights, sum_weights, take_pages_away

CHECKPOINT = "safetensors:" + "0" * 32
OURS = {sum_weights: "sum", adopt_weights: "adopt", take_pages_away: "take"}


@dataclass
class Engine:
    """Two workers, of which a call may change the weights."""

    checkpoint: str = CHECKPOINT
    weights: list[str] = field(default_factory=lambda: ["a", "a"])
    unseen: str = ""
    done: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    identities: list[str] = field(default_factory=list)
    effects: dict[Any, Callable[[], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.watch = WeightWatch(None, lambda shards, reason: self.changes.append(reason))

    def rpc(self, method: Any, timeout: float | None = None, args: Any = (), kwargs: Any = None) -> list[Any]:
        self.done.append(OURS.get(method) or (method if isinstance(method, str) else "callable"))
        if method is sum_weights:
            return [WeightReport(rank, each, self.checkpoint, self.unseen) for rank, each in enumerate(self.weights)]
        if method is adopt_weights:
            self.identities.append(args[0])
            return [(rank, None) for rank in range(2)]
        effect = self.effects.get(method)
        if effect is not None:
            effect()
        return [None, None]

    def call(self, method: Any, *args: Any, **kwargs: Any) -> list[str]:
        """What the workers were asked to do."""
        self.done.clear()
        self.watch.call(self.rpc, method, args, kwargs)
        return list(self.done)

    def change(self, *weights: str) -> Callable[[], None]:
        return lambda: setattr(self, "weights", list(weights))


@pytest.fixture
def engine() -> Engine:
    made = Engine()
    assert made.call(FIRST_LOOK) == ["sum", FIRST_LOOK]
    return made


def test_ordinary_calls_are_not_followed_by_a_look(engine: Engine) -> None:
    """No inter-token cost: a step, a status, an adapter is what it was."""
    for name in sorted(HARMLESS):
        assert engine.call(name) == [name]
    assert engine.changes == []


@pytest.mark.parametrize("method", ["reload_weights", "load_model", "a_method_of_an_extension", lambda worker: None])
def test_whatever_else_is_followed_by_a_look(engine: Engine, method: Any) -> None:
    """Known, unknown or callable; and where nothing changed nothing ends."""
    assert engine.call(method)[1:] == ["sum"]
    assert engine.changes == []
    assert engine.call("execute_model") == ["execute_model"]


def test_a_change_makes_another_identity_and_a_change_back_the_first_one(engine: Engine) -> None:
    """By the checksum over all workers: each one's KV depends on the weights of all."""
    engine.effects["reload_weights"] = engine.change("a", "b")
    assert engine.call("reload_weights") == ["reload_weights", "sum", "adopt"]
    (changed,) = engine.identities
    assert changed.startswith("loaded:")
    assert engine.changes == ["weights: reload_weights changed them here"]
    assert engine.call("reload_weights") == ["reload_weights", "sum"], "the same weights again are no change"
    engine.effects["reload_weights"] = engine.change("a", "a")
    engine.call("reload_weights")
    assert engine.identities == [changed, CHECKPOINT]


def test_equal_workers_in_another_order_are_other_weights(engine: Engine) -> None:
    """Ranks hold parts of their own."""
    engine.effects["one"], engine.effects["other"] = engine.change("a", "b"), engine.change("b", "a")
    engine.call("one")
    engine.call("other")
    assert len(set(engine.identities)) == 2


def test_two_engines_that_changed_alike_agree() -> None:
    """The identity is that of the bytes."""
    engines = [Engine(), Engine()]
    for each in engines:
        each.call(FIRST_LOOK)
        each.effects["reload_weights"] = each.change("x", "y")
        each.call("reload_weights")
    assert engines[0].identities == engines[1].identities


def test_a_call_that_fails_halfway_is_followed_by_a_look(engine: Engine) -> None:
    """It may have changed some of the weights; its error is the caller's."""

    def fail() -> None:
        engine.weights = ["a", "half"]
        raise RuntimeError("no such file")

    engine.effects["reload_weights"] = fail
    with pytest.raises(RuntimeError, match="no such file"):
        engine.call("reload_weights")
    assert engine.done == ["reload_weights", "sum", "adopt"]


def test_memory_that_is_taken_away_is_let_go_of_before_and_looked_at_after(engine: Engine) -> None:
    """No link touches pages of a sleeping engine, and nobody reads weights whose memory is gone."""
    assert engine.call("sleep", kwargs={"level": 1}) == ["take", "sleep"]
    assert engine.call("list_loras") == ["list_loras"]
    assert engine.call("wake_up", kwargs={"tags": ["kv_cache"]}) == ["wake_up"]
    assert engine.call("wake_up", kwargs={"tags": None}) == ["wake_up", "sum"]
    assert engine.changes == []


def test_memory_of_kv_that_comes_back_puts_no_weights_to_sleep(engine: Engine) -> None:
    """Executors whose steps are no calls (Ray's) have no other look than the one after a reload."""
    engine.call("sleep")
    engine.call("wake_up", kwargs={"tags": ["weights"]})
    engine.call("wake_up", kwargs={"tags": ["kv_cache"]})
    engine.effects["reload_weights"] = engine.change("c", "c")
    assert engine.call("reload_weights") == ["reload_weights", "sum", "adopt"]


def test_workers_that_loaded_different_files_are_known_by_what_they_loaded() -> None:
    """On two hosts, say. Each one's KV depends on the weights of all, so none goes by the digest of its own files."""
    engine = Engine()
    reports = [WeightReport(rank, "a", f"safetensors:{rank:032x}", "") for rank in range(2)]
    rpc = engine.rpc
    engine.rpc = lambda method, **more: reports if method is sum_weights else rpc(method, **more)  # type: ignore[method-assign]
    assert engine.call(FIRST_LOOK) == ["adopt", FIRST_LOOK]
    assert engine.identities[0].startswith("loaded:")


@pytest.mark.parametrize(
    ("more", "checkpoint", "reported"),
    [
        ({}, CHECKPOINT, CHECKPOINT),
        ({"secondary_weights": []}, CHECKPOINT, CHECKPOINT),
        ({"secondary_weights": ["a text model elsewhere"]}, CHECKPOINT, ""),
        ({"allow_patterns_overrides": ["part/*.safetensors"]}, CHECKPOINT, ""),
        ({"secondary_weights": ["a text model elsewhere"]}, "named:mine", "named:mine"),
    ],
)
def test_a_model_that_loads_more_than_its_checkpoint_is_not_known_by_that(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], checkpoint: str, reported: str
) -> None:
    """Ultravox reads its text model from another repository: two with one projector may have two text models. They go
    by the parameters as loaded."""
    import torch

    model = torch.nn.Linear(2, 2)
    vars(model).update(more)
    monkeypatch.setattr(weight_rpc, "sides", [SimpleNamespace(checkpoint=checkpoint)])
    assert sum_weights(SimpleNamespace(rank=0, get_model=lambda: model)).checkpoint == reported


def test_other_weights_after_waking_are_seen(engine: Engine) -> None:
    """Sleep, wake the weights, reload them, wake the rest: what training loops do."""
    engine.call("sleep")
    engine.call("wake_up", kwargs={"tags": ["weights"]})
    engine.effects["reload_weights"] = engine.change("c", "c")
    assert engine.call("reload_weights")[-2:] == ["sum", "adopt"]
    engine.call("wake_up", kwargs={"tags": ["kv_cache"]})
    assert len(engine.identities) == 1


@pytest.mark.parametrize("step", sorted(STEPS))
def test_a_step_after_sleep_looks_first(engine: Engine, step: str) -> None:
    """Whatever woke the engine: nothing is computed with weights that nobody looked at."""
    engine.call("sleep")
    engine.weights = ["d", "d"]
    assert engine.call(step) == ["sum", "adopt", step]
    assert engine.call(step) == [step]


def test_weights_without_files_are_known_by_their_bytes() -> None:
    """Dummy weights and the like: the identity is the checksum, told to all workers before the first request."""
    engine = Engine(checkpoint="")
    assert engine.call(FIRST_LOOK) == ["sum", "adopt", FIRST_LOOK]
    (identity,) = engine.identities
    assert identity.startswith("loaded:")
    assert engine.call("execute_model") == ["execute_model"]


def test_what_nobody_can_see_is_never_taken_for_equal(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Weights that a kernel keeps where no checksum reaches: after a call that may change them they are nobody's equal,
    and one line says so."""
    engine.unseen = "layers.0.mlp"
    engine.call("reload_weights")
    engine.call("reload_weights")
    assert all(each.startswith("unknown:") for each in engine.identities)
    assert len(set(engine.identities)) == 2
    assert "layers.0.mlp" in caplog.text


def test_unseen_weights_have_their_files_identity_until_something_may_change_them() -> None:
    """Nothing changed them since they were loaded."""
    engine = Engine(unseen="layers.0.mlp")
    engine.call(FIRST_LOOK)
    assert engine.identities == []


def test_a_call_before_the_first_look_is_compared_with_what_was_before() -> None:
    """An engine that is asked to reload before its first request has changed weights, too."""
    engine = Engine()
    engine.effects["reload_weights"] = engine.change("b", "b")
    assert engine.call("reload_weights") == ["sum", "reload_weights", "sum", "adopt"]


class TestExecutor:
    __test__ = False

    def __init__(self, config: Any) -> None:
        self.vllm_config = config
        self.done: list[Any] = []

    def collective_rpc(self, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> list[Any]:
        self.done.append(method)
        return [WeightReport(0, "a", CHECKPOINT, "")] if method is sum_weights else [None]


@pytest.fixture
def executors(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.executor.abstract import Executor

    monkeypatch.setattr(Executor, "get_class", staticmethod(lambda config: config.executor))


def test_each_engine_of_a_process_has_a_watch_of_its_own(executors: None) -> None:
    """The class is taken hold of once; an engine whose watch is gone runs as before."""
    kind = type("One", (TestExecutor,), {"collective_rpc": TestExecutor.collective_rpc})
    configs = [SimpleNamespace(executor=kind), SimpleNamespace(executor=kind)]
    watches = [watch_executor(config, lambda *_: None) for config in configs]
    engines = [kind(config) for config in configs]
    for engine in engines:
        engine.collective_rpc(FIRST_LOOK)
    engines[0].collective_rpc("reload_weights")
    assert engines[0].done == [sum_weights, FIRST_LOOK, "reload_weights", sum_weights]
    assert engines[1].done == [sum_weights, FIRST_LOOK]
    watches.clear()
    weight_watch._watches.clear()
    engines[1].collective_rpc("reload_weights")
    assert engines[1].done[-1] == "reload_weights"


def test_a_scheduler_that_cant_compute_requests_anew_is_refused(
    executors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a change nothing would keep requests from going on, on pages of the old weights."""
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, "__init__", lambda self: None)
    kind = type("One", (TestExecutor,), {"collective_rpc": TestExecutor.collective_rpc})
    with pytest.raises(SettingsError, match="watch_weights: false"):
        watch_executor(SimpleNamespace(executor=kind), lambda *_: None)


def test_engines_of_one_process_whose_connectors_have_copies_of_their_configuration(executors: None) -> None:
    """MultiConnector gives each of its connectors a shallow copy."""
    kind = type("One", (TestExecutor,), {"collective_rpc": TestExecutor.collective_rpc})
    configs = [SimpleNamespace(executor=kind, model_config=object()) for _ in range(2)]
    watches = [watch_executor(copy.copy(config), lambda *_: None) for config in configs]
    engines = [kind(config) for config in configs]
    for engine in engines:
        engine.collective_rpc(FIRST_LOOK)
        engine.collective_rpc("reload_weights")
        assert engine.done == [sum_weights, FIRST_LOOK, "reload_weights", sum_weights]
    assert len(watches) == 2


def test_another_executor_is_refused_by_name_of_the_setting(executors: None) -> None:
    """Where vLLM's calls can't be watched the start says so, and what to set."""
    kind = type("Other", (), {"collective_rpc": lambda self, call: None})
    with pytest.raises(SettingsError, match="watch_weights"):
        watch_executor(SimpleNamespace(executor=kind), lambda *_: None)


def test_vllms_own_executors_are_as_expected() -> None:
    """Both of one host: what is taken hold of is there, and each harmless step's name is one of vLLM's."""
    import inspect

    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor
    from vllm.v1.worker.gpu_worker import Worker

    for kind in (MultiprocExecutor, UniProcExecutor):
        assert list(inspect.signature(kind.collective_rpc).parameters)[:5] == [
            "self", "method", "timeout", "args", "kwargs",
        ]  # fmt: skip
    for name in ("reload_weights", "sleep", "discard", "wake_up", *STEPS, FIRST_LOOK):
        assert callable(getattr(Worker, name)), name
