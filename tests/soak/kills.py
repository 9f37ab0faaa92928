"""``python -m tests.soak.kills``: fifty requests under way while a process is killed or stopped, with real vLLM.

None may hang: each ends with the plain server's tokens, or with an error in the API's form (of a stream that has begun:
an error event). Only when the router itself is killed a client sees a broken connection. Afterwards requests are
answered again, and nothing is held. Prints a table of outcomes; exit status 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from benchmarks._figures import say
from pdtransport.serving.errors import is_openai_error
from tests.rig.cases import Case
from tests.rig.client import Client, RequestFailed
from tests.rig.servers import START_S, Server
from tests.rig.watch import settled
from tests.soak.fleet import Fleet, running

REQUESTS = 50
ENDED_FIRST = 5  # requests that have ended when it strikes: the others are queued, at prefill, at decode, mid-stream
CACHE_TOKENS = 1 << 16  # room for all of them: what fifty requests do to caches that are too small is another question
STOPPED_S = 20.0
LIMIT_S = 120.0  # beyond the stop: a request that has not ended by then hangs
MENDED_S = 60.0
LOOK_S = 0.25
BROKEN = "broken connection"


@dataclass
class Outcome:
    """What became of the requests of one strike.

    Args:
        unready_s: seconds from the strike until /health said 503; None if it never did.
        ready_s: seconds from the end of a stop, or the restart of what was killed, until it said 200.
        answered_s: seconds until a request was answered, once all others had ended and what was killed ran again.
    """

    what: str
    ends: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    unready_s: float | None = None
    ready_s: float | None = None
    answered_s: float | None = None
    problems: list[str] = field(default_factory=list)

    def row(self) -> str:
        def told(seconds: float | None) -> str:
            return "-" if seconds is None else f"{seconds:.1f}"

        ends = ", ".join(f"{end} {count}" for end, count in self.ends.most_common())
        times = " | ".join(told(each) for each in (self.slowest_s, self.unready_s, self.ready_s, self.answered_s))
        return f"| {self.what} | {ends} | {times} | {'; '.join(self.problems) or 'none'} |"


HEADER = (
    "| what | requests ended with | slowest, s | /health 503 after, s | 200 again after, s | answered again after, s | "
    "broken promises |\n|---|---|---|---|---|---|---|"
)


class Strike:
    """One of them.

    Args:
        breaks: connections may break: the router is who dies.
    """

    def __init__(self, what: str, breaks: bool = False) -> None:
        self.what = what
        self.breaks = breaks

    async def hit(self, fleet: Fleet) -> None:
        """Do it."""

    async def mend(self, fleet: Fleet) -> None:
        """Start again what is gone."""


class Stop(Strike):
    """SIGSTOP for a while, of the core of a server's engine, or of all of the server."""

    def __init__(self, what: str, whole: bool) -> None:
        super().__init__(what)
        self._whole = whole

    async def hit(self, fleet: Fleet) -> None:
        self._send(fleet.decode, signal.SIGSTOP)
        await asyncio.sleep(STOPPED_S)
        self._send(fleet.decode, signal.SIGCONT)

    def _send(self, server: Server, number: int) -> None:
        if self._whole:
            server.signal(number)
        else:
            for pid in server.engines():
                os.kill(pid, number)


class KillServer(Strike):
    """SIGKILL of one process of a server, which ends the server."""

    def __init__(self, what: str, of: Callable[[Fleet], Server], which: Callable[[Server], Sequence[int]]) -> None:
        super().__init__(what)
        self._of, self._which = of, which

    async def hit(self, fleet: Fleet) -> None:
        for pid in self._which(self._of(fleet)):
            os.kill(pid, signal.SIGKILL)

    async def mend(self, fleet: Fleet) -> None:
        server = self._of(fleet)
        await asyncio.to_thread(server.stop)  # what the process' death leaves of the others
        server.launch()  # in this thread, whose end ends it
        await asyncio.to_thread(server.wait_ready, time.monotonic() + START_S)


class KillPool(Strike):
    async def hit(self, fleet: Fleet) -> None:
        await asyncio.to_thread(fleet.pool.signal, signal.SIGKILL)

    async def mend(self, fleet: Fleet) -> None:
        fleet.start_pool()


class KillRouter(Strike):
    async def hit(self, fleet: Fleet) -> None:
        fleet.router.signal(signal.SIGKILL)

    async def mend(self, fleet: Fleet) -> None:
        fleet.router.again()
        await asyncio.to_thread(fleet.router.wait_ready)


STRIKES: dict[str, Strike] = {
    "nothing": Strike("nothing"),
    "stop-core": Stop("SIGSTOP of decode's engine core for 20 s", whole=False),
    "stop-decode": Stop("SIGSTOP of all of decode for 20 s", whole=True),
    "pool": KillPool("SIGKILL of the pool"),
    "router": KillRouter("SIGKILL of the router", breaks=True),
    "prefill-core": KillServer("SIGKILL of prefill's engine core", lambda f: f.prefill, Server.engines),
    "prefill-worker": KillServer("SIGKILL of prefill's worker", lambda f: f.prefill, Server.workers),
    "decode-core": KillServer("SIGKILL of decode's engine core", lambda f: f.decode, Server.engines),
    "decode-worker": KillServer("SIGKILL of decode's worker", lambda f: f.decode, Server.workers),
}


