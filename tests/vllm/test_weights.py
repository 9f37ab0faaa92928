"""Weights that change under running engines: no answer from KV of other weights, on the link or in the pool."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.cases import MARGIN
from tests.rig.checkpoints import altered
from tests.rig.client import Client, Handed, hand_off, in_parallel
from tests.rig.fixtures import Book, forget, pair_spec
from tests.rig.pooled import Service, counters, pooled
from tests.rig.proof import record_of
from tests.rig.servers import TINY_LM, Server, fleet

TOKENS = 5
PROMPTS = 3

Answers = list[tuple[int, ...]]  # the tokens that the numerics of another batch can't turn


@dataclass
class Changing:
    """A pair whose weights change. ``old`` is what both started with; ``new`` differs in one inner layer's keys and
    values. Decode uses a pool."""

    prefill: Server
    decode: Server
    old: Path
    new: Path
    prompts: list[tuple[int, ...]]


@pytest.fixture(scope="module")
def pair(logs: Path, book: Book, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Changing]:
    folder = tmp_path_factory.mktemp("weights")
    old, new = folder / "old", altered(TINY_LM, folder / "new")
    shutil.copytree(TINY_LM, old)
    service = Service(folder)
    service.start()
    prompts = [case.prompt for case in book.spare if len(case.prompt) > 150][:PROMPTS]
    specs = [
        replace(pair_spec("changing-prefill", "kv_producer", cores="0"), model=old),
        pooled(service.directory, replace(pair_spec("changing-decode", "kv_both", cores="1"), model=old)),
    ]
    try:
        with fleet(*specs, logs=logs) as (prefill, decode):
            yield Changing(prefill, decode, old, new, [tuple(prompt) for prompt in prompts])
    finally:
        service.close()


async def rpc(client: Client, server: Server, method: str, **kwargs: str) -> None:
    """What vLLM's dev mode lets anybody do with the workers."""
    async with client.post(f"{server.url}/collective_rpc", {"method": method, "kwargs": kwargs}):
        pass


async def own(client: Client, pair: Changing) -> Answers:
    """Decode's own answers, nothing of them in its prefix cache."""
    await forget(client, pair.decode)
    jobs = [partial(client.complete, pair.decode, prompt, TOKENS, logprobs=2) for prompt in pair.prompts]
    found = []
    for answer in await in_parallel(2, jobs):
        sure = next((i for i, margin in enumerate(answer.margins) if margin < MARGIN), TOKENS)
        found.append(tuple(answer.tokens[:sure]))
    assert any(found), "decode is sure of nothing"
    await watch.settled(client, [pair.decode])
    await forget(client, pair.decode)
    return found


def same(got: Answers, wanted: Answers) -> bool:
    return all(one[: len(other)] == other for one, other in zip(got, wanted, strict=True))


async def handed(client: Client, pair: Changing) -> list[Handed]:
    jobs = [partial(hand_off, client, pair.prefill, pair.decode, prompt, TOKENS) for prompt in pair.prompts]
    done = await in_parallel(2, jobs)
    await watch.settled(client, [pair.prefill, pair.decode])
    await forget(client, pair.decode)
    return done


def answers(done: Sequence[Handed]) -> Answers:
    return [tuple(each.tokens) for each in done]


async def all_crossed(client: Client, pair: Changing) -> Answers:
    """Answers of requests that were all handed over."""
    done = await handed(client, pair)
    for each in done:
        record = await record_of(pair.decode, each.transfer, "consumer")
        assert (record["state"], record["code"]) == ("ready", ""), record
    return answers(done)


async def none_crossed(client: Client, pair: Changing) -> Answers:
    """Answers of requests of which none was handed over, because of the weights."""
    done = await handed(client, pair)
    for each in done:
        record = await record_of(pair.decode, each.transfer, "consumer")
        assert record["code"], record
        assert "weights" in record["reason"], record
    return answers(done)


