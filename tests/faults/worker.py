"""One worker process of the rig: a transport on memory of its own, between canaries, driven over a pipe.

The main thread does what the driver says and judges what a transfer left in memory; the transport's I/O thread is left
alone. Prefill's pages hold a pattern that follows from the request's seed; decode's hold canaries until they are
granted. Pages that were given back are overwritten at once, so that a late read or write shows.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
import time
import traceback
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from pdtransport import KVGeometry, Settings, Transport, prompt_digest
from pdtransport.links.base import Link
from pdtransport.transfer.outcome import Outcome
from tests.faults.inject import install
from tests.faults.mutants import MUTANTS
from tests.faults.rules import Injector

LAYERS, PAGES, HEADS, BLOCK_SIZE, SLOT = 2, 128, 4, 16, 64
GUARD = 1 << 16  # bytes before and behind the pages that no link may touch
CANARY, EMPTY = 0xC5, 0x3A
MAX_COMPLAINTS = 20
JOIN_S = 10.0


@dataclass
class Start:
    """What a worker is told when it starts."""

    role: str  # "prefill" or "decode"
    engine: str
    rank: int
    world: int
    port: int
    settings: dict[str, Any]
    namespace: str = ""  # network namespace to live in
    environment: dict[str, str] = field(default_factory=dict)
    mutant: str = ""  # a bug to have, of :mod:`tests.faults.mutants`


@lru_cache(maxsize=8)
def pattern(seed: int, blocks: int) -> np.ndarray:
    """``[layers, blocks, heads, tokens, slot]`` bytes of a request, all heads."""
    words = LAYERS * blocks * HEADS * BLOCK_SIZE * SLOT // 8
    whole = np.random.default_rng(seed).integers(0, 1 << 63, words, dtype=np.uint64)
    return whole.view(np.uint8).reshape(LAYERS, blocks, HEADS, BLOCK_SIZE, SLOT)


def digest_of(seed: int) -> bytes:
    return prompt_digest(hashlib.blake2b(str(seed).encode(), digest_size=8).digest())


def token_of(seed: int) -> int:
    """The first token that prefill samples for a request."""
    return seed % 50_000


def promises(seed: int) -> bool:
    """Whether decode promises to go on from prefill's first token: every other request."""
    return seed % 2 == 1


@dataclass
class Held:
    """Pages of one transfer here."""

    pages: list[int]
    handle: Any
    seed: int
    blocks: int
    first: int = 0


