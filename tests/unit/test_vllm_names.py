"""Every vLLM that we support has what we touch of it: files of ``tests/unit/vllm_names``, one a version."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest

from scripts.vllm_names import FILES, Source, installed, names, touched

VERSIONS = sorted(path.stem for path in FILES.glob("*.json"))
REMEDY = "python -m scripts.vllm_names"


@lru_cache
def needed() -> dict[str, set[str]]:
    return touched()


def held(version: str) -> dict[str, str]:
    return dict(json.loads((FILES / f"{version}.json").read_text()))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_has_each_name_that_is_needed(version: str) -> None:
    """What a supported vLLM lacks is not touched there: we catch its absence where we import it, or the hook is off."""
    has = held(version)
    lacking = {name: sorted(places) for name, places in needed().items() if places and name not in has}
    assert not lacking, f"vLLM {version} lacks these: catch ImportError there, or run {REMEDY} if they are new here"


def test_what_is_told_of_the_installed_version_is_so() -> None:
    """The file of a version says what that version holds: a signature that differs would be noticed."""
    pytest.importorskip("vllm")
    version, place = installed()
    if version not in VERSIONS:
        pytest.skip(f"no file of vLLM {version}: {REMEDY}")
    assert held(version) == names(place), f"run {REMEDY}"


def test_an_absence_is_noticed(tmp_path: Path) -> None:
    """Re-exported names, inherited members and attributes set in methods are found, and nothing else is."""
    (tmp_path / "vllm" / "v1").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("from .v1.base import *\nfrom .v1 import base as basis\n")
    (tmp_path / "vllm" / "v1" / "__init__.py").touch()
    (tmp_path / "vllm" / "v1" / "base.py").write_text(
        "class Base:\n    size: int\n    def __init__(self) -> None:\n        self.made = 1\n"
        "try:\n    def step(a, *, b=1): ...\nexcept ImportError:\n    step = None\nclass Made(Base):\n    pass\n"
    )
    source = Source(tmp_path)
    told = {name: source.told(f"vllm:{name}") for name in ("Base", "Made.made", "Made.size", "Made.other", "gone")}
    assert told == {"Base": "class", "Made.made": "attribute", "Made.size": "int", "Made.other": None, "gone": None}
    assert source.told("vllm:basis") == "module"
    assert source.told("vllm.v1.base:step") is not None
    assert source.told("vllm.v2:step") is None
