"""Holds the results of a worker's transfers, stores and loads until they are reported to the scheduler's half.

Written by the worker's thread and by callbacks in the I/O thread and the pool client's threads; no method blocks.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from pdtransport.engine.block_refs import BlockRefCounts
from pdtransport.engine.commands import WorkerReport
from pdtransport.engine.stats import TransferStats
from pdtransport.engine.wakeups import WakeupSender
from pdtransport.transfer.outcome import Outcome


class Results:
    """Results of one worker.

    Args:
        stats: makes the statistics of one reporting interval.
        on_failed: called with the id of a request whose pages did not arrive.

    Attributes:
        rope: wakes the scheduler.
        rank: the worker's rank.
    """

    def __init__(self, stats: Callable[[], TransferStats], on_failed: Callable[[str], None]) -> None:
        self.rope = WakeupSender()
        self.rank = 0
        self._new_stats, self._on_failed = stats, on_failed
        self._lock = threading.Lock()
        self._users = BlockRefCounts()
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._stats = stats()
        self._news = WorkerReport()

    # -- who uses a request's pages, on prefill and for stores -----------------------------------------------------

    def use(self, req_id: str) -> None:
        """An offer or a store uses the request's pages."""
        with self._lock:
            self._users.use(req_id)

    def end(self, req_id: str) -> None:
        """The scheduler has finished the request: it counts as sent once nothing uses its pages."""
        with self._lock:
            if self._users.end(req_id):
                self._sent.add(req_id)

    def offer_ended(self, req_id: str, outcome: Outcome) -> None:
        with self._lock:
            self._stats.record("producer", outcome)
            if self._users.leave(req_id):
                self._sent.add(req_id)
        self.rope.pull()

    def kept(self, req_id: str) -> None:
        """A store no longer reads the request's pages."""
        with self._lock:
            self._news.kept[req_id] += 1
            if self._users.leave(req_id):
                self._sent.add(req_id)
        self.rope.pull()

    # -- what else happened ----------------------------------------------------------------------------------------

    def promised(self, req_id: str) -> None:
        """Decode promised to continue from this request's first token."""
        with self._lock:
            self._news.promised.add(req_id)
        self.rope.promised(req_id)

    def declined(self, outcome: Outcome) -> None:
        with self._lock:
            self._stats.record("consumer", outcome)

    def receipt_ended(self, req_id: str, outcome: Outcome) -> None:
        with self._lock:
            self._stats.record("consumer", outcome)
            self._received.add(req_id)
            if outcome.cached_tokens is not None:
                self._news.cached[req_id] = outcome.cached_tokens
            if outcome.first_token is not None:
                self._news.first_tokens[req_id] = outcome.first_token
            if outcome.never_granted:
                self._news.never_granted[req_id] += 1
            if not outcome.ok:
                self._failed.add(req_id)
                self._on_failed(req_id)
        if outcome.ok:
            self.rope.arrived(req_id, self.rank, outcome.first_token)
        self.rope.pull()

    def loaded(self, req_id: str, ok: bool) -> None:
        """A load from the pool ended."""
        with self._lock:
            self._received.add(req_id)
            if not ok:
                self._failed.add(req_id)
                self._on_failed(req_id)
        if ok:
            self.rope.arrived(req_id, self.rank)
        self.rope.pull()

    def in_pool(self, chunks: list[bytes]) -> None:
        with self._lock:
            self._news.in_pool.update(chunks)

    def count_chunks(self, role: str, tally: Counter[str], nbytes: int) -> None:
        with self._lock:
            self._stats.count_chunks(tally, role, nbytes)

    # -- for the scheduler's half ----------------------------------------------------------------------------------

    def take_ended(self) -> tuple[set[str], set[str], set[str]]:
        """``(finished sending, finished receiving, failed receiving)`` since the last call.

        Each request is reported once. Failed requests are also in ``finished receiving``.
        """
        with self._lock:
            sent, self._sent = self._sent, set()
            received, self._received = self._received, set()
            failed, self._failed = self._failed, set()
        return sent, received, failed

    def take_news(self) -> WorkerReport:
        with self._lock:
            news, self._news = self._news, WorkerReport()
        return news

    def take_stats(self) -> TransferStats | None:
        with self._lock:
            if self._stats.is_empty():
                return None
            stats, self._stats = self._stats, self._new_stats()
        return stats
