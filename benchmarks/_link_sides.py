"""The two processes of `benchmarks.links`: real channels, with a pipe in place of the control channel."""

from __future__ import annotations

import multiprocessing as mp
import select
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from pdtransport.errors import LinkUnavailable
from pdtransport.links.base import LinkBusy, Region
from pdtransport.links.negotiate import choose, open_links
from pdtransport.settings import LinkSettings

BLOCK_BYTES = 1 << 20  # of KV, one checksum each; a multiple of every page
ANSWER_S = 60.0

Runs = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Case:
    """One measurement: ``nbytes`` in pages of ``page`` bytes."""

    nbytes: int
    page: int
    shuffled: bool
    checksums: bool

    @property
    def label(self) -> str:
        return f"{'shuffled' if self.shuffled else 'in order'}, checksums {'full' if self.checksums else 'off'}"


class Pair:
    """Two processes with a channel of link ``name`` between them.

    Raises:
        LinkUnavailable: the link can't be used here.
    """

    def __init__(self, name: str, nbytes: int) -> None:
        context = mp.get_context("spawn")
        between = context.Pipe()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for end in between:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, end, name, nbytes), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        exports = [self._answer(pipe) for pipe in self._pipes]
        for pipe, export in zip(self._pipes, reversed(exports), strict=True):
            pipe.send(export)
        self.why: str = [self._answer(pipe) for pipe in self._pipes][1]

    def rate(self, case: Case) -> float:
        """Bytes a second from "go" to the last page placed and, with checksums, verified."""
        for pipe in self._pipes:
            pipe.send(case)
        seconds: list[float] = [self._answer(pipe) for pipe in self._pipes]
        return case.nbytes / seconds[1]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    @staticmethod
    def _answer(pipe: Connection) -> Any:
        if not pipe.poll(ANSWER_S):
            raise TimeoutError(f"a side did not answer within {ANSWER_S:.0f} s")
        answer = pipe.recv()
        if isinstance(answer, LinkUnavailable):
            raise answer
        return answer


def _serve(orders: Connection, peer: Connection, name: str, nbytes: int) -> None:
    try:
        side = _Side(name, nbytes, peer)
        orders.send(side.link.export())
        orders.send(side.connect(orders.recv()))
    except LinkUnavailable as error:
        orders.send(error)
        return
    sender = side.is_sender()
    try:
        while True:
            case = orders.recv()
            orders.send(side.give(case) if sender else side.take(case))
    except EOFError:
        side.link.close()


class _Side:
    def __init__(self, name: str, nbytes: int, peer: Connection) -> None:
        self._name, self._peer = name, peer
        self._settings = LinkSettings.model_validate({"order": [name]})
        self._memory = np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)
        opened = open_links(self._settings, [Region(self._memory.ctypes.data, nbytes, self._memory)])
        self._links = opened.links
        self.link = opened.links[name]
        self._next_key = 1

    def connect(self, export: bytes) -> str:
        self._channel = choose(self._links, {}, (self._name,), None, {self._name: export}, "the other side")
        return self._channel.why

    def is_sender(self) -> bool:
        """The sides draw lots: the first of the pipe's ends sends."""
        token = time.monotonic_ns()
        self._peer.send(token)
        return token < self._peer.recv()

    def give(self, case: Case) -> float:
        """Offer all batches, no more than the window at once, as prefill does."""
        todo = list(enumerate(self._batches(case), self._next_key))
        blocks = self._settings.batch_bytes // BLOCK_BYTES if case.checksums else 0
        in_flight, window = 0, self._settings.window_bytes // self._settings.batch_bytes
        assert self._peer.recv() == "go"
        begin = time.perf_counter()
        while todo or in_flight:
            worked = self.link.progress()
            while self._peer.poll(0):
                self._channel.release(self._peer.recv())
                in_flight, worked = in_flight - 1, True
            try:
                while todo and in_flight < window:
                    key, runs = todo[0]
                    self._peer.send((key, *self._channel.send(key, runs, blocks)))
                    todo.pop(0)
                    in_flight, worked = in_flight + 1, True
                    self._next_key = key + 1
                    self.link.progress()
            except LinkBusy:
                pass
            self._sleep(worked)
        return time.perf_counter() - begin

    def take(self, case: Case) -> float:
        """Take batches as they are announced, as decode does."""
        places = self._batches(case)
        blocks = self._settings.batch_bytes // BLOCK_BYTES
        placed: list[int] = []

        def done(key: int, error: str | None) -> None:
            if error:
                raise RuntimeError(error)
            placed.append(key)
            self._peer.send(key)

        self._peer.send("go")
        begin = time.perf_counter()
        announced = 0
        while len(placed) < len(places):
            worked = self.link.progress()
            while self._peer.poll(0):
                key, offer, sums = self._peer.recv()
                runs = places[announced]
                announced, worked = announced + 1, True
                self._channel.receive(key, offer, runs, sums, blocks, lambda error, key=key: done(key, error))
            self._sleep(worked)
            if time.perf_counter() - begin > ANSWER_S:
                raise TimeoutError(f"{case}: not done after {ANSWER_S:.0f} s")
        return time.perf_counter() - begin

    def _sleep(self, worked: bool) -> None:
        if worked or not self.link.arm():
            return
        waiting: list[Any] = [self._peer, *([self.link.fileno()] if self.link.fileno() >= 0 else [])]
        select.select(waiting, [], [], 1.0)

    def _batches(self, case: Case) -> list[Runs]:
        order = np.arange(case.nbytes // case.page)
        if case.shuffled:
            order = np.random.default_rng().permutation(order)
        runs = np.empty((len(order), 2), dtype=np.uint64)
        runs[:, 0] = order.astype(np.uint64) * np.uint64(case.page) + np.uint64(self._memory.ctypes.data)
        runs[:, 1] = case.page
        batches: list[Runs] = np.split(runs, case.nbytes // self._settings.batch_bytes)
        return batches
