"""Spreads plans over harnesses, one thread each."""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tests.faults.harness import Harness, Result
from tests.faults.network import Network, network_plan
from tests.faults.plan import Plan, plan_of
from tests.faults.pool_harness import PoolHarness
from tests.faults.pool_plan import PoolPlan, pool_plan_of
from tests.faults.report import Report, described
from tests.rig.ports import Ports

FIRST_PORT, LAST_PORT = 21500, 21899


class AnyHarness(Protocol):
    """A set of processes that plays one plan after the other."""

    def run(self, plan: Any) -> Result: ...

    def close(self) -> list[str]: ...


def random_plans(seeds: Sequence[int], links: list[str]) -> list[Plan]:
    return [plan_of(seed, links) for seed in seeds]


def pool_plans(seeds: Sequence[int]) -> list[PoolPlan]:
    """What this machine can play: without a redis-server, nothing with one."""
    plans = [pool_plan_of(seed) for seed in seeds]
    return plans if shutil.which("redis-server") else [plan for plan in plans if plan.link != "redis"]


def run_plans(
    plans: Sequence[Plan],
    harnesses: int,
    report: Report,
    seconds: float = 0.0,
    shout: Callable[[str], object] = print,
    mutant: str = "",
    until_failure: bool = False,
) -> None:
    """Run all plans; with ``seconds``, start none after so long, and with ``until_failure`` none after a failure. What
    fails is shouted at once."""
    groups: dict[tuple[str, int], list[Plan]] = defaultdict(list)
    for plan in plans:
        groups[plan.link, plan.prefills].append(plan)
    stop_at = time.monotonic() + seconds if seconds else float("inf")
    ports, lock = Ports(FIRST_PORT, LAST_PORT), threading.Lock()
    threads = []
    for (link, prefills), theirs in groups.items():
        todo: queue.SimpleQueue[Plan] = queue.SimpleQueue()
        for plan in theirs:
            todo.put(plan)
        share = max(1, round(harnesses * len(theirs) / len(plans)))
        for _ in range(min(share, len(theirs))):
            harness: AnyHarness
            if isinstance(theirs[0], PoolPlan):
                harness = PoolHarness(link)
            else:
                harness = Harness(link, prefills, ports, len(threads), mutant=mutant)
            arguments = (harness, todo, stop_at, report, lock, shout, until_failure)
            threads.append(threading.Thread(target=_work, args=arguments))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _work(
    harness: AnyHarness,
    todo: queue.SimpleQueue[Plan],
    stop_at: float,
    report: Report,
    lock: threading.Lock,
    shout: Callable[[str], object],
    until_failure: bool = False,
) -> None:
    problems: list[str] = []
    try:
        while time.monotonic() < stop_at and not (until_failure and report.failures):
            try:
                plan = todo.get_nowait()
            except queue.Empty:
                break
            result = harness.run(plan)
            with lock:
                report.add(result)
                if result.problems:
                    shout(described(result))
    finally:
        problems = harness.close()
    with lock:
        report.trouble += problems
        for problem in problems:
            shout(f"at the end: {problem}")


def run_network(times: int, cases: Sequence[str], report: Report, shout: Callable[[str], object] = print) -> None:
    """Each case ``times`` times, one after the other, in two network namespaces.

    Raises:
        NoNamespaces: they can't be made here.
    """
    network = Network.make()
    try:
        todo: queue.SimpleQueue[Plan] = queue.SimpleQueue()
        for number in range(times):
            for case in cases:
                todo.put(network_plan(case, number))
        harness = Harness("ucx", 1, Ports(FIRST_PORT, LAST_PORT), 999, network)
        _work(harness, todo, float("inf"), report, threading.Lock(), shout)
    finally:
        network.close()
