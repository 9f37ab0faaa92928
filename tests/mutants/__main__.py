"""``python -m tests.mutants [GROUP or NAME ...]``: are bugs made on purpose found? Prints the score; ends with 1 if one
lives, with 2 if the place of one does not exist any more.

Groups: ``listed`` (:mod:`tests.mutants.listed`, each found by the tests that it names), ``sim`` (by the simulator) and
``faults`` (by real processes, a minute or more each). ``--all-tests`` runs all fast tests against each listed one.
``--file FILE`` takes others instead: a JSON list of ``{"name", "module", "symbol", "old", "new"}``, say, of somebody
who has not seen the tests. All fast tests run against each, those that name its module first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.listed import LISTED
from tests.mutants.place import Mutant, Stale
from tests.mutants.processes import Run, import_others, run_tests

GROUPS = ("listed", "sim", "faults")
FAST_TESTS = ("tests/unit", "tests/sim")
FAULT_RUNS, FAULT_LANES = 400, 2
HANG_OF_ALL_S = 1200


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("what", nargs="*", default=list(GROUPS), help="groups, or names of listed ones; default: all")
    parser.add_argument("--all-tests", action="store_true", help="run all fast tests against each listed one")
    parser.add_argument("--against", nargs="+", metavar="TEST", help="run these tests against each listed one")
    parser.add_argument("--file", type=Path, help="mutants that are not listed, as JSON")
    args = parser.parse_args()
    listed = LISTED if args.file is None else from_file(args.file)
    if args.file is not None and args.what == list(GROUPS):
        args.what = ["listed"]
    by_name = {mutant.name: mutant for mutant in listed}
    unknown = [name for name in args.what if name not in by_name and name not in GROUPS]
    if unknown:
        parser.error(f"no group and no mutant: {', '.join(unknown)}")
    chosen = [mutant for mutant in listed if mutant.name in args.what or "listed" in args.what]
    stale = [problem for mutant in chosen if (problem := problem_with(mutant))]
    if stale:
        print(*stale, "mend or drop these entries of tests/mutants/listed", sep="\n", file=sys.stderr)
        return 2
    against = args.against or (FAST_TESTS if args.all_tests or args.file else ())
    found = Score()
    if chosen:
        check_listed(chosen, against, found)
    if "sim" in args.what:
        check_simulated(found)
    if "faults" in args.what:
        check_faults(found)
    return found.tell()


def from_file(path: Path) -> list[Mutant]:
    parts = ("name", "module", "symbol", "old", "new")
    return [Mutant(*(each[part] for part in parts), ()) for each in json.loads(path.read_text())]


class Score:
    def __init__(self) -> None:
        self.killed = 0
        self.alive: list[str] = []

    def add(self, name: str, how: str, seconds: float) -> None:
        """``how`` it was found; empty: it lives."""
        print(f"{name}: {how or 'LIVES'} ({seconds:.1f} s)", flush=True)
        self.killed += bool(how)
        if not how:
            self.alive.append(name)

    def tell(self) -> int:
        total = self.killed + len(self.alive)
        print(f"{self.killed} of {total} were found" + (f"; alive: {', '.join(self.alive)}" if self.alive else ""))
        return 1 if self.alive else 0


def problem_with(mutant: Mutant) -> str:
    try:
        mutant.source()
    except Stale as stale:
        return str(stale)
    return ""


def check_listed(mutants: Sequence[Mutant], against: Sequence[str], found: Score) -> None:
    """Run each one's tests, once all of them passed without any."""
    tests = against or list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    hang_s = HANG_OF_ALL_S if against else max(120, 20 * len(mutants))
    plain = run_tests(tests, hang_s=hang_s)
    if plain.exit != 0:
        raise SystemExit(f"the tests do not pass without a mutant (pytest ended with {plain.exit}):\n{plain.output}")
    print(f"without a mutant: {plain.passed} tests pass ({plain.seconds:.1f} s)", flush=True)
    import_others(plain.modules)
    for mutant in mutants:
        tests = nearest_first(against, mutant) or mutant.tests
        run = run_tests(tests, mutant, **({"hang_s": hang_s} if against else {}))
        found.add(mutant.name, judged(mutant, run, named=not against), run.seconds)


def nearest_first(tests: Sequence[str], mutant: Mutant) -> list[str]:
    """The same tests by file, those first that name the mutant's module: the first failure ends a run."""
    files = [file for test in tests for file in (sorted(Path(test).rglob("test_*.py")) or [Path(test)])]
    package, _, leaf = mutant.module.removesuffix(".c").replace("/", ".").rpartition(".")
    names = (f"{package}.{leaf}", f"from {package} import {leaf}", f"{leaf}.")
    texts = {file: file.read_text() if file.is_file() else "" for file in files}
    ranks = {file: next((at for at, name in enumerate(names) if name in texts[file]), len(names)) for file in files}
    return [str(file) for file in sorted(files, key=lambda file: ranks[file])]


def judged(mutant: Mutant, run: Run, *, named: bool) -> str:
    """What found the mutant; empty if nothing did. ``named``: the tests were those that the mutant names.

    Raises:
        SystemExit: no test ran with it, which proves nothing.
    """
    if run.exit == -1:
        return "found: its tests do not end"
    if run.exit == 1 and run.reached and run.failed:
        return f"found by {run.failed[0]}"
    if run.exit == 0 and (not named or (run.reached and run.passed)):
        return ""
    why = f"pytest ended with {run.exit}" if run.reached else f"no test imports {mutant.module}"
    raise SystemExit(f"mutant {mutant.name}: {why}, so nothing was tested:\n{run.output[-4000:]}")


def check_simulated(found: Score) -> None:
    from tests.sim.mutants import MUTANTS

    tests = "tests/sim/test_mutations.py"
    for mutant in MUTANTS:
        test = "a_check_against_a_rogue_peer_is_needed" if mutant.rogue else "a_broken_rule_is_found"
        run = run_tests([f"{tests}::test_{test}[{mutant.name}]"])
        if run.exit not in (0, 1):
            raise SystemExit(f"mutant {mutant.name}: pytest ended with {run.exit}:\n{run.output[-4000:]}")
        if run.exit == 1 and f"mutant {mutant.name} survived" not in run.output:
            raise SystemExit(f"mutant {mutant.name} can't be made any more:\n{run.output[-4000:]}")
        found.add(mutant.name, "found by the simulator" if run.exit == 0 else "", run.seconds)


def check_faults(found: Score) -> None:
    from tests.faults.mutants import MUTANTS
    from tests.faults.mutation import hunt

    for name in MUTANTS:
        began = time.monotonic()
        found.add(name, hunt(name, FAULT_RUNS, FAULT_LANES), time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
