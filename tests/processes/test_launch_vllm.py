"""pdlaunch with real vLLM servers: the demo that `make demo` runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pdtransport.launch import guard

REPO = Path(__file__).resolve().parents[2]
START_S = 400


@pytest.mark.vllm
@pytest.mark.more
@pytest.mark.xdist_group("launch")
@pytest.mark.timeout(1200)
def test_the_demo_proves_compares_and_leaves_nothing(tmp_path: Path) -> None:
    """The quickstart comes up, pages cross, every answer's tokens equal a plain server's, and no process is left."""
    topology = yaml.safe_load((REPO / "examples" / "quickstart.yaml").read_text())
    topology["model"]["id"] = str(REPO / "examples" / topology["model"]["id"])
    topology["defaults"]["start_timeout_s"] = START_S
    topology["router"]["port"] = 21330
    file = tmp_path / "quickstart.yaml"
    file.write_text(yaml.safe_dump(topology))
    before = set(guard.descendants(os.getpid()))
    done = subprocess.run(
        [sys.executable, "-m", "pdtransport.launch.demo", str(file), "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "proved: prefill-0 -> decode-0: 16 tokens equal" in done.stdout
    assert "9 of 9 answers" in done.stdout
    assert "pages are transferred while prefill computes the rest" in done.stdout
    assert "no page was transferred" not in done.stdout
    assert set(guard.descendants(os.getpid())) <= before
    assert not [pid for pid in everyone_with(str(tmp_path)) if pid != os.getpid()]


def everyone_with(text: str) -> list[int]:
    """Processes of this machine whose environment or command line names ``text``."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            named = text.encode() in (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if named:
            found.append(int(entry.name))
    return found
