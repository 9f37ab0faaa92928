"""What it costs an engine to have the connector, while nobody uses it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.fixtures import Servers
from tests.rig.servers import Server

MAX_EXTRA_RSS = 150 << 20
IDLE_S = 6.0
ASLEEP_S = 1.5  # vLLM's own workers spin for a second after a step
MAX_EXTRA_CPU = 0.01  # of one core: a few heartbeats are less than the kernel's clock tick shows


@pytest.mark.long  # servers of its own, and half a minute of doing nothing
def test_idle_connector_costs_little_memory_and_no_processor_time(
    plain: Server, servers: Servers, with_client: Any
) -> None:
    """An idle connector adds at most 150 MB to a worker's resident memory and no measurable processor time, compared
    with the plain server, which learns the answers of all other tests after this one."""

    async def warm(client: Any) -> None:
        for server in (plain, *servers.all):
            await watch.refresh(client, server)

    with_client(warm)
    time.sleep(ASLEEP_S)
    everyone = [plain, *servers.all]
    before = [watch.cpu_seconds(server.members()) for server in everyone]
    time.sleep(IDLE_S)
    shares = [(watch.cpu_seconds(s.members()) - b) / IDLE_S for s, b in zip(everyone, before, strict=True)]
    base_cpu, base_rss = shares[0], watch.rss_bytes(plain.workers()[0])
    for server, share in zip(servers.all, shares[1:], strict=True):
        extra = watch.rss_bytes(server.workers()[0]) - base_rss
        print(f"\n{server.spec.name}: {extra / 1e6:+.0f} MB, {share:.4f} of a core (plain: {base_cpu:.4f})")
        assert extra <= MAX_EXTRA_RSS, f"{server}: its worker holds {extra / 1e6:.0f} MB more than a plain one"
        assert share - base_cpu <= MAX_EXTRA_CPU, f"{server}: idle, it uses {share:.4f} of a core"
