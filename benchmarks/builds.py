"""One benchmark on two builds in turns: ``python -m benchmarks.builds --old DIR --runs 6 -- MODULE OPTION...``.

DIR is a checkout of an older commit. To make it, and to compare:

    git worktree add DIR COMMIT
    python -m benchmarks.builds --old DIR --runs 6 --json found.json -- links --rounds 3

Nothing needs to be installed: ``scripts/gpu_tree.sh`` of each checkout lays a tree for ``PYTHONPATH`` in a temporary
folder and compiles that commit's C kernels there. (By hand: ``PYTHON=.venv/bin/python DIR/scripts/gpu_tree.sh TREE``,
then ``PYTHONPATH=TREE:DIR``.) The same Python with the same packages runs both.

``--runs`` pairs run in the order old new, new old, old new, ...: neither a slow drift of the machine nor the place
within a pair favours a build. MODULE is a module of ``benchmarks`` that knows ``--json``; OPTIONs go to it unchanged.
The JSON of all runs is in ``--json FILE``, written after each; ``--resume FILE`` adds the pairs that are missing in
that file. Leave both checkouts alone meanwhile: the trees link to their modules.

Which code measures: with ``--driver this``, MODULE and tests.rig of this checkout measure both builds. With ``own``,
those of each build do: for a MODULE that calls what has been renamed. It measures changes of the benchmark as well. The
default is ``this``, and ``own`` if the first run of the old build ends without figures. The output says which.

Which build is measured: each process that imports ``pdtransport`` notes where from, and fails if one of its modules,
the compiled one included, is not of its build. A run in which no process imported it does not count.

Columns: *old*, *new*: medians over the runs; *difference*: median over the pairs, new less old; *95 % interval*: of the
mean difference (Student's t over the pairs, from 4 pairs on); *bound*: 3 % of the old median, and for times that a
client sees at least 1 ms; *verdict*: the interval is ``within`` the bound; or it leaves the bound and lies on the
``better`` or the ``worse`` side of 0; or it is too wide to tell (``open``). Figures that one build lacks are listed
below.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks._figures import FAILED, keep, measuring, say
from benchmarks._paired import Pair, Unit, compare, figures_of, table, unpaired
from tests.rig.servers import die_with_parent

HERE = Path(__file__).resolve().parents[1]
SEEN = "PDT_BUILDS_SEEN"  # file in which processes note where pdtransport came from
TREE_S = 180.0
LAST_LINES, KEPT_LINES = 3, 200  # of the output of a run without figures: told, and kept in the JSON
BUILDS = ("old", "new")
ROOMS = ("pdtransport", "kernels", "launch")  # of a checkout, which its package is made of; DIR may lie in this one

Driver = Literal["this", "own"]

# Added to a tree's sitecustomize, which the tree's own finder precedes.
GUARD = """
import os

class Guard:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] != "pdtransport":
            return None
        for finder in sys.meta_path:
            spec = None if finder is Guard else finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        origin = os.path.realpath(spec.origin or "")
        if not origin.startswith({roots!r}):
            raise ImportError(f"benchmarks.builds: {{name}} is {{origin}}, not of the build in {root}")
        if name in ("pdtransport", "pdtransport.kernels._pages"):
            with open(os.environ[{seen!r}], "a") as file:
                file.write(f"{{os.getpid()}} {{name}} {{origin}}\\n")
        return spec

sys.meta_path.insert(0, Guard)
"""


class NoBuild(Exception):
    """A build can't be laid out; the text says why and what to do."""


@dataclass(frozen=True)
class Build:
    """A checkout, and the tree of it that goes onto PYTHONPATH."""

    name: str
    root: Path
    tree: Path

    @classmethod
    def lay(cls, name: str, root: Path, folder: Path) -> Build:
        """
        Raises:
            NoBuild: ``root`` is no checkout with ``scripts/gpu_tree.sh``, or that fails.
        """
        script, tree = root / "scripts" / "gpu_tree.sh", folder / name
        if not script.exists():
            raise NoBuild(f"--old: {script} is missing: git worktree add {root} COMMIT, with a commit that has it")
        done = subprocess.run(
            ["bash", str(script), str(tree)],
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=TREE_S,
        )
        if done.returncode:
            raise NoBuild(f"{script} ended with status {done.returncode}: {done.stderr.strip()}")
        roots = tuple(f"{path}{os.sep}" for path in (*(root / room for room in ROOMS), tree.resolve()))
        with (tree / "sitecustomize.py").open("a", encoding="utf-8") as file:
            file.write(GUARD.format(roots=roots, root=str(root), seen=SEEN))
        return cls(name, root, tree)

    def commit(self) -> str:
        """As git tells it; "?" where the checkout came without git, perhaps into the folder of another one."""
        if not (self.root / ".git").exists():
            return "?"
        told = ["git", "-C", str(self.root), "describe", "--always", "--dirty", "--abbrev=9"]
        try:
            found = subprocess.run(told, capture_output=True, text=True, timeout=10)
        except FileNotFoundError:
            return "?"
        return found.stdout.strip() or "?"


