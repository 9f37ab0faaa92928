"""What real servers say about themselves, and what becomes of transfers that never begin."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Any

import pytest
import zmq

from pdtransport.control.watching import WorkerWatch
from pdtransport.protocol.messages import Code, Ended, Message
from pdtransport.router.facts import ControlAddress, read_facts
from pdtransport.settings import ControlSettings
from tests.rig.client import Client
from tests.rig.fixtures import Servers
from tests.rig.ports import HOST
from tests.rig.router import routed
from tests.rig.servers import Server
from tests.rig.watch import metric

PROMPT = list(range(20, 90))
WAIT_S = 20.0


@pytest.mark.more
def test_prefill_without_the_connector_or_in_the_wrong_role_is_found_out(
    plain: Server, servers: Servers, with_client: Any, logs: Path
) -> None:
    """A plain vLLM server and a kv_consumer get no prompt to prefill; the log, the header and the metrics say why."""

    async def scenario(client: Client) -> None:
        for prefill, why in ((plain, "without PDTransportConnector"), (servers.decode, "has kv_role kv_consumer")):
            more = ("--hand-off-wait-s", "5")  # decode's word may be late on a busy machine
            with routed([prefill], [servers.decode], logs, "concurrent", *more, told=False) as router:
                answer = await client.complete(router.url, PROMPT, 2)
                path = answer.headers["x-pd-path"]
                assert path.startswith("decode-only; prefill server "), path
                assert why in path
                text = await client.get_text(f"{router.url}/metrics")
                assert metric(text, "pdrouter_not_disaggregated_total", reason="prefill_not_a_producer") == 1
                assert router.get_json("/health")["disaggregates"] is False
                assert len([line for line in router.log.read_text().splitlines() if why in line]) == 1

    with_client(scenario)


def test_metrics_tell_role_and_control_address(servers: Servers, with_client: Any) -> None:
    async def scenario(client: Client) -> None:
        for server in servers.all:
            facts = read_facts(await client.get_text(f"{server.url}/metrics"), server.url)
            (engine,) = facts.engines
            assert engine.role == server.spec.kv_role
            assert engine.control == ControlAddress(HOST, server.control_port, 1)

    with_client(scenario)


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"remote_port": 0}, "remote_port"),
        ({"remote_host": "no host"}, "remote_host"),
        ({"remote_host": "10.1.2.3"}, "control.peers"),
        ({"remote_host": "evil.example.org"}, "control.peers"),
        ({"tp_size": 1000}, "tp_size"),
    ],
)
def test_a_request_that_the_scheduler_serves_without_a_transfer_is_told(
    params: dict[str, Any], why: str, servers: Servers, with_client: Any
) -> None:
    """Whoever watches decode's worker hears of it before the answer, with the reason."""
    wanted = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": secrets.token_hex(16),
        "remote_host": HOST,
        "remote_port": servers.prefill.control_port,
        "tp_size": 1,
        **params,
    }
    context: zmq.Context[Any] = zmq.Context()
    watch = WorkerWatch(context, HOST, servers.decode.control_port, ControlSettings(), None)

    async def scenario(client: Client) -> None:
        heard: list[Message] = []

        async def until(count: int) -> None:
            while len(heard) < count:
                heard.extend(watch.read(100)[0])
                await asyncio.sleep(0.01)

        watch.ask()
        await asyncio.wait_for(until(1), WAIT_S)
        await client.complete(servers.decode, PROMPT, 2, wanted)
        await asyncio.wait_for(until(2), WAIT_S)
        said = heard[1]
        assert isinstance(said, Ended)
        assert (said.transfer, said.code) == (wanted["transfer_id"], Code.REFUSED)
        assert why in said.reason

    try:
        with_client(scenario)
    finally:
        watch.close()
        context.term()
