"""Restarts a topology's pool when it dies.

Servers can compute without a pool, so its death ends nothing else. Pauses between restarts grow, and their number is
limited.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pdtransport.launch import logs
from pdtransport.launch.plan import PoolPlan
from pdtransport.launch.processes import Process, ProcessGroup
from pdtransport.pool.core.shared_memory import remove_stale

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
MAX_DEATHS = 6  # in a row; after that the servers continue without a pool
LASTED_S = 600.0  # a pool that was up this long starts a new row

Say = Callable[[str], None]


class PoolKeeper:
    """The pool's current process. Call :meth:`look` often; it never blocks."""

    def __init__(self, plan: PoolPlan, fleet: ProcessGroup, say: Say) -> None:
        self._plan, self._fleet, self._say = plan, fleet, say
        self.process = fleet.start("pool", plan.argv)
        self._ready = False
        self._deaths = 0
        self._again_at: float | None = None  # time of the next restart; until then no process runs

    def ready(self) -> str:
        """The pool's message once it serves; empty until then."""
        return next((line.partition(": ")[2] for line in self.process.tail(8) if " serves " in line), "")

    def serves(self, told: str) -> None:
        """The pool serves from now on: report it."""
        self._ready = True
        if not self._deaths:
            self._fleet.spare(self.process)
        at = f", HTTP API at {self._plan.url}" if self._plan.url else ""
        self._say(f"  {'pool':<12} {self.process.seconds:4.0f} s  ready: {told}{at}")

    def look(self) -> None:
        """Check the process and restart it if it died.

        Does nothing before the pool has served once: a pool that can't start fails the launch.
        """
        if not self._ready and not self._deaths:
            return
        if self._again_at is not None:
            if time.monotonic() >= self._again_at:
                self._again_at = None
                self._start()
        elif self.process in self._fleet.processes:
            status = self.process.poll()
            if status is not None:
                self._on_death(self.process, status)
            elif not self._ready and (told := self.ready()):
                self.serves(told)

    def _start(self) -> None:
        try:
            self.process = self._fleet.start("pool", self._plan.argv, again=True)
        except OSError as error:
            self._pause(f"can't be started ({error.strerror})")
        else:
            self._fleet.spare(self.process)

    def _on_death(self, process: Process, status: int) -> None:
        self._fleet.forget(process)
        if self._ready and process.seconds > LASTED_S:
            self._deaths = 0
        self._ready = False
        self.free_memory()
        cause = logs.likely_cause(process.tail(64), status, process.out_of_memory())
        self._pause(f"{logs.ending(status)}{f' ({cause})' if cause else ''}")

    def _pause(self, what: str) -> None:
        self._deaths += 1
        if self._deaths >= MAX_DEATHS:
            self._say(
                f"pool {what}, for the {self._deaths}th time in a row: it is not restarted, and requests are served "
                f"without it; its log: {self.process.log}"
            )
            return
        pause = min(FIRST_PAUSE_S * 2 ** (self._deaths - 1), LONGEST_PAUSE_S)
        self._again_at = time.monotonic() + pause
        self._say(f"pool {what}: restarted in {pause:g} s; requests are served without it; its log: {self.process.log}")

    def free_memory(self) -> None:
        """Remove the shared memory of a pool that was killed: the kernel does not free it when the process ends."""
        remove_stale(self._plan.memory_dir, self._plan.name)
