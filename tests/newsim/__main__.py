"""``python -m tests.newsim --seeds 5000``: run seeds; ``--seed N --trace``: replay one, readably."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.newsim.plan import plan_of
from tests.newsim.run import Result, run

CHUNK = 100
MAX_SHOWN = 10


def run_chunk(start: int, count: int) -> tuple[Counter[str], list[tuple[int, str]]]:
    counters: Counter[str] = Counter()
    failures = []
    for seed in range(start, start + count):
        result = run(plan_of(seed))
        counters.update(result.counters)
        if result.violation:
            failures.append((seed, result.violation))
    return counters, failures


def run_seeds(start: int, seeds: int, processes: int) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Counters over all runs, and ``(seed, violation)`` of those that failed."""
    chunks = [(at, min(CHUNK, start + seeds - at)) for at in range(start, start + seeds, CHUNK)]
    counters: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    if processes <= 1:
        results = [run_chunk(*chunk) for chunk in chunks]
    else:
        with ProcessPoolExecutor(processes) as pool:
            results = list(pool.map(run_chunk, *zip(*chunks, strict=True)))
    for counts, failed in results:
        counters.update(counts)
        failures += failed
    return counters, failures


def show(result: Result) -> None:
    print("\n".join(result.log))
    print("outcomes:", result.outcomes)
    print("violation:", result.violation or "none")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.newsim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5000, help="how many")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--seed", type=int, help="run this one only")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every event")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.seed is not None:
        plan = plan_of(args.seed)
        if args.trace:
            print(plan)
        result = run(plan, args.trace)
        show(result)
        return 1 if result.violation else 0
    began = time.monotonic()
    counters, failures = run_seeds(args.start, args.seeds, args.processes)
    for seed, violation in failures[:MAX_SHOWN]:
        print(f"seed {seed}: {violation}\n    replay: python -m tests.newsim --seed {seed} --trace")
    print(f"{args.seeds} seeds in {time.monotonic() - began:.1f} s, {len(failures)} violations")
    print(", ".join(f"{name} {count}" for name, count in sorted(counters.items())))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
