"""``python -m tests.faults --runs 5000``: faults in real processes; ``--seed N`` replays one run.

Each run takes worker processes (one or two that prefill, one that decodes) with real sockets and links through several
transfers while something goes wrong, and checks the promises. ``--rig vllm`` does the same with real vLLM servers
behind the router: requests, and tokens that must be a plain server's. A failing seed is printed with the command that
replays it: the same transfers and faults in fresh processes, though not the machine's own scheduling.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from pathlib import Path

from tests.faults.network import CASES, NoNamespaces
from tests.faults.page import write
from tests.faults.plan import Plan
from tests.faults.report import Report
from tests.faults.runner import pool_plans, random_plans, run_network, run_plans
from tests.faults.steps import STEPS, step_plan, step_plans
from tests.faults.vllm_plan import round_of
from tests.faults.vllm_rig import run_vllm


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rig", choices=["engine-free", "vllm", "pool"], default="engine-free")
    parser.add_argument("--runs", type=int, default=200, help="random runs; of vllm: rounds of some requests")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--kills", type=int, default=0, help="times that each side is killed at each protocol step")
    parser.add_argument("--links", default="cma,ucx", help="links to run over, by their names in settings")
    parser.add_argument("--lanes", dest="harnesses", type=int, default=8, help="sets of processes that work at a time")
    parser.add_argument("--seconds", type=float, default=0, help="start no run after so long; 0: start all")
    parser.add_argument("--write", type=Path, help="write the matrix to this file")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores, {platform.system()}", help="for the matrix")
    parser.add_argument("--network", type=int, default=0, help="times that each case of the network is run")
    parser.add_argument("--case", choices=list(CASES), help="of the network: this one only")
    parser.add_argument("--results", type=Path, help="add the results to this file; the matrix then shows all of it")
    parser.add_argument("--note", default="", help="what is known about the failures, for the matrix")
    vllm = parser.add_argument_group("the rig vllm, to which --runs, --start, --seed, --write and --results apply, too")
    vllm.add_argument("--kill-every", type=int, default=50, help="every so many-th seed kills a server; 0: none")
    vllm.add_argument("--router-every", type=int, default=0, help="every so many-th seed strikes the router; 0: none")
    vllm.add_argument(
        "--policy", choices=["fail", "recompute"], default="fail", help="kv_load_failure_policy of decode"
    )
    vllm.add_argument(
        "--disconnects", type=int, default=0, help="instead: so many requests, 30%% of whose clients leave"
    )
    vllm.add_argument(
        "--beside-plain", action="store_true", help="with --disconnects: a plain server with half of the prompts, too"
    )
    one = parser.add_argument_group("replay one run")
    one.add_argument("--seed", type=int, help="this random one")
    one.add_argument("--step", choices=list(STEPS), help="this protocol step")
    one.add_argument("--side", choices=["prefill", "decode"], default="prefill")
    one.add_argument("--action", choices=["kill", "stop"], default="kill")
    one.add_argument("--halt", type=float, default=0.0, help="seconds that a stopped process stands still")
    one.add_argument("--number", type=int, default=0)
    args = parser.parse_args()
    links = args.links.split(",")
    real = args.rig == "vllm"
    plans = [] if real else plans_of(args, links)
    if len(plans) == 1:
        print(plans[0])
    began = time.monotonic()
    report = Report(links, commands=[shlex.join(["python", "-m", "tests.faults", *said(sys.argv[1:])])])
    if plans:
        run_plans(plans, args.harnesses, report, args.seconds, shout=print)
    if not (plans or args.network or args.disconnects or (real and (args.runs or args.seed is not None))):
        report.commands.clear()  # only to write down what is known
    elif real:
        seeds = range(args.start, args.start + args.runs) if args.seed is None else [args.seed]
        print(f"seeds {seeds[0]} to {seeds[-1]}" if args.seed is None else f"seed {args.seed}")
        plans = [round_of(seed, args.kill_every, args.router_every) for seed in seeds]
        run_vllm(
            report, plans, args.policy, args.disconnects, args.seed or 0, args.seconds, beside_plain=args.beside_plain
        )
    elif args.network:
        try:
            run_network(args.network, [args.case] if args.case else list(CASES), report)
        except NoNamespaces as error:
            parser.error(f"--network: {error}")
    print(report.summary(time.monotonic() - began))
    for text in report.trouble if real else ():
        print(f"at the end: {text}")
    failed = bool(report.failures or report.trouble)
    if args.results:
        if args.results.exists():
            report.load(args.results)
        report.save(args.results)
    if args.write:
        report.note = args.note
        write(report, args.write, args.rig, args.machine, time.strftime("%Y-%m-%d"))
    return 1 if failed else 0


def said(arguments: list[str]) -> list[str]:
    """Arguments without those that only say where results go."""
    kept, rest = [], iter(arguments)
    for each in rest:
        name, given, _ = each.partition("=")
        if name not in ("--results", "--write", "--machine", "--note"):
            kept.append(each)
        elif not given:
            next(rest, None)
    return kept


def plans_of(args: argparse.Namespace, links: list[str]) -> list[Plan]:
    seeds = range(args.start, args.start + args.runs) if args.seed is None else [args.seed]
    if args.rig == "pool":
        return list(pool_plans(seeds))
    if args.seed is not None:
        return random_plans(seeds, links)
    if args.step is not None:
        return [step_plan(args.step, args.side, args.action, args.halt, args.number, links[0])]
    return random_plans(seeds, links) + step_plans(args.kills, links)


if __name__ == "__main__":
    sys.exit(main())
