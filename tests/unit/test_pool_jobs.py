"""Work of a tier's threads: nobody idles while there is some, and what concerns one key stays in order."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any, cast

from pdtransport.pool.core.tier_state import Delete, Job, Promote, TierState
from pdtransport.pool.server.jobs import Jobs

TIER = cast(TierState, None)  # nothing here looks at it


def write(key: bytes, number: int = 0) -> Job:
    return Delete(TIER, key, "", number)


def taken(jobs: Jobs) -> Job:
    job = jobs.take()
    assert job is not None
    return job


def test_any_thread_takes_what_is_next() -> None:
    """Keys play no part in who does what: with as many threads as jobs, all of them are under way."""
    jobs = Jobs()
    keys = [bytes([number, 0, 0, 0, 0]) for number in range(4)]  # alike at their ends
    for key in keys:
        jobs.put(write(key))
    assert [taken(jobs).key for _ in keys] == keys


def test_jobs_of_a_key_wait_for_each_other() -> None:
    """In order, and without holding others up."""
    jobs = Jobs()
    for number in range(3):
        jobs.put(write(b"a", number))
    jobs.put(write(b"b"))
    first = taken(jobs)
    assert taken(jobs).key == b"b"
    assert len(jobs) == 2
    for number in range(3):
        assert first.key == b"a"
        assert first.nbytes == number
        jobs.done(first)
        if number < 2:
            first = taken(jobs)
    assert len(jobs) == 0


def test_reads_go_first() -> None:
    """Someone waits for them."""
    jobs = Jobs()
    jobs.put(write(b"a"))
    jobs.put(Promote(TIER, 0, b"b", "", 8, b""))
    assert isinstance(taken(jobs), Promote)


def test_threads_do_all_of_it_in_order() -> None:
    """4 threads, 50 keys, 2,000 jobs: no two of a key at once, none lost, each key's in order."""
    jobs, done, busy = Jobs(), defaultdict(list), set()
    guard, all_done = threading.Lock(), threading.Semaphore(0)
    overlaps: list[Any] = []

    def work() -> None:
        while (job := jobs.take()) is not None:
            with guard:
                overlaps.extend([job] if job.key in busy else [])
                busy.add(job.key)
            with guard:
                done[job.key].append(job.nbytes)
                busy.discard(job.key)
            jobs.done(job)
            all_done.release()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(2000):
        jobs.put(write(bytes([number % 50]), number))
    for _ in range(2000):
        assert all_done.acquire(timeout=30)
    jobs.close()
    for thread in threads:
        thread.join(30)
    assert not overlaps
    assert all(numbers == sorted(numbers) for numbers in done.values())
    assert sum(map(len, done.values())) == 2000
