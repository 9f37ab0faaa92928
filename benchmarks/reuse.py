"""Time to first token with and without the shared pool: ``python -m benchmarks.reuse [--quick] [--json FILE]``.

Two workloads on one vLLM server (tiny-lm on one core, blocks of 128 tokens, vLLM's default steps), one request at a
time. The server's own cache holds 10,240 tokens, so that it has evicted nearly all of a prompt when this comes again:

documents   ``--documents`` of 4,000 tokens (default 20), each asked one question, and when all were asked, another one
chat        ``--users`` (12) who take turns for ``--rounds`` (6): what was said before, the answer (32 tokens) and 200
            tokens more; the first prompt has 1,500 tokens

Systems, each a server started afresh:

no pool     a plain server
memory      a pool that keeps all chunks in memory
disk        one whose memory is small and whose chunks come from disk (round the page cache where that is possible)
redis       the same with a redis-server on this host

Columns: TTFT in milliseconds as the client sees it, of prompts that come for the first time and of those that come
again (``again``); where the latters' tokens came from, in percent: the engine's own cache, the pool. ``again / first``
is what the pool gains; ``first / no pool`` what a miss costs (the lookup, and storing beside computing).

``--resume FILE`` takes over the samples of earlier runs' JSON, so that systems can be measured one by one. What the
systems need is looked at first; a system that fails is left out, and so is what Ctrl-C leaves undone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._figures import FAILED, keep, measuring, say
from benchmarks._handoff_report import markdown
from benchmarks._needs import LACKING, tell_lacking
from benchmarks._reuse_systems import SYSTEMS, NoSuchSystem, needs_of, running
from benchmarks.handoff import machine, names
from tests.rig import watch
from tests.rig.client import Client
from tests.rig.prompts import Prompts
from tests.rig.servers import Server, ServerFailed

DOCUMENT = 4000  # tokens
QUESTION = 32
OPENING, TURN = 1500, 200
ANSWERS = {"documents": 4, "chat": 32}
WARM_UP = 1  # documents
QUICK = {"documents": 4, "users": 8, "rounds": 2, "runs": 1}  # still more than the server's cache holds


@dataclass(frozen=True)
class Sample:
    """One request. ``again``: its prompt, or most of it, came before."""

    system: str
    workload: str
    again: bool
    tokens: int
    ttft_ms: float


@dataclass(frozen=True)
class Phase:
    """Where the prompt tokens of several requests came from."""

    system: str
    workload: str
    again: bool
    computed: float
    engine: float
    pool: float


async def phase(
    client: Client, server: Server, system: str, workload: str, again: bool, prompts: Iterable[list[int]]
) -> tuple[list[Sample], Phase, list[list[int]]]:
    """Ask one after another; also what was answered."""
    before = await watch.refresh(client, server)
    samples, answers = [], []
    for prompt in prompts:
        answer = await client.complete(server, prompt, ANSWERS[workload], stream=True)
        samples.append(Sample(system, workload, again, len(prompt), 1000 * answer.ttft_s))
        answers.append(answer.tokens)
    after = await watch.refresh(client, server)
    sources = ("computed_tokens", "local_hit_tokens", "external_tokens")
    grown = [getattr(after, name) - getattr(before, name) for name in sources]
    return samples, Phase(system, workload, again, *grown), answers


async def measure(system: str, server: Server, options: argparse.Namespace, run: int) -> tuple[list[Any], list[Any]]:
    """The samples of one server, and its phases."""
    stream = Prompts(options.seed * 1000 + run)  # the same prompts for all systems
    samples: list[Sample] = []
    phases: list[Phase] = []

    async def ask(workload: str, again: bool, prompts: list[list[int]]) -> list[list[int]]:
        fresh, told, answers = await phase(client, server, system, workload, again, prompts)
        samples.extend(fresh)
        phases.append(told)
        return answers

    async with Client() as client:
        for prompt in stream.many([DOCUMENT] * WARM_UP):
            await client.complete(server, prompt, ANSWERS["documents"], stream=True)
        documents = stream.many([DOCUMENT - QUESTION] * options.documents)
        for again in (False, True):
            await ask("documents", again, [[*document, *stream.one(QUESTION)[:QUESTION]] for document in documents])
        talks = stream.many([OPENING] * options.users)
        for turn in range(options.rounds):
            answers = await ask("chat", turn > 0, talks)
            talks = [[*talk, *answer, *stream.one(TURN + 1)[1:]] for talk, answer in zip(talks, answers, strict=True)]
    return samples, phases


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summarise(samples: Sequence[Sample], phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """A row for each workload and system."""
    rows = []
    for workload in ANSWERS:
        plain = [s.ttft_ms for s in samples if (s.system, s.workload, s.again) == ("no pool", workload, False)]
        for system in SYSTEMS:
            mine = [s for s in samples if (s.system, s.workload) == (system, workload)]
            first, again = ([s.ttft_ms for s in mine if s.again is which] for which in (False, True))
            if not first or not again:
                continue
            told = [p for p in phases if (p.system, p.workload, p.again) == (system, workload, True)]
            asked = sum(p.computed + p.engine + p.pool for p in told)
            rows.append(
                {
                    "workload": workload,
                    "system": system,
                    "requests": f"{len(first)} + {len(again)}",
                    "first p50": round(median(first), 1),
                    "first p99": round(quantile(first, 0.99), 1),
                    "again p50": round(median(again), 1),
                    "again p99": round(quantile(again, 0.99), 1),
                    "engine %": round(100 * sum(p.engine for p in told) / asked, 1),
                    "pool %": round(100 * sum(p.pool for p in told) / asked, 1),
                    "again / first": round(median(again) / median(first), 3) if workload == "documents" else None,
                    "first / no pool": round(median(first) / median(plain), 3)
                    if plain and system != "no pool"
                    else None,
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = list(rows[0])
    return markdown(head, [["" if row[name] is None else str(row[name]) for name in head] for row in rows])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reuse", description=str(__doc__).splitlines()[0])
    shorter = ", ".join(f"--{name} {value}" for name, value in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"under 5 minutes: {shorter}")
    parser.add_argument("--systems", type=names, default=list(SYSTEMS), help=f"of {', '.join(SYSTEMS)}; default all")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=6, help="turns of each user")
    parser.add_argument("--runs", type=int, default=1, help="times that each system is started, in turn; default 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--disk", type=Path, default=Path(), help="folder for the pool's disk; default: the current one"
    )
    parser.add_argument("--resume", type=Path, nargs="+", default=[], help="take over the samples of these JSON files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK)
    if min(options.documents, options.users, options.runs) < 1 or options.rounds < 2:
        parser.error("--documents, --users and --runs are at least 1, --rounds 2")
    unknown = sorted(set(options.systems) - set(SYSTEMS))
    if unknown:
        parser.error(f"--systems: unknown {', '.join(unknown)}; known are {', '.join(SYSTEMS)}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    if tell_lacking("benchmarks.reuse", needs_of(options.systems, options.disk.absolute())):
        return LACKING
    before, samples, phases = machine(), [], []
    for file in options.resume:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        samples += [Sample(**sample) for sample in earlier["samples"]]
        phases += [Phase(**each) for each in earlier["phases"]]
    failed: list[str] = []
    with measuring() as ending:
        for run in range(options.runs):
            for system in options.systems:
                say(f"run {run + 1} of {options.runs}: {system}")
                try:
                    with running(system, options.disk.absolute()) as server:
                        fresh, told = asyncio.run(measure(system, server, options, run))
                except (ServerFailed, NoSuchSystem) as error:
                    say(f"{system}: {error}")
                    failed.append(system)
                    continue
                samples += fresh
                phases += told
                keep(options.json, document(before, samples, phases))
    rows = summarise(samples, phases)
    if not rows:
        say("no system was measured")
        return ending.status or FAILED
    print(f"{before['cpu']}, {before['cores']} cores, {before['dtype']}, load {before['load_average'][0]:.1f} at first")
    print(table(rows))
    if failed:
        say(f"failed: {', '.join(failed)}")
    return ending.status or (FAILED if failed else 0)


def document(before: dict[str, Any], samples: Sequence[Sample], phases: Sequence[Phase]) -> str:
    """All figures so far, as JSON."""
    told: dict[str, Any] = {"machine": before, "after": machine()["load_average"], "rows": summarise(samples, phases)}
    told["samples"] = [asdict(sample) for sample in samples]
    told["phases"] = [asdict(each) for each in phases]
    return json.dumps(told, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main())
