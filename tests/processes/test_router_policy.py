"""Placement policies of other packages, in a router that is a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import ClientSession

from tests.processes.test_router import PATIENCE_S, Child, body, router, run, server
from tests.rig.outside_package import install, install_documented

FAILURES = "pdrouter_placement_failures_total"
POLICIES = """
import time
from pdtransport.router.placement.base import PlacementPolicy

class Last(PlacementPolicy):
    def choose(self, request, servers):
        return servers[-1].name

class Raises(PlacementPolicy):
    def choose(self, request, servers):
        raise RuntimeError("no luck")

class Hangs(PlacementPolicy):
    def choose(self, request, servers):
        time.sleep(3600)
"""


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, ...]]:
    """Options of a router in front of one prefill and two decode servers."""
    with server("prefill") as (p, _), server("decode") as (one, _), server("decode") as (two, _):
        yield "--prefill", p, "--decode", one, two


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what is installed for the processes of a test."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    return tmp_path


@pytest.fixture
def policies(outside: Path) -> None:
    points = {name.lower(): f"pdt_policies:{name}" for name in ("Last", "Raises", "Hangs")}
    install(outside, "pdt_policies", POLICIES, {"pdtransport.router.placement": points})


async def failures(client: ClientSession, url: str, reason: str) -> int:
    async with client.get(f"{url}/metrics") as response:
        text = await response.text()
    assert f"# TYPE {FAILURES} counter" in text
    values = [line.split()[1] for line in text.splitlines() if line.startswith(f'{FAILURES}{{reason="{reason}"}}')]
    return int(values[0]) if values else 0


async def decode_of(client: ClientSession, url: str, first: int = 0) -> str:
    """Name of the decode server that answered a prompt which begins with the token ``first``."""
    prompt = [first + 1000, *range(64)]
    async with client.post(f"{url}/v1/completions", json=body(prompt=prompt)) as response:
        assert response.status == 200, await response.text()
        await response.read()
        return response.headers["x-pd-decode"]


async def chosen(client: ClientSession, url: str, first: int = 0) -> str:
    """As :func:`decode_of`, for a request that the policy was in time for, on a machine however busy."""
    while True:
        late = await failures(client, url, "late")
        found = await decode_of(client, url, first)
        if await failures(client, url, "late") == late:
            return found


def test_the_documented_policy_has_two_routers_choose_alike(servers: tuple[str, ...], outside: Path) -> None:
    """The package of docs/adding/policy.md works as it stands there: a prompt's beginning alone says where it goes."""
    install_documented(outside, "policy.md")
    options = (*servers, "--placement-policy", "rendezvous", "--placement-affinity-chunk-chars", "64")
    with router(*options) as (one, _), router(*options) as (two, _):

        async def test(client: ClientSession) -> None:
            async with client.get(f"{one}/pd/status") as response:
                assert (await response.json())["placement"] == "rendezvous"
            ways = [await chosen(client, one, first) for first in range(20)]
            assert set(ways) == {url.removeprefix("http://") for url in servers[-2:]}
            assert [await chosen(client, two, first) for first in reversed(range(20))] == ways[::-1]
            assert await failures(client, one, "error") == await failures(client, one, "unknown_server") == 0

        run(test)


def test_a_policy_may_send_all_requests_to_one_server(servers: tuple[str, ...], policies: None) -> None:
    """What an installed policy chooses is what happens."""
    with router(*servers, "--placement-policy", "last") as (url, _):

        async def test(client: ClientSession) -> None:
            assert {await chosen(client, url) for _ in range(8)} == {servers[-1].removeprefix("http://")}

        run(test)


def test_a_policy_that_raises_costs_no_request(servers: tuple[str, ...], policies: None) -> None:
    """Each request is answered as with least_loaded; each choice that failed counts, and one line says it all."""
    with router(*servers, "--placement-policy", "raises", "--placement-affinity-entries", "0") as (url, child):

        async def test(client: ClientSession) -> None:
            ways = [await decode_of(client, url) for _ in range(6)]
            assert ways == [url.removeprefix("http://") for url in servers[-2:]] * 3
            assert await failures(client, url, "error") + await failures(client, url, "late") == 12
            child.process.send_signal(signal.SIGTERM)
            output, _ = await asyncio.to_thread(child.process.communicate, None, PATIENCE_S)
            said = [line for line in output.splitlines() if "raised" in line]
            assert len(said) == 1, output
            assert "placement.policy raises raised RuntimeError at pdt_policies.py:11; least_loaded chose" in said[0]
            assert "Traceback" not in output

        run(test)


def test_a_policy_that_hangs_costs_no_request_and_keeps_no_router_alive(
    servers: tuple[str, ...], policies: None
) -> None:
    """Requests are answered, all but the first without a wait for the policy, and SIGTERM ends the router as ever."""
    with router(*servers, "--placement-policy", "hangs") as (url, child):

        async def test(client: ClientSession) -> None:
            for _ in range(4):
                await decode_of(client, url)
            assert await failures(client, url, "late") == 8
            child.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(child.process.wait, PATIENCE_S) == 0

        run(test)


def test_a_policy_that_nobody_has_is_one_line_and_status_2(servers: tuple[str, ...], policies: None) -> None:
    """The line names the setting, the policies that are there, and what to do."""
    with Child("-m", "pdtransport.router.cli", *servers, "--placement-policy", "nobody") as child:
        output, _ = child.process.communicate(timeout=PATIENCE_S)
    assert child.process.returncode == 2
    assert output == (
        "pdrouter: there is no placement policy 'nobody' (least_loaded, hangs, last, raises): install its package, "
        "which has an entry point in the group pdtransport.router.placement, or set placement.policy to an "
        "installed one\n"
    )
