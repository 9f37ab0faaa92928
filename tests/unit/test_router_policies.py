"""Other packages' placement policies: what they see, and that their trouble costs no request."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from pdtransport import plugins
from pdtransport.errors import SettingsError
from pdtransport.router import placer as placer_module
from pdtransport.router import policy_thread
from pdtransport.router.call import Call, parse
from pdtransport.router.endpoints import Endpoint
from pdtransport.router.metrics import Metrics
from pdtransport.router.placement.base import PlacementPolicy, RequestView, ServerView
from pdtransport.router.placement.registry import other_policy
from pdtransport.router.placer import Placer
from pdtransport.router.settings import RouterPlacement
from tests.unit.router_rig import PATIENCE_S, ask, rigged, run
from tests.unit.test_router_placement import endpoints

Choose = Callable[[RequestView, Sequence[ServerView]], Any]


class Scripted(PlacementPolicy):
    def __init__(self, script: Choose) -> None:
        self.choose = script  # type: ignore[method-assign]

    def choose(self, request: RequestView, servers: Sequence[ServerView]) -> str:
        raise NotImplementedError


def last(request: RequestView, servers: Sequence[ServerView]) -> str:
    return servers[-1].name


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine makes no policy late."""
    monkeypatch.setattr(policy_thread, "ANSWER_S", PATIENCE_S)


@pytest.fixture
def using(monkeypatch: pytest.MonkeyPatch) -> Callable[[Choose], None]:
    """Makes a script the policy of the routers and placers made from then on."""
    return lambda script: monkeypatch.setattr(placer_module, "other_policy", lambda _: Scripted(script))


def call(**more: Any) -> Call:
    return parse(json.dumps(ask(**more)).encode(), "completions", chunk_chars=64, chunks=4)


def choices(place: Placer, servers: list[Endpoint], times: int = 1) -> list[str]:
    """The names that ``place`` chooses, one request after the other."""

    async def chosen() -> list[str]:
        found = [await place.choose("decode", call(), servers) for _ in range(times)]
        return [each.name for each in found if each is not None]

    return asyncio.run(asyncio.wait_for(chosen(), PATIENCE_S))


def at_once(asking: Coroutine[Any, Any, str | None]) -> str | None:
    """What a coroutine returns that waits for nothing."""
    try:
        asking.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("it waits")


def test_a_policy_sees_immutable_values_of_the_request_and_of_servers_that_can_take_it(using: Any) -> None:
    """Nothing that a policy is given lets it change the router, and prompts and keys are not among it."""
    seen: list[tuple[RequestView, Sequence[ServerView]]] = []

    def look(request: RequestView, servers: Sequence[ServerView]) -> str:
        seen.append((request, servers))
        return servers[-1].name

    async def test() -> None:
        using(look)
        async with rigged(prefill=2, decode=3, placement={"affinity_chunk_chars": 64}) as rig:
            rig.router.fleet.decode[2].set_healthy(False, "test")
            reply = await rig.ask(ask(stream=False, cache_salt="hush"))
            assert reply.headers["x-pd-decode"] == rig.decode[1].name
            assert reply.headers["x-pd-prefill"] == rig.prefill[1].name
            assert (await rig.get("/pd/status")).json()["placement"] == "least_loaded"  # as the settings say
            (first, decodes), (second, prefills) = seen
            assert (first.role, first.decode, first.model, first.stream) == ("decode", "", "m", False)
            assert first.prompt_tokens == len(ask()["prompt"])
            assert first.prefix_keys == second.prefix_keys != ()
            assert (second.role, second.decode) == ("prefill", rig.decode[1].name)
            assert decodes == tuple(ServerView(each.name, each.url, 0, 0, 0) for each in rig.decode[:2])
            assert [each.name for each in prefills] == [each.name for each in rig.prefill]
            assert "hush" not in repr(seen)
            assert len({hash(each) for each in seen}) == 2  # tuples of values all the way down
            with pytest.raises(AttributeError):
                decodes[0].requests = 9  # type: ignore[misc]

    run(test)


@pytest.mark.parametrize(
    ("raised", "named"),
    [(ValueError("no\nluck"), "ValueError"), (StopIteration(), "StopIteration"), (SystemExit(1), "SystemExit"),
     (asyncio.CancelledError(), "CancelledError")],
)  # fmt: skip
def test_whatever_a_policy_raises_least_loaded_chooses(
    using: Any, caplog: pytest.LogCaptureFixture, raised: BaseException, named: str
) -> None:
    """An exception of any kind costs no request, counts each time, and is one line of log a minute."""

    def fails(request: RequestView, servers: Sequence[ServerView]) -> str:
        raise raised

    using(fails)
    metrics, servers = Metrics(), endpoints(2)
    place = Placer(RouterPlacement(), metrics)
    with caplog.at_level(logging.WARNING):
        assert choices(place, servers, 4) == [servers[0].name] * 4, "least_loaded keeps a prefix where it was"
    place.close()
    assert metrics.placement_failures.value("error") == 4
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"placement.policy least_loaded raised {named} at test_router_policies.py:")
    assert "\n" not in line


