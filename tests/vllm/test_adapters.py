"""LoRA adapters under real vLLM: KV goes by what each engine has loaded, whatever the adapters are called, wherever
they lie, and whatever lies there now."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.adapters import write_adapter
from tests.rig.client import Client, new_transfer, to_decode, to_prefill
from tests.rig.device import PLACE
from tests.rig.fixtures import forget, pair_spec
from tests.rig.pooled import Service, pooled
from tests.rig.prompts import Prompts
from tests.rig.proof import record_of
from tests.rig.servers import Server, fleet

# What the adapters are of: LoRA kernels of GPUs take 16 bits alone, on the CPU single precision leaves no near ties.
DTYPE = "bfloat16" if PLACE.gpu else "float32"
LORA = ("--enable-lora", "--max-lora-rank", "16", "--max-loras", "3")
ANSWER = 8


@pytest.fixture(scope="module")
def pair(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Prefill, with a pool of its own, and decode, both with adapters that can be loaded and replaced while they
    run."""
    service = Service(tmp_path_factory.mktemp("adapters"))
    service.start()
    specs = [
        pair_spec(
            f"lora-{role}", f"kv_{role}", cores=str(core), args=LORA, dtype=DTYPE, load_failure_policy="recompute"
        )
        for core, role in enumerate(("producer", "consumer"))
    ]
    specs = [pooled(service.directory, specs[0]), specs[1]]
    specs = [replace(spec, env={**spec.env, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}) for spec in specs]
    try:
        with fleet(*specs, logs=logs) as (prefill, decode):
            yield prefill, decode
    finally:
        service.close()


async def load(client: Client, server: Server, name: str, folder: Path, **more: Any) -> None:
    body = {"lora_name": name, "lora_path": str(folder), **more}
    async with client.post(f"{server.url}/v1/load_lora_adapter", body):
        pass


async def unload(client: Client, server: Server, name: str) -> None:
    async with client.post(f"{server.url}/v1/unload_lora_adapter", {"lora_name": name}):
        pass


class Asked:
    """Prompts that both servers are asked, each with its own name of an adapter."""

    def __init__(self, client: Client, pair: tuple[Server, Server]) -> None:
        self._client, (self._prefill, self._decode) = client, pair

    async def own(self, prompt: Sequence[int], model: str) -> list[int]:
        """Decode's answer without any help, not even its prefix cache's."""
        await forget(self._client, self._decode)
        answer = await self._client.complete(self._decode, prompt, ANSWER, model=model)
        await forget(self._client, self._decode)
        return answer.tokens

    async def handed(self, prompt: Sequence[int], there: str, here: str) -> tuple[list[int], dict[str, Any]]:
        """Decode's answer with prefill's help, and decode's record of the transfer."""
        transfer = new_transfer()
        first = self._client.complete(self._prefill, prompt, 1, to_prefill(self._prefill, transfer), model=there)
        then = self._client.complete(self._decode, prompt, ANSWER, to_decode(self._prefill, transfer), model=here)
        _, answer = await asyncio.gather(first, then)
        return answer.tokens, await record_of(self._decode, transfer, "consumer")


def test_a_hand_over_goes_by_the_content_that_each_side_has_loaded(
    pair: tuple[Server, Server], with_client: Any, tmp_path: Path
) -> None:
    """Other bytes under one name, id and path are refused by the adapter's name, and decode's answer is its own; the
    same bytes are handed over from wherever they come, and at once after they were replaced in place."""
    prefill, decode = pair
    prompts = [Prompts(11).one(tokens) for tokens in (70, 150, 300)]
    path = write_adapter(tmp_path / "adapter", 1)

    async def scenario(client: Client) -> None:
        asked = Asked(client, pair)
        await load(client, prefill, "x", path)
        write_adapter(path, 2)  # decode gets the new bytes
        await load(client, decode, "x", path)
        answers = [await asked.own(prompt, "x") for prompt in prompts]
        old = []
        for prompt, own in zip(prompts, answers, strict=True):
            tokens, record = await asked.handed(prompt, "x", "x")
            assert tokens == own
            assert record["code"] == "mismatch", record
            assert "LoRA adapter 'x'" in record["reason"], record
            old.append((await client.complete(prefill, prompt, ANSWER, model="x")).tokens)
        assert old != answers  # which is what they would have been

        async def crosses(there: str, here: str) -> None:
            await forget(client, decode)
            for prompt, own in zip(prompts, answers, strict=True):
                tokens, record = await asked.handed(prompt, there, here)
                assert tokens == own, (there, here)
                assert (record["state"], record["code"]) == ("ready", ""), (there, here, record)

        elsewhere = write_adapter(tmp_path / "elsewhere" / "copy", 2)
        await load(client, prefill, "y", elsewhere)
        await crosses("y", "x")
        write_adapter(elsewhere, 1)  # and nobody loads it
        await crosses("y", "x")
        # Prefill's prefix cache is full of what "x" was: none of it may be handed over, nor stand in the way.
        await load(client, prefill, "x", path, load_inplace=True)
        await crosses("x", "x")
        write_adapter(path, 1)
        await unload(client, prefill, "x")
        await load(client, prefill, "x", path)
        await forget(client, decode)
        tokens, record = await asked.handed(prompts[0], "x", "x")
        assert tokens == answers[0]
        assert "LoRA adapter 'x'" in record["reason"], record
        tokens, record = await asked.handed(prompts[0], "y", "tiny-lm")  # decode computes without an adapter
        assert tokens == await asked.own(prompts[0], "tiny-lm")
        assert record["code"] == "mismatch", record

    with_client(scenario)


def test_the_pool_finds_a_prompt_by_its_adapters_content(
    pair: tuple[Server, Server], with_client: Any, tmp_path: Path
) -> None:
    """Stored under one name, found under another with the same bytes, and not with other bytes."""
    prefill, _ = pair
    prompt = Prompts(12).one(300)
    write_adapter(tmp_path / "one", 5)
    write_adapter(tmp_path / "same", 5)
    write_adapter(tmp_path / "other", 6)

    async def scenario(client: Client) -> None:
        answers, loaded = {}, {}
        for name in ("one", "same", "other"):
            await load(client, prefill, name, tmp_path / name)
            await client.complete(prefill, Prompts(13).one(20), 1, model=name)  # from here on workers have told of it
        for name in ("one", "same", "other"):
            before = await watch.engine_state(client, prefill)
            answers[name] = (await client.complete(prefill, prompt, ANSWER, model=name)).tokens
            loaded[name] = (await watch.engine_state(client, prefill)).external_tokens - before.external_tokens
            await watch.settled(client, [prefill])
            await forget(client, prefill)
        assert loaded["one"] == loaded["other"] == 0
        assert loaded["same"] > 0
        assert answers["one"] == answers["same"] != answers["other"]

    with_client(scenario)