@dataclass
class Run:
    """One run of the benchmark.

    Args:
        document: its JSON; empty if it left none.
        seen: processes that imported pdtransport.
        compiled: those of them that loaded its C kernels.
        failed: why the run does not count.
        log: the end of its output, if it left no figures.
    """

    build: str
    pair: int
    status: int
    document: dict[str, Any] = field(default_factory=dict)
    seen: int = 0
    compiled: int = 0
    failed: str = ""
    log: list[str] = field(default_factory=list)


def run_once(build: Build, pair: int, driver: Path, command: Sequence[str], timeout_s: float) -> Run:
    """Run ``command``, a module of ``benchmarks`` in ``driver`` and its options, with ``build``'s product."""
    with tempfile.TemporaryDirectory(prefix="pdtransport-builds-") as folder:
        out, seen, log = (Path(folder, name) for name in ("found.json", "seen", "log"))
        path = [str(build.tree), str(driver), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), SEEN: str(seen)}
        module, *options = command
        argv = [sys.executable, "-m", f"benchmarks.{module}", *options, "--json", str(out)]
        with log.open("wb") as output:
            try:
                done = subprocess.run(
                    argv,
                    cwd=driver,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                    preexec_fn=die_with_parent(),
                )
                run = Run(build.name, pair, done.returncode)
            except subprocess.TimeoutExpired:
                run = Run(build.name, pair, FAILED, failed=f"not done after {timeout_s:g} s (--seconds)")
        if seen.exists():
            notes = [line.split(" ", 2)[:2] for line in seen.read_text().splitlines()]
            run.seen = len({pid for pid, name in notes if name == "pdtransport"})
            run.compiled = len({pid for pid, name in notes if name != "pdtransport"})
        if out.exists():
            run.document = json.loads(out.read_text(encoding="utf-8"))
        if not run.failed and not figures_of(run.document)[0]:
            run.log = log.read_text(errors="replace").splitlines()[-KEPT_LINES:]
            run.failed = f"status {run.status}, no figures: {' | '.join(run.log[-LAST_LINES:])}"
        elif not run.failed and not run.seen:
            run.failed = "no process imported pdtransport, so nothing shows which build this was"
    return run


