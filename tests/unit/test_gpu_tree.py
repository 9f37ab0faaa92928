"""scripts/gpu_tree.sh: the package on PYTHONPATH where pip can't install it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
HAS_COMPILER = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
SHOW = """
import pdtransport, pdtransport.launch
from importlib.metadata import entry_points
from pdtransport.kernels import pages
found = {entry.value for entry in entry_points(group="vllm.general_plugins") if entry.name == "pdtransport"}
print(pdtransport.__file__, pages.__file__, pages.BACKEND, *found)
"""


@pytest.mark.long  # compiles twice
def test_the_tree_is_imported_even_from_the_checkout_and_twice_laid_is_as_once(tmp_path: Path) -> None:
    """The checkout's own ``pdtransport`` lacks kernels and launch: the tree must win there. vLLM finds the plugin."""
    dest = tmp_path / "tree"
    for _ in range(2):
        done = subprocess.run(
            ["bash", str(REPO / "scripts" / "gpu_tree.sh"), str(dest)],
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    shown = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(dest)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0, shown.stderr
    package, kernels, backend, *plugins = shown.stdout.split()
    assert package == str(dest / "pdtransport" / "__init__.py")
    assert kernels == str(dest / "pdtransport" / "kernels" / "pages.py")
    assert backend == ("c" if HAS_COMPILER else "numpy")
    assert plugins == ["pdtransport.vllm:register"]
