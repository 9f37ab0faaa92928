"""The shared pool in one worker: stores chunks of pages and loads them, in the pool client's threads.

On a GPU the copies are kernels on streams of the pool client's. What pages are used for before comes as an event
(``after``), behind which they run.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from pdtransport.errors import PoolUnavailable
from pdtransport.kernels.runs import Runs, run
from pdtransport.kv.geometry import HOST, KVGeometry
from pdtransport.pool.client.pool_client import Copied, Pending, PoolClient
from pdtransport.pool.core.requests import Verdict
from pdtransport.pool.tiers.codecs import Lossy
from pdtransport.settings import PoolUse, Settings
from pdtransport.vllm.metadata import Fetch, Keep

if TYPE_CHECKING:
    from pdtransport.kernels.watch import DeviceMemory

logger = logging.getLogger(__name__)

LOAD_THREADS = 2
STORE_THREADS = 1

# What the counters call a chunk that came to this; all other verdicts are failures.
STORED = {
    Verdict.WRITE: "stored",
    Verdict.HAVE: "present",
    Verdict.LATER: "skipped",
    Verdict.FULL: "skipped",
    Verdict.BUSY: "skipped",
}


class PoolWorker:
    """One per worker, used by its own thread; the callbacks come from any thread.

    Args:
        parts: ranges of KV heads; each is a chunk of its own in the pool.
        ratio: attention kernel's blocks in one of the scheduler's.
        on_loaded: of a request, and whether all its pages are what was stored.
        on_kept: of a request: one :class:`Keep` no longer reads its pages.
        count: chunks by what became of them, and the bytes that were copied.
        lossy: how tiers of the pool may pack its chunks with loss.
        on_stored: whose parts of this worker are all in the pool: chunks, by the key of their first part; None: nobody
            wants to know.
        settings: of the engine, for a pool on another host.

    Raises:
        PoolUnavailable: a GPU has no memory left for it.
    """

    def __init__(
        self,
        use: PoolUse,
        geometry: KVGeometry,
        *,
        parts: Sequence[tuple[int, int]],
        ratio: int,
        rank: int,
        on_loaded: Callable[[str, bool], None],
        on_kept: Callable[[str], None],
        count: Callable[[str, Counter[str], int], None],
        lossy: Lossy | None = None,
        on_stored: Callable[[list[bytes]], None] | None = None,
        settings: Settings | None = None,
    ) -> None:
        self._lossy = lossy
        settings = settings or Settings()
        self._use, self._geometry = use, geometry
        self._parts, self._ratio, self._rank = parts, ratio, rank
        self._on_loaded, self._on_kept, self._count = on_loaded, on_kept, count
        self._on_stored = on_stored
        self._lock = threading.Lock()
        self._queued = 0  # chunks
        self._stores: dict[str, list[Pending[Copied]]] = {}
        self._loads: dict[str, Pending[Copied]] = {}
        self._aside = Aside(geometry, parts, (use.chunk_blocks - 1) * ratio)
        # Loads have a client of their own: a request waits for them, and for stores nobody does.
        who = f"vllm-{os.getpid()}"
        self._loader, self._storer = (
            PoolClient.of(
                settings, use, tenant=use.tenant, threads=threads, who=f"{who}-{what}", device=geometry.device
            )
            for what, threads in (("load", LOAD_THREADS), ("store", STORE_THREADS))
        )

    def close(self) -> None:
        """End what is under way: nothing touches the pages any more."""
        for client in (self._loader, self._storer):
            client.close()

    # -- store ---------------------------------------------------------------------------------------------------

    def keep(self, command: Keep, after: Any | None = None) -> None:
        """Store as many of its chunks as the queue has room for."""
        if not command.keys:
            self._on_kept(command.req_id)
            return
        keys = command.keys[self._rank]
        with self._lock:
            room = max(0, self._use.max_queued_chunks - self._queued)
            chosen = keys[:room]
            self._queued += len(chosen)
        if len(chosen) < len(keys):
            self._count("store", Counter(skipped=len(keys) - len(chosen)), 0)
        if not chosen:
            self._on_kept(command.req_id)
            return
        runs = self._chunks(command.pages)[: len(chosen)]
        try:
            pending = self._storer.store(chosen, runs, lossy=self._lossy, deadline_s=self._use.store_s, after=after)
        except PoolUnavailable:
            self._end_store(command.req_id, Counter(failed=len(chosen)), len(chosen), 0)
            return
        with self._lock:
            self._stores.setdefault(command.req_id, []).append(pending)
        pending.future.add_done_callback(lambda done: self._stored(command, pending, len(chosen), done))

    def _stored(self, command: Keep, pending: Pending[Copied], chunks: int, done: Future[Copied]) -> None:
        req_id = command.req_id
        with self._lock:
            others = [each for each in self._stores.pop(req_id) if each is not pending]
            if others:
                self._stores[req_id] = others
        copied = _outcome(done)
        if copied is None:
            tally = Counter({"skipped" if done.cancelled() else "failed": chunks})
        else:
            tally = Counter(STORED.get(verdict, "failed") for verdict in copied.verdicts)
            self._tell_stored(command, copied)
        self._end_store(req_id, tally, chunks, copied.nbytes if copied else 0)

    def _tell_stored(self, command: Keep, copied: Copied) -> None:
        if self._on_stored is None:
            return
        parts, there = len(self._parts), (Verdict.WRITE, Verdict.HAVE)
        whole = range(len(copied.verdicts) // parts)
        good = [i for i in whole if all(each in there for each in copied.verdicts[i * parts : (i + 1) * parts])]
        self._on_stored([command.keys[0][i * parts] for i in good])

    def _end_store(self, req_id: str, tally: Counter[str], chunks: int, nbytes: int) -> None:
        with self._lock:
            self._queued -= chunks
        self._count("store", tally, nbytes)
        self._on_kept(req_id)

    def rewind(self, req_id: str, timeout_s: float) -> None:
        """The engine takes this request's pages back: when this returns, no store reads them any more.

        Raises:
            TimeoutError: one still does; the pages must not be reused.
        """
        with self._lock:
            pending = list(self._stores.get(req_id, ()))
        running = [each for each in pending if not each.future.cancel()]
        for each in running:
            each.cancel()
        if futures.wait([each.future for each in running], timeout_s).not_done:
            raise TimeoutError(f"a store of request {req_id} did not let go of its pages within {timeout_s} s")

    # -- load ----------------------------------------------------------------------------------------------------

    def fetch(self, command: Fetch, after: Any | None = None) -> None:
        """Load its chunks. Of the first one the engine may hold blocks already, and others may use them: these bytes
        go aside."""
        keys = command.keys[self._rank]
        held = command.held * self._ratio
        pages = self._chunks(command.pages, first=self._use.chunk_blocks - command.held)
        alive = []
        for i, part in enumerate(self._parts if held else ()):
            aside, owner = self._aside.take(held * self._geometry.block_bytes(*part))
            pages[i] = np.concatenate([aside, pages[i]])
            alive.append(owner)

        def ended(done: Future[Copied], _alive: list[Any] = alive) -> None:
            with self._lock:
                self._loads.pop(command.req_id, None)
            self._loaded(command.req_id, len(keys), _outcome(done))

        try:
            pending = self._loader.load(keys, pages, deadline_s=self._use.load_s, after=after)
        except PoolUnavailable:
            self._loaded(command.req_id, len(keys), None)
            return
        with self._lock:
            self._loads[command.req_id] = pending
        pending.future.add_done_callback(ended)

    def refuse(self, command: Fetch) -> None:
        """It is not to be loaded."""
        self._loaded(command.req_id, len(command.keys[self._rank]), None)

    def _loaded(self, req_id: str, chunks: int, copied: Copied | None) -> None:
        good = copied.verdicts.count(Verdict.READ) if copied is not None else 0
        self._count("load", Counter(hit=good, failed=chunks - good), copied.nbytes if copied else 0)
        self._on_loaded(req_id, good == chunks)

    def end_loads(self) -> None:
        """What comes is not wanted any more: all loads fail."""
        with self._lock:
            loading = list(self._loads)
        for req_id in loading:
            self.cancel(req_id)

    def end_all(self, timeout_s: float) -> None:
        """The engine takes all pages back: when this returns, nothing here uses them any more.

        Raises:
            TimeoutError: something still does.
        """
        self.end_loads()
        with self._lock:
            left = [each.future for each in self._loads.values()]
            storing = list(self._stores)
        for req_id in storing:
            self.rewind(req_id, timeout_s)
        if futures.wait(left, timeout_s).not_done:
            raise TimeoutError(f"loads from the pool did not let go of their pages within {timeout_s} s")

    def cancel(self, req_id: str) -> None:
        """Nobody wants these pages any more; that they are free is reported as the load's end."""
        with self._lock:
            pending = self._loads.get(req_id)
        if pending is not None and not pending.future.cancel():
            pending.cancel()

    # -- where ---------------------------------------------------------------------------------------------------

    def _chunks(self, blocks: Sequence[int], first: int = 0) -> list[Runs]:
        """The runs of each part of each chunk in these scheduler's blocks; the first chunk has ``first`` of them (0: as
        all)."""
        step, at = self._use.chunk_blocks, 0
        found = []
        while at < len(blocks):
            end = at + (first if not at and first else step)
            pages = [block * self._ratio + i for block in blocks[at:end] for i in range(self._ratio)]
            found += [self._geometry.runs(pages, *part) for part in self._parts]
            at = end
        return found


