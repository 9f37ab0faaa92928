"""KV of producers that are not trusted is used by the request that asked for it, and by no other."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")
from types import SimpleNamespace

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from pdtransport.engine.commands import LoadChunks, StoreChunks
from pdtransport.engine.trusted_producers import Producers
from pdtransport.errors import SettingsError
from pdtransport.settings import Settings
from pdtransport.vllm.patches.withheld import Withheld
from tests.unit.engine_rig import PROMPT, TOKEN, Engine
from tests.unit.test_vllm_pool import Half, ended, speak
from tests.unit.test_vllm_scheduler import CONSUME, scheduler_half, step

TRUSTED = {"share_received": "trusted", "trusted_producers": ["127.0.0.1:1"]}  # where Engine's requests get their pages
OTHERS = {"share_received": "trusted", "trusted_producers": ["127.0.0.1:2", "10.0.0.0/8"]}


# -- which producers are trusted ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "host", "port", "ranks", "covered"),
    [
        ("prefill-1", "prefill-1", 7670, 8, True),
        ("prefill-1", "PREFILL-1", 7670, 1, True),
        ("Prefill-1", "prefill-1.", 7670, 1, True),
        ("prefill-1", "prefill-1.example.org", 7670, 1, False),
        ("prefill-1", "prefill-10", 7670, 1, False),
        ("prefill-1:7670", "prefill-1", 7670, 1, True),
        ("prefill-1:7670", "prefill-1", 7670, 2, False),
        ("prefill-1:7670-7671", "prefill-1", 7670, 2, True),
        ("prefill-1:7670-7671", "prefill-1", 7671, 2, False),
        ("10.0.0.0/24", "10.0.0.77", 1, 1, True),
        ("10.0.0.0/24", "10.0.1.77", 1, 1, False),
        ("10.0.0.0/24", "prefill-1", 1, 1, False),
        ("10.0.0.5:7670", "10.0.0.5", 7670, 1, True),
        ("10.0.0.5:7670", "10.0.0.5", 7671, 1, False),
        ("127.0.0.1:7670", "localhost", 7670, 1, True),
        ("localhost:7670", "127.0.0.1", 7670, 1, True),
        ("[fd00::5]:7670", "[fd00::5]", 7670, 1, True),
        ("[fd00::5]:7670", "fd00::5", 7670, 1, True),
        ("fd00::/64", "fd00::99", 7670, 1, True),
        ("fd00::/64", "fd01::99", 7670, 1, False),
    ],
)
def test_producers_are_known_by_where_they_are_reached(
    entry: str, host: str, port: int, ranks: int, covered: bool
) -> None:
    """All ports of all ranks must be covered: a tp_size that a client chose reaches no further than the list."""
    assert Producers([entry]).cover([host], port, ranks) == covered
    assert Producers(["elsewhere", entry]).cover([host, "192.0.2.1"], port, ranks) == covered
    assert not Producers([]).cover([host], port, ranks)


def test_ports_of_several_entries_make_one_instance() -> None:
    assert Producers(["h:1", "h:2"]).cover(["h"], 1, 2)
    assert not Producers(["h:1", "g:2"]).cover(["h"], 1, 2)


def test_a_host_is_trusted_by_its_name_or_by_the_address_that_is_called() -> None:
    """Requests name a host, and decode calls the address that it looked up once."""
    for entry in ("prefill-1", "10.0.0.0/24", "10.0.0.7"):
        assert Producers([entry]).cover(["prefill-1", "10.0.0.7"], 1, 1)
    for entry in ("prefill-2", "10.0.1.0/24", "10.0.0.8"):
        assert not Producers([entry]).cover(["prefill-1", "10.0.0.7"], 1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"trusted_producers": ["h"]},
        {"share_received": "trusted"},
        {"share_received": "none", "trusted_producers": ["h"]},
        {"share_received": "some"},
        {"share_received": "trusted", "trusted_producers": [""]},
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    """A list that nothing reads would be taken for protection."""
    with pytest.raises(SettingsError):
        Settings.parse(wrong)


@pytest.mark.parametrize("entry", ["10.0.0.5/24", "a b", "h:", "h:x", "http://h", "h:7-"])
def test_an_entry_that_names_no_producer_is_refused_at_start(entry: str) -> None:
    with pytest.raises(SettingsError, match="trusted_producers: ") as caught:
        Withheld(Settings.parse({"share_received": "trusted", "trusted_producers": [entry]}))
    assert "\n" not in str(caught.value)


# -- the prefix cache, with vLLM's own scheduler and cache manager --------------------------------------------------


@pytest.fixture(params=[AsyncScheduler, Scheduler], ids=["async", "sync"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def served(engine: Engine, name: str = "r") -> Any:
    """A request whose pages come, and that ends."""
    made = engine.waiting(name)
    engine.reports(name)
    engine.step(20)
    assert made.is_finished()
    assert engine.tokens_of(name) == [TOKEN] * 8
    return made


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    ("settings", "shared"),
    [({}, True), ({"share_received": "none"}, False), (TRUSTED, True), (OTHERS, False)],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_blocks_of_untrusted_producers_never_enter_the_prefix_cache(
    kind: Any, settings: dict[str, Any], shared: bool, told: bool, ahead: bool
) -> None:
    """Nor do those that were computed on top of them, however the request's first step began. The request is answered
    as ever, and all its blocks are free in the end."""
    engine = Engine(kind, step_ahead=ahead, **settings)
    found: list[int] = []
    made = engine.waiting()
    if told:
        engine.arrives()
    else:
        engine.reports()
    while not made.is_finished():
        engine.step()
        found.append(engine.cached())
    engine.step(3)
    assert engine.tokens_of("r") == [TOKEN] * 8
    if shared:
        assert engine.cached() == PROMPT
    else:
        assert set(found) == {0}, "another request would have found them"
        assert engine.cached() == 0
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 63
    engine.close()


def test_what_this_engine_computes_itself_is_shared(kind: Any) -> None:
    """The setting is about what was handed over, and a prefix that is here already stays."""
    engine = Engine(kind, share_received="none")
    engine.request("o", max_tokens=1, transfer=False)
    engine.step(6)
    assert engine.cached() == PROMPT
    made = engine.waiting("r", more=70)
    engine.reports()
    engine.step(20)
    assert made.is_finished()
    assert engine.cached() == PROMPT
    engine.close()


def test_a_preempted_request_stays_apart(kind: Any) -> None:
    """Its pages are computed anew here, and still nobody finds them: it is not worth the risk."""
    engine = Engine(kind, share_received="none")
    made = engine.waiting(max_tokens=30)
    engine.reports()
    engine.step(6)
    assert made.status is RequestStatus.RUNNING
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.step(45)
    assert made.is_finished()
    assert engine.cached() == 0
    engine.close()


def test_nothing_is_kept_of_requests_that_ended(kind: Any) -> None:
    engine = Engine(kind, share_received="none")
    served(engine)
    engine.scheduler.requests.clear()
    gc.collect()
    assert len(engine.side._withheld._requests) == 0
    engine.close()


def test_a_vllm_that_caches_otherwise_is_refused() -> None:
    """What can't be kept is not promised."""
    with pytest.raises(SettingsError, match="can't be kept with this vLLM"):
        Withheld(Settings(share_received="none")).bind(SimpleNamespace())
    Withheld(Settings()).bind(SimpleNamespace())


