"""Rounds of requests against real vLLM while something goes wrong, judged by what a client may rely on.

Status 200 means the plain server's tokens; each request ends within its deadline; in the end nothing is held.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import aiohttp

from tests.faults.harness import Result
from tests.faults.network import NoNamespaces, cut_off
from tests.faults.plan import KILL, STOP, Plan
from tests.faults.report import Report, described
from tests.faults.vllm_fleet import REQUEST_S, Fleet, started
from tests.faults.vllm_plan import CUT, LINK, ROUTER, Request, request
from tests.rig.client import Answer, Client, Handed, RequestFailed, hand_off, in_parallel
from tests.rig.fixtures import forget
from tests.rig.router import RunningRouter
from tests.rig.servers import Server, ServerFailed
from tests.rig.watch import rss_bytes, settled

CASES, LONGEST = 160, 900  # prompts, and tokens of one
SHORT_CASES, SHORT = 300, 250  # the same, where clients leave
LEAVING = 0.3  # of all clients
AT_A_TIME, PIECE = 8, 100
USUAL = 600  # requests first, whose clients stay: torch keeps memory for each size of step that it met
IDLE_S = 60.0
CHECK_EVERY = 25  # rounds: then blocks, transfers, descriptors and memory are looked at
WARM = 24  # requests before what is held at rest counts
MENDED_S = 10.0
PROBE_S = 0.05
SLOW_S = 2.0


class Round:
    """One plan under way."""

    def __init__(self, fleet: Fleet, client: Client, plan: Plan) -> None:
        self.fleet, self.client, self.plan = fleet, client, plan
        self.result = Result(plan)
        self.killed: Server | None = None
        self._chance = random.Random(plan.seed + 1)
        self.took: dict[int, float] = {}  # seconds, by number of the request
        self._healthy: dict[int, float] = {}
        self._struck_at: float | None = None

    async def go(self) -> Result:
        """Never raises for what servers do: that stands in the result."""
        if any(what.startswith(KILL) and role != ROUTER for _, role, what in self.plan.signals):
            await self._rehearse()
        before, processes = await self._set_rules(), self.fleet.processes()
        await forget(self.client, *self.fleet.here("prefill"), *self.fleet.here("decode"))
        strikes = [asyncio.create_task(self._strike(*signal)) for signal in self.plan.signals]
        await asyncio.gather(*(self.one(each, n) for n, each in enumerate(self.plan.transfers)))  # type: ignore[arg-type]
        await asyncio.gather(*strikes)
        faulted = time.monotonic()
        await self._clear_rules(before)
        died = self.killed is not None or self.plan.column == KILL
        await self._mend(self._struck_at if died and self._struck_at is not None else faulted)
        if self.killed is not None:
            self.fleet.restart(self.killed)
        if self.plan.row.startswith(ROUTER):
            await self._all_as_before(processes)
        self.result.struck = self._struck_at is not None or self.result.ended["left"] > 0
        return self.result

    async def _rehearse(self) -> None:
        """The same requests with nobody dying: how long each takes."""
        await forget(self.client, *self.fleet.all)
        calm = Round(self.fleet, self.client, replace(self.plan, row="nothing", signals=[]))
        await asyncio.gather(*(calm.one(each, n) for n, each in enumerate(self.plan.transfers)))  # type: ignore[arg-type]
        self._healthy, self.result.healthy_s = calm.took, calm.result.took_s
        self.result.problems += [f"in the rehearsal: {problem}" for problem in calm.result.problems]

    async def _all_as_before(self, processes: dict[str, int]) -> None:
        """A router's end or silence leaves nothing behind in servers, and makes nobody start one again."""
        try:
            await settled(self.client, self.fleet.all)
        except AssertionError as error:
            self.result.problems.append(str(error))
        here = self.fleet.processes()
        others = [name for name, pid in processes.items() if here.get(name) != pid and name != "router:0"]
        if others and not self.fleet.away:
            self.result.problems.append(f"{others} are other processes than before")

    async def one(self, each: Request, number: int = 0) -> None:
        """Send one request, perhaps leave it, and judge how it ended."""
        await asyncio.sleep(each.offer_at)
        sent = time.monotonic()
        task = asyncio.create_task(self._send(each))
        limit = REQUEST_S + self.plan.stopped_s
        leaves = None if each.cancel_at is None else max(0.0, each.cancel_at - each.offer_at)
        done, _ = await asyncio.wait([task], timeout=limit if leaves is None else leaves)
        if not done:
            task.cancel()
            await asyncio.wait([task], timeout=limit)
            if leaves is None:
                self.result.problems.append(f"a request by {each.way} has not ended after {limit:.0f} s")
            self.result.ended["never" if leaves is None else "left"] += 1
            return
        end = task.result()
        self.result.ended[end] += 1
        took = time.monotonic() - sent
        self.result.took_s.append(took)
        self.took[number] = took
        if self._struck_at is not None and self.killed is not None and sent < self._struck_at:
            self.result.told_s.append(time.monotonic() - self._struck_at)
            if number in self._healthy:
                self.result.beyond_s.append(max(0.0, took - self._healthy[number]))
        if self.plan.row == "nothing" and not end.startswith("ok") and not self.fleet.away:
            self.result.problems.append(f"a request by {each.way} ended with {end}, without a fault")

    async def _send(self, each: Request) -> str:
        """How it ended, in a word or two."""
        chance = random.Random(each.seed)
        case = chance.choice(self.fleet.book)
        prefills, decodes = self.fleet.here("prefill"), self.fleet.here("decode")
        prefill, decode = chance.choice(prefills), chance.choice(decodes)
        count = len(case.tokens)
        answer: Answer | Handed
        try:
            if each.way == "router":
                answer = await self.client.complete(self.fleet.router.url, case.prompt, count, stream=each.stream)
            else:
                answer = await hand_off(
                    self.client,
                    prefill,
                    decode,
                    case.prompt,
                    count,
                    each.way,
                    stream=each.stream,  # type: ignore[arg-type]
                )
        except RequestFailed as error:
            return "error in the stream" if error.status == 200 else f"HTTP {error.status}"
        except (aiohttp.ClientError, ConnectionError):
            # The router always ends an answer that it began, if only with an error, unless it is killed itself.
            if each.way == "router" and each.stream and (self.plan.row, self.plan.column) != (ROUTER, KILL):
                self.result.problems.append("the router broke a stream off without an error event")
            return "broken connection"
        if tuple(answer.tokens) != case.tokens:
            self.result.problems.append(
                f"status 200 by {each.way} with wrong tokens: {list(case.tokens)} expected, {answer.tokens} came "
                f"(prompt of {len(case.prompt)})"
            )
            return "WRONG"
        if isinstance(answer, Answer) and answer.headers.get("x-pd-path", "").startswith("decode-only"):
            return "ok from decode alone"
        return "ok"

    # -- faults --------------------------------------------------------------------------------------------------

    async def _set_rules(self) -> dict[str, dict[str, int]]:
        done: dict[str, dict[str, int]] = {}
        if self.fleet.sockets:
            for shift, role in enumerate(("prefill", "decode")):
                done |= await self.fleet.rules(role, self.plan.rules.get(f"{role}0", []), shift * 100)
        return done

    async def _clear_rules(self, before: dict[str, dict[str, int]]) -> None:
        if self.fleet.sockets:
            for role in ("prefill", "decode"):
                for name, now in (await self.fleet.rules(role, [])).items():
                    self.result.injected.update(Counter(now) - Counter(before.get(name, {})))

    async def _strike(self, at: float, role: str, what: str) -> None:
        await asyncio.sleep(at)
        if role == ROUTER:
            await self._strike_router(what)
            return
        server = self._chance.choice(self.fleet.here(role))
        verb, *more = what.split()
        if verb == KILL:
            if len(self.fleet.here(role)) < 2:
                return  # the other one is not back yet
            self.killed = server
            self.fleet.kill(server, more[0])
            self._struck_at = time.monotonic()
            return
        if verb == CUT:
            with suppress(NoNamespaces), cut_off(server.port):
                self._struck_at = time.monotonic()
                await asyncio.sleep(self.plan.stopped_s)
            return
        await self._halt(server)

    async def _halt(self, whom: Server | RunningRouter) -> None:
        whom.signal(signal.SIGSTOP)
        self._struck_at = time.monotonic()
        await asyncio.sleep(self.plan.stopped_s)
        whom.signal(signal.SIGCONT)

    async def _strike_router(self, what: str) -> None:
        router = self.fleet.router
        if what == STOP:
            await self._halt(router)
            return
        router.signal(signal.SIGKILL)
        self._struck_at = time.monotonic()
        self.fleet.usage.pop("router:0", None)
        router.again()  # in this thread, whose end ends it
        await asyncio.to_thread(router.wait_ready)

    async def _mend(self, since: float) -> None:
        """A request through the router is answered again; and where nothing was killed, hand-offs go through."""
        until = time.monotonic() + MENDED_S
        ends: list[str] = []
        seed = self.plan.seed << 8
        while time.monotonic() < until:
            seed += 1
            probes = [Request(seed, 0, 0, 0.0, 0.0, [], 0.0, way="router")]
            if self.killed is None:
                probes.append(Request(seed, 0, 0, 0.0, 0.0, [], 0.0, way="concurrent"))
            tasks = [asyncio.create_task(self._send(each)) for each in probes]
            _, late = await asyncio.wait(tasks, timeout=REQUEST_S)
            for task in late:
                task.cancel()
            await asyncio.wait(tasks)
            ends = ["never" if task in late else task.result() for task in tasks]
            if all(end.startswith("ok") for end in ends):
                self.result.mended_s = time.monotonic() - since
                return
            await asyncio.sleep(PROBE_S)
        self.result.problems.append(f"no request was answered within {MENDED_S} s after the fault: {ends}")


