"""The C kernels, built into a folder of one's own (with a sanitizer, with a bug), and used in this process alone."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

REPO = Path(__file__).resolve().parents[2]
NAME = "pdtransport.kernels._pages"
VARIABLE = "PDT_TEST_EXTENSION"  # as pytest's plugin (-p tests.rig.extension): the file to use


def build(folder: Path, more: Sequence[str] = (), sources: Path = REPO) -> Path:
    """Compile the extension that setup.py describes, its C files below ``sources``, with ``more`` flags; its path.

    Raises:
        subprocess.CalledProcessError: the compiler says no.
    """
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(REPO / "setup.py"))
    (extension,) = setup.call_args.kwargs["ext_modules"]
    target = folder / f"_pages{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", *extension.extra_compile_args, *more]
    command += [str(sources / each) for each in extension.sources]
    subprocess.run([*command, "-o", str(target), *extension.extra_link_args], check=True, timeout=120)
    return target


class Instead(importlib.abc.MetaPathFinder):
    """Puts another file, or other source text, in the place of one module that has not been imported yet."""

    def __init__(self, name: str, path: Path, source: str | None = None) -> None:
        self.name, self.path, self.source = name, path, source
        self.used = False

    def install(self) -> None:
        """
        Raises:
            RuntimeError: the module was imported before.
        """
        if self.name in sys.modules:
            raise RuntimeError(f"{self.name} is imported already")
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        self.used = True
        if self.source is None:
            return importlib.util.spec_from_file_location(name, self.path)
        loader = _Text(name, str(self.path), self.source)
        folder = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, self.path, loader=loader, submodule_search_locations=folder)


class _Text(SourceFileLoader):
    """Source that stands in no file; nothing is cached."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> Any:
        return compile(self._source, self.path, "exec", dont_inherit=True)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:  # which import the kernels
    use_given()


def pytest_collection_finish() -> None:
    path = os.environ.get(VARIABLE)
    if path and getattr(sys.modules.get(NAME), "__file__", "") != path:
        pytest.exit(f"no test uses {path}", returncode=3)


def use_given() -> None:
    """Use the file that the variable names, if it names one."""
    if path := os.environ.get(VARIABLE):
        Instead(NAME, Path(path)).install()
