"""``python -m tests.faults.mutation``: does the rig find the bugs of :mod:`tests.faults.mutants`?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.faults.mutants import MUTANTS
from tests.faults.report import Report
from tests.faults.runner import random_plans, run_plans

MAX_RUNS = 400


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutation", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MUTANTS), help="of mutants; default: all")
    parser.add_argument("--lanes", dest="harnesses", type=int, default=8)
    parser.add_argument("--links", default="cma,ucx")
    args = parser.parse_args()
    missed = []
    for name in args.names:
        found = hunt(name, MAX_RUNS, args.harnesses, args.links.split(","))
        print(f"{name}: {found or 'NOT FOUND'}", flush=True)
        missed += [] if found else [name]
    return 1 if missed else 0


def hunt(name: str, runs: int, harnesses: int, links: Sequence[str] = ("cma", "ucx")) -> str:
    """Run plans with this bug in the workers until one fails: what it found, and in which run; empty if none did."""
    report = Report(list(links))
    run_plans(
        random_plans(range(runs), list(links)),
        harnesses,
        report,
        shout=lambda text: None,
        mutant=name,
        until_failure=True,
    )
    if not report.failures:
        return ""
    return f"found in run {report.total.runs}: {report.failures[0].splitlines()[1].strip()[:120]}"


if __name__ == "__main__":
    sys.exit(main())
