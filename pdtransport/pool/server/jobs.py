"""The job queue of one lower tier: any of its threads takes the next job; jobs for one key run one at a time."""

from __future__ import annotations

import heapq
import itertools
import threading

from pdtransport.pool.core.tier_state import Job, Promote

READ, REST = range(2)  # priorities; reads go first

_Place = tuple[int, int, Job]  # rank, number, job


class Jobs:
    """A priority queue in which reads overtake writes and deletes, since a request waits for each read.

    A read of a key is queued only once the write of that key has ended, so it never overtakes that write.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: list[_Place] = []  # a heap
        self._behind: dict[bytes, list[_Place]] = {}  # by key of each job in progress: jobs that wait for it to end
        self._closed = False

    def put(self, job: Job) -> None:
        rank = READ if isinstance(job, Promote) else REST
        with self._changed:
            heapq.heappush(self._waiting, (rank, next(self._numbers), job))
            self._changed.notify()

    def take(self) -> Job | None:
        """Wait for the next job, which the caller must end with :meth:`done`; None once the queue is closed."""
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
        """Make :meth:`take` return None from now on, even if jobs are queued."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._waiting) + sum(map(len, self._behind.values()))
