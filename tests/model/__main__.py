"""``python -m tests.model``: explore every state of a small hand-off, and say what was found.

Two prefill workers and a decode worker, the real tables of ``pdtransport/protocol``; any message lost, copied,
overtaken or late; processes restart, peers are given up and come back, bytes are damaged, pages are taken back,
requests are aborted, deadlines pass in any order. What must hold stands in ``INVARIANTS``. ``--short``: what ``make
test`` explores; ``--case WORD``: cases with that in their names; ``--bug NAME``: with a bug made on purpose, and the
way to it.
"""

from __future__ import annotations

import argparse
import resource
import sys

import pytest

from tests.model.bugs import BUGS
from tests.model.cases import FULL, SHORT
from tests.model.explore import Explorer, Found

INVARIANTS = (
    "a write meets only pages that are granted now, to the batch's sender, under its generation, and not verified yet",
    "Ready: every page was verified under this grant and holds what its producer's incarnation computed for it",
    "each transfer ends once on each side, and nothing is asked for or written after its end",
    "Ack: only of what is complete; Release as delivered: only of what was acked",
    "no batch is offered for a grant that was revoked, even if the Revoke came first",
    "words about a grant that is not live, or said to a dead incarnation, change nothing",
    "if nothing is heard from any state on, deadlines end everything and free all of it",
    "no move that the tables do not list, no exception",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--short", action="store_true", help="the part that make test explores")
    parser.add_argument("--case", default="", help="only cases with this in their names")
    parser.add_argument("--bug", choices=[bug.name for bug in BUGS], help="explore with this bug, in its own case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each case at most")
    args = parser.parse_args()
    if args.bug:
        bug = next(bug for bug in BUGS if bug.name == args.bug)
        with pytest.MonkeyPatch.context() as patch:
            bug.apply(patch)
            return say(Explorer(bug.case).explore())
    print("explored in every order:", *INVARIANTS, sep="\n  - ")
    cases = [case for case in (SHORT if args.short else FULL) if args.case in case.name]
    print(f"{'states':>9} {'covered':>9} {'transitions':>11} {'snapshots':>9} {'depth':>5} {'seconds':>7}  case")
    worst = 0
    for case in cases:
        worst |= say(Explorer(case).explore(seconds=args.seconds))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{memory:.0f} MiB at most")
    return worst


def say(found: Found) -> int:
    whole = "" if found.complete or found.broken else "  NOT WHOLE: out of time"
    row = f"{found.states:>9} {found.covered:>9} {found.transitions:>11} {found.snapshots:>9} {found.depth:>5}"
    row += f" {found.seconds:>7.1f}"
    print(f"{row}  {found.case.name}{whole}", flush=True)
    if found.broken:
        print(f"BROKEN: {found.broken}", *found.trace, sep="\n    ")
    return 1 if found.broken or not found.complete else 0


if __name__ == "__main__":
    sys.exit(main())
