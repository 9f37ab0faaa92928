"""The driver's hold on worker processes: forked from a clean server that has everything imported, signalled, ended."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from tests.faults.worker import main

UP_S = 60.0  # the first one waits for the fork server's imports
ANSWER_S = 20.0
EXIT_S = 15.0

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.preload"])


class Startable(Protocol):
    """What a process is told at its start."""

    role: str
    rank: int


@dataclass
class Ended:
    """How a transfer ended on one worker. ``verdict`` is what is wrong with its bytes, or empty."""

    transfer: str
    ok: bool
    code: str
    reason: str
    verdict: str
    at: float


class WorkerLost(Exception):
    """The process is gone, or does not answer."""


class Process:
    """A worker process that can be started again under the same name and port. ``target`` runs in it; it has to say
    that it is up, to answer audits, and to end at ``exit``."""

    def __init__(self, start: Startable, target: Callable[[Connection, Any], None] = main) -> None:
        self.start = start
        self._target = target
        self.name = f"{start.role}{start.rank}"
        self.starts = 0
        self.pipe: Connection | None = None
        self.ended: list[Ended] = []
        self.broken: list[str] = []  # what it died of, if nobody killed it
        self.said: list[tuple[Any, ...]] = []  # anything else
        self.pid = self.port = 0
        self._process: Any = None

    def up(self) -> None:
        """Start it, and wait until it serves."""
        if self.alive:
            return
        self.close()
        ours, theirs = _context.Pipe()
        self._process = _context.Process(target=self._target, args=(theirs, self.start), daemon=True)
        self._process.start()
        theirs.close()
        self.pipe, self.starts = ours, self.starts + 1
        kind, *rest = self._next(UP_S)
        if kind != "up":
            raise WorkerLost(f"{self.name} did not start: {rest}")
        self.pid, self.port = rest

    @property
    def alive(self) -> bool:
        return self._process is not None and self.pipe is not None and self._process.is_alive()

    def tell(self, *words: Any) -> bool:
        """Say something; False if nobody is there."""
        if self.pipe is None:
            return False
        try:
            self.pipe.send(words)
        except OSError:
            return False
        return True

    def read(self) -> bool:
        """Take one thing that it said; False if it is gone."""
        if self.pipe is None:
            return False
        try:
            kind, *rest = self.pipe.recv()
        except (EOFError, OSError):
            self.lose()
            return False
        self._note(kind, rest)
        return True

    def _note(self, kind: str, rest: list[Any]) -> None:
        if kind == "ended":
            self.ended.append(Ended(*rest))
        elif kind == "broken":
            self.broken += rest
        else:
            self.said.append((kind, *rest))

    def audit(self) -> dict[str, Any]:
        """
        Raises:
            WorkerLost: it does not answer.
        """
        if not self.tell("audit"):
            raise WorkerLost(f"{self.name} is gone")
        kind, *rest = self._next(ANSWER_S)
        while kind != "audit":
            self._note(kind, rest)
            kind, *rest = self._next(ANSWER_S)
        found: dict[str, Any] = rest[0]
        return found

    def _next(self, timeout_s: float) -> tuple[Any, ...]:
        assert self.pipe is not None
        try:
            if not self.pipe.poll(timeout_s):
                raise WorkerLost(f"{self.name} said nothing for {timeout_s} s")
            said: tuple[Any, ...] = self.pipe.recv()
        except (EOFError, OSError):
            self.lose()
            raise WorkerLost(f"{self.name} is gone") from None
        return said

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.alive:
                os.kill(self.pid, number)

    @property
    def stopped(self) -> bool:
        """It was sent SIGSTOP and no SIGCONT."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rsplit(b")", 1)[1].split()[0] == b"T"
        except OSError:
            return False

    def lose(self) -> None:
        """It is dead: reap it."""
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None
        if self._process is not None:
            self._process.join(EXIT_S)

    def close(self) -> str:
        """End it in order; what went wrong with that, or nothing."""
        if self._process is None:
            return ""
        problem = ""
        if self.alive:
            self.signal(signal.SIGCONT)
            self.tell("exit")
            until = time.monotonic() + EXIT_S
            while self.pipe is not None and time.monotonic() < until and self._process.is_alive():
                if self.pipe.poll(0.05):
                    self.read()
            self._process.join(0.1)
            if self._process.is_alive():
                problem = f"{self.name} did not end within {EXIT_S} s of being told to"
                self._process.kill()
        self.lose()
        self._process = None
        return problem
