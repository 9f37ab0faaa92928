"""What users install: wheel, sdist and editable installs hold the same package, and nothing else. Needs no network."""

from __future__ import annotations

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
ROOMS = {"pdtransport": "pdtransport", "kernels": "pdtransport/kernels", "launch": "pdtransport/launch"}
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
NOT_PACKAGED = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build", "dist", "models")
HAS_COMPILER = any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def copy_of_the_repository(target: Path) -> Path:
    """What a fresh clone holds, as far as building reads it."""
    target.mkdir()
    for name in (*ROOMS, "docs", "examples"):
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, target / name, ignore=NOT_PACKAGED)
    for path in REPO.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, target)
    for name in ("tests", "benchmarks", "scripts"):
        (target / name).mkdir()
        (target / name / "__init__.py").touch()
    return target


def build(source: Path, kind: str, **env: str) -> tuple[Path, str]:
    """The built file and what the build said."""
    out = source.parent / f"{source.name}-{kind}"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(out)],
        cwd=source,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1], done.stdout + done.stderr


def modules_of_the_repository() -> set[str]:
    found = set()
    for room, package in ROOMS.items():
        found |= {f"{package}/{path.relative_to(REPO / room)}" for path in (REPO / room).rglob("*.py")}
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return build(copy_of_the_repository(tmp_path_factory.mktemp("sdist") / "source"), "sdist")


@pytest.fixture(scope="module")
def unpacked(sdist: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist[0]) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> tuple[Path, str]:
    """Built from the sdist, so it shows that the sdist holds all that a build needs."""
    return build(unpacked, "wheel")


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_module_and_nothing_else(wheel: tuple[Path, str]) -> None:
    """All modules of pdtransport/, kernels/ and launch/ are installed below pdtransport, and the GPU kernels' source,
    which is compiled where it is used; no tests, nothing beside."""
    held = names(wheel[0])
    assert {name for name in held if name.endswith(".py")} == modules_of_the_repository()
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"pdtransport"}
    assert "pdtransport/py.typed" in held
    assert [name for name in held if "csrc" in name] == ["pdtransport/kernels/csrc/pages.cu"]


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler here")
def test_wheel_holds_the_compiled_kernels(wheel: tuple[Path, str]) -> None:
    """Where there is a compiler, the CPU kernels come compiled."""
    assert [name for name in names(wheel[0]) if name.startswith("pdtransport/kernels/_pages") and name.endswith(".so")]


def test_wheel_registers_its_commands_and_the_vllm_plugin(wheel: tuple[Path, str]) -> None:
    """pdlaunch, pdpool and pdrouter are commands, and vLLM finds the connector by its plugin entry point."""
    with zipfile.ZipFile(wheel[0]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
        points = configparser.ConfigParser()
        points.read_string(archive.read(name).decode())
        [metadata] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        text = archive.read(metadata).decode()
    assert set(points["console_scripts"]) == {"pdlaunch", "pdpool", "pdrouter"}
    assert dict(points["vllm.general_plugins"]) == {"pdtransport": "pdtransport.vllm:register"}
    assert set(points["pdtransport.pool.tiers"]) == {"mooncake", "nixl"}
    assert "License-Expression: Apache-2.0" in text
    core = [line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not [line for line in core for heavy in ("vllm", "torch", "ucxx", "cupy") if heavy in line]


def test_no_extra_brings_vllm(wheel: tuple[Path, str]) -> None:
    """Whatever extras are asked for, the vLLM that is there stays the only one, and so does its torch."""
    with zipfile.ZipFile(wheel[0]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    wanted = metadata.get_all("Requires-Dist") or []
    named = {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in wanted}
    assert not [name for name in named if name.startswith(("vllm", "torch"))]
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert {"cu12", "cu13"} <= extras
    for number in ("12", "13"):
        [line] = [line for line in wanted if line.startswith("pdtransport[") and f'"cu{number}"' in line]
        asked = set(line.partition("[")[2].partition("]")[0].split(","))
        assert asked == {f"cupy-cu{number}", f"ucx-cu{number}"} <= extras


def test_sdist_holds_the_c_sources_without_complaint(sdist: tuple[Path, str]) -> None:
    """The C sources travel in the sdist, and setuptools does not warn of data outside the packages."""
    with tarfile.open(sdist[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"kernels/csrc/{path.name}" for path in (REPO / "kernels" / "csrc").iterdir()} <= held
    assert "absent from the `packages` configuration" not in sdist[1]
    assert not [name for name in held if name.endswith((".so", ".safetensors")) or name.startswith("tests")]


def test_wheel_build_does_not_complain_of_packages(wheel: tuple[Path, str]) -> None:
    """No warning of packages that a later setuptools will leave out."""
    assert "absent from the `packages` configuration" not in wheel[1]


def test_builds_without_a_compiler(tmp_path: Path) -> None:
    """Without a C compiler the package builds all the same, without the compiled kernels."""
    source = copy_of_the_repository(tmp_path / "source")
    built, _ = build(source, "wheel", CC="/nonexistent/cc", CXX="/nonexistent/c++")
    held = names(built)
    assert not [name for name in held if name.endswith(".so")]
    assert {name for name in held if name.endswith(".py")} == modules_of_the_repository()


CHECK = """
import importlib, sys
import pdtransport.kernels, pdtransport.launch.cli, pdtransport.router.cli
print(pdtransport.launch.cli.__file__)
for name in ("kernels", "launch"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"there is a top-level module {name}")
"""


@pytest.mark.more
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installs_put_kernels_and_launch_inside_the_package(kind: str, wheel: tuple[Path, str], tmp_path: Path) -> None:
    """After either install, kernels and launch are pdtransport's, there is no module of those names, and the commands
    run."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    # This environment's packages, but not its own editable install: .pth files are not followed from there.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    source = copy_of_the_repository(tmp_path / "source")
    target = [str(wheel[0])] if kind == "wheel" else ["--no-build-isolation", "-e", str(source)]
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "-q"]
    done = subprocess.run(
        [*pip, "--no-deps", "--no-index", "--ignore-installed", *target],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "CC": "/nonexistent/cc"},
    )
    assert done.returncode == 0, done.stderr
    found = subprocess.run(
        [str(home / "bin" / "python"), "-P", "-c", CHECK] if sys.version_info >= (3, 11) else
        [str(home / "bin" / "python"), "-I", "-c", CHECK],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(str(site if kind == "wheel" else source))
    for command in ("pdlaunch", "pdrouter"):
        shown = subprocess.run([home / "bin" / command, "--help"], capture_output=True, text=True, timeout=120)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith(f"usage: {command}")


IMPORT_ALL = """
import importlib, pkgutil, sys, threading
heavy = {"torch", "vllm", "ucxx", "ucp", "cupy"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in heavy:
            raise ImportError(f"{name} is optional and was imported")
sys.meta_path.insert(0, Refuse())
import pdtransport
for module in pkgutil.walk_packages(pdtransport.__path__, "pdtransport."):
    if not module.name.startswith("pdtransport.vllm.") and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert threading.active_count() == 1, threading.enumerate()
"""


def test_imports_start_nothing_and_need_no_optional_package() -> None:
    """Importing any module (but the connector's own) needs neither torch, vLLM, UCX nor cupy, and starts no thread."""
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
