"""What `benchmarks.handoff` measures: the systems, and how one request of each is timed."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import aiohttp

from tests.rig import watch
from tests.rig.client import Client, Handed, Order, RequestFailed, hand_off
from tests.rig.prompts import BOS, Prompts, tokenizer
from tests.rig.servers import Server, ServerSpec

MAX_TOKENS = 4
WARM_LENGTHS = (64, 512, 64, 512)
IDLE_S = 1.2  # vLLM's workers spin for a second after their last step: let them fall asleep before "idle" is measured
STATUS_LATER_S = 0.05  # the ack may follow the first token

Dispatch = Literal["concurrent", "serial", "both"]


@dataclass(frozen=True)
class System:
    """Servers side by side. With two, the first prefills and the second decodes."""

    name: str
    specs: tuple[ServerSpec, ...]

    @property
    def connector(self) -> str:
        return self.specs[0].connector


def _spec(name: str, cores: str, **more: Any) -> ServerSpec:
    return ServerSpec(name, cores=cores, max_batched_tokens=None, max_num_seqs=8, **more)


SYSTEMS = {
    "aggregated": System("aggregated", (_spec("aggregated", "0"),)),
    "aggregated+idle": System("aggregated+idle", (_spec("aggregated", "0"), _spec("idle", "1"))),
    "nixl": System(
        "nixl",
        (
            _spec("nixl-p", "0", connector="nixl", kv_role="kv_both"),
            _spec("nixl-d", "1", connector="nixl", kv_role="kv_both"),
        ),
    ),
    "pdtransport": System(
        "pdtransport",
        (
            _spec("pdt-p", "0", connector="pdtransport", kv_role="kv_producer"),
            _spec("pdt-d", "1", connector="pdtransport", kv_role="kv_consumer"),
        ),
    ),
}


@dataclass
class Sample:
    """One request. Seconds; ``prefill_s`` and ``handoff_s`` are None for aggregated servers. ``decode_cpu`` and
    ``foreign_cpu`` are processor time over wall time: of the decode server, and of what is not ours. ``stages`` holds
    the breakdown of a pdtransport hand-off."""

    system: str
    length: int
    ttft_s: float | None
    prefill_s: float | None = None
    handoff_s: float | None = None
    decode_cpu: float | None = None
    foreign_cpu: float = 0.0
    failed: str = ""
    stages: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cold_prompt(length: int, seed: str) -> list[int]:
    """Real text behind a nonce, so that no prefix of it is cached anywhere."""
    dice = random.Random(seed)
    nonce = [dice.randrange(300, tokenizer().get_vocab_size()) for _ in range(min(8, length - 1))]
    text = Prompts(dice.randrange(1 << 32)).one(length - len(nonce))
    return [BOS, *nonce, *text[1:]]


async def measure(
    system: System, servers: Sequence[Server], lengths: Sequence[int], runs: int, dispatch: Dispatch, seed: int
) -> list[Sample]:
    samples = []
    orders: list[Order] = ["concurrent", "serial"] if dispatch == "both" else [dispatch]
    if system.connector != "pdtransport":
        orders = ["serial"]
    async with Client() as client:
        for index, length in enumerate(WARM_LENGTHS):
            for order in orders:
                prompt = cold_prompt(length, f"warm {seed} {index} {order} {time.time_ns()}")
                await _warm(client, system, servers, prompt, order)
        for run in range(runs):
            for length in lengths:
                for order in orders:
                    # time_ns: a server that lives through two seeds alike must not have seen the prompt
                    prompt = cold_prompt(length, f"{seed} {run} {length} {order} {time.time_ns()}")
                    time.sleep(IDLE_S)
                    samples.append(await _watched(client, system, servers, prompt, order))
    return samples


async def _watched(
    client: Client, system: System, servers: Sequence[Server], prompt: Sequence[int], order: Order
) -> Sample:
    """A sample that knows how busy others kept the machine meanwhile; one without figures if the request failed."""
    ours = [os.getpid(), *(pid for server in servers for pid in server.members())]
    started, machine, own = time.monotonic(), watch.machine_busy_seconds(), watch.cpu_seconds(ours)
    try:
        sample = await _one(client, system, servers, prompt, order)
    except (RequestFailed, aiohttp.ClientError) as error:
        sample = Sample(_row(system, order), len(prompt), ttft_s=None, failed=str(error))
    foreign = watch.machine_busy_seconds() - machine - (watch.cpu_seconds(ours) - own)
    sample.foreign_cpu = max(0.0, foreign) / (time.monotonic() - started)
    return sample


async def _warm(client: Client, system: System, servers: Sequence[Server], prompt: Sequence[int], order: Order) -> None:
    """A request that is not measured; the first one of a pair sets up its connection, and may fail."""
    try:
        await _one(client, system, servers, prompt, order)
    except (RequestFailed, aiohttp.ClientError) as error:
        print(f"{system.name}: warming up failed: {error}", file=sys.stderr)


def _row(system: System, order: Order) -> str:
    return f"{system.name} {order}" if system.connector == "pdtransport" else system.name


async def _one(
    client: Client, system: System, servers: Sequence[Server], prompt: Sequence[int], order: Order
) -> Sample:
    if system.connector == "none":
        answer = await client.complete(servers[0], prompt, MAX_TOKENS, stream=True)
        return Sample(system.name, len(prompt), answer.ttft_s)
    prefill, decode = servers
    pids = decode.members()
    cpu_before = watch.cpu_seconds(pids)
    handed = await hand_off(client, prefill, decode, prompt, MAX_TOKENS, order, stream=True)
    cpu = watch.cpu_seconds(pids) - cpu_before
    if handed.prefill is None:
        raise RuntimeError(f"prefill failed: {handed.prefill_error}")
    sent = min(handed.prefill.sent, handed.decode.sent)
    sample = Sample(
        _row(system, order),
        len(prompt),
        ttft_s=handed.decode.first_token - sent,
        prefill_s=handed.prefill.done - handed.prefill.sent,
        handoff_s=handed.decode.first_token - handed.prefill.done,
        decode_cpu=cpu / (handed.decode.done - sent),
    )
    if system.connector == "pdtransport":
        sample.stages = await _stages(handed, prefill, decode)
    return sample


async def _stages(handed: Handed, prefill: Server, decode: Server) -> dict[str, float]:
    """Seconds of each stage of a hand-off.

    Raises:
        RuntimeError: the request was not disaggregated, so its figures would mean nothing.
    """
    time.sleep(STATUS_LATER_S)
    source = _record(await watch.status(prefill, handed.transfer), "producer", handed)
    sink = _record(await watch.status(decode, handed.transfer), "consumer", handed)
    assert handed.prefill is not None
    opened, verified = source["events"]["opened"], sink["events"]["verified"]
    return {
        "P start": opened - handed.prefill.sent,
        "compute": handed.prefill.done - opened,
        "tail": verified - handed.prefill.done,
        "D step": handed.decode.first_token - verified,
        "hand-off": handed.decode.first_token - handed.prefill.done,
    }


def _record(replies: list[dict[str, Any]], role: str, handed: Handed) -> dict[str, Any]:
    for reply in replies:
        for record in reply["transfers"]:
            if record["transfer"] == handed.transfer and record["role"] == role and not record["code"]:
                return dict(record)
    raise RuntimeError(f"transfer {handed.transfer} did not go well on the {role}'s side: {replies}")