async def warm(fleet: Fleet, client: Client) -> None:
    """Each server serves each of the others a few times: connections, links, allocators."""
    jobs = [(p, d) for p in fleet.here("prefill") for d in fleet.here("decode")]
    for number in range(WARM):
        prefill, decode = jobs[number % len(jobs)]
        case = fleet.book[number % len(fleet.book)]
        await hand_off(client, prefill, decode, case.prompt, len(case.tokens))
    longest = max(fleet.book, key=lambda case: len(case.prompt))
    await asyncio.gather(*(hand_off(client, p, d, longest.prompt, len(longest.tokens)) for p, d in jobs * 2))


async def welcome(fleet: Fleet, client: Client, names: Sequence[str], report: Report) -> None:
    """Servers that were started again are used again, while nobody else was started."""
    for name in names:
        returned = next(server for server in fleet.all if server.spec.name == name)
        others = fleet.decodes if returned in fleet.prefills else fleet.prefills
        case = max(fleet.book, key=lambda case: len(case.prompt))
        for other in others:
            pair = (returned, other) if returned in fleet.prefills else (other, returned)
            await forget(client, *pair)
            try:
                handed = await asyncio.wait_for(hand_off(client, *pair, case.prompt, len(case.tokens)), REQUEST_S)
            except (RequestFailed, TimeoutError, aiohttp.ClientError) as error:
                report.trouble.append(f"{name}, started again, and {other.spec.name}: {error!r}")
                continue
            if tuple(handed.tokens) != case.tokens or handed.prefill_error:
                report.trouble.append(f"{name}, started again, and {other.spec.name}: wrong: {handed}")


