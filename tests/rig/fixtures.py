"""What the vLLM tests agree on: servers' settings, prompts with known answers, steps that several of them take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.rig.answers import Answers
from tests.rig.cases import BLOCK, LONGEST, MARGIN_TP, SURE_OF_HALF, Case, assorted, best_of, cases
from tests.rig.client import Client
from tests.rig.device import DTYPES, PLACE, seated
from tests.rig.prompts import Prompts
from tests.rig.servers import KVRole, Server, ServerSpec

SEED = 20
ASSORTED = 200
CACHE_BYTES = 65_536 * 2048 * DTYPES[PLACE.dtype]  # eight of the longest prompts of tiny-lm
DEADLINES = {"arrival_s": 10.0, "hold_s": 10.0}  # shorter than the defaults, so that tests need not wait for these
FAMILY_PREFIX = 640  # whole blocks of 16 and of 32
LONG_ANSWER = 96
LONG_ANSWER_LEAST = 32
PLAIN_CHUNK = 2048
SPARING, FORKING = (
    None if PLACE.gpu else Path(__file__).parent / "fork_server" / name for name in ("server.py", "forking.py")
)


@dataclass(frozen=True)
class Servers:
    """``prefills`` hand over to ``decode``; ``audit`` is the directory of their audit files."""

    prefill: Server
    other_prefill: Server
    decode: Server
    audit: Path

    @property
    def all(self) -> list[Server]:
        return [self.prefill, self.other_prefill, self.decode]


@dataclass(frozen=True)
class Book:
    """Prompts with known answers.

    Args:
        assorted: of all sizes.
        parallel: of up to half the longest size, and sure enough for other tensor-parallel sizes.
        family: share their first ``FAMILY_PREFIX`` tokens, no more; the first one is hardly longer.
        long: short prompts with long answers.
        spare: of medium size, for tests that want to see that servers still serve; not in ``assorted``.
        altered: case -> answers to the same prompt with one block of it replaced.
    """

    assorted: list[Case]
    parallel: list[Case]
    family: list[Case]
    long: list[Case]
    spare: list[Case]
    altered: list[tuple[Case, list[tuple[int, ...]]]]

    def describe(self) -> str:
        tokens = sum(len(case.prompt) for case in self.assorted)
        compared = sum(len(case.tokens) for case in self.assorted)
        return (
            f"{len(self.assorted)} assorted prompts of {tokens} tokens, {compared} answer tokens to compare; "
            f"{len(self.parallel)} for TP, {len(self.family)} with a shared prefix, {len(self.long)} with long answers"
        )


def plain_spec() -> ServerSpec:
    """The server whose answers are compared with. On the CPU its chunks are large: it computes prompts for a third less
    processor time, and the margins of ``tests.rig.cases`` cover that."""
    chunk = ServerSpec.max_batched_tokens if PLACE.gpu else PLAIN_CHUNK
    return ServerSpec("plain", kv_cache_bytes=CACHE_BYTES, max_batched_tokens=chunk, script=SPARING)


def pair_spec(name: str, role: KVRole, audit: Path | None = None, **more: Any) -> ServerSpec:
    """A pdtransport server. vLLM's dev mode lets tests empty its prefix cache."""
    extra: dict[str, Any] = {
        "deadlines": DEADLINES,
        "observe": {"recent_transfers": 512},
        "control": {"liveness_s": 5.0},  # three servers on two cores may hold a thread up for longer than the default
    }
    if audit is not None:
        extra["observe"]["audit_dir"] = str(audit)
    env = {"VLLM_SERVER_DEV_MODE": "1"}
    return ServerSpec(
        name,
        connector="pdtransport",
        kv_role=role,
        extra_config=extra,
        env=env,
        script=FORKING,
        **{"kv_cache_bytes": CACHE_BYTES, **more},
    )


TINY_TOKENS = 1280  # all that the tiny server's cache holds
TINY_LEN = 1024
TINY_CHUNK = 64  # many steps a prompt: many moments to be preempted at


def tiny_spec(audit: Path) -> ServerSpec:
    """A server of both roles whose cache is too small for what it is asked."""
    return pair_spec(
        "tiny",
        "kv_both",
        audit,
        cores="0",
        blocks=TINY_TOKENS // BLOCK,
        max_model_len=TINY_LEN,
        max_batched_tokens=TINY_CHUNK,
        load_failure_policy="recompute",
        cards=seated(PLACE.cards, 1),
    )


def doomed_spec(audit: Path) -> ServerSpec:
    """A prefill server that a test will kill."""
    return pair_spec("doomed", "kv_both", audit, cores="0", load_failure_policy="fail")


async def make_book(answers: Answers) -> Book:
    """Raises AssertionError if the plain server is sure of too few prompts for a meaningful test."""
    everything = await assorted(answers, SEED)
    assert len(everything) >= ASSORTED, f"the plain server is sure of {len(everything)} prompts only"
    prompts = Prompts(SEED + 1)
    base = prompts.one(FAMILY_PREFIX)
    tails = [[[*base, *prompts.one(n)[1:]] for _ in range(6 if SURE_OF_HALF else 1)] for n in (2, 33, 90, 257, 520)]
    lengthy = [prompts.one(prompts.below(100, 200)) for _ in range(60 if SURE_OF_HALF else 16)]
    return Book(
        assorted=everything,
        parallel=[case for case in await assorted(answers, SEED, margin=MARGIN_TP) if len(case.prompt) <= LONGEST // 2],
        family=await best_of(answers, tails),
        long=await cases(answers, lengthy, least=LONG_ANSWER_LEAST, longest=LONG_ANSWER),
        spare=await cases(answers, [prompts.one(prompts.below(100, 400)) for _ in range(60)], least=3),
        altered=await _altered(answers, everything, prompts),
    )


async def _altered(
    answers: Answers, everything: Sequence[Case], prompts: Prompts
) -> list[tuple[Case, list[tuple[int, ...]]]]:
    """Answers to prompts of which the first, a middle or the last whole block is other text."""
    chosen = [case for case in everything if 3 * BLOCK < len(case.prompt) <= 700 and len(case.tokens) >= 4][:24]
    found = []
    for case in chosen:
        last = len(case.prompt) // BLOCK - 1
        variants = []
        for block in (0, last // 2, last):
            other = list(case.prompt)
            start = max(1, block * BLOCK)  # BOS stays
            other[start : (block + 1) * BLOCK] = prompts.one(1000)[-((block + 1) * BLOCK - start) :]
            variants.append(other)
        known = await answers.learn(variants, len(case.tokens))
        found.append((case, [tuple(answer.tokens) for answer in known]))
    return found


async def forget(client: Client, *servers: Server) -> None:
    """Empty the prefix caches of servers."""
    for server in servers:
        async with client.post(f"{server.url}/reset_prefix_cache", {}):
            pass
