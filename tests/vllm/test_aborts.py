"""Clients that go away at any moment, on either side, leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from typing import Any

from tests.rig import watch
from tests.rig.cases import handed_over
from tests.rig.client import Client, RequestFailed, in_parallel, new_transfer, to_decode, to_prefill
from tests.rig.fixtures import Book, Servers, forget
from tests.rig.prompts import Prompts
from tests.rig.proof import bytes_equal, crossed

ABORTS = int(os.environ.get("PDT_ABORTS", "70"))
ENOUGH = 0.4  # of them under way when they are aborted; on a GPU half are answered by then
AT_A_TIME = 8
SEED = 77
LONGEST_DELAY_S = 0.8
LONGEST_PROMPT = 1500
MAX_TOKENS = 48
MORE_FILES = 8
MORE_THREADS = 4
MORE_RSS = 96 << 20  # allocators and lazily touched pages; 200 leaked prompts of 3 MB each would be 600 MB


def usage(servers: Servers) -> list[tuple[int, int, int]]:
    """Open files, threads and resident bytes of each worker."""
    pids = [server.workers()[0] for server in servers.all]
    return [(watch.open_files(pid), watch.threads(pid), watch.rss_bytes(pid)) for pid in pids]


async def abort_one(client: Client, servers: Servers, dice: random.Random, prompt: list[int]) -> str:
    """One hand-off of which a seeded choice of the two requests is dropped after a seeded delay."""
    prefill = dice.choice([servers.prefill, servers.other_prefill])
    order, side = dice.choice(["concurrent", "serial"]), dice.choice(["prefill", "decode", "both"])
    delay, stream = dice.uniform(0, LONGEST_DELAY_S), dice.random() < 0.5
    transfer = new_transfer()

    async def prefilling() -> Any:
        return await client.complete(prefill, prompt, 1, to_prefill(prefill, transfer))

    async def decoding(params: Any) -> Any:
        return await client.complete(servers.decode, prompt, MAX_TOKENS, params, stream=stream)

    async def serially() -> None:
        await decoding((await prefilling()).kv_params)

    if order == "concurrent":
        first = asyncio.create_task(prefilling())
        second = asyncio.create_task(decoding(to_decode(prefill, transfer)))
        doomed = {"prefill": [first], "decode": [second], "both": [first, second]}[side]
        tasks = [first, second]
    else:
        tasks = doomed = [asyncio.create_task(serially())]
        side = "either"
    await asyncio.sleep(delay)
    for task in doomed:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception) and not isinstance(outcome, RequestFailed):
            raise outcome  # a failed request is what decode owes a client whose prefill went away; nothing else is
    aborted = any(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    return f"{order}, {side}, {'aborted' if aborted else 'too late'}"


def test_aborts_at_random_moments_leak_nothing(servers: Servers, book: Book, with_client: Any) -> None:
    """After 70 aborts (``PDT_ABORTS``) both engines hold no block, request or transfer, their workers no more files
    or threads, and the next requests get the right tokens from pages that cross whole."""
    lengths = Prompts(SEED)
    dice = random.Random(SEED)

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all)
        await watch.settled(client, servers.all)
        before = usage(servers)
        seen: Counter[str] = Counter()

        async def one(prompt: list[int], seed: int) -> None:
            seen[await abort_one(client, servers, random.Random(seed), prompt)] += 1

        prompts = [lengths.one(dice.randint(33, LONGEST_PROMPT)) for _ in range(ABORTS)]
        jobs = [lambda p=p, s=s: one(p, s) for s, p in enumerate(prompts, SEED * 1000)]
        await in_parallel(AT_A_TIME, jobs)
        print("\n" + ", ".join(f"{count} {what}" for what, count in sorted(seen.items())))
        assert sum(count for what, count in seen.items() if "aborted" in what) >= ABORTS * ENOUGH
        await watch.settled(client, servers.all)
        await forget(client, *servers.all)
        some = book.spare[:24]
        handed = await handed_over(client, some, lambda _: servers.prefill, servers.decode, "concurrent")
        bytes_equal(await crossed(some, handed, [servers.prefill], servers.decode), servers.audit)
        await watch.settled(client, servers.all)
        for server, old, new in zip(servers.all, before, usage(servers), strict=True):
            print(
                f"{server.spec.name}: files {old[0]} -> {new[0]}, threads {old[1]} -> {new[1]}, "
                f"RSS {old[2] / 1e6:.0f} -> {new[2] / 1e6:.0f} MB"
            )
            assert new[0] <= old[0] + MORE_FILES, f"{server}: open files {old[0]} -> {new[0]}"
            assert new[1] <= old[1] + MORE_THREADS, f"{server}: threads {old[1]} -> {new[1]}"
            assert new[2] <= old[2] + MORE_RSS, f"{server}: resident memory {old[2]} -> {new[2]}"

    with_client(scenario)
