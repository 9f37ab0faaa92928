"""What ``tests/conftest.py`` promises of tests that start processes: one more try, except for a wrong answer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"
FAILS_ONCE = """
from pathlib import Path
from tests.rig.cases import WrongAnswer

def fails_once(name, error):
    seen = Path(__file__).with_name(name)
    if not seen.exists():
        seen.touch()
        raise error("the first try")

def test_late():
    fails_once("late", AssertionError)

def test_wrong():
    fails_once("wrong", WrongAnswer)
"""


def test_a_late_answer_is_waited_for_once_more_and_a_wrong_one_fails_at_once(tmp_path: Path) -> None:
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for folder in ("processes", "unit"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"test_{folder}.py").write_text(FAILS_ONCE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=CONFTEST.parents[1])
    failed = sorted(line.split(" - ")[0].split("/")[-1] for line in done.stdout.splitlines() if line[:6] == "FAILED")
    wrong = ["test_processes.py::test_wrong", "test_unit.py::test_late", "test_unit.py::test_wrong"]
    assert failed == wrong, done.stdout
    assert "AGAIN processes/test_processes.py::test_late: E " in done.stdout, done.stdout