class Round:
    """Fifty requests and one strike."""

    def __init__(self, fleet: Fleet, client: Client, strike: Strike, seed: int) -> None:
        self._fleet, self._client, self._strike = fleet, client, strike
        self._random = random.Random(seed)
        self.outcome = Outcome(strike.what)
        self._struck = asyncio.Event()
        self._ended = 0
        self._over: float | None = None  # when all was as before, apart from what it did

    async def go(self) -> Outcome:
        """Never raises for what becomes of requests: that stands in the outcome."""
        outcome, fleet = self.outcome, self._fleet
        long = [case for case in fleet.book if len(case.prompt) >= 200]
        chosen = [self._random.choice(long) for _ in range(REQUESTS)]
        asked = [asyncio.create_task(self._one(case, number % 2 == 0)) for number, case in enumerate(chosen)]
        await self._struck.wait()
        began = time.monotonic()
        looking = asyncio.create_task(self._look(began))
        await self._strike.hit(fleet)
        mends = type(self._strike).mend is not Strike.mend
        self._over = None if mends else time.monotonic()
        _, late = await asyncio.wait(asked, timeout=LIMIT_S)
        for task in late:
            task.cancel()
        outcome.ends["never"] += len(late)
        outcome.problems += [f"{len(late)} requests hang"] if late else []
        outcome.ends = +outcome.ends
        if mends:
            await self._strike.mend(fleet)
            self._over = time.monotonic()
        await self._again()
        looking.cancel()
        await self._nothing_held()
        return outcome

    async def _one(self, case: Case, stream: bool) -> None:
        began, end = time.monotonic(), await self._send(case, stream)
        self.outcome.ends[end] += 1
        self.outcome.slowest_s = max(self.outcome.slowest_s, time.monotonic() - began)
        self._ended += 1
        if self._ended == ENDED_FIRST:
            self._struck.set()

    async def _send(self, case: Case, stream: bool) -> str:
        salt, problems = f"{self._random.getrandbits(64):x}", self.outcome.problems
        try:
            answer = await self._client.complete(
                self._fleet.router.url, case.prompt, len(case.tokens), stream=stream, cache_salt=salt
            )
        except RequestFailed as error:
            if error.status == 200:
                return "error event"
            if not is_openai_error(error.text.encode()):
                problems.append(f"HTTP {error.status} with {error.text[:80]!r}")
            return f"HTTP {error.status}"
        except (aiohttp.ClientError, OSError, json.JSONDecodeError) as error:
            if not self._strike.breaks:
                problems.append(f"{'a stream' if stream else 'an answer'} broke: {error!r}"[:160])
            return BROKEN
        if answer.finish is None:
            problems.append("a stream ended without a finish or an error event")
            return "ended early"
        if tuple(answer.tokens) != case.tokens:
            problems.append(f"wrong tokens: {answer.tokens}, not {list(case.tokens)}")
            return "WRONG"
        return "ok"

    async def _look(self, began: float) -> None:
        """What /health says, from the strike on."""
        outcome = self.outcome
        while True:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
                try:
                    async with session.get(f"{self._fleet.router.url}/health") as reply:
                        now = time.monotonic()
                        if reply.status == 503 and outcome.unready_s is None:
                            outcome.unready_s = now - began
                        if reply.status == 200 and outcome.ready_s is None and self._over is not None:
                            outcome.ready_s = now - self._over
                except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
                    pass
            await asyncio.sleep(LOOK_S)

    async def _again(self) -> None:
        """Wait until the router is ready and a request is answered."""
        case, outcome, since = self._fleet.book[0], self.outcome, time.monotonic()
        while time.monotonic() < since + MENDED_S:
            try:
                answer = await asyncio.wait_for(
                    self._client.complete(self._fleet.router.url, case.prompt, len(case.tokens)), MENDED_S
                )
                if tuple(answer.tokens) == case.tokens and outcome.ready_s is not None:
                    outcome.answered_s = time.monotonic() - since
                    return
                if tuple(answer.tokens) != case.tokens:
                    outcome.problems.append(f"afterwards wrong tokens: {answer.tokens}")
                await asyncio.sleep(LOOK_S)
            except (RequestFailed, aiohttp.ClientError, OSError, asyncio.TimeoutError):
                await asyncio.sleep(LOOK_S)
        outcome.problems.append(f"no request was answered within {MENDED_S:.0f} s afterwards")

    async def _nothing_held(self) -> None:
        try:
            await settled(self._client, [self._fleet.prefill, self._fleet.decode])
            await asyncio.to_thread(self._fleet.pool.at_rest)
        except (AssertionError, RequestFailed, aiohttp.ClientError) as error:
            self.outcome.problems.append(f"not given back: {str(error)[:200]}")


async def rounds(
    names: Sequence[str],
    logs: Path,
    seed: int,
    told: Callable[[Outcome], object] = lambda outcome: None,
    cache_tokens: int = CACHE_TOKENS,
) -> list[Outcome]:
    """One round a name of ``STRIKES``, on one fleet."""
    done = []
    async with running(logs, beside_plain=False, cache_tokens=cache_tokens) as fleet, Client() as client:
        for number, name in enumerate(names):
            outcome = await Round(fleet, client, STRIKES[name], seed + number).go()
            told(outcome)
            done.append(outcome)
    return done


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.kills", description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(STRIKES), default=list(STRIKES), help="these strikes")
    parser.add_argument("--seed", type=int, default=1, help="the same seed asks the same (default 1)")
    parser.add_argument("--cache-tokens", type=int, default=CACHE_TOKENS, help="of each server (default %(default)s)")
    options = parser.parse_args(argv)
    logs = Path(tempfile.mkdtemp(prefix="pdtransport-kills-"))
    say(f"logs: {logs}")

    def told(outcome: Outcome) -> None:
        say(outcome.row())

    done = asyncio.run(rounds(options.only, logs, options.seed, told, options.cache_tokens))
    print(HEADER, *(outcome.row() for outcome in done), sep="\n")
    return 1 if any(outcome.problems for outcome in done) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
