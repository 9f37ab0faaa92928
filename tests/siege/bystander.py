"""A bystander of an attack: how long it waits for its answers, beside how long it waits when nobody attacks."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

AT_MOST = 3.0  # times its time when idle, and
FLOOR_S = 0.1  # less than this is no effect: two cores, on which the attackers run as well
SUITE_FLOOR_S = 0.25  # the same in the test suite, whose other tests run on those cores, too
SUITE_TRIES = 3  # of an attack there
MEMORY_WITHIN = 0.10  # of what it was before, once the attack is over
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Effect:
    """What an attack did to one bystander and to the process that was attacked.

    Args:
        attack: What was done, in a few words.
        idle_s: Seconds of each probe before the attack.
        under_s: Seconds of each probe while it went on.
        memory_before: Resident bytes of the process before.
        memory_after: The same when the attack is over.
        processor_s: Seconds of processor time that the process took during the attack.
        lines: Lines that the process wrote to its log during the attack.
    """

    attack: str
    idle_s: list[float] = field(default_factory=list)
    under_s: list[float] = field(default_factory=list)
    memory_before: int = 0
    memory_after: int = 0
    processor_s: float = 0.0
    lines: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median wait under attack, by the median wait before."""
        return statistics.median(self.under_s) / statistics.median(self.idle_s)

    def complaint(self, lines_at_most: int = 1, floor_s: float = FLOOR_S) -> str:
        """What is wrong with it, or nothing."""
        under, idle = statistics.median(self.under_s), statistics.median(self.idle_s)
        found = []
        if under > max(AT_MOST * idle, floor_s):
            found.append(f"a bystander waits {under * 1e3:.1f} ms instead of {idle * 1e3:.1f}")
        if self.memory_after > (1 + MEMORY_WITHIN) * self.memory_before:
            found.append(f"memory grew from {self.memory_before >> 20} to {self.memory_after >> 20} MiB")
        if len(self.lines) > lines_at_most:
            found.append(f"{len(self.lines)} lines of log: {self.lines[:3]!r}")
        return "; ".join(found)

    def row(self) -> str:
        """One row of the table that ``python -m tests.siege`` prints."""
        idle, under = statistics.median(self.idle_s) * 1e3, statistics.median(self.under_s) * 1e3
        memory = f"{self.memory_before / 2**20:.0f} → {self.memory_after / 2**20:.0f}"
        return (
            f"| {self.attack} | {idle:.2f} | {under:.2f} | {max(self.under_s) * 1e3:.1f} | {memory} |"
            f" {self.processor_s:.2f} | {len(self.lines)} |"
        )


AnyEffect = TypeVar("AnyEffect", bound=Effect)


def in_the_suite(attack: Callable[[Path], AnyEffect], parent: Path, lines_at_most: int = 1) -> AnyEffect:
    """The effect of an attack beside other tests, which hold a bystander up now and then; a fault does so every time.

    Args:
        attack: gets a new folder in ``parent`` at each try.

    Raises:
        AssertionError: there was something to complain about in each of ``SUITE_TRIES`` tries.
    """
    for number in range(SUITE_TRIES):
        folder = parent / f"try{number}"
        folder.mkdir()
        effect = attack(folder)
        complaint = effect.complaint(lines_at_most, SUITE_FLOOR_S)
        if not complaint:
            return effect
    raise AssertionError(complaint)


HEADER = (
    "| attack | bystander idle, ms | under attack, ms | longest, ms | memory, MiB | processor, s | log lines |\n"
    "|---|---|---|---|---|---|---|"
)


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor_s(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def timed(probe: Callable[[], object]) -> float:
    start = time.perf_counter()
    probe()
    return time.perf_counter() - start


def idle(effect: Effect, probe: Callable[[], object], times: int = 20) -> None:
    """Ask ``times`` times while nobody attacks."""
    probe()  # the first one pays for connections and imports
    effect.idle_s += [timed(probe) for _ in range(times)]


@contextmanager
def watched(effect: Effect, probe: Callable[[], object], pause_s: float = 0.02) -> Iterator[None]:
    """Ask again and again in a thread of its own as long as the block runs, and at least five times.

    Raises:
        Exception: whatever a probe raised: a bystander that is refused is an effect, too.
    """
    over, failed = threading.Event(), []

    def ask() -> None:
        try:
            while not over.is_set() or len(effect.under_s) < 5:
                effect.under_s.append(timed(probe))
                time.sleep(pause_s)
        except Exception as error:  # noqa: BLE001  # raised again by whoever started the watch
            failed.append(error)

    thread = threading.Thread(target=ask, name="bystander")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failed:
        raise failed[0]


def settled(pid: int, before: int, within_s: float = 10.0) -> int:
    """Resident bytes of a process once they are back at ``before`` (within a tenth), or after ``within_s``."""
    deadline = time.monotonic() + within_s
    while (now := resident(pid)) > (1 + MEMORY_WITHIN) * before and time.monotonic() < deadline:
        time.sleep(0.1)
    return now
