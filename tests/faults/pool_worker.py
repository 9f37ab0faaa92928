"""The pool's service, and a client of it, each in a process of its own that the driver commands, kills and asks."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from pdtransport.errors import PoolUnavailable, SettingsError
from pdtransport.kernels import pages
from pdtransport.kernels.runs import Runs
from pdtransport.pool.admin.pool_admin import Chosen, PoolAdmin
from pdtransport.pool.client.copiers import HostCopier
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import PoolSettings
from tests.faults.worker import Complaints, descriptors, resident_bytes
from tests.processes.pool_rig import Bytes, content, key

PIECE = 16 << 10  # an engine's pages: chunks are scattered over pieces of this size
SMALLEST, LARGEST = 4 << 10, 200 << 10  # bytes of a chunk
THREADS = 2  # of a client
GO_S = 10.0  # a copy that was halted goes on after this, whatever the driver does


@dataclass(frozen=True)
class ServiceStart:
    settings: dict[str, Any]
    role: str = "pool"
    rank: int = 0


@dataclass(frozen=True)
class ClientStart:
    directory: Path
    rank: int
    role: str = "client"


@dataclass(frozen=True)
class CopyRule:
    """Act in the middle of copy number ``nth`` of a ``verb``, when its first bytes are written: ``kill`` or ``stop``
    this process, or ``halt`` until the driver says ``go``."""

    verb: str
    nth: int
    action: str


def bytes_of(number: int) -> int:
    """Length of the chunk of this number, a multiple of 8."""
    return SMALLEST + number * 7919 * 8 % (LARGEST - SMALLEST)


def facts(complaints: Complaints) -> dict[str, Any]:
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "open": dict(descriptors()),
        "threads": len(os.listdir("/proc/self/task")),
        "resident": resident_bytes(),
        "complaints": list(complaints.found),
    }


def complain() -> Complaints:
    complaints = Complaints()
    logging.getLogger().handlers = [complaints]
    return complaints


def serve(pipe: Connection, start: ServiceStart) -> None:
    """The service, as ``pdpool`` runs it."""
    complaints = complain()
    try:
        pool = Pool(PoolSettings.parse(start.settings))
    except SettingsError as error:
        pipe.send(("failed", str(error)))
        return
    with pool:
        pipe.send(("up", os.getpid(), 0))
        while (verb := _heard(pipe)) != "exit":
            assert verb == "audit"
            pipe.send(("audit", facts(complaints)))


def _heard(pipe: Connection) -> str:
    try:
        return str(pipe.recv()[0])
    except EOFError:
        return "exit"


def use(pipe: Connection, start: ClientStart) -> None:
    """A client: an engine's worker, as far as a pool can tell."""
    user = User(pipe, start)
    pipe.send(("up", os.getpid(), 0))
    user.serve()
    user.client.close()