async def play(
    fleet: Fleet,
    plans: Sequence[Plan],
    report: Report,
    until: float = math.inf,
    shout: Callable[[str], object] = print,
) -> None:
    """All plans that begin before ``until``, one after the other; what fails is shouted at once."""
    async with Client() as client:
        await warm(fleet, client)
        await fleet.begin(client)
        for number, plan in enumerate(plans, 1):
            whole = any(what.startswith(KILL) for _, _, what in plan.signals) or plan.row.startswith(ROUTER)
            await welcome(fleet, client, await fleet.back(wait=whole), report)
            began = time.time()
            result = await Round(fleet, client, plan).go()
            report.add(result)
            print(told(result), flush=True)
            if result.problems:
                shout(described(result))
            if result.problems or max([*result.took_s, result.mended_s or 0.0]) > SLOW_S:
                print(*await asyncio.to_thread(slow, fleet, began), sep="\n", flush=True)
            late = time.monotonic() > until
            if number % CHECK_EVERY == 0 or number == len(plans) or late:
                names = await fleet.back()
                await welcome(fleet, client, names, report)
                if names:
                    try:
                        await warm(fleet, client)
                    except RequestFailed as error:
                        report.trouble.append(f"after seed {plan.seed}, with {names} started again: {error}")
                await fleet.begin(client)
                report.trouble += [f"after seed {plan.seed}: {leak}" for leak in await fleet.leaks(client)]
                print(f"{number} rounds of {len(plans)}, {report.total.failed} failed", flush=True)
            if late:
                print(f"no time is left; the next seed is {plan.seed + 1}")
                break
        report.trouble += fleet.complaints()


def told(result: Result) -> str:
    """A round in one line."""
    plan, ended = result.plan, ", ".join(f"{end} {count}" for end, count in result.ended.items())
    took, again = max(result.took_s, default=0.0), result.mended_s
    line = f"{plan.seed}: {plan.row} / {plan.column}: {ended}; slowest {took:.2f} s"
    line += f", over {max(result.told_s):.2f} s after the death" if result.told_s else ""
    line += f", at most {max(result.beyond_s):.2f} s beyond healthy ones" if result.beyond_s else ""
    return line + (f", again after {again:.2f} s" if again is not None else "")


def slow(fleet: Fleet, since: float) -> list[str]:
    """The router's timelines of its requests since then (Unix seconds) that took long."""
    traces = fleet.router.get_json("/pd/traces")["traces"]
    late = [each for each in traces if each["at"] >= since and max(each["events"].values(), default=0.0) > SLOW_S]
    late.reverse()
    return ["    " + json.dumps({key: each[key] for key in ("at", "events", "dispatches")}) for each in late]