class Aside:
    """Memory beside the pages, for bytes of up to ``blocks`` blocks of one part that nobody wants. On the host each
    load has its own, since checksums are taken of what stands there. On a GPU they are taken of what is written, on its
    way: there all loads share one piece.

    Raises:
        PoolUnavailable: the GPU has none left.
    """

    def __init__(self, geometry: KVGeometry, parts: Sequence[tuple[int, int]], blocks: int) -> None:
        self._shared: DeviceMemory | None = None
        nbytes = max(blocks * geometry.block_bytes(*part) for part in parts)
        if geometry.device != HOST and nbytes:
            from pdtransport.kernels.gpu import GpuError
            from pdtransport.kernels.watch import DeviceMemory

            try:
                self._shared = DeviceMemory(nbytes, geometry.device)
            except GpuError as error:
                raise PoolUnavailable(f"{error}: lower --gpu-memory-utilization") from None

    def take(self, nbytes: int) -> tuple[Runs, Any]:
        """So much of it, and what keeps it alive."""
        if self._shared is not None:
            return run(self._shared.address, nbytes), self._shared
        own = np.empty(nbytes, dtype=np.uint8)
        return run(own.ctypes.data, nbytes), own


def _outcome(done: Future[Copied]) -> Copied | None:
    """How a copy ended; None if it was cancelled before it began, or failed for a reason that nobody foresaw."""
    if done.cancelled():
        return None
    error = done.exception()
    if error is not None:
        logger.error("a copy between pages and pool failed: %r", error)
        return None
    return done.result()
