"""``python -m tests.soak --minutes 30 --json FILE``: does anything grow that does not grow in a plain server?

One prefill and one decode server with a pool behind the router, real vLLM on the CPU, prompts of mixed lengths, a third
of the clients leave before the answer. A plain server is sent the same prompts at the same moments. Memory,
descriptors, threads and free KV blocks of each process are sampled; over the last two thirds, nothing may grow beyond
the plain server's growth (prefill) or at all (the others), each answer must be a plain server's, and in the end every
block and chunk must be back. Memory is in MiB.

Exit status: 0 if all is so, 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from benchmarks._figures import keep, say
from tests.rig.client import Client
from tests.rig.watch import settled
from tests.soak.fleet import Fleet, running
from tests.soak.load import Load
from tests.soak.report import Report
from tests.soak.sampling import Sampler, held

KEPT_EVERY = 12  # samples


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=str(__doc__).splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long requests are sent (default 30)")
    parser.add_argument("--clients", type=int, default=3, help="that ask at a time (default 3)")
    parser.add_argument("--pause", type=float, default=0.4, help="seconds between two requests of a client, on average")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples (default 5)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed asks the same (default 1)")
    parser.add_argument("--json", type=Path, help="write all samples and what follows from them here")
    parser.add_argument("--read", type=Path, help="instead: judge such a file again")
    return parser.parse_args(argv)


async def soak(options: argparse.Namespace, fleet: Fleet, report: Report) -> None:
    """Send requests for as long as was asked, then see that everything is given back."""
    async with Client() as client:
        load = Load(fleet, client, options.seed, options.pause)
        await load.prime()
        say("primed")
        sampler = Sampler(fleet.processes(), fleet.servers, client)
        report.counts, report.samples = load.counts, sampler.samples
        done, taken = asyncio.Event(), [0]

        def told() -> None:
            taken[0] += 1
            if taken[0] % KEPT_EVERY == 0:
                say(f"{taken[0] * options.every / 60:.0f} minutes: {dict(load.counts.ends)}")
                keep(options.json, json.dumps(report.as_json()))

        asyncio.get_running_loop().call_later(options.minutes * 60, done.set)
        await asyncio.gather(load.run(options.clients, done), sampler.run(options.every, done, told))
        report.trouble += sampler.trouble
        await _at_rest(fleet, client, report)


async def _at_rest(fleet: Fleet, client: Client, report: Report) -> None:
    try:
        await settled(client, list(fleet.servers.values()))
        report.at_rest["pool"] = fleet.pool.at_rest()
    except AssertionError as error:
        report.trouble.append(f"not given back: {error}")
    report.at_rest["held"] = {name: held(pid) for name, pid in fleet.processes().items()}
    for server in fleet.servers.values():
        server.must_live()


def main(argv: list[str]) -> int:
    options = parse(argv)
    if options.read is not None:
        report = Report.from_json(json.loads(options.read.read_text()))
    else:
        logs = Path(tempfile.mkdtemp(prefix="pdtransport-soak-"))
        say(f"logs: {logs}")
        report = Report(options.minutes, options.clients, options.seed)

        async def go() -> None:
            async with running(logs, beside_plain=True) as fleet:
                await soak(options, fleet, report)

        try:
            asyncio.run(go())
        finally:
            keep(options.json, json.dumps(report.as_json()))
    print(report.text())
    return 1 if report.complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