def resident(fleet: Fleet) -> str:
    """Memory of each process, and of the plain server's."""
    pids = fleet.processes()
    if fleet.plain is not None:
        pids["plain:0"] = fleet.plain.workers()[0]
    return "MiB: " + ", ".join(f"{name} {rss_bytes(pid) >> 20}" for name, pid in pids.items())


async def leave(fleet: Fleet, count: int, seed: int, report: Report) -> None:
    """``count`` requests, three of ten of whose clients leave at a random moment, then a minute with nothing to do."""
    chance = random.Random(seed)
    async with Client() as client:
        await warm(fleet, client)
        row = "short requests, eight at a time"

        async def beside(number: int, each: Request) -> None:
            """Half of the prompts go to the plain server, too: as many as each server that prefills is sent."""
            if fleet.plain is not None and number % 2 == 0:
                case = random.Random(each.seed).choice(fleet.book)
                with suppress(TimeoutError):
                    await asyncio.wait_for(client.complete(fleet.plain, case.prompt, 1), each.cancel_at or REQUEST_S)

        async def one(number: int, leaves_s: float) -> None:
            each = request(chance, chance.getrandbits(32), 0.0)
            each.way = "router"
            leaves = chance.random() < LEAVING and leaves_s > 0
            if leaves:
                each.cancel_at = chance.uniform(0, leaves_s)
            column = "the client leaves" if leaves else "the client stays"
            replay = f"--rig vllm --disconnects {count} --seed {seed}"
            it = Round(fleet, client, Plan(number, LINK, 1, row, column, replay, [each]))
            await asyncio.gather(it.one(each), beside(number, each))
            if not leaves and it.result.ended["ok"] == 0:
                it.result.problems.append(f"a client that stayed got {dict(it.result.ended)}")
            if leaves_s > 0:
                it.result.struck = it.result.ended["left"] > 0
                report.add(it.result)
            else:
                usual.extend(it.result.took_s)

        usual: list[float] = []
        for _ in range(0, USUAL, PIECE):
            await in_parallel(AT_A_TIME, [partial(one, number, 0.0) for number in range(PIECE)])
            await forget(client, *fleet.with_plain)
            print(resident(fleet), flush=True)
        middle = sorted(usual)[len(usual) // 2]
        await fleet.begin(client)
        for first in range(0, count, PIECE):
            numbers = range(first, min(count, first + PIECE))
            await in_parallel(AT_A_TIME, [partial(one, number, middle) for number in numbers])
            await forget(client, *fleet.with_plain)  # so that pages cross again
            print(f"{numbers[-1] + 1} requests of {count}, {report.total.failed} failed; {resident(fleet)}", flush=True)
        report.trouble += await fleet.leaks(client)
        print(f"idle for {IDLE_S:.0f} s")
        await asyncio.sleep(IDLE_S)
        report.trouble += [f"after an idle minute: {leak}" for leak in await fleet.leaks(client)]
        answers = await in_parallel(
            AT_A_TIME,
            [partial(client.complete, fleet.router.url, case.prompt, len(case.tokens)) for case in fleet.book],
        )
        wrong = [case for case, answer in zip(fleet.book, answers, strict=True) if tuple(answer.tokens) != case.tokens]
        if wrong:
            report.trouble.append(f"afterwards {len(wrong)} of {len(answers)} answers have other tokens than before")
        print(f"afterwards {len(answers) - len(wrong)} of {len(answers)} prompts have the same tokens as before")
        report.trouble += fleet.complaints()


def run_vllm(
    report: Report,
    plans: Sequence[Plan],
    policy: str,
    disconnects: int,
    seed: int,
    seconds: float,
    *,
    beside_plain: bool = False,
) -> None:
    """Rounds (none begins after ``seconds``, if that is not 0), or ``disconnects`` requests. A server
    that does not start is told as trouble."""
    until = time.monotonic() + (seconds or math.inf)

    async def go() -> None:
        if disconnects:
            short = {"count": SHORT_CASES, "longest": SHORT}
            async with started(inject=False, policy=policy, beside_plain=beside_plain, **short) as fleet:
                await leave(fleet, disconnects, seed, report)
            return
        async with started(inject=True, policy=policy, count=CASES, longest=LONGEST) as fleet:
            await play(fleet, plans, report, until)

    try:
        asyncio.run(go())
    except (ServerFailed, RequestFailed, AssertionError, aiohttp.ClientError, TimeoutError) as error:
        report.trouble.append(f"cut short: {error!r}")