@pytest.mark.parametrize("answer", ["nobody", "", None, 0, "x" * 10_000, ["h:1"]])
def test_an_answer_that_names_no_candidate_is_not_followed(
    using: Any, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    """A request goes to a server that can take it, or to none: a policy can't bring one back that was left out."""
    using(lambda request, servers: answer)
    metrics, servers = Metrics(), endpoints(3)
    place = Placer(RouterPlacement(), metrics)
    assert choices(place, servers[:1]) == [servers[0].name]
    place.close()
    assert metrics.placement_failures.value("unknown_server") == 1
    assert len(caplog.records[0].getMessage()) < 400
    assert choices(place, []) == [], "and no policy is asked where there is none"


def test_a_late_policy_holds_up_one_request_and_is_asked_again_once_it_is_through(
    using: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that hangs delays a request by ANSWER_S at most, and those after it not at all; what it was asked
    meanwhile it need not answer any more."""
    asked: list[bool] = []
    go_on = threading.Event()

    def hangs(request: RequestView, servers: Sequence[ServerView]) -> str:
        asked.append(True)
        assert go_on.wait(PATIENCE_S)
        return servers[-1].name

    async def test() -> None:
        using(hangs)
        metrics, servers = Metrics(), endpoints(2)
        place = Placer(RouterPlacement(), metrics)

        async def choose() -> str | None:
            found = await place.choose("decode", call(), servers)
            return found.name if found else None

        monkeypatch.setattr(policy_thread, "ANSWER_S", 0.01)
        assert await asyncio.gather(choose(), choose()) == [servers[0].name] * 2
        monkeypatch.setattr(policy_thread, "ANSWER_S", PATIENCE_S)
        for _ in range(3):
            assert at_once(choose()) == servers[0].name
        assert metrics.placement_failures.value("late") == 5
        go_on.set()
        while await choose() != servers[1].name:
            await asyncio.sleep(0.005)
        assert len(asked) == 2, "the second question was given up before its turn"
        place.close()

    run(test)


def test_a_client_that_leaves_while_the_policy_chooses_leaves_nothing_behind(using: Any) -> None:
    """The request ends at once, whatever the policy does, and the next one is served by it."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(request: RequestView, servers: Sequence[ServerView]) -> str:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return servers[-1].name

    async def test() -> None:
        using(slow)
        async with rigged(decode=2) as rig:
            asking = asyncio.create_task(rig.ask())
            await asyncio.to_thread(begun.wait, PATIENCE_S)
            asking.cancel()
            while rig.router.describe()["inflight"]:
                await asyncio.sleep(0.005)
            go_on.set()
            assert (await rig.ask()).headers["x-pd-decode"] == rig.decode[1].name

    run(test)


def test_a_policy_is_asked_again_for_each_retry_without_the_server_that_failed(using: Any) -> None:
    """A policy that insists on a server does not keep a request from being served by another."""
    using(last)

    async def test() -> None:
        async with rigged(decode=2) as rig:
            await rig.decode[1].stop()
            reply = await rig.ask()
            assert (reply.status, reply.headers["x-pd-decode"]) == (200, rig.decode[0].name)

    run(test)


class NoPolicy:
    def __init__(self, settings: RouterPlacement) -> None:
        pass


class Refuses(Scripted):
    def __init__(self, settings: RouterPlacement) -> None:
        raise ValueError("no luck")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "nobody",
            r"no placement policy 'nobody' \(least_loaded, absent, half, .*\): install its package, which has",
        ),
        ("absent", "can't be loaded: AttributeError"),
        ("refuses", "placement.policy refuses: ValueError: no luck"),
        ("half", "placement.policy half: TypeError: Can't instantiate abstract class"),
        ("other", "placement.policy other: its entry point returned a NoPolicy, not a PlacementPolicy"),
    ],
)
def test_a_policy_that_can_not_be_had_is_said_at_start(monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    """One line with the cause and what to do, before the router listens."""
    here = "tests.unit.test_router_policies"
    points = {"absent": f"{here}:Absent", "refuses": f"{here}:Refuses", "other": f"{here}:NoPolicy"}
    points["half"] = "pdtransport.router.placement.base:PlacementPolicy"
    made = [EntryPoint(each, where, "g") for each, where in points.items()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: made)
    with pytest.raises(SettingsError, match=says) as refused:
        other_policy(RouterPlacement(policy=name))
    assert "\n" not in str(refused.value)
    assert other_policy(RouterPlacement()) is None
