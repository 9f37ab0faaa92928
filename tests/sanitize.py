"""``python -m tests.sanitize``: the C kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer.

The kernels are built with both into a temporary folder, and used from there by the tests alone. First both sanitizers
must find a fault that is made for them: one that is not there would find none.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.rig.extension import VARIABLE, build

REPO = Path(__file__).resolve().parents[1]
TESTS = [
    f"tests/unit/test_{name}.py"
    for name in ("kernels", "quant", "pool_index", "link_memory", "link_reading", "geometry")
]
FLAGS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",  # the interpreter never frees all
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:abort_on_error=1",
    "PYTHONMALLOC": "malloc",
}
# Checksums of 8 bytes more than an array has; of runs that lie at an odd address.
FAULTS = {
    "heap-buffer-overflow": "data = np.zeros(64, dtype=np.uint8); pages.checksum(run(data.ctypes.data, 72), 1)",
    "misaligned address": "runs = np.zeros(33, dtype=np.uint8); "
    "pages._C.pdt_checksum(runs.ctypes.data + 1, 2, 1, np.zeros(1, dtype=np.uint64).ctypes.data)",
}
FAULT = """
from tests.rig.extension import use_given
use_given()
import numpy as np
from pdtransport.kernels import pages
from pdtransport.kernels.runs import run
assert pages._C is not None
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("tests", nargs="*", default=TESTS, help="default: those of the C kernels")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pdt-sanitize-") as folder:
        library = build(Path(folder), FLAGS)
        environment = {**os.environ, **OPTIONS, VARIABLE: str(library), "LD_PRELOAD": " ".join(runtimes())}
        for name, fault in FAULTS.items():
            command = [sys.executable, "-c", FAULT + fault]
            ended = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
            if ended.returncode == 0 or name not in ended.stderr:
                print(f"the sanitizers do not find a {name} made on purpose:\n{ended.stderr}", file=sys.stderr)
                return 2
        for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS"):  # pytest keeps what is said on the way to an abort
            environment[name] += f":log_path={folder}/report"
        command = [sys.executable, "-m", "pytest", "-p", "tests.rig.extension", "-p", "no:cacheprovider", "-x"]
        status = subprocess.run([*command, *args.tests], cwd=REPO, env=environment).returncode
        reports = sorted(Path(folder).glob("report*"))
        for report in reports:
            print(report.read_text(errors="replace"), file=sys.stderr)
    return status or bool(reports)


def runtimes() -> Sequence[str]:
    """The sanitizers' libraries, which must be in the process before anything else."""
    compiler = os.environ.get("CC", "cc")
    found = (
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )
    return list(found)


if __name__ == "__main__":
    sys.exit(main())