class User:
    def __init__(self, pipe: Connection, start: ClientStart) -> None:
        self.pipe, self.complaints = pipe, complain()
        self.client = PoolClient(directory=start.directory, threads=THREADS, who=f"client{start.rank}")
        together = threading.Barrier(THREADS)
        for _ in range(THREADS):  # start them all: they count as there from the beginning
            self.client._copiers.submit(together.wait, GO_S)
        self._say = threading.Lock()
        self._rules: list[CopyRule] = []
        self._seen: Counter[str] = Counter()
        self._go = threading.Event()
        self._copies = threading.local()
        self._asked: Counter[str] = Counter()
        self._under_way: dict[str, Any] = {}
        self._hook()

    def say(self, *words: Any) -> None:
        with self._say:
            self.pipe.send(words)

    def serve(self) -> None:
        while True:
            try:
                verb, *arguments = self.pipe.recv()
            except EOFError:
                return
            if verb == "exit":
                return
            getattr(self, "do_" + verb)(*arguments)

    # -- the middle of a copy ----------------------------------------------------------------------------------------

    def _hook(self) -> None:
        whole, begin = pages.read_mapped, HostCopier.begin

        def named(copier: HostCopier, *arguments: Any, storing: bool, **more: Any) -> Any:
            self._copies.verb = "store" if storing else "load"
            return begin(copier, *arguments, storing=storing, **more)

        def struck(source: Runs, target: Runs, blocks: int = 0, **more: Any) -> Any:
            verb = self._copies.verb
            self._seen[verb] += 1
            for rule in [rule for rule in self._rules if (rule.verb, rule.nth) == (verb, self._seen[verb] - 1)]:
                whole(np.array([[source[0, 0], 8]], np.uint64), np.array([[target[0, 0], 8]], np.uint64), 0)
                self._strike(rule.action)
            return whole(source, target, blocks, **more)

        HostCopier.begin = named  # type: ignore[method-assign]
        pages.read_mapped = struck  # type: ignore[assignment]

    def _strike(self, action: str) -> None:
        if action == "halt":
            self.say("halted")
            self._go.wait(GO_S)
        else:
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)

    def do_rules(self, rules: list[CopyRule]) -> None:
        self._rules, self._seen = rules, Counter()
        self._go.clear()

    def do_go(self) -> None:
        self._go.set()

    # -- stores and loads --------------------------------------------------------------------------------------------

    def do_ask(self, name: str, verb: str, numbers: Sequence[int], deadline_s: float) -> None:
        """Begin; ``ended`` says what became of it."""
        self._asked[verb] += len(numbers)
        memory = [Scattered(number, fill=verb == "store") for number in numbers]
        call = self.client.store if verb == "store" else self.client.load
        pending = call([key(number) for number in numbers], [each.runs for each in memory], deadline_s=deadline_s)
        self._under_way[name] = pending

        def ended(_: object) -> None:
            at, done, wrong = time.monotonic(), pending.future.result(), []
            for number, each, verdict in zip(numbers, memory, done.verdicts, strict=True):
                if (verdict.name == "READ" or verb == "store") and not each.right():
                    wrong.append(number)
            verdict = f"{verb}: wrong bytes of chunks {wrong}" if wrong else ""
            names = ",".join(each.name for each in done.verdicts)
            del self._under_way[name]
            self.say("ended", name, not done.error, names, done.error, verdict, at)

        pending.future.add_done_callback(ended)

    def do_cancel(self, name: str) -> None:
        if name in self._under_way:
            self._under_way[name].cancel()

    def do_pin(self, name: str, numbers: Sequence[int], for_s: float) -> None:
        try:
            chosen = Chosen(keys=tuple(key(number) for number in numbers))
            pinned = PoolAdmin(self.client).pin(chosen, "hard", for_s).done
            self.say("ended", name, True, "PINNED" if pinned == len(numbers) else "UNPINNED", "", "", time.monotonic())
        except PoolUnavailable as error:
            self.say("ended", name, False, "UNPINNED", str(error), "", time.monotonic())

    def do_audit(self) -> None:
        counters = dict(self.client.counters)
        self.say("audit", {**facts(self.complaints), "counters": counters, "asked": dict(self._asked)})


class Scattered:
    """One chunk's pages in an engine's memory, in no order."""

    def __init__(self, number: int, *, fill: bool) -> None:
        nbytes = bytes_of(number)
        self._right = content(number, nbytes)
        self._pieces = [self._right[at : at + PIECE] for at in range(0, nbytes, PIECE)]
        self._memory = np.full((len(self._pieces), PIECE), 0xA5, dtype=np.uint8)
        self._order = np.random.default_rng(number).permutation(len(self._pieces))
        self.runs: Runs = np.array(
            [
                (self._memory.ctypes.data + int(place) * PIECE, len(piece))
                for place, piece in zip(self._order, self._pieces, strict=True)
            ],
            dtype=np.uint64,
        )
        for place, piece in zip(self._order, self._pieces if fill else (), strict=fill):
            self._memory[place, : len(piece)] = piece

    def right(self) -> bool:
        """It holds the chunk, and nothing was written beside it."""
        return all(self._is(place, piece) for place, piece in zip(self._order, self._pieces, strict=True))

    def _is(self, place: int, piece: Bytes) -> bool:
        row = self._memory[place]
        return bool((row[: len(piece)] == piece).all() and (row[len(piece) :] == 0xA5).all())
