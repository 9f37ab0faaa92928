"""A package of somebody else's, as pip would install it into a folder: its module and its entry points."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.rig.documents import blocks

ADDING = Path(__file__).resolve().parents[2] / "docs" / "adding"
_GROUP = re.compile(r'\[project\.entry-points\."(.+)"\]')
_POINT = re.compile(r'(\w+) = "(\w+:\w+)"')


@contextmanager
def installed(package: Path, scratch: Path) -> Iterator[Path]:
    """Install ``package`` with pip, for this process and those that it starts; yields the folder that it is in."""
    source, target = scratch / "source", scratch / "site"
    shutil.copytree(package, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, timeout=100)
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()
    try:
        yield target
    finally:
        sys.path.remove(str(target))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(str(target)):
                del sys.modules[name]


def install(folder: Path, module: str, source: str, points: Mapping[str, Mapping[str, str]]) -> None:
    """Make ``folder``, once it is on ``sys.path``, offer ``points`` (name and place by group) of the module."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
    groups = (
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in named.items())
        for group, named in points.items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))


def install_documented(folder: Path, page: str) -> str:
    """Install the package that a page of docs/adding shows; returns its module's name."""
    (project,), (source,) = (blocks(ADDING / page, language) for language in ("toml", "python"))
    points: dict[str, dict[str, str]] = {}
    module = ""
    for line in project.text.splitlines():
        if group := _GROUP.fullmatch(line):
            named = points.setdefault(group[1], {})
        elif points and (point := _POINT.fullmatch(line)):
            named[point[1]] = point[2]
            module = point[2].partition(":")[0]
    install(folder, module, source.text, points)
    return module
