"""Read what servers and their workers say about themselves, and what the kernel says about them."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.rig.client import Client, RequestFailed
from tests.rig.ports import HOST
from tests.rig.prompts import BOS
from tests.rig.servers import Server

SETTLE_S = 45.0  # longer than DeadlineSettings.hold_s: what prefill holds for nobody must be gone by then
POLL_S = 0.25
STATUS_S = 5.0
TICKS = os.sysconf("SC_CLK_TCK")
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def metric(text: str, name: str, **labels: str) -> float:
    """Sum of a Prometheus metric's samples that carry ``labels``.

    Raises:
        KeyError: there is no such sample.
    """
    values = []
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None or match["name"] != name:
            continue
        carried = dict(_LABEL.findall(match["labels"] or ""))
        if labels.items() <= carried.items():
            values.append(float(match["value"]))
    if not values:
        raise KeyError(f"no metric {name} with {labels}")
    return sum(values)


@dataclass(frozen=True)
class EngineState:
    """Some of vLLM's own metrics of one server; token counts are totals since its start."""

    kv_usage: float
    running: float
    waiting: float
    preemptions: float
    computed_tokens: float
    local_hit_tokens: float
    external_tokens: float
    cached_tokens: float  # found in its own prefix cache, by requests that ended before they answered, too


async def engine_state(client: Client, server: Server) -> EngineState:
    text = await client.get_text(f"{server.url}/metrics")
    source = "vllm:prompt_tokens_by_source_total"
    return EngineState(
        kv_usage=metric(text, "vllm:kv_cache_usage_perc"),
        running=metric(text, "vllm:num_requests_running"),
        waiting=metric(text, "vllm:num_requests_waiting"),
        preemptions=metric(text, "vllm:num_preemptions_total"),
        computed_tokens=metric(text, source, source="local_compute"),
        local_hit_tokens=metric(text, source, source="local_cache_hit"),
        external_tokens=metric(text, source, source="external_kv_transfer"),
        cached_tokens=metric(text, "vllm:prefix_cache_hits_total"),
    )


async def refresh(client: Client, server: Server) -> EngineState:
    """The state after one more step: an engine writes its gauges at the end of a step only, so what an abort freed
    shows when the next request has ended."""
    await client.complete(server, [BOS, *b"fresh"], 1)
    return await engine_state(client, server)


async def status(server: Server, transfer: str = "") -> list[dict[str, Any]]:
    """Status of each worker of a server, over its control channel."""
    from pdtransport.control.client import fetch_status

    replies = []
    for rank in range(server.spec.workers):
        port = server.control_port + rank
        replies.append(await asyncio.to_thread(fetch_status, HOST, port, transfer=transfer, timeout_s=STATUS_S))
    return replies


async def counters(server: Server) -> Counter[str]:
    """Counters summed over a server's workers."""
    total: Counter[str] = Counter()
    for reply in await status(server):
        total.update(reply["counters"])
    return total


def live(replies: Iterable[dict[str, Any]]) -> int:
    """Things that workers still hold for transfers under way."""
    return sum(sum(reply["live"].values()) for reply in replies)


async def until(what: str, check: Callable[[], Awaitable[str]], timeout_s: float = SETTLE_S) -> None:
    """Poll until ``check`` returns "" (nothing to complain of).

    Raises:
        AssertionError: ``what`` did not come true within ``timeout_s``; ends with the last complaint.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        complaint = await check()
        if not complaint:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} not so after {timeout_s:.0f} s: {complaint}")
        await asyncio.sleep(POLL_S)


async def settled(client: Client, servers: Sequence[Server], timeout_s: float = SETTLE_S) -> None:
    """Wait until no server holds a KV block, a request or a transfer.

    Raises:
        AssertionError: one still does after ``timeout_s``: a leak.
    """

    async def complaint() -> str:
        for server in servers:
            try:
                state = await refresh(client, server)
            except RequestFailed as error:
                return f"{server}: {error}"
            if state.kv_usage or state.running or state.waiting:
                return f"{server}: {state}"
            if server.spec.connector == "pdtransport":
                replies = await status(server)
                if live(replies):
                    return f"{server}: live {[reply['live'] for reply in replies]}"
        return ""

    await until("every engine free of blocks, requests and transfers", complaint, timeout_s)


# -- what the kernel says -----------------------------------------------------------------------------------------


def rss_bytes(pid: int) -> int:
    """Resident memory of a process, 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time, user and system, that processes have used since they started."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def machine_busy_seconds() -> float:
    """Processor time that everything on this machine has used, in user and system mode, since it booted."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, *_ = fields
    return (user + nice + system + irq + softirq) / TICKS
