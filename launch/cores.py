"""Parses, formats and distributes lists of CPU cores."""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_CORE = 4095


def parse_cores(text: str) -> list[int]:
    """``"0-3,8"`` to ``[0, 1, 2, 3, 8]``.

    Raises:
        ValueError: not such a list.
    """
    cores: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high or high > MAX_CORE:
            raise ValueError(f"{text!r} is not a list of cores; write 0-3,8 or [0, 1, 2, 3, 8]")
        cores.extend(range(low, high + 1))
    return cores


def format_cores(cores: Sequence[int]) -> str:
    """``[0, 1, 2, 3, 8]`` to ``"0-3,8"``."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def share_out(cores: Sequence[int], workers: int) -> list[list[int]]:
    """Split the cores over the workers, in order and as evenly as possible.

    With fewer cores than workers, each worker gets one core, and cores are reused in turn.
    """
    if len(cores) < workers:
        return [[cores[worker % len(cores)]] for worker in range(workers)]
    bounds = [len(cores) * worker // workers for worker in range(workers + 1)]
    return [list(cores[bounds[worker] : bounds[worker + 1]]) for worker in range(workers)]
