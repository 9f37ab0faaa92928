"""One round: the same servers throughout, whose adapters and weights change between requests, and once in a while
during one."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.identity import contents
from tests.identity.asking import Asked, Told, alone, by_client, by_pool, by_router, distance, same
from tests.identity.draw import Pair, draw
from tests.identity.makers import ADAPTERS, WEIGHTS, write_weights
from tests.identity.outcomes import POOL, Outcome, Report, Verdict
from tests.identity.world import FOLDERS, Content, Instance, put_adapter
from tests.rig.client import Client, Order, RequestFailed
from tests.rig.prompts import Prompts
from tests.rig.router import RunningRouter, routed

ELSEWHERE = "weights"  # where weights lie that no server starts with
NAMES = ("ada", "bob", "cy")  # of adapters
SHORTEST, LONGEST = 70, 330  # tokens of a prompt
LONG = 1800  # of one during whose computation something is changed
RACE_S = 0.3  # within which that happens
# Shares of the requests:
CHANGED = 0.4  # something is changed before
RESTORED = 0.3  # a server has the weights again that it was started with, where one has others
RACED = 0.05  # something is changed meanwhile
REPEATED = 0.15  # prefill has it in its prefix cache from before it was changed, where there is such a one
ROUTED = 0.35  # goes through a router, where both sides are asked the same
# Why an equal pair may be refused, by what it is refused for.
ALLOWED = {
    "weights": "weights reloaded to others that are equal now",
    "adapter": "an adapter's files are others than those that are loaded",
}
ORDERS: tuple[Order, ...] = ("concurrent", "serial")


@dataclass(frozen=True)
class Held:
    """A prompt that ``prefill`` has in its prefix cache, and what it was computed with. ``stored``: what all who were
    asked it under this salt computed it with, which a pool keeps."""

    prefill: Instance
    adapter: str
    content: Content
    prompt: list[int]
    salt: str
    stored: tuple[Content, ...]


class Round:
    """Use as ``with Round(...)``, which ends the routers that it starts.

    Args:
        routers: that it may start.
        pool: the servers have one, through which all requests go.
    """

    def __init__(
        self,
        instances: list[Instance],
        root: Path,
        logs: Path,
        rng: random.Random,
        prompts: Prompts,
        report: Report,
        routers: int,
        pool: bool = False,
    ) -> None:
        self._instances = instances
        self._root = root
        self._logs = logs
        self._rng = rng
        self._prompts = prompts
        self._report = report
        self._most_routers = routers
        self._pool = pool
        self._routers: dict[tuple[int, int], tuple[Order, RunningRouter]] = {}
        self._held: list[Held] = []
        self._salts = 0
        self._stack = ExitStack()

    def __enter__(self) -> Round:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def go(self, count: int) -> None:
        """Ask ``count`` requests, each after the one before."""
        async with Client() as client:
            for instance in self._instances:
                for name in NAMES[:2]:
                    await instance.load(client, name, self._rng.choice(FOLDERS))
            for _ in range(count):
                changed = [instance for instance in self._instances if instance.reloaded]
                if changed and self._rng.random() < RESTORED:
                    self._report.actions[await self._reload(client, self._rng.choice(changed))] += 1
                if self._rng.random() < CHANGED:
                    await self._change(client, self._rng.choice(self._instances))
                self._report.outcomes.append(await self._request(client))

    # -- changes ----------------------------------------------------------------------------------------------------

    async def _change(self, client: Client, instance: Instance) -> None:
        kinds = {
            "adapter updated in place": 4,
            "adapter's files replaced": 1,
            "adapter unloaded": 1,
            "adapter loaded": 2,
            "weights reloaded": 2,
        }
        kind = self._rng.choices(list(kinds), list(kinds.values()))[0]
        names = sorted(instance.adapters)
        if kind == "adapter updated in place" and names:
            await self._update_in_place(client, instance, self._rng.choice(names))
        elif kind == "adapter's files replaced":
            put_adapter(self._root, self._rng.choice(FOLDERS), self._rng.choice(list(ADAPTERS)))
        elif kind == "adapter unloaded" and len(names) > 1:
            await instance.unload(client, self._rng.choice(names))
        elif kind == "weights reloaded":
            kind = await self._reload(client, instance)
        else:
            kind = "adapter loaded"
            fresh = [name for name in NAMES if name not in instance.adapters] or names
            await instance.load(client, self._rng.choice(fresh), self._rng.choice(FOLDERS))
        self._report.actions[kind] += 1

    async def _update_in_place(self, client: Client, instance: Instance, name: str) -> None:
        """Other bytes at the same path, of which only this server hears."""
        folder = instance.adapters[name].folder
        put_adapter(self._root, folder, self._rng.choice(list(ADAPTERS)))
        await instance.load(client, name, folder)

    async def _reload(self, client: Client, instance: Instance) -> str:
        """Weights from elsewhere or from the same files with other bytes; back to what it was started with, if it has
        others."""
        start = next(name for name in WEIGHTS if instance.started == self._weights_content(name))
        wanted = start if instance.reloaded else self._rng.choice([start, *WEIGHTS])
        if not instance.model.folder.startswith(ELSEWHERE) and self._rng.random() < 0.5:
            write_weights(self._root / instance.model.folder, wanted, instance.model.sharded)
            await instance.reload(client)
            return "weights reloaded in place"
        await instance.reload(client, self._weights_folder(wanted))
        return "weights reloaded from elsewhere"

    def _weights_folder(self, name: str) -> Path:
        folder = self._root / ELSEWHERE / name
        if not folder.exists():
            folder.mkdir(parents=True)
            write_weights(folder, name, sharded=False)
        return folder

    def _weights_content(self, name: str) -> str:
        return contents.weights(self._weights_folder(name))

    # -- requests ---------------------------------------------------------------------------------------------------

    async def _request(self, client: Client) -> Outcome:
        self._salts += 1
        salt = f"tenant-{self._salts}"
        again = [held for held in self._held if held.content != self._content_now(held)]
        if again and self._rng.random() < REPEATED:
            held = self._rng.choice(again)
            self._held.remove(held)
            return await self._repeated(client, held)
        pair = draw(self._rng, self._instances)
        asked = (
            Asked(pair.adapters[0], salt),
            Asked(pair.adapters[1], salt if pair.one_salt else f"{salt}-other"),
        )
        if pair.one_salt and self._rng.random() < RACED:
            return await self._raced(client, pair, asked)
        prompt = self._prompts.one(self._prompts.below(SHORTEST, LONGEST))
        verdict, why = self._verdict(pair)
        outcome = await self._ask(client, pair, asked, prompt, verdict, why)
        computed = [pair.prefill.content(asked[0].adapter)]
        if pair.one_salt:
            computed.append(pair.decode.content(asked[1].adapter))
        self._held.append(Held(pair.prefill, asked[0].adapter, computed[0], prompt, salt, tuple(computed)))
        return outcome

    def _content_now(self, held: Held) -> Content | None:
        there = not held.adapter or held.adapter in held.prefill.adapters
        return held.prefill.content(held.adapter) if there else held.content

    def _verdict(self, pair: Pair) -> tuple[Verdict, str]:
        allowed = self._allowed(pair)
        if pair.differs == ("adapter",) and pair.decode.moved(pair.adapters[1]):
            return "either", ALLOWED["adapter"]  # handed over, and computed again once decode has read the files
        if pair.differs:
            return "different", ""
        return ("either", ALLOWED[allowed[0]]) if allowed else ("equal", "")

    def _allowed(self, pair: Pair) -> tuple[str, ...]:
        """Parts for whose sake an equal pair may be refused, since what is loaded is not what was at the start."""
        found = []
        if pair.prefill.reloaded or pair.decode.reloaded:
            found.append("weights")
        for instance, name in zip((pair.prefill, pair.decode), pair.adapters, strict=True):
            if instance.moved(name):
                found.append("adapter")
        return tuple(found)

    async def _repeated(self, client: Client, held: Held) -> Outcome:
        """The same prompt of the same tenant, of which prefill's prefix cache holds what it computed with others."""
        decodes = [instance for instance in self._instances if instance is not held.prefill]
        decode = self._rng.choice(decodes)
        name = held.adapter if held.adapter in decode.adapters else ""
        differs = held.prefill.content(held.adapter).differs(decode.content(name))
        pair = Pair(held.prefill, decode, (held.adapter, name), True, differs, ())
        # Decode may itself hold it under this salt from before, which vLLM alone answers for: it forgets.
        await decode.forget(client)
        asked = (Asked(held.adapter, held.salt), Asked(name, held.salt))
        found = self._pool and any(not each.differs(decode.content(name)) for each in held.stored)
        verdict: Verdict = "different" if differs and not found else "either"
        return await self._ask(client, pair, asked, held.prompt, verdict, "prefill holds it from before a change")

    async def _raced(self, client: Client, pair: Pair, asked: tuple[Asked, Asked]) -> Outcome:
        """Prefill's weights or adapter are changed while it computes; decode must not hear of the difference."""
        prompt = self._prompts.one(LONG)
        delay = self._rng.uniform(0.0, RACE_S)
        name = asked[0].adapter

        async def change() -> None:
            await asyncio.sleep(delay)
            if name and self._rng.random() < 0.5:
                await self._update_in_place(client, pair.prefill, name)
            else:
                await self._reload(client, pair.prefill)
            self._report.actions["changed meanwhile"] += 1

        verdict: Verdict = "different" if pair.differs else "either"
        task = asyncio.create_task(change())
        try:
            outcome = await self._ask(client, pair, asked, prompt, verdict, "changed meanwhile", raced=True)
        finally:
            await task
        return outcome

    async def _ask(
        self,
        client: Client,
        pair: Pair,
        asked: tuple[Asked, Asked],
        prompt: list[int],
        verdict: Verdict,
        why: str,
        raced: bool = False,
    ) -> Outcome:
        allowed = tuple(ALLOWED) if raced else self._allowed(pair)  # as it is now, before what is asked
        number = len(self._report.outcomes) + 1
        times = [time.monotonic()]
        how, told, fault = await self._dispatch(client, pair, asked, prompt, raced)
        times.append(time.monotonic())
        for instance, side in zip((pair.prefill, pair.decode), asked, strict=True):
            instance.used(side.adapter)
        own = await alone(client, pair.decode, prompt, asked[1].adapter)
        telling = None
        if not raced:
            telling = not same(await alone(client, pair.prefill, prompt, asked[0].adapter), own)
        times.append(time.monotonic())
        facts: dict[str, Any] = {"handed": False, "used": 0, "right": False, "off": float("inf"), "reason": fault}
        if told is not None:
            off = distance(told.answer, own)
            facts = {"handed": told.handed, "used": told.used, "right": same(told.answer, own), "off": off}
            facts |= {"code": told.code, "reason": told.reason, "path": told.path}
        return Outcome(
            number=number,
            verdict=verdict,
            why=why,
            differs=pair.differs,
            allowed=allowed,
            labels=pair.labels,
            how=how,
            pair=f"{pair.prefill.server.spec.name}>{pair.decode.server.spec.name}",
            telling=telling,
            asked_s=round(times[1] - times[0], 3),
            alone_s=round(times[2] - times[1], 3),
            **facts,
        )

    async def _dispatch(
        self, client: Client, pair: Pair, asked: tuple[Asked, Asked], prompt: list[int], raced: bool
    ) -> tuple[str, Told | None, str]:
        """How it was asked; what came; else why nothing did."""
        order = self._rng.choice(ORDERS)
        how = f"client, {order}"
        try:
            if self._pool:
                return POOL, await by_pool(client, pair.prefill, pair.decode, prompt, asked), ""
            if asked[0] == asked[1] and not raced and self._rng.random() < ROUTED:
                found = self._router(pair, order)
                if found is not None:
                    order, router = found
                    how = f"router, {order}"
                    return how, await by_router(client, router.url, pair.prefill, pair.decode, prompt, asked[0]), ""
            if raced:
                order, how = "concurrent", "client, concurrent"
            return how, await by_client(client, pair.prefill, pair.decode, prompt, asked, order), ""
        except RequestFailed as error:
            return how, None, str(error)

    def _router(self, pair: Pair, order: Order) -> tuple[Order, RunningRouter] | None:
        """The router of this pair, started if there may be one more."""
        key = (pair.prefill.server.port, pair.decode.server.port)
        if key not in self._routers:
            if len(self._routers) >= self._most_routers:
                return None
            started = routed([pair.prefill.server], [pair.decode.server], self._logs, order)
            self._routers[key] = (order, self._stack.enter_context(started))
        return self._routers[key]