class Complaints(logging.Handler):
    """Errors with a traceback are bugs, wherever they are swallowed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and len(self.found) < MAX_COMPLAINTS:
            trace = logging.Formatter().formatException(record.exc_info)
            self.found.append(f"{record.getMessage()}: {trace[-1500:]}")


def main(pipe: Connection, start: Start) -> None:
    os.environ.update(start.environment)
    if start.namespace:
        from tests.processes.link_rig import _enter_network

        _enter_network(start.namespace)
    complaints = Complaints()
    logging.getLogger().handlers = [complaints]
    if start.mutant:
        MUTANTS[start.mutant]()
    injector = Injector()
    links = install(injector)
    try:
        worker = Worker(pipe, start, injector, links, complaints)
    except Exception as error:  # noqa: BLE001 - told to the driver
        pipe.send(("failed", repr(error)))
        return
    pipe.send(("up", os.getpid(), worker.transport.port))
    try:
        worker.serve()
    except Exception:
        pipe.send(("broken", traceback.format_exc()))
        raise
    worker.transport.close()


class Worker:
    def __init__(
        self, pipe: Connection, start: Start, injector: Injector, links: list[Link], complaints: Complaints
    ) -> None:
        self.start, self.injector, self.links, self.complaints = start, injector, links, complaints
        self.pipe = pipe
        self.prefill = start.role == "prefill"
        heads = HEADS // start.world
        self.heads = slice(start.rank * heads, (start.rank + 1) * heads)
        shape = (LAYERS, PAGES, heads, BLOCK_SIZE, SLOT)
        self.fill = EMPTY if self.prefill else CANARY
        self.memory = np.full(GUARD + int(np.prod(shape)) + GUARD, self.fill, dtype=np.uint8)
        self.kv = self.memory[GUARD:-GUARD].reshape(shape)
        self.free = list(range(PAGES))
        self.held: dict[str, Held] = {}
        self.ended: deque[tuple[str, Outcome, float]] = deque()
        self.bell_out, self.bell_in = os.pipe()
        geometry = KVGeometry.of_array(self.kv, head_lo=self.heads.start, total_heads=HEADS)
        self.transport = Transport(
            geometry,
            Settings.parse(start.settings),
            engine=start.engine,
            rank=start.rank,
            world=start.world,
            port=start.port,
        )

    def serve(self) -> None:
        while True:
            for ready in wait([self.pipe, self.bell_out]):
                if ready == self.bell_out:
                    os.read(self.bell_out, 4096)
                    continue
                try:
                    verb, *arguments = self.pipe.recv()
                except EOFError:
                    return
                if verb == "exit":
                    return
                getattr(self, "do_" + verb)(*arguments)
            while self.ended:
                self.on_end(*self.ended.popleft())

    # -- transfers -----------------------------------------------------------------------------------------------

    def hold(self, transfer: str, seed: int, blocks: int, first: int = 0) -> Held | None:
        count = blocks - first
        if len(self.free) < count:
            self.pipe.send(("ended", transfer, False, "no_pages", "", "", time.monotonic()))
            return None
        np.random.default_rng(seed).shuffle(self.free)
        pages = [self.free.pop() for _ in range(count)]
        held = self.held[transfer] = Held(pages, None, seed, blocks, first)
        return held

    def note(self, outcome: Outcome) -> None:
        """In the I/O thread: the main thread shall look at it."""
        self.ended.append((outcome.transfer, outcome, time.monotonic()))
        os.write(self.bell_in, b"\0")

    def do_offer(self, transfer: str, seed: int, tokens: int) -> None:
        held = self.hold(transfer, seed, -(-tokens // BLOCK_SIZE))
        if held is not None:
            held.handle = self.transport.offer(transfer, digest_of(seed), tokens, self.note)

    def do_ready(self, transfer: str, tokens: int) -> None:
        held = self.held.get(transfer)
        if held is not None and held.handle is not None:
            done = -(-tokens // BLOCK_SIZE)
            self.kv[:, held.pages[:done]] = pattern(held.seed, held.blocks)[:, :done, self.heads]
            held.handle.ready(held.pages[:done], tokens)

    def do_finish(self, transfer: str) -> None:
        if transfer in self.held:
            held = self.held[transfer]
            held.handle.finish(token_of(held.seed))

    def do_cancel(self, transfer: str) -> None:
        if transfer in self.held:
            self.held[transfer].handle.cancel()

    def do_withdraw(self, transfer: str) -> None:
        """The engine takes the pages back and overwrites them; it computes them again into others."""
        held = self.held.get(transfer)
        if held is not None:
            held.handle.withdraw(JOIN_S)
            self.kv[:, held.pages] = EMPTY

    def do_receive(self, transfer: str, seed: int, tokens: int, first: int, host: str, port: int, ranks: int) -> None:
        held = self.hold(transfer, seed, -(-tokens // BLOCK_SIZE), first)
        if held is None:
            return
        held.handle = self.transport.receive(
            transfer,
            digest_of(seed),
            tokens,
            held.pages,
            host=host,
            port=port,
            ranks=ranks,
            first_block=first,
            first_token=promises(seed),
            on_end=self.note,
        )

    def on_end(self, transfer: str, outcome: Outcome, at: float) -> None:
        held = self.held.pop(transfer, None)
        verdict = ""
        if held is None:
            verdict = "ended twice"
        else:
            if outcome.ok and not self.prefill:
                wrong = self.kv[:, held.pages] != pattern(held.seed, held.blocks)[:, held.first :, self.heads]
                if wrong.any():
                    blocks = np.flatnonzero(wrong.any(axis=(0, 2, 3, 4))) + held.first
                    verdict = f"reported ok, but {wrong.sum()} bytes are wrong, in blocks {blocks.tolist()}"
                token = token_of(held.seed) if promises(held.seed) else None
                if outcome.first_token != token:
                    verdict = f"goes on from the first token {outcome.first_token}, not from {token}"
            self.kv[:, held.pages] = self.fill
            self.free += held.pages
        self.pipe.send(("ended", transfer, outcome.ok, outcome.code, outcome.reason, verdict, at))

    # -- what the driver asks ------------------------------------------------------------------------------------

    def do_rules(self, rules: list[Any]) -> None:
        """From its I/O thread's next turn on."""
        self.transport._call(lambda _engine: self.injector.set(rules))

    def do_audit(self) -> None:
        self.pipe.send(("audit", self.audit()))

    def audit(self) -> dict[str, Any]:
        status = self.transport.status(timeout_s=JOIN_S)
        rest = self.memory.copy()
        inner = rest[GUARD:-GUARD].reshape(self.kv.shape)
        for held in self.held.values():
            inner[:, held.pages] = self.fill
        return {
            "live": {**status["live"], "held": len(self.held), "pages": PAGES - len(self.free), **self.links_hold()},
            "descriptors": len(os.listdir("/proc/self/fd")),
            "open": dict(descriptors()),
            "threads": len(os.listdir("/proc/self/task")),
            "python_threads": threading.active_count(),
            "resident": resident_bytes(),
            "written": int((rest != self.fill).sum()),  # bytes of memory that nobody was granted
            "complaints": list(self.complaints.found),
            "counters": status["counters"],
            "injected": dict(self.injector.done),
            "peers": [{key: peer[key] for key in ("engine", "rank", "link")} for peer in status["peers"]],
        }

    def wanted_channels(self, link: Link) -> int:
        """Channels of ``link`` that belong to peers that are up."""
        peers = list(self.transport._engine._peers)
        return sum(channel.link == link.name for peer in peers for channel in peer.channels())

    def links_hold(self) -> dict[str, int]:
        """What the links hold of their bounded resources, by the names that they have there."""
        holds: dict[str, int] = {}
        for link in self.links:
            tickets = getattr(link, "tickets", None)
            if tickets is not None:
                holds[f"{link.name} tickets"] = len(tickets._words) - tickets.free
            channels = getattr(link, "_channels", [])
            holds[f"{link.name} channels of nobody"] = max(
                0, sum(not c.closed for c in channels) - self.wanted_channels(link)
            )
            for memory in getattr(link, "memories", []):
                for ring in ("sending", "receiving"):
                    slots = getattr(memory, ring)
                    holds[f"{link.name} {ring} slots"] = slots.count - slots.free
        return holds


def descriptors() -> Counter[str]:
    """What they lead to, without numbers, and how many of each."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{fd}"))] += 1
    return found


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