# -- the pool -------------------------------------------------------------------------------------------------------


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Half]:
    monkeypatch.setattr("tests.unit.test_vllm_pool.Settings", lambda **more: Settings(share_received="none", **more))
    made = Half()
    made.side._withheld._requests = Everything()  # type: ignore[assignment]
    yield made
    made.side.close()


class Everything(list[Any]):
    """A set of things that have no hash: these requests are not vLLM's own."""

    add = list.append


def test_no_chunk_of_an_untrusted_producer_is_stored(apart: Half) -> None:
    """Neither the prompt's nor those that the answer completes."""
    made = apart.arrive(CONSUME)
    apart.admit(made, there=0)
    apart.side.update_output(ended())
    prompt = made.num_prompt_tokens
    assert step(apart.side, {"r": (prompt - 1, 1)}).after == []
    speak(made, 200)
    assert step(apart.side, {"r": (prompt + 190, 1)}).after == []


def test_what_is_computed_here_is_stored_all_the_same(apart: Half) -> None:
    made = apart.arrive()
    apart.admit(made, there=0)
    (keep,) = step(apart.side, {"r": (0, made.num_prompt_tokens)}).after
    assert isinstance(keep, StoreChunks)


def test_a_failed_transfer_may_be_loaded_from_the_pool(apart: Half) -> None:
    """The pool's chunks are trusted; only what this request holds is not stored."""
    made = apart.arrive(CONSUME)
    apart.admit(made, there=0)
    apart.side.update_output(ended(ok=False))
    (fetch,) = apart.admit(made, there=3)
    assert isinstance(fetch, LoadChunks)
    assert step(apart.side, {"r": (0, made.num_prompt_tokens)}).after == []


def test_the_scheduler_is_a_side_with_the_setting() -> None:
    """An entry that can't be used ends the engine's start."""
    with pytest.raises(SettingsError, match="trusted_producers"):
        scheduler_half(Settings.parse({"share_received": "trusted", "trusted_producers": ["a b"]}))
