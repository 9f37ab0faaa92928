"""The tests of this folder that a GPU should see, in one bounded run: ``PDT_DEVICE=cuda python -m tests.vllm``.

Token and byte equality (chunked prefill, sixteen at a time, prefix hits, both dispatch orders), preemption on both
sides, aborts, prefill killed in the middle of transfers, leak checks. All servers start together. The tests run on
the CPU too, by ``--selection``; there they start servers one after another and take as long as ``make test`` does.

Exit status: pytest's; 124 where ``--seconds`` passed (pytest is interrupted first, so that it tells how far it came).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SELECTION = (
    "test_numerics.py",
    "test_equality.py",
    "test_prefixes.py",
    "test_aborts.py",
    "test_preemption.py",
    "test_parallel.py::test_prefill_killed_in_the_middle_of_transfers",
)
INTERRUPTED_S = 30.0  # pytest stops the servers within this after SIGINT
LATE = 124


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.vllm", description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=270.0, help="end the run after this (default 270)")
    parser.add_argument("--aborts", type=int, default=50, help="requests to abort (default 50)")
    parser.add_argument("--json", type=Path, help="write each test's outcome and seconds here")
    parser.add_argument("--selection", nargs="+", default=list(SELECTION), help="files or tests, by pytest's names")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    parser.add_argument("pytest", nargs="*", help="after --: more for pytest")
    options = parser.parse_args(argv)
    if options.seconds <= 0 or options.aborts < 1:
        parser.error("--seconds and --aborts are positive")
    return options


def outcomes(junit: Path) -> list[dict[str, Any]]:
    """Name, outcome ("passed", "failed", "error" or "skipped"), seconds and first line of the reason of each test; no
    rows if pytest wrote nothing."""
    if not junit.exists():
        return []
    rows = []
    for case in ET.parse(junit).getroot().iter("testcase"):
        outcome, why = "passed", ""
        for kind, word in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
            found = case.find(kind)
            if found is not None:
                outcome, why = word, (found.get("message") or "").splitlines()[0][:200]
        module = (case.get("classname") or "").rpartition(".")[2]
        seconds = round(float(case.get("time") or 0), 1)
        rows.append({"test": f"{module}::{case.get('name')}", "outcome": outcome, "seconds": seconds, "why": why})
    return rows


def run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="pdtransport-tests-") as scratch:
        junit = Path(scratch, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-s", "--tb=short", f"--junitxml={junit}", *options.pytest]
        if options.logs:
            command.append(f"--basetemp={options.logs}")
        command += [str(HERE / name) for name in options.selection]
        env = {**os.environ, "PDT_ABORTS": str(options.aborts)}
        process = subprocess.Popen(command, cwd=HERE.parents[1], env=env, stdin=subprocess.DEVNULL)
        try:
            status = process.wait(options.seconds)
        except subprocess.TimeoutExpired:
            print(f"interrupted after {options.seconds:.0f} s", flush=True)
            process.send_signal(signal.SIGINT)
            status = LATE
            try:
                process.wait(INTERRUPTED_S)
            except subprocess.TimeoutExpired:
                process.kill()  # its servers die with it
                process.wait()
        rows = outcomes(junit)
    for row in rows:
        print(f"{row['outcome']:<8}{row['seconds']:>7.1f} s  {row['test']}  {row['why']}".rstrip())
    if options.json:
        place = {name: os.environ[name] for name in sorted(os.environ) if name.startswith("PDT_")}
        options.json.write_text(json.dumps({"status": status, "place": place, "tests": rows}, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(run(parse(sys.argv[1:])))
