"""What a server's metrics say about pdtransport: whether it runs there, its role, and its workers' addresses."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientSession, ClientTimeout

MAX_METRICS_BYTES = 8 << 20
MAX_ENGINES = 64  # data-parallel replicas behind one server
_INFO = "vllm:pdtransport_info{"
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_PRODUCES = frozenset({"kv_producer", "kv_both"})
_CONSUMES = frozenset({"kv_consumer", "kv_both"})


@dataclass(frozen=True, slots=True)
class ControlAddress:
    """Control address of rank 0's worker of an engine; rank r listens on ``port + r``."""

    host: str
    port: int
    tp_size: int

    def params(self, transfer_id: str) -> dict[str, Any]:
        """kv_transfer_params for a decode server dispatched together with the prefill server at this address."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer_id,
            "remote_host": self.host,
            "remote_port": self.port,
            "tp_size": self.tp_size,
        }


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One engine of a server (with data parallelism there are several)."""

    engine_id: str
    role: str  # kv_role
    control: ControlAddress


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What is known of a server.

    ``vllm``: the metrics are vLLM's. If False, nothing is known, because statistics may be switched off.
    """

    vllm: bool = False
    engines: tuple[EngineFacts, ...] = ()

    def unfit_as(self, role: str) -> str:
        """Why no hand-off can begin (``prefill``) or end (``decode``) at this server; empty if it can."""
        if not self.vllm:
            return ""
        roles = _PRODUCES if role == "prefill" else _CONSUMES
        if not self.engines:
            return "runs vLLM without PDTransportConnector: start it with --kv-transfer-config"
        if not any(engine.role in roles for engine in self.engines):
            return f"has kv_role {self.engines[0].role}: it takes {' or '.join(sorted(roles))}"
        return ""


def read_facts(metrics: str, url: str) -> ServerFacts:
    """Parse the Prometheus text of the server at ``url``.

    An engine that listens on all addresses gets the URL's host as its address.
    """
    engines: list[EngineFacts] = []
    for line in _lines_of(metrics):
        engine = _engine(dict(_LABEL.findall(line)), urlsplit(url).hostname or "")
        if engine is not None and len(engines) < MAX_ENGINES:
            engines.append(engine)
    return ServerFacts("\nvllm:" in metrics or metrics.startswith("vllm:"), tuple(engines))


async def ask_facts(session: ClientSession, url: str, headers: dict[str, str], timeout_s: float) -> ServerFacts | None:
    """Read the server's ``/metrics``. None: no answer; retry later."""
    try:
        async with session.get(
            f"{url}/metrics", headers=headers, timeout=ClientTimeout(total=timeout_s), allow_redirects=False
        ) as answer:
            if answer.status != 200:
                return ServerFacts()
            parts, size = [], 0
            async for part in answer.content.iter_any():
                parts.append(part)
                size += len(part)
                if size > MAX_METRICS_BYTES:
                    return ServerFacts()
            return read_facts(b"".join(parts).decode("utf-8", "replace"), url)
    except (ClientError, OSError, asyncio.TimeoutError, ValueError):
        return None


def _lines_of(metrics: str) -> Iterator[str]:
    at = metrics.find(_INFO)
    while at >= 0:
        end = metrics.find("\n", at)
        if at == 0 or metrics[at - 1] == "\n":
            yield metrics[at : end if end >= 0 else None][:4096]
        at = metrics.find(_INFO, at + 1)


def _engine(labels: dict[str, str], url_host: str) -> EngineFacts | None:
    port, ranks = labels.get("control_port", ""), labels.get("tp_size", "")
    host = labels.get("control_host", "")
    if not (port.isdecimal() and ranks.isdecimal()) or len(port) > 5 or len(ranks) > 4 or not host:
        return None
    if not (0 < int(port) < 65536 and 0 < int(ranks) <= 1024):
        return None
    address = ControlAddress(url_host if _is_wildcard(host) else host, int(port), int(ranks))
    return EngineFacts(labels.get("engine_id", ""), labels.get("role", ""), address)


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == "*"
