"""Runs tests with one mutant in it: in a child of a process that has imported what does not change."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.mutants.place import REPO, Mutant

HANG_S = 120  # of one mutant's tests; a bug that makes them hang is found
TEST_S = 60  # of one test
SIM_SEEDS = "1500"  # of the simulator's 5,000: enough for the bugs that it finds, and within a test's time
_OURS = ("pdtransport", "tests", "conftest", "benchmarks", "examples", "scripts")


@dataclass
class Run:
    """What a child did."""

    exit: int = -1  # pytest's exit status; -1: it was ended for taking too long
    failed: list[str] = field(default_factory=list)
    passed: int = 0
    reached: bool = True  # the module with the bug was imported
    seconds: float = 0.0
    output: str = ""
    modules: list[str] = field(default_factory=list)  # imported, of others


def run_tests(tests: Sequence[str], mutant: Mutant | None = None, *, hang_s: float = HANG_S) -> Run:
    """Run these tests up to the first failure, in a child. Tests see no file but those of the working tree."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pdt-mutant-") as name:
        folder = Path(name)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.setsid()
                _child(folder, tests, mutant)
            os._exit(70)
        run = Run()
        if _ended(child, began + hang_s):
            with contextlib.suppress(OSError, ValueError):
                run = Run(**json.loads((folder / "run.json").read_text()))
            run.exit = 70 if run.exit == -1 else run.exit
        run.seconds = time.monotonic() - began
        with contextlib.suppress(OSError):
            run.output = (folder / "output").read_text(errors="replace")
    return run


def _ended(child: int, until: float) -> bool:
    """Wait for the child, and end what it left behind; False: it had to be ended."""
    pause, ended = 0.005, False
    while not ended and time.monotonic() < until:
        ended = os.waitpid(child, os.WNOHANG)[0] == child
        if not ended:
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
    return ended


def _child(folder: Path, tests: Sequence[str], mutant: Mutant | None) -> None:
    output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(REPO)
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
    import pytest

    from tests.rig.extension import NAME, Instead, build

    instead = None
    if mutant is not None and mutant.is_c:
        shutil.copytree(REPO / "kernels" / "csrc", folder / "kernels" / "csrc")
        (folder / mutant.module).write_text(mutant.source())
        instead = Instead(NAME, build(folder, sources=folder))
    elif mutant is not None:
        instead = Instead(mutant.module, mutant.path, mutant.source())
    if instead is not None:
        instead.install()

    run = Run()

    class Watch:
        @staticmethod
        def pytest_runtest_logreport(report: pytest.TestReport) -> None:
            if report.failed:
                run.failed.append(report.nodeid)
            elif report.passed and report.when == "call":
                run.passed += 1

    options = ["-x", "-m", "not long and not more", "-p", "no:cacheprovider", "--no-header", f"--timeout={TEST_S}"]
    os.environ.setdefault("PDTRANSPORT_SIM_SEEDS", SIM_SEEDS)
    run.exit = int(pytest.main([*options, *tests], plugins=[Watch()]))
    run.reached = instead is None or instead.used
    run.modules = [name for name in sys.modules if not name.startswith((*_OURS, "__m"))] if mutant is None else []
    (folder / "run.json").write_text(json.dumps(asdict(run)))
    sys.stdout.flush()
    os._exit(0)


def import_others(modules: Sequence[str]) -> None:
    """Import what tests imported of others, so that children need not."""
    known = set(sys.modules)
    with _quiet():
        for name in modules:
            if name not in sys.modules:
                with contextlib.suppress(Exception):
                    __import__(name)
                ours = [each for each in set(sys.modules) - known if each.startswith(_OURS)]
                if ours:  # a child would see the module without its bug
                    raise RuntimeError(f"{name}, a package of others, imports {', '.join(sorted(ours)[:5])}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
