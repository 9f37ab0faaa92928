"""Threads of the lower tiers: write-back, promotion, deletion, scans, and probes of tiers that are down."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

from pdtransport.errors import TransportClosed
from pdtransport.kernels import pages
from pdtransport.pool.core.frames import frame_runs
from pdtransport.pool.core.shared_memory import Mapping
from pdtransport.pool.core.store import ChunkStore
from pdtransport.pool.core.tier_state import Delete, Job, Promote, TierState, WriteBack
from pdtransport.pool.server.jobs import Jobs
from pdtransport.pool.tiers.base import Damaged, Stored, TierDown, TierError, check
from pdtransport.pool.tiers.envelope import Opening, seal
from pdtransport.pool.tiers.keyed_digest import Forged
from pdtransport.pool.tiers.registry import lossy_codec

logger = logging.getLogger("pdtransport.pool")

SCAN_BATCH = 1024  # chunks that one call in the store's thread adopts
PROBE_S = 0.5  # between probes of a tier that is down
FOREVER_S = 1e9
STOP_S = 10.0  # how long close() waits for a thread; one that hangs in a file system is left behind
COMPLAIN_EVERY_S = 10.0  # between log lines about one kind of failure of one tier

Post = Callable[[Callable[[], None]], None]


class Mover:
    """Runs the jobs of each lower tier of ``store`` in that tier's threads.

    Results are posted to the thread that drives the chunk store.
    """

    def __init__(self, store: ChunkStore, memory: Mapping, post: Post) -> None:
        self._store, self._memory, self._post = store, memory, post
        self._frame_bytes = store.settings.frame_bytes
        self._stopping = threading.Event()
        self._complaining = threading.Lock()
        self._complained: dict[tuple[str, str], tuple[float, int]] = {}  # time of last log line, lines suppressed since
        self._jobs = {tier.name: Jobs() for tier in store.lower}
        self._threads: list[threading.Thread] = []
        for tier in store.lower:
            jobs, name = self._jobs[tier.name], f"pdpool-{tier.name}"
            self._threads += [
                threading.Thread(target=self._work, args=(jobs,), name=name, daemon=True)
                for _ in range(tier.tier.threads)
            ]
            self._threads.append(
                threading.Thread(target=self._look_after, args=(tier,), name=f"{name}-scan", daemon=True)
            )
        if store.lower:  # the tier threads are the first in this process to touch the memory: prefault it for them
            populate = threading.Thread(target=memory.populate, args=(self._stopping.is_set,), daemon=True)
            self._threads.append(populate)
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        self._jobs[job.tier.name].put(job)

    @property
    def backlog(self) -> int:
        """Number of queued jobs, all tiers together."""
        return sum(map(len, self._jobs.values()))

    def close(self) -> None:
        """End the threads. Queued jobs are dropped, write-backs included."""
        self._stopping.set()
        for each in self._jobs.values():
            each.close()
        for thread in self._threads:
            thread.join(STOP_S)
        if self.ended:
            for tier in self._store.lower:
                tier.tier.close()

    @property
    def ended(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self, jobs: Jobs) -> None:
        while (job := jobs.take()) is not None:
            try:
                if isinstance(job, WriteBack):
                    self._write_back(job)
                elif isinstance(job, Promote):
                    self._promote(job)
                else:
                    self._delete(job)
            except TransportClosed:
                return
            finally:
                jobs.done(job)

    def _write_back(self, job: WriteBack) -> None:
        store, stored = self._store, None
        try:
            stored = self._write(job)
        except Damaged:
            self._post(lambda: store.found_damaged(job))
            return
        except TierDown as error:
            self._went_down(job.tier, error)
        except Exception as error:  # noqa: BLE001 - a tier's trouble must not end the thread
            self._complain(job.tier, "write", error)
        self._post(lambda: store.written_back(job, stored))

    def _write(self, job: WriteBack) -> int:
        """Seal a chunk and write it to its tier; returns the bytes that it takes there.

        Raises:
            Damaged: the chunk in memory no longer has its checksum.
            TierError, OSError: as :meth:`Tier.write`.
        """
        parts, tier = self._parts(job.frames, job.nbytes), job.tier
        codec = lossy_codec(job.lossy.codec) if job.lossy is not None else None
        grid = job.lossy.grid if job.lossy is not None and codec is not None else None
        codec = codec or tier.codec
        if codec is None and tier.signer is None:
            pieces = seal(job.key, parts, job.checksum, None)
            return tier.tier.write_checked(job.key, job.tenant, job.nbytes, pieces, job.checksum)
        check(self._checksum(job.frames, job.nbytes), job.checksum)
        pieces = seal(job.key, parts, job.checksum, codec, grid, tier.signer)
        return tier.tier.write(job.key, job.tenant, job.nbytes, pieces)

    def _promote(self, job: Promote) -> None:
        store, found = self._store, None
        try:
            opening = Opening(job.key, self._parts(job.frames, job.nbytes), job.tier.signer)
            taken = job.tier.tier.read(job.key, job.tenant, job.nbytes, opening.place)
            checksum = opening.finish()
            if taken is None or not opening.plain:
                taken = self._checksum(job.frames, job.nbytes)
            if taken != checksum:
                raise TierError(f"chunk {job.key.hex()[:16]} is damaged: its checksum differs")
            found = checksum
        except TierDown as error:
            self._went_down(job.tier, error)
        except Forged as error:
            kind = f"{job.tier.name}_digest_{error.kind}"
            self._complain(job.tier, "read", error)
            self._post(lambda: store.counters.update((kind,)))
        except Exception as error:  # noqa: BLE001
            self._complain(job.tier, "read", error)
        self._post(lambda: store.promoted(job, found))

    def _delete(self, job: Delete) -> None:
        try:
            job.tier.tier.delete(job.key, job.tenant, job.nbytes)
        except Exception as error:  # noqa: BLE001
            self._complain(job.tier, "delete", error)

    def _look_after(self, tier: TierState) -> None:
        """Scan the tier at start, and every ``rescan_s`` if others write to it; while it is down, probe it."""
        scan_at = 0.0
        while not self._stopping.is_set():
            try:
                if not tier.up:
                    tier.tier.probe()
                    self._post(lambda: setattr(tier, "up", True))
                    logger.warning("pool tier %s is reachable again", tier.name)
                    scan_at = 0.0  # its content may have changed
                if time.monotonic() >= scan_at:
                    self._scan(tier)
                    scan_at = time.monotonic() + (tier.tier.rescan_s or FOREVER_S)
            except TierDown as error:
                self._went_down(tier, error)
            except TransportClosed:
                return
            except Exception as error:  # noqa: BLE001 - tried again later
                self._complain(tier, "scan", error)
                scan_at = time.monotonic() + (tier.tier.rescan_s or FOREVER_S)
            self._stopping.wait(PROBE_S)

    def _scan(self, tier: TierState) -> None:
        found = tier.tier.scan()
        while batch := list(itertools.islice(found, SCAN_BATCH)):
            self._adopt(tier, batch)
            if self._stopping.is_set():
                return

    def _went_down(self, tier: TierState, error: TierDown) -> None:
        if tier.up:
            self._complain(tier, "reaching it", error)
        self._post(lambda: self._store.went_down(tier))

    def _adopt(self, tier: TierState, batch: list[Stored]) -> None:
        store, adopted = self._store, threading.Event()

        def adopt() -> None:
            for found in batch:
                if not store.adopt(tier, found):
                    store.counters[f"{tier.name}_not_adopted"] += 1
            adopted.set()

        self._post(adopt)
        while not adopted.wait(0.5) and not self._stopping.is_set():
            pass  # one batch at a time, so that requests are served between batches

    def _complain(self, tier: TierState, what: str, error: Exception) -> None:
        """Log a failure, at most one line of a kind every ``COMPLAIN_EVERY_S``.

        Otherwise others who write to a shared tier could fill the log.
        """
        now = time.monotonic()
        with self._complaining:
            at, unsaid = self._complained.get((tier.name, what), (-FOREVER_S, 0))
            if now < at + COMPLAIN_EVERY_S:
                self._complained[tier.name, what] = at, unsaid + 1
                return
            self._complained[tier.name, what] = now, 0
        text = str(error if isinstance(error, TierError) else f"{type(error).__name__}: {error}")
        more = f" (and {unsaid} more since the last such line)" if unsaid else ""
        logger.warning("pool tier %s: %s failed: %s%s", tier.name, what, text.replace("\n", " ")[:300], more)

    def _parts(self, frames: bytes, nbytes: int) -> list[memoryview]:
        runs = frame_runs(0, frames, self._frame_bytes, [nbytes])
        return [self._memory.view(first, length) for first, length in runs.tolist()]

    def _checksum(self, frames: bytes, nbytes: int) -> int:
        return checksum_of(self._memory, frames, nbytes, self._frame_bytes)


def checksum_of(memory: Mapping, frames: bytes, nbytes: int, frame_bytes: int) -> int:
    """Checksum of a chunk's bytes in these frames."""
    return int(pages.checksum(frame_runs(memory.address, frames, frame_bytes, [nbytes]), 1)[0])