class Comparison:
    """Runs of both builds so far, and how they are measured."""

    def __init__(self, builds: dict[str, Build], options: argparse.Namespace, runs: Sequence[Run] = ()) -> None:
        self._builds, self._options = builds, options
        self._commits = {name: build.commit() for name, build in builds.items()}  # when the trees were laid
        self.runs = list(runs)
        self.driver: Driver = options.driver or "this"
        self.why = ""  # the driver was chosen
        self._may_change = not options.driver and not self.runs

    def measure(self) -> None:
        """All pairs that are missing; keeps everything after each run."""
        done = max((run.pair for run in self.runs), default=-1) + 1
        for pair in range(done, self._options.runs):
            for name in BUILDS if pair % 2 == 0 else reversed(BUILDS):
                say(f"pair {pair + 1} of {self._options.runs}: {name}")
                self._add(self._one(name, pair))

    def _one(self, name: str, pair: int) -> Run:
        build = self._builds[name]
        driver = HERE if self.driver == "this" else build.root
        run = run_once(build, pair, driver, self._options.command, self._options.seconds)
        module = build.root / "benchmarks" / f"{self._options.command[0]}.py"
        if run.failed and self._may_change and module.exists():
            self.driver, self.why, self._may_change = "own", run.failed.rpartition(" | ")[2], False
            say(f"this checkout's driver does not measure the old build ({self.why}): each build's own does")
            return self._one(name, pair)
        self._may_change = False
        return run

    def _add(self, run: Run) -> None:
        if run.failed:
            say(f"pair {run.pair + 1}, {run.build}: {run.failed}")
        elif run.status:
            say(f"pair {run.pair + 1}, {run.build}: status {run.status}; the figures that it left count")
        self.runs.append(run)
        keep(self._options.json, self.document() + "\n")

    def pairs(self) -> tuple[list[Pair], dict[str, Unit]]:
        """Figures of each pair whose two runs count, and their units."""
        units: dict[str, Unit] = {}
        by_pair: dict[int, dict[str, dict[str, float]]] = {}
        for run in self.runs:
            if not run.failed:
                values, known = figures_of(run.document)
                units |= known
                by_pair.setdefault(run.pair, {})[run.build] = values
        return [(two["old"], two["new"]) for two in by_pair.values() if len(two) == len(BUILDS)], units

    def document(self) -> str:
        shown = {
            "command": self._options.command,
            "builds": self._commits,
            "driver": self.driver,
            "why": self.why,
            "runs": [asdict(run) for run in self.runs],
        }
        return json.dumps(shown, indent=1)

    def report(self) -> bool:
        """Print everything. Whether each run counts and each figure has its partner."""
        measured_by = {"this": "this checkout's for both builds", "own": "each build's own"}[self.driver]
        print(f"benchmarks.{' '.join(self._options.command)}")
        print(f"driver: {measured_by}{f' ({self.why})' if self.why else ''}")
        for name, commit in self._commits.items():
            runs = [run for run in self.runs if run.build == name and not run.failed]
            print(
                f"{name}: commit {commit}, runs: {len(runs)}; pdtransport imported by "
                f"{sum(run.seen for run in runs)} processes, C kernels by {sum(run.compiled for run in runs)}, "
                "all of this build"
            )
        pairs, units = self.pairs()
        if not pairs:
            print("no pair has figures of both builds")
            return False
        rows = compare(pairs, units)
        if rows:
            print(table(rows))
        alone = unpaired(pairs)
        for line in alone:
            print(line)
        failed = [run for run in self.runs if run.failed]
        for run in failed:
            print(f"not counted: pair {run.pair + 1}, {run.build}: {run.failed}")
        return not alone and not failed


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.builds",
        usage="%(prog)s --old DIR [--runs N] [option ...] -- MODULE [OPTION ...]",
        description=str(__doc__).splitlines()[0],
    )
    parser.add_argument("--old", type=Path, required=True, metavar="DIR", help="checkout of the older commit")
    parser.add_argument("--runs", type=int, default=6, help="runs of each build (default 6)")
    parser.add_argument("--driver", choices=("this", "own"), help="whose benchmark measures; see the module's help")
    parser.add_argument("--seconds", type=float, default=3600.0, help="bound of one run (default 3600)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from the JSON of an earlier call")
    parser.add_argument("command", nargs="+", metavar="MODULE", help="links, handoff, ... and its options, after --")
    options = parser.parse_args(argv)
    options.command[0] = options.command[0].removeprefix("benchmarks.")
    options.old = options.old.resolve()
    if not (HERE / "benchmarks" / f"{options.command[0]}.py").exists():
        parser.error(f"MODULE: benchmarks has no {options.command[0]}")
    if "--json" in options.command:
        parser.error("--json: goes before --, not to the benchmark, whose JSON is read here")
    if options.runs < 1 or options.seconds <= 0:
        parser.error("--runs is at least 1, --seconds above 0")
    if options.old == HERE:
        parser.error("--old: this is the new build; git worktree add DIR COMMIT makes a checkout of an older one")
    return options


def earlier(options: argparse.Namespace) -> list[Run]:
    """Whole pairs of ``--resume``'s file, whose driver is taken over.

    Raises:
        NoBuild: it is of another command.
    """
    if options.resume is None:
        return []
    told = json.loads(options.resume.read_text(encoding="utf-8"))
    if told["command"] != options.command:
        raise NoBuild(f"--resume: {options.resume} holds runs of {' '.join(told['command'])}: give the same command")
    options.driver = options.driver or told["driver"]
    runs = [Run(**run) for run in told["runs"]]
    whole = {run.pair for run in runs if run.build == "old"} & {run.pair for run in runs if run.build == "new"}
    return [run for run in runs if run.pair in whole]


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory(prefix="pdtransport-trees-") as folder, measuring(NoBuild) as ending:
        roots = {"old": options.old, "new": HERE}
        runs = earlier(options)
        builds = {name: Build.lay(name, root, Path(folder)) for name, root in roots.items()}
        comparison = Comparison(builds, options, runs)
        with measuring() as measured:
            comparison.measure()
        whole = comparison.report()
        ending.status = measured.status or (0 if whole else FAILED)
    return ending.status


if __name__ == "__main__":
    sys.exit(main())
