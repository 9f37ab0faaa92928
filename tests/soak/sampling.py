"""What each process of a fleet holds, sampled every few seconds."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.rig import watch
from tests.rig.client import Client
from tests.rig.servers import Server

MEMORY = ("rss", "heap", "pss")  # MiB
COUNTS = ("descriptors", "threads", "free_blocks")
_FIELD = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)

Held = Mapping[str, float]


def held(pid: int) -> dict[str, float]:
    """What a process holds; empty if it is gone. ``heap`` is its anonymous memory: what malloc and mmap gave it,
    without files and shared memory."""
    folder = Path("/proc", str(pid))
    try:
        status = dict(_FIELD.findall((folder / "status").read_text()))
        rollup = dict(_FIELD.findall((folder / "smaps_rollup").read_text()))
        return {
            "rss": int(status["VmRSS"]) / 1024,
            "heap": int(status["RssAnon"]) / 1024,
            "pss": int(rollup["Pss"]) / 1024,
            "descriptors": watch.open_files(pid),
            "threads": watch.threads(pid),
        }
    except (OSError, KeyError):
        return {}


@dataclass
class Samples:
    """Of each process, by name: seconds since the soak began, and what it held then."""

    taken: dict[str, list[tuple[float, Held]]] = field(default_factory=dict)

    def series(self, name: str, what: str, since: float) -> tuple[list[float], list[float]]:
        """Seconds and values of one quantity, from ``since`` on."""
        points = [(at, each[what]) for at, each in self.taken.get(name, []) if at >= since and what in each]
        return [at for at, _ in points], [value for _, value in points]

    def add(self, name: str, at: float, what: Held) -> None:
        self.taken.setdefault(name, []).append((at, what))


class Sampler:
    """Samples processes and the free blocks of servers.

    Args:
        pids: of processes, by name.
        servers: whose free KV blocks are read too, and noted with the process ``NAME core``.
    """

    def __init__(self, pids: Mapping[str, int], servers: Mapping[str, Server], client: Client) -> None:
        self.samples = Samples()
        self.trouble: list[str] = []
        self._pids = pids
        self._servers = servers
        self._client = client
        self._began = time.monotonic()

    async def run(self, every_s: float, done: asyncio.Event, told: Callable[[], None]) -> None:
        """Until ``done``; ``told`` is called after each sample."""
        number = 0
        while not done.is_set():
            await self.once()
            told()
            number += 1
            left = self._began + number * every_s - time.monotonic()
            try:
                await asyncio.wait_for(done.wait(), max(left, 0.1))
            except asyncio.TimeoutError:
                continue

    async def once(self) -> None:
        """One sample of everything."""
        at = time.monotonic() - self._began
        found = await asyncio.to_thread(lambda: {name: held(pid) for name, pid in self._pids.items()})
        for name, server in self._servers.items():
            blocks = server.spec.blocks
            assert blocks is not None
            text = await self._client.get_text(f"{server.url}/metrics")
            used = watch.metric(text, "vllm:kv_cache_usage_perc")
            found[f"{name} core"] |= {"free_blocks": round(blocks * (1 - used), 1)}
        for name, each in found.items():
            if each.get("rss"):
                self.samples.add(name, at, each)
            elif f"{name} is gone" not in self.trouble:
                self.trouble.append(f"{name} is gone")
