"""One request to a pair of servers, and the same request to each of them alone."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any

from tests.identity.world import Instance
from tests.rig import watch
from tests.rig.client import Answer, Client, Order, RequestFailed, new_transfer, prepare, to_decode, to_prefill
from tests.rig.pooled import counters, rested
from tests.rig.proof import record_of
from tests.rig.servers import MODEL_NAME

TOKENS = 4  # of an answer
SURE = 0.02  # nats above the runner-up that make a token comparable: cases.MARGIN in single precision
SAME = 0.005  # nats: margins of equal computations differ by less, those of others hardly ever


@dataclass(frozen=True)
class Asked:
    """What one side is asked: an adapter's name ("": the base model) and the tenant's salt."""

    adapter: str
    salt: str

    def body(self) -> dict[str, Any]:
        return {"model": self.adapter or MODEL_NAME, "cache_salt": self.salt, "logprobs": 2}


@dataclass
class Told:
    """How a request ended.

    Args:
        handed: decode used KV that prefill had sent.
        used: prompt tokens that came from prefill, by vLLM's own count.
    """

    answer: Answer
    handed: bool
    used: int
    code: str
    reason: str
    path: str = ""


async def by_client(
    client: Client, prefill: Instance, decode: Instance, prompt: list[int], asked: tuple[Asked, Asked], order: Order
) -> Told:
    """The request as a router sends it, in either order; each side may be asked under names of its own.

    Raises:
        RequestFailed: decode did not answer.
    """
    transfer = new_transfer()
    before = await watch.engine_state(client, decode.server)
    first = prepare(prefill.server, prompt, 1, to_prefill(prefill.server, transfer), **asked[0].body())
    params: dict[str, Any] | None = to_decode(prefill.server, transfer)
    if order == "serial":
        params = (await client.send(first)).kv_params
        answer = await client.complete(decode.server, prompt, TOKENS, params, **asked[1].body())
    else:
        second = prepare(decode.server, prompt, TOKENS, params, **asked[1].body())
        tasks = [asyncio.create_task(client.send(request)) for request in (first, second)]
        try:
            answer = await tasks[1]
            (outcome,) = await asyncio.gather(tasks[0], return_exceptions=True)
        finally:
            for task in tasks:
                task.cancel()
        if isinstance(outcome, BaseException) and not isinstance(outcome, RequestFailed):
            raise outcome
    return await _told(client, decode, prefill, transfer, answer, before)


async def by_router(
    client: Client, url: str, prefill: Instance, decode: Instance, prompt: list[int], asked: Asked
) -> Told:
    """
    Raises:
        RequestFailed: the router did not answer with 200.
    """
    before = await watch.engine_state(client, decode.server)
    answer = await client.complete(url, prompt, TOKENS, **asked.body())
    transfer = answer.headers.get("x-pd-transfer-id", "")
    told = await _told(client, decode, prefill, transfer, answer, before)
    told.path = answer.headers.get("x-pd-path", "")
    return told


async def by_pool(
    client: Client, prefill: Instance, decode: Instance, prompt: list[int], asked: tuple[Asked, Asked]
) -> Told:
    """One server computes the prompt and stores it in the pool that both have; then the other one is asked.

    Raises:
        RequestFailed: one did not answer.
    """
    for instance, side in zip((prefill, decode), asked, strict=True):
        if side.adapter:  # which content it has is known from its first step on; until then the pool is not used
            await alone(client, instance, prompt[:2], side.adapter)
    await client.complete(prefill.server, prompt, 1, **asked[0].body())
    await rested(client, prefill.server)
    before, found = await watch.engine_state(client, decode.server), await counters(client, decode.server)
    answer = await client.complete(decode.server, prompt, TOKENS, **asked[1].body())
    after, now = await watch.engine_state(client, decode.server), await counters(client, decode.server)
    now.subtract(found)
    used = int(after.external_tokens - before.external_tokens)
    return Told(answer, now["hit"] > 0, used, "", f"chunks in the pool: {dict(+now)}")


async def alone(client: Client, instance: Instance, prompt: list[int], adapter: str) -> Answer:
    """The instance's own answer, of which nothing was computed before: its salt is nobody else's."""
    return await client.complete(
        instance.server, prompt, TOKENS, **Asked(adapter, f"alone-{secrets.token_hex(8)}").body()
    )


async def _told(
    client: Client, decode: Instance, prefill: Instance, transfer: str, answer: Answer, before: watch.EngineState
) -> Told:
    after = await watch.engine_state(client, decode.server)
    used = int(after.external_tokens - before.external_tokens)
    record = await record_of(decode.server, transfer, "consumer")
    handed = record.get("state") == "ready" and not record.get("code")
    code, reason = record.get("code", ""), record.get("reason", "")
    if not handed and not reason:
        other = await record_of(prefill.server, transfer, "producer")
        code, reason = code or other.get("code", ""), other.get("reason", "")
    return Told(answer, handed, used, code, reason)


def same(one: Answer, other: Answer) -> bool:
    """Two answers are of the same computation: the same tokens, each by the same margin over the runner-up."""
    return distance(one, other) <= SAME


def distance(one: Answer, other: Answer) -> float:
    """Nats by which the margins of two answers differ at most, up to the first token that differs: infinite where the
    second answer was sure of that one."""
    most = 0.0
    for mine, theirs, margin, its in zip(one.tokens, other.tokens, one.margins, other.margins, strict=True):
        if mine != theirs:
            return float("inf") if its >= SURE else most
        most = max(most, abs(margin - its))
    return most
