"""A few clients, each of which sends its next request when the last one ended; a third leaves before the answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import aiohttp

from tests.rig.cases import Case
from tests.rig.client import Answer, Client, RequestFailed
from tests.rig.prompts import Prompts
from tests.soak.fleet import Fleet

LEAVING = 1 / 3
STREAMED = 1 / 2
AGAIN = 1 / 5  # of requests are of few prompts that all servers were asked before, as far as the salt goes
FEW = 12
PRIME_SEED = 256
REQUEST_S = 120.0
REMEMBERED = 50  # durations of requests: clients leave within the typical one
MAX_TOLD = 50  # failures that are told by their text


@dataclass
class Counts:
    """What became of requests. ``ends``: ``ok``, ``left``, or how it failed."""

    ends: Counter[str] = field(default_factory=Counter)
    paths: Counter[str] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)  # the same, at the plain server
    compared: int = 0  # answer tokens that were a plain server's
    differing: int = 0  # answers that were not
    failures: list[str] = field(default_factory=list)

    def failed(self, end: str, text: str) -> None:
        self.ends[end] += 1
        if len(self.failures) < MAX_TOLD:
            self.failures.append(f"{end}: {text}")


class Load:
    """Clients of the router, and at the same moments of the plain server: the same prompts, of which it computes one
    token, as prefill does, and whose clients leave when the router's do.

    Args:
        pause_s: between two requests of a client.
    """

    def __init__(self, fleet: Fleet, client: Client, seed: int, pause_s: float) -> None:
        self.counts = Counts()
        assert fleet.plain is not None
        self._fleet, self._plain = fleet, fleet.plain
        self._client = client
        self._random = random.Random(seed)
        self._pause_s = pause_s
        self._took: deque[float] = deque([1.0], maxlen=REMEMBERED)
        self._few = self._random.sample(fleet.book, FEW)

    async def prime(self) -> None:
        """One prompt of each size of a step, to prefill and to the plain server: on CPUs a server keeps some 1.5 MiB
        for each size that it meets for the first time, and the soak is about what comes after that."""
        prompts = Prompts(PRIME_SEED)
        largest = self._plain.spec.max_batched_tokens
        assert largest is not None
        for size in range(1, largest + 1):
            prompt = prompts.one(size)
            both = (self._fleet.prefill, self._plain)
            await asyncio.gather(*(self._client.complete(to, prompt, 1, cache_salt=f"prime {size}") for to in both))

    async def run(self, clients: int, done: asyncio.Event) -> None:
        """Until ``done``; each client's last request is waited for."""
        await asyncio.gather(*(self._one_client(done) for _ in range(clients)))

    async def _one_client(self, done: asyncio.Event) -> None:
        while not done.is_set():
            again = self._random.random() < AGAIN
            case = self._random.choice(self._few if again else self._fleet.book)
            salt = "again" if again else f"{self._random.getrandbits(64):x}"  # else nobody's cache holds the prompt
            stream = self._random.random() < STREAMED
            usual = sorted(self._took)[len(self._took) // 2]
            leaves_s = self._random.uniform(0, usual) if self._random.random() < LEAVING else None
            limit = REQUEST_S if leaves_s is None else leaves_s
            await asyncio.gather(
                self._routed(case, limit, leaves_s is not None, stream=stream, cache_salt=salt),
                self._plainly(case, limit, leaves_s is not None, cache_salt=salt),
            )
            await asyncio.sleep(self._random.uniform(0, 2 * self._pause_s))

    async def _routed(self, case: Case, limit_s: float, leaves: bool, **how: object) -> None:
        counts, began = self.counts, time.monotonic()
        try:
            answer = await self._send(self._fleet.router.url, case, len(case.tokens), limit_s, **how)
        except TimeoutError:
            if leaves:
                counts.ends["left"] += 1
            else:
                counts.failed("no answer", f"none within {limit_s:.0f} s to {len(case.prompt)} tokens")
        except RequestFailed as error:
            counts.failed(f"HTTP {error.status}" if error.status != 200 else "error in the stream", str(error))
        except (aiohttp.ClientError, OSError) as error:
            counts.failed("broken connection", repr(error))
        else:
            self._took.append(time.monotonic() - began)
            counts.ends["ok"] += 1
            counts.paths[answer.headers.get("x-pd-path", "none").split(";")[0]] += 1
            self._compare(case.tokens, answer, "the router's")

    async def _plainly(self, case: Case, limit_s: float, leaves: bool, **how: object) -> None:
        try:
            answer = await self._send(self._plain.url, case, 1, limit_s, **how)
        except TimeoutError:
            self.counts.plain["left" if leaves else "no answer"] += 1
        except (RequestFailed, aiohttp.ClientError, OSError) as error:
            self.counts.plain["failed"] += 1
            self.counts.failures.append(f"the plain server: {error!r}")
        else:
            self.counts.plain["ok"] += 1
            self._compare(case.tokens[:1], answer, "the plain server's")

    async def _send(self, url: str, case: Case, tokens: int, limit_s: float, **more: object) -> Answer:
        return await asyncio.wait_for(self._client.complete(url, case.prompt, tokens, **more), limit_s)

    def _compare(self, wanted: tuple[int, ...], answer: Answer, whose: str) -> None:
        self.counts.compared += len(wanted)
        if tuple(answer.tokens) != wanted:
            self.counts.differing += 1
            self.counts.failures.append(f"{whose} answer is {answer.tokens}, not {list(wanted)}")
