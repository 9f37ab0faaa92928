"""A server whose HTTP process answers while its engine is stopped: the router finds out, and that it goes on."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.unit.router_rig import Rig, ask, rigged, run, soon

FAST = {"interval_s": 0.1, "engine_s": 0.2}


def answers(rig: Rig) -> None:
    """Before the router starts: the engines of all servers can be asked, and answer."""
    for engine in (*rig.prefill, *rig.decode):
        engine.engine_answers = asyncio.Event()
        engine.engine_answers.set()


async def health(rig: Rig) -> tuple[int, dict[str, Any]]:
    reply = await rig.get("/health")
    return reply.status, reply.json()


def test_stopped_engine_makes_its_server_unhealthy_although_its_health_path_says_200() -> None:
    """Readiness is about completions: with decode's engine stopped /health says 503, requests get a 503 that says so,
    the status names the cause, and what is known of the server is kept, since it is the same process."""

    async def test() -> None:
        async with rigged(health=FAST, before=answers) as rig:
            await rig.learn()
            known = rig.router.fleet.decode[0].facts
            assert (await health(rig))[0] == 200
            assert rig.d.engine_answers is not None
            rig.d.engine_answers.clear()
            await soon(lambda: not rig.router.fleet.decode[0].healthy)
            status, state = await health(rig)
            assert (status, state["status"], state["decode"]) == (503, "unavailable", {"healthy": 0, "of": 1})
            reply = await rig.ask()
            assert reply.status == 503
            assert reply.error["code"] == "no_decode_server"
            (described,) = (await rig.get("/pd/status")).json()["decode"]
            assert "its engine did not answer within health.engine_s (0.2 s)" in described["last_error"]
            assert rig.router.fleet.decode[0].facts is known
            rig.d.engine_answers.set()
            await soon(lambda: rig.router.fleet.decode[0].healthy)
            assert (await health(rig))[0] == 200
            assert (await rig.ask()).status == 200

    run(test)


def test_stopped_engine_is_asked_again_without_growing_pauses() -> None:
    """An engine that goes on after 20 seconds is used again at once, not half a minute later."""

    async def test() -> None:
        settings = {"interval_s": 0.02, "engine_s": 0.02, "backoff_max_s": 600}
        async with rigged(health=settings, before=answers) as rig:
            assert rig.d.engine_answers is not None
            rig.d.engine_answers.clear()
            await soon(lambda: not rig.router.fleet.decode[0].healthy)
            asked = rig.d.engine_asked
            await soon(lambda: rig.d.engine_asked > asked + 20)

    run(test)


def test_prompts_go_to_decode_alone_while_prefills_engine_is_stopped() -> None:
    """Nobody waits for pages that don't come."""

    async def test() -> None:
        async with rigged(health=FAST, before=answers) as rig:
            assert rig.p.engine_answers is not None
            rig.p.engine_answers.clear()
            await soon(lambda: not rig.router.fleet.prefill[0].healthy)
            reply = await rig.ask(ask(stream=True))
            assert reply.status == 200
            assert reply.headers["x-pd-path"] == "decode-only; no prefill server is healthy"
            assert (await health(rig))[1]["why_not"] == "no_prefill"

    run(test)


def test_server_that_can_not_be_asked_for_its_engine_is_judged_by_its_health_path() -> None:
    """Servers of other versions have no such path: they are asked once, and again when they come back."""

    async def test() -> None:
        async with rigged(health={"interval_s": 0.02}) as rig:
            checks = rig.d.health_checks
            await soon(lambda: rig.d.health_checks > checks + 5)
            assert rig.d.engine_asked == 1
            assert rig.router.fleet.decode[0].healthy
            rig.d.health_status = 500
            await soon(lambda: not rig.router.fleet.decode[0].healthy)
            rig.d.health_status = 200
            await soon(lambda: rig.router.fleet.decode[0].healthy)
            assert rig.d.engine_asked == 2

    run(test)


def test_engines_are_not_asked_where_the_setting_says_so() -> None:
    """health.engine_s of 0 is for engines whose steps may take any time."""

    async def test() -> None:
        async with rigged(health={"interval_s": 0.02, "engine_s": 0}, before=answers) as rig:
            checks = rig.d.health_checks
            await soon(lambda: rig.d.health_checks > checks + 5)
            assert rig.d.engine_asked == rig.p.engine_asked == 0

    run(test)
