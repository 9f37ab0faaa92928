"""Random pairs of labels and contents: ``python -m tests.identity --requests 200 --seed 1``.

Servers with equal and with other weights, configurations and adapters, under equal and under other names and paths,
some changed while they run; each request goes to a prefill and a decode server, and decode's answer must be what the
same server says alone. Equal pairs must be handed over, different ones refused by name of what differs. In the last
round KV goes through a pool: equal servers must find there what others stored, different ones nothing.

Exit status: 0 if all is so, 1 if not, 2 if the run shows nothing: too many different pairs answer alike anyway.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.identity.outcomes import Report
from tests.identity.run import Plan, run

PER_ROUND = 40


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.identity", description=str(__doc__).splitlines()[0])
    parser.add_argument("--requests", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed asks the same (default 1)")
    parser.add_argument("--servers", type=int, default=4, help="at a time (default 4)")
    parser.add_argument("--rounds", type=int, help=f"sets of servers (default: one for {PER_ROUND} requests)")
    parser.add_argument("--routers", type=int, default=3, help="pairs of a round that have a router, too (default 3)")
    parser.add_argument("--pooled", type=int, default=1, help="rounds, the last ones, through a pool (default 1)")
    parser.add_argument("--json", type=Path, help="write each request's outcome here")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    options = parser.parse_args(argv)
    if options.requests < 1 or options.servers < 2:
        parser.error("at least one request and two servers are needed")
    options.rounds = options.rounds or max(1, options.requests // PER_ROUND)
    return options


def status(report: Report) -> int:
    return 1 if report.failed else 2 if report.void else 0


def main(argv: list[str]) -> int:
    options = parse(argv)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdtransport-identity-")))
        logs = options.logs or root / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        plan = Plan(options.requests, options.seed, options.servers, options.rounds, options.routers, options.pooled)

        def told(report: Report) -> None:
            if options.json:
                options.json.write_text(json.dumps(report.as_json(), indent=1))

        report = run(plan, root, logs, told)
    print(report.text())
    return status(report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
