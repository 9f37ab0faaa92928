"""The fast tests on each Python that pyproject.toml names and this machine has: ``make test-pythons``.

Where the package index has a CPU build of torch for a Python, that is installed; elsewhere tests that need torch are
skipped, as those that need vLLM are everywhere.
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.error_on_missing_interpreters = False
PYTHONS = nox.project.python_versions(nox.project.load_toml("pyproject.toml"))
TORCH = re.search(r"^TORCH_VERSION=(\S+)$", Path("scripts/setup_env.sh").read_text(), re.MULTILINE)


@nox.session(python=PYTHONS, reuse_venv=True)
def tests(session: nox.Session) -> None:
    session.install("-e", ".[dev]")
    if TORCH is not None:
        torch = f"torch=={TORCH[1]}+cpu"
        if session.run("python", "-m", "pip", "install", "-q", torch, success_codes=[0, 1], silent=True):
            session.log(f"the index has no {torch} for this Python: tests that need torch are skipped")
    fast = ["-m", "not more and not long", "tests/unit", "tests/sim", "-n", "2", "--dist", "loadgroup"]
    session.run("python", "-m", "pytest", *fast, *session.posargs)
