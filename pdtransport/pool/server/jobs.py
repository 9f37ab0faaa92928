"""What waits for the threads of one tier: any of them takes what is next, and jobs of one key run in order."""

from __future__ import annotations

import heapq
import itertools
import threading

from pdtransport.pool.core.tier_state import Job, Promote

READ, REST = range(2)  # what goes first

_Place = tuple[int, int, Job]  # rank, number, job


class Jobs:
    """Reads go first: someone waits for them. A read of a key never stands behind a write of it, which must have
    ended for the tier to have it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: list[_Place] = []  # a heap
        self._behind: dict[bytes, list[_Place]] = {}  # of each key that a thread works on: what must wait for that
        self._closed = False

    def put(self, job: Job) -> None:
        rank = READ if isinstance(job, Promote) else REST
        with self._changed:
            heapq.heappush(self._waiting, (rank, next(self._numbers), job))
            self._changed.notify()

    def take(self) -> Job | None:
        """The next one, which the caller ends with :meth:`done`; waits for it. None: there will be none."""
        with self._changed:
            while not self._closed:
                if not self._waiting:
                    self._changed.wait()
                    continue
                place = heapq.heappop(self._waiting)
                job = place[2]
                behind = self._behind.get(job.key)
                if behind is None:
                    self._behind[job.key] = []
                    return job
                behind.append(place)
            return None

    def done(self, job: Job) -> None:
        with self._changed:
            for place in self._behind.pop(job.key):
                heapq.heappush(self._waiting, place)
                self._changed.notify()

    def close(self) -> None:
        """Whoever takes finds none, whatever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._waiting) + sum(map(len, self._behind.values()))
