"""Worker half of pool use: stores chunks of KV pages in the shared pool and loads them, in the pool client's threads.

On a GPU the copies are kernels on the pool client's own streams. They wait for the CUDA event ``after``, which the
caller records after all earlier uses of the pages.
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

from pdtransport.engine.commands import LoadChunks, StoreChunks
from pdtransport.errors import PoolUnavailable
from pdtransport.kernels.runs import Runs, run
from pdtransport.kv.geometry import HOST, KVGeometry
from pdtransport.pool.client.pool_client import Copied, Pending, PoolClient
from pdtransport.pool.core.requests import KeyVerdict
from pdtransport.pool.tiers.codecs import Lossy
from pdtransport.settings import PoolUse, Settings

if TYPE_CHECKING:
    from pdtransport.kernels.watch import DeviceMemory

logger = logging.getLogger(__name__)

LOAD_THREADS = 2
STORE_THREADS = 1

# Counter name of a stored chunk by its verdict; all other verdicts count as "failed".
STORED = {
    KeyVerdict.WRITE: "stored",
    KeyVerdict.HAVE: "present",
    KeyVerdict.LATER: "skipped",
    KeyVerdict.FULL: "skipped",
    KeyVerdict.BUSY: "skipped",
}


class PoolWorker:
    """Worker half of pool use, one per worker. Methods are called by the worker's thread, callbacks by any thread.

    Args:
        parts: ranges of KV heads; the pool stores each as a chunk of its own.
        ratio: attention kernel blocks per scheduler block.
        on_loaded: called with a request id and whether all its chunks were loaded and verified.
        on_kept: called with a request id when one :class:`StoreChunks` no longer reads its pages.
        count: called with "store" or "load", counts of chunks by outcome, and bytes copied.
        lossy: how the pool's tiers may compress these chunks with loss; None: not at all.
        on_stored: called with the chunks of which all this worker's parts are in the pool, each named by the key of its
            first part; None: not needed.
        settings: the engine's, needed for a pool on another host.
        who: the engine's name in the pool's lists of clients.

    Raises:
        PoolUnavailable: the GPU has no memory left for the scratch buffer.
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
        who: str = "engine",
    ) -> None:
        self._lossy = lossy
        settings = settings or Settings()
        self._use, self._geometry = use, geometry
        self._parts, self._ratio, self._rank = parts, ratio, rank
        self._on_loaded, self._on_kept, self._count = on_loaded, on_kept, count
        self._on_stored = on_stored
        self._lock = threading.Lock()
        self._queued = 0  # chunks to be stored
        self._stores: dict[str, list[Pending[Copied]]] = {}
        self._loads: dict[str, Pending[Copied]] = {}
        self._aside = Aside(geometry, parts, (use.chunk_blocks - 1) * ratio)
        # Loads have their own client, so that they never queue behind stores: requests wait for loads, not for stores.
        who = f"{who}-{os.getpid()}"
        self._loader, self._storer = (
            PoolClient.of(
                settings, use, tenant=use.tenant, threads=threads, who=f"{who}-{what}", device=geometry.device
            )
            for what, threads in (("load", LOAD_THREADS), ("store", STORE_THREADS))
        )

    def close(self) -> None:
        """End all stores and loads; nothing touches the pages afterwards."""
        for client in (self._loader, self._storer):
            client.close()

    # -- store ---------------------------------------------------------------------------------------------------

    def keep(self, command: StoreChunks, after: Any | None = None) -> None:
        """Store as many of the command's chunks as the queue has room for; the others count as skipped."""
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

    def _stored(self, command: StoreChunks, pending: Pending[Copied], chunks: int, done: Future[Copied]) -> None:
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

    def _tell_stored(self, command: StoreChunks, copied: Copied) -> None:
        if self._on_stored is None:
            return
        parts, there = len(self._parts), (KeyVerdict.WRITE, KeyVerdict.HAVE)
        whole = range(len(copied.verdicts) // parts)
        good = [i for i in whole if all(each in there for each in copied.verdicts[i * parts : (i + 1) * parts])]
        self._on_stored([command.keys[0][i * parts] for i in good])

    def _end_store(self, req_id: str, tally: Counter[str], chunks: int, nbytes: int) -> None:
        with self._lock:
            self._queued -= chunks
        self._count("store", tally, nbytes)
        self._on_kept(req_id)

    def rewind(self, req_id: str, timeout_s: float) -> None:
        """End this request's stores because the engine takes its pages back; when this returns, no store reads them.

        Raises:
            TimeoutError: a store still reads them; the pages must not be reused.
        """
        with self._lock:
            pending = list(self._stores.get(req_id, ()))
        running = [each for each in pending if not each.future.cancel()]
        for each in running:
            each.cancel()
        if futures.wait([each.future for each in running], timeout_s).not_done:
            raise TimeoutError(f"a store of request {req_id} still reads its pages after {timeout_s} s")

    # -- load ----------------------------------------------------------------------------------------------------

    def fetch(self, command: LoadChunks, after: Any | None = None) -> None:
        """Load the command's chunks.

        The engine may already hold the first blocks of the first chunk, and other requests may use them. The bytes of
        these blocks are loaded into a scratch buffer instead.
        """
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

    def refuse(self, command: LoadChunks) -> None:
        """Report this load as failed without starting it."""
        self._loaded(command.req_id, len(command.keys[self._rank]), None)

    def _loaded(self, req_id: str, chunks: int, copied: Copied | None) -> None:
        good = copied.verdicts.count(KeyVerdict.READ) if copied is not None else 0
        self._count("load", Counter(hit=good, failed=chunks - good), copied.nbytes if copied else 0)
        self._on_loaded(req_id, good == chunks)

    def end_loads(self) -> None:
        """Cancel all loads, as :meth:`cancel` does."""
        with self._lock:
            loading = list(self._loads)
        for req_id in loading:
            self.cancel(req_id)

    def end_all(self, timeout_s: float) -> None:
        """End all loads and stores because the engine takes all pages back; when this returns, nothing uses them.

        Raises:
            TimeoutError: a load or store still uses pages.
        """
        self.end_loads()
        with self._lock:
            left = [each.future for each in self._loads.values()]
            storing = list(self._stores)
        for req_id in storing:
            self.rewind(req_id, timeout_s)
        if futures.wait(left, timeout_s).not_done:
            raise TimeoutError(f"loads from the pool still write their pages after {timeout_s} s")

    def cancel(self, req_id: str) -> None:
        """Cancel this request's load; the load's end is reported once nothing writes the pages."""
        with self._lock:
            pending = self._loads.get(req_id)
        if pending is not None and not pending.future.cancel():
            pending.cancel()

    # -- where ---------------------------------------------------------------------------------------------------

    def _chunks(self, blocks: Sequence[int], first: int = 0) -> list[Runs]:
        """Memory runs of each part of each chunk in these scheduler blocks, chunk by chunk.

        The first chunk has ``first`` blocks; 0: as many as the others.
        """
        step, at = self._use.chunk_blocks, 0
        found = []
        while at < len(blocks):
            end = at + (first if not at and first else step)
            pages = [block * self._ratio + i for block in blocks[at:end] for i in range(self._ratio)]
            found += [self._geometry.runs(pages, *part) for part in self._parts]
            at = end
        return found


class Aside:
    """Scratch memory for loaded bytes that are not needed, up to ``blocks`` kernel blocks of one part.

    On the host each load has its own buffer: the checksum is computed over the memory after the copy. On a GPU it is
    computed during the copy, so all loads share one buffer.

    Raises:
        PoolUnavailable: the GPU has no memory left.
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
        """``nbytes`` of scratch memory, and the object that keeps it alive."""
        if self._shared is not None:
            return run(self._shared.address, nbytes), self._shared
        own = np.empty(nbytes, dtype=np.uint8)
        return run(own.ctypes.data, nbytes), own


def _outcome(done: Future[Copied]) -> Copied | None:
    """Result of a copy; None if it was cancelled before it began or raised an error (which is logged)."""
    if done.cancelled():
        return None
    error = done.exception()
    if error is not None:
        logger.error("a copy between pages and pool failed: %r", error)
        return None
    return done.result()
