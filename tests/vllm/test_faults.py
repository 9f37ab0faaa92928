"""Servers that stand still for a while, and clients that leave meanwhile: the right tokens or a clear end.

The short form of ``python -m tests.faults --rig vllm``, without what needs an injector in the servers, or a restart.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.faults.report import Report
from tests.faults.vllm_fleet import ROUTER, Fleet
from tests.faults.vllm_plan import round_of
from tests.faults.vllm_rig import Round, warm
from tests.rig import watch
from tests.rig.cases import handed_over
from tests.rig.client import Client
from tests.rig.fixtures import Book, Servers, forget
from tests.rig.proof import bytes_equal, crossed
from tests.rig.router import routed

FIRST_SEED = 700
SECONDS = 8.0  # no round begins after so long
LEAST = 4  # rounds whatever the machine


def test_servers_that_stand_still_break_no_promise(servers: Servers, book: Book, with_client: Any, logs: Path) -> None:
    """Status 200 means the plain server's tokens, all requests end by their deadlines, and nothing is held afterwards:
    seeded rounds through the router and straight to the servers, while these are stopped and clients leave."""
    report = Report([])

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all)
        until = time.monotonic() + SECONDS
        prefills = [servers.prefill, servers.other_prefill]
        with routed(prefills, [servers.decode], logs, "concurrent", *ROUTER) as router:
            fleet = Fleet(prefills, [servers.decode], router, [case for case in book.spare if len(case.tokens) >= 4])
            await warm(fleet, client)
            await fleet.begin(client)
            seed = FIRST_SEED
            while time.monotonic() < until or seed < FIRST_SEED + LEAST:
                report.add(await Round(fleet, client, round_of(seed, 0, inject=False)).go())
                seed += 1
            report.trouble += await fleet.leaks(client)
        some = book.spare[:6]
        handed = await handed_over(client, some, lambda _: servers.other_prefill, servers.decode, "concurrent")
        bytes_equal(await crossed(some, handed, [servers.other_prefill], servers.decode), servers.audit)
        await watch.settled(client, servers.all)

    with_client(scenario)
    print(f"\n{report.total.runs} rounds from seed {FIRST_SEED} on: {dict(report.total.ends)}")
    assert report.failures == [], report.failures[0]
    assert report.trouble == []
    assert report.total.struck >= LEAST / 2
    served = sum(count for end, count in report.total.ends.items() if end.startswith("ok"))
    assert served >= LEAST, "clients that stay are served"
