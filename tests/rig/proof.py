"""Proof that requests were disaggregated: what the workers and vLLM itself say of each of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.rig import audit, watch
from tests.rig.cases import Case, WrongAnswer
from tests.rig.client import Client, Handed
from tests.rig.device import DTYPES
from tests.rig.servers import Server

KV_ELEMENTS_PER_TOKEN = 2048  # tiny-lm: 8 layers x (key, value) x 4 heads x 32
KV_HEADS = 4
ACK_S = 10.0  # prefill hears of the last page's arrival a moment after the client got its answer
END_S = 10.0  # where decode had every page itself, its answer does not wait for the transfer's end


@dataclass(frozen=True)
class Crossing:
    """What of one request crossed, as decode's workers tell it."""

    case: Case
    handed: Handed
    skipped: int
    blocks: int
    nbytes: int


async def crossed(
    case_list: Sequence[Case], handed: Sequence[Handed], prefills: Sequence[Server], decode: Server
) -> list[Crossing]:
    """How each request's pages crossed, in order.

    Raises:
        AssertionError: one was not handed over completely: decode must have computed some of it again.
    """
    sinks = await _ended([decode], "consumer", {done.transfer for done in handed})
    found = []
    for case, done in zip(case_list, handed, strict=True):
        records = sinks.get(done.transfer, [])
        what = f"transfer {done.transfer} of {len(case.prompt)} tokens"
        assert len(records) == decode.spec.tp, f"{what}: decode's workers know {len(records)} of {decode.spec.tp}"
        bad = [record for record in records if record["state"] != "ready" or record["code"]]
        assert not bad, f"{what}: {bad}"
        skipped, blocks = {r["skipped_blocks"] for r in records}, {r["blocks"] for r in records}
        assert len(skipped) == len(blocks) == 1, f"{what}: decode's ranks disagree: {records}"
        crossing = Crossing(case, done, skipped.pop(), blocks.pop(), sum(r["bytes"] for r in records))
        assert crossing.skipped + crossing.blocks == case.blocks, f"{what}: {crossing}"
        block_bytes = decode.spec.block_size * KV_ELEMENTS_PER_TOKEN * DTYPES[decode.spec.dtype]
        assert crossing.nbytes == crossing.blocks * block_bytes, f"{what}: {crossing.nbytes} bytes crossed"
        found.append(crossing)
    await _delivered(found, prefills)
    return found


async def _delivered(crossings: Sequence[Crossing], prefills: Sequence[Server]) -> None:
    """Prefill agrees that it delivered each of them."""

    async def complaint() -> str:
        sources = await _records(prefills, "producer")
        for crossing in crossings:
            records = sources.get(crossing.handed.transfer, [])
            if not records:
                return f"prefill does not know {crossing.handed.transfer}"
            # A request that was cancelled after decode had acknowledged everything (the router does that where decode
            # was quicker to answer) was delivered all the same.
            bad = [r for r in records if (r["state"] != "delivered" or r["code"]) and "acked" not in r["events"]]
            if bad:
                return f"prefill did not deliver {bad[0]}"
        return ""

    await watch.until("all delivered", complaint, ACK_S)


async def _records(servers: Sequence[Server], role: str) -> dict[str, list[dict[str, Any]]]:
    """Transfer id to its records, one of each worker that knows it."""
    known: dict[str, list[dict[str, Any]]] = {}
    for server in servers:
        for reply in await watch.status(server):
            for record in reply["transfers"]:
                if record["role"] == role:
                    known.setdefault(record["transfer"], []).append(record)
    return known


async def _ended(servers: Sequence[Server], role: str, transfers: Set[str]) -> dict[str, list[dict[str, Any]]]:
    """``_records`` once none of ``transfers`` is open, or as they are after ``END_S``."""
    deadline = time.monotonic() + END_S
    while True:
        known = await _records(servers, role)
        is_open = any(record["state"] == "open" for transfer in transfers for record in known.get(transfer, ()))
        if not is_open or time.monotonic() > deadline:
            return known
        await asyncio.sleep(0.05)


async def record_of(server: Server, transfer: str, role: str) -> dict[str, Any]:
    """Rank 0's record of a transfer, once it has ended or after ``END_S``; {} if it has none."""
    records = (await _ended([server], role, {transfer})).get(transfer, [])
    return records[0] if records else {}


def bytes_equal(crossings: Sequence[Crossing], directory: Path) -> int:
    """How many blocks were compared: every page arrived with the bytes that prefill had.

    Raises:
        WrongAnswer: one did not.
    """
    expected = {c.handed.transfer: audit.Expected(c.skipped, c.case.blocks, KV_HEADS) for c in crossings}
    found = audit.problems(directory, expected)
    if found:
        raise WrongAnswer(f"{len(found)} problems with the pages' bytes: {found[:5]}")
    return sum(c.blocks for c in crossings)


class Recomputed:
    """Counts, by vLLM's own metrics, the prompt tokens that a server computes itself between ``begin`` and ``end``."""

    def __init__(self, client: Client, server: Server) -> None:
        self._client = client
        self._server = server
        self._before: watch.EngineState | None = None

    async def begin(self) -> None:
        self._before = await watch.engine_state(self._client, self._server)

    async def end(self) -> tuple[int, int]:
        """Prompt tokens computed here, and prompt tokens that came from prefill."""
        assert self._before is not None, "begin() first"
        now = await watch.engine_state(self._client, self._server)
        computed = now.computed_tokens - self._before.computed_tokens
        return int(computed), int(now.external_tokens - self._before.external_tokens)
