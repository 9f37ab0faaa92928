"""A request's body goes with its answer, not when Python next looks for cycles, which a quiet router seldom does."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

from pdtransport.router.call import Call
from tests.unit.router_rig import Script, ask, fails, learned, rigged, run, soon


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def calls() -> int:
    return sum(type(each) is Call for each in gc.get_objects())


async def _never(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError("nobody waits so long")


async def _breaks(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def _first_fails(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(0.05)
    return web.json_response({"error": {"message": "no", "type": "x", "param": None, "code": 400}}, status=400)


CASES: dict[str, tuple[Script | None, Script | None]] = {  # of prefill and decode
    "served": (None, None),
    "decode ends before prefill": (_never, None),
    "prefill fails": (fails(500), _never),
    "prefill refuses": (fails(400), _never),
    "both refuse": (fails(400), _first_fails),
    "prefill breaks": (_breaks, _never),
    "decode fails": (None, fails(500)),
    "decode refuses": (_never, fails(400)),
    "decode breaks": (_never, _breaks),
    "nobody answers": (_never, _never),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_body_goes_with_its_request(case: str, stream: bool) -> None:
    """However it ended: bodies that nobody answers for would add up beyond every bound (max_buffered_bytes)."""

    async def test() -> None:
        async with rigged(timeouts={"first_byte_s": 0.3, "total_s": 0.3, "prefill_s": 5}) as rig:
            await learned(rig)
            rig.p.script, rig.d.script = CASES[case]
            for _ in range(3):
                await rig.ask(ask(stream=stream))
            await soon(lambda: calls() == 0)

    run(test)