async def identity(server: Server) -> str:
    return str((await watch.status(server))[0]["fingerprint"]["weights"])


@pytest.mark.more
def test_reloaded_weights_are_others(pair: Changing, with_client: Any) -> None:
    """After one side reloads other weights every answer is decode's own, nothing is handed over (prefill's prefix cache
    included), and the reason names the weights. Once the other side has the same, all is handed over again, and answers
    are those of the new weights. Back with the old ones, the pair is what it was. What the pool holds is found again by
    who has the weights that it was computed with, and by nobody else."""

    async def scenario(client: Client) -> None:
        first = await identity(pair.prefill)
        assert first == await identity(pair.decode)
        assert first.startswith("safetensors:")
        old = await own(client, pair)
        assert same(await all_crossed(client, pair), old)

        await rpc(client, pair.prefill, "reload_weights", weights_path=str(pair.new))
        changed = await identity(pair.prefill)
        assert changed.startswith("loaded:")
        assert same(await none_crossed(client, pair), old)

        before = await counters(client, pair.decode)
        await rpc(client, pair.decode, "reload_weights", weights_path=str(pair.new))
        assert await identity(pair.decode) == changed
        new = await own(client, pair)
        assert not same(old, new), "the new weights change nothing"
        after = await counters(client, pair.decode)
        assert after["hit"] == before["hit"], "new weights went on from chunks of the old ones"
        assert after["stored"] > before["stored"]
        assert same(await all_crossed(client, pair), new)

        for server in (pair.decode, pair.prefill):
            await rpc(client, server, "reload_weights", weights_path=str(pair.old))
            assert await identity(server) == first
        assert same(await own(client, pair), old)
        assert (await counters(client, pair.decode))["hit"] > after["hit"], "the old chunks are not found again"
        assert same(await all_crossed(client, pair), old)

    with_client(scenario)


@pytest.mark.more
def test_files_that_were_replaced_are_others(pair: Changing, with_client: Any) -> None:
    """The same name, path and size: a reload from a folder whose files were replaced makes other weights."""

    async def scenario(client: Client) -> None:
        first = await identity(pair.decode)
        old = await own(client, pair)
        for file in pair.new.glob("*.safetensors"):
            shutil.copy(file, pair.old / file.name)
        try:
            await rpc(client, pair.decode, "reload_weights")
            assert (await identity(pair.decode)).startswith("loaded:")
            new = await own(client, pair)
            assert not same(old, new)
            assert same(await none_crossed(client, pair), new)
        finally:
            for file in TINY_LM.glob("*.safetensors"):
                shutil.copy(file, pair.old / file.name)
            await rpc(client, pair.decode, "reload_weights")
        assert await identity(pair.decode) == first
        assert same(await all_crossed(client, pair), old)

    with_client(scenario)


@pytest.mark.more
def test_sleep_and_wake_keep_the_weights(pair: Changing, with_client: Any) -> None:
    """An engine that slept and woke with the weights it had hands over as before; with others it does not. (On a CPU
    vLLM does not free memory while it sleeps; what we do at its calls is the same.)"""

    async def scenario(client: Client) -> None:
        old = await own(client, pair)
        async with client.post(f"{pair.prefill.url}/sleep?level=1", {}):
            pass
        async with client.post(f"{pair.prefill.url}/wake_up", {}):
            pass
        assert same(await all_crossed(client, pair), old)
        async with client.post(f"{pair.prefill.url}/sleep?level=2", {}):
            pass
        async with client.post(f"{pair.prefill.url}/wake_up?tags=weights", {}):
            pass
        await rpc(client, pair.prefill, "reload_weights", weights_path=str(pair.new))
        async with client.post(f"{pair.prefill.url}/wake_up?tags=kv_cache", {}):
            pass
        assert same(await none_crossed(client, pair), old)
        await rpc(client, pair.prefill, "reload_weights", weights_path=str(pair.old))
        assert same(await all_crossed(client, pair), old)

    with_client(scenario)
