"""Real vLLM servers and a router under the vLLM rig: started, restarted in place, counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.faults.rule_server import SOCKET_VARIABLE, set_rules
from tests.faults.rules import Rule
from tests.rig import watch
from tests.rig.answers import Answers
from tests.rig.cases import Case, cases
from tests.rig.client import Client
from tests.rig.fixtures import forget, pair_spec, plain_spec
from tests.rig.prompts import Prompts
from tests.rig.router import RunningRouter, routed
from tests.rig.servers import REPOSITORY, START_S, Server, ServerSpec, group_members, start, stop_all
from tests.rig.watch import rss_bytes

# Short enough that lost transfers do not fill the run, long enough for two cores that also start a server.
DEADLINES = {
    "answer_s": 2.0,
    "arrival_s": 5.0,
    "queue_s": 8.0,
    "stall_s": 4.0,
    "verify_s": 4.0,
    "hold_s": 4.0,
    "claim_s": 8.0,
    "ack_s": 4.0,
}
ROUTER = ("--timeouts-total-s", "40", "--timeouts-prefill-s", "15", "--timeouts-connect-s", "2")
REQUEST_S = 45.0  # the router's whole deadline, and what a busy machine adds
MORE_FILES, MORE_THREADS = 8, 4
MORE_RSS = 96 << 20  # allocators and lazily touched pages, as in tests/vllm/test_aborts.py
# What vLLM itself adds on CPUs where prompts of ever new lengths are computed: a plain server grew by 260 MiB over 900
# prompts (`--beside-plain`), ever slower.
VLLM_RSS = 256 << 20
ANSWERS = REPOSITORY / ".pytest_cache" / "d" / "pdtransport-answers"  # where pytest keeps them, too
CASE_SEED = 4
_TRACE_LINES = 60


@dataclass(frozen=True)
class Usage:
    """What a process holds."""

    files: int
    threads: int
    rss: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        return cls(watch.open_files(pid), watch.threads(pid), rss_bytes(pid))

    def grown(self, since: Usage, more_rss: int = MORE_RSS) -> list[str]:
        found = []
        if self.files > since.files + MORE_FILES:
            found.append(f"open files {since.files} -> {self.files}")
        if self.threads > since.threads + MORE_THREADS:
            found.append(f"threads {since.threads} -> {self.threads}")
        if self.rss > since.rss + more_rss:
            found.append(f"resident memory {since.rss >> 20} -> {self.rss >> 20} MiB")
        return found

    def __str__(self) -> str:
        return f"{self.files} files, {self.threads} threads, {self.rss >> 20} MiB"


def unreconciled(counts: Counter[str]) -> list[str]:
    """What the counters of all servers, none of which died, contradict each other in."""
    ok, failed = counts["handovers_ok"], counts["handovers_failed"]
    print(
        f"counted: {counts['fetches_ok']} fetches ok, {counts['fetches_failed']} failed; {ok} handovers ok, {failed} "
        f"failed; {counts['blocks_sent']} blocks sent, {counts['blocks_received']} received"
    )
    found = []
    if not ok <= counts["fetches_ok"] <= ok + failed:  # a fetch whose ack was lost is a handover that failed
        found.append(f"{counts['fetches_ok']} fetches ok, but {ok} handovers ok and {failed} failed")
    if counts["blocks_received"] > counts["blocks_sent"]:
        found.append(f"{counts['blocks_sent']} blocks sent, but {counts['blocks_received']} received")
    if counts["bytes_received"] > counts["bytes_sent"]:
        found.append(f"{counts['bytes_sent']} bytes sent, but {counts['bytes_received']} received")
    return found


@dataclass
class Fleet:
    """Servers of both roles, their router, and prompts with known answers.

    Args:
        sockets: where servers take rules, by their names; none where they run without an injector.
    """

    prefills: list[Server]
    decodes: list[Server]
    router: RunningRouter
    book: list[Case]
    sockets: dict[str, Path] = field(default_factory=dict)
    usage: dict[str, Usage] = field(default_factory=dict)  # at rest, by process; see :meth:`rest`
    counted: Counter[str] | None = None  # by all servers at rest; None once one died, whose counts went with it
    away: dict[str, asyncio.Task[None]] = field(default_factory=dict)  # servers being started again
    plain: Server | None = None  # vLLM without a connector, for comparison
    _plain_rss: int = 0

    @property
    def all(self) -> list[Server]:
        return [*self.prefills, *self.decodes]

    @property
    def with_plain(self) -> list[Server]:
        return [*self.all, *([self.plain] if self.plain is not None else [])]

    def here(self, role: str) -> list[Server]:
        """Servers of a role that are not being started again."""
        servers = self.prefills if role == "prefill" else self.decodes
        return [server for server in servers if server.spec.name not in self.away]

    # -- faults --------------------------------------------------------------------------------------------------

    async def rules(self, role: str, rules: Sequence[Rule], shift: int = 0) -> dict[str, dict[str, int]]:
        """Set the rules of all servers of a role, each with seeds of its own; what each injector has done so far."""
        done: dict[str, dict[str, int]] = {}
        for number, server in enumerate(self.here(role)):
            path = self.sockets.get(server.spec.name)
            if path is not None:
                theirs = [replace(rule, seed=rule.seed + shift + number) for rule in rules]
                with contextlib.suppress(OSError, EOFError):  # it was killed
                    done[server.spec.name] = await asyncio.to_thread(set_rules, path, theirs)
        return done

    def kill(self, server: Server, what: str) -> None:
        """SIGKILL to a whole server, or to its worker process alone; it counts as away until :meth:`restart`."""
        if what == "worker":
            os.kill(server.workers()[0], signal.SIGKILL)
        else:
            server.signal(signal.SIGKILL)

    def restart(self, server: Server) -> None:
        """Begin to start a killed server again, on its ports; :meth:`back` waits for it."""

        async def again() -> None:
            await asyncio.to_thread(server.stop)  # what a worker's death leaves of the others
            server.launch()  # in this thread, whose end ends it
            await asyncio.to_thread(server.wait_ready, time.monotonic() + START_S)

        for name in [key for key in self.usage if key.split(":")[0] == server.spec.name]:
            del self.usage[name]
        self.counted = None
        self.away[server.spec.name] = asyncio.create_task(again())

    async def back(self, wait: bool = True) -> list[str]:
        """Names of the servers that are up again; with ``wait``, once all are.

        Raises:
            ServerFailed: one does not start.
        """
        found = []
        for name, task in list(self.away.items()):
            if wait or task.done():
                await task
                del self.away[name]
                found.append(name)
        return found

    # -- what is held --------------------------------------------------------------------------------------------

    def processes(self) -> dict[str, int]:
        """Ids of the workers and of the router, by ``server:rank``."""
        found = {f"{s.spec.name}:{rank}": pid for s in self.all for rank, pid in enumerate(s.workers())}
        return {**found, "router:0": self.router.pid}

    async def rest(self, client: Client) -> dict[str, Usage]:
        """Wait until nothing is under way, empty the prefix caches, and tell what each process holds.

        Raises:
            AssertionError: blocks, requests or transfers are never given back.
        """
        await watch.settled(client, self.all)
        await forget(client, *self.all)
        return {name: Usage.of(pid) for name, pid in self.processes().items()}

    async def begin(self, client: Client) -> None:
        """Remember what processes hold at rest, of those that were not looked at before, and their counters."""
        for name, usage in (await self.rest(client)).items():
            self.usage.setdefault(name, usage)
        self.counted = self.counted or await self._counters()
        if self.plain is not None:
            self._plain_rss = rss_bytes(self.plain.workers()[0])

    def _plain_growth(self) -> int:
        """Bytes that computing prompts costs a server without pdtransport, too."""
        if self.plain is None:
            return VLLM_RSS
        return rss_bytes(self.plain.workers()[0]) - self._plain_rss

    async def _counters(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for server in self.all:
            total += await watch.counters(server)
        return total

    async def leaks(self, client: Client) -> list[str]:
        """What is held now and was not at :meth:`begin`."""
        try:
            now = await self.rest(client)
        except AssertionError as error:
            return [str(error)]
        found = []
        for name, usage in now.items():
            more_rss = MORE_RSS + (self._plain_growth() if name.startswith("prefill") else 0)
            grown = usage.grown(self.usage.get(name, usage), more_rss)
            print(f"{name}: {self.usage.get(name)} -> {usage}")
            found += [f"{name}: {text}" for text in grown]
        if self.counted is not None:
            found += unreconciled(await self._counters() - self.counted)
        return found

    def complaints(self) -> list[str]:
        """Stack traces through pdtransport in the logs of servers and router: errors nobody expected."""
        found: Counter[str] = Counter()
        for log in [*(server.log for server in self.all), self.router.log]:
            lines = log.read_text(errors="replace").splitlines()
            for number, line in enumerate(lines):
                if "Traceback (most recent call last)" in line:
                    trace = lines[number : number + _TRACE_LINES]
                    if any(re.search(r"[/.]pdtransport/", each) for each in trace):
                        said = next((each for each in trace[1:] if each and not each[0].isspace()), trace[-1])
                        found[f"{log.name}: a stack trace: {said[-200:]}"] += 1
        return [f"{text} ({count} times)" for text, count in found.items()]


def specs(sockets: Path | None, policy: str) -> list[ServerSpec]:
    """Two servers of each role on two cores; with ``sockets``, an injector in each."""
    made = []
    for name, role, core in (
        ("prefill-1", "kv_producer", "0"),
        ("prefill-2", "kv_producer", "1"),
        ("decode-1", "kv_consumer", "1"),
        ("decode-2", "kv_consumer", "0"),
    ):
        spec = pair_spec(name, role, cores=core)  # type: ignore[arg-type]
        extra: dict[str, Any] = {"observe": {"recent_transfers": 512}}
        env = dict(spec.env)
        if sockets is not None:
            extra["deadlines"] = DEADLINES
            env[SOCKET_VARIABLE] = str(sockets / f"{name}.sock")
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(sockets)]))
        if role == "kv_consumer":
            spec = replace(spec, load_failure_policy=policy)  # type: ignore[arg-type]
        module = "tests.faults.vllm_inside" if sockets is not None else ""
        made.append(replace(spec, extra_config=extra, env=env, connector_module=module))
    return made


async def known_cases(logs: Path, count: int, longest: int) -> list[Case]:
    """Up to ``count`` prompts of up to ``longest`` tokens with answers of a plain server, which is stopped again."""
    prompts = Prompts(CASE_SEED)
    answers = Answers(plain_spec(), logs, ANSWERS)
    try:
        tried = [prompts.one(prompts.below(40, longest)) for _ in range(count)]
        found = await cases(answers, tried, least=4, longest=12)
    finally:
        await asyncio.to_thread(answers.close)
    assert len(found) > count / 3, f"the plain server is sure of {len(found)} prompts only"
    return found


@asynccontextmanager
async def started(
    *, inject: bool, policy: str, count: int, longest: int, beside_plain: bool = False
) -> AsyncIterator[Fleet]:
    """Servers and router for the length of an ``async with`` block. Afterwards none of their processes is left.

    Raises:
        ServerFailed: one did not start or did not end.
    """
    logs = Path(tempfile.mkdtemp(prefix="pdt-faults-"))
    print(f"logs: {logs}")
    book = await known_cases(logs, count, longest)
    if inject:
        (logs / "tests").symlink_to(REPOSITORY / "tests")  # on the servers' path, and nothing else of the repository
    wanted = specs(logs if inject else None, policy)
    if beside_plain:
        wanted.append(replace(wanted[0], name="plain", connector="none", extra_config={}))
    servers = start(wanted, logs)
    try:
        sockets = {spec.name: logs / f"{spec.name}.sock" for spec in wanted} if inject else {}
        with routed(servers[:2], servers[2:4], logs, "concurrent", *ROUTER) as router:
            plain = servers[4] if beside_plain else None
            yield Fleet(servers[:2], servers[2:4], router, book, sockets, plain=plain)
    finally:
        stop_all(servers)
    left = [pid for server in servers for pid in group_members(server.pgid)]
    assert not left, f"processes {left} are left"
