"""Brings a topology up and holds it: start the servers, wait for them, start the router, watch, end everything."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from pdtransport.errors import PDTransportError
from pdtransport.launch import logs, web
from pdtransport.launch.plan import Instance, Plan, PoolPlan
from pdtransport.launch.processes import Fleet, Process
from pdtransport.launch.topology import Topology
from pdtransport.pool.locks import private_directory

POLL_S = 0.25
PROGRESS_S = 15.0  # a role whose stage does not change is mentioned this often
ROUTER_START_S = 60.0

Say = Callable[[str], None]


class ProcessFailed(PDTransportError):
    """A process ended, or was not up in time. The text is for people: why, then its last log lines."""

    def __init__(self, process: Process, what: str) -> None:
        lines = process.tail(4096)
        cause = logs.likely_cause(lines, process.poll())
        shown = "\n".join(f"  | {line}" for line in logs.last_lines(lines)) or "  | (it wrote nothing)"
        super().__init__(
            f"{process.name} {what}\n"
            + (f"likely cause: {cause}\n" if cause else "")
            + f"its last log lines ({process.log}):\n{shown}"
        )
        self.process = process.name
        self.cause = cause


class Interrupted(BaseException):
    """Told to stop by a signal. No Exception: nothing on the way may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted` once; after that, and while shielded, they only hurry
    the fleet's end."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._shielded = False
        self._before: dict[int, object] = {}

    def shield(self) -> None:
        self._shielded = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._shielded:
            self._fleet.hurried = True
            return
        self._shielded = True
        raise Interrupted(number)

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


@dataclass
class _Starting:
    process: Process
    url: str
    stage: str = ""
    said: float = 0.0

    def progress(self, say: Say) -> None:
        stage = logs.stage(self.process.tail(200))
        now = time.monotonic()
        if stage != self.stage or now - self.said > PROGRESS_S:
            self.stage, self.said = stage, now
            say(f"  {self.process.name:<12} {self.process.seconds:4.0f} s  {stage}")


def check(fleet: Fleet) -> None:
    """Raises:
    ProcessFailed: a process ended.
    """
    dead = fleet.dead()
    if dead is not None:
        raise ProcessFailed(dead, f"ended with status {dead.poll()}")


def await_health(fleet: Fleet, starting: Sequence[tuple[Process, str]], timeout_s: float, say: Say) -> None:
    """Wait until each of ``starting`` (a process and its URL) answers; tell how far they are.

    Raises:
        ProcessFailed: a process of the fleet ended, or one was not up in time.
    """
    deadline = time.monotonic() + timeout_s
    waiting = [_Starting(process, url) for process, url in starting]
    while waiting:
        check(fleet)
        for one in list(waiting):
            if web.is_healthy(one.url):
                waiting.remove(one)
                say(f"  {one.process.name:<12} {one.process.seconds:4.0f} s  ready")
            else:
                one.progress(say)
        if waiting and time.monotonic() > deadline:
            check(fleet)
            raise ProcessFailed(waiting[0].process, f"was not up within {timeout_s:g} s (defaults.start_timeout_s)")
        time.sleep(POLL_S if waiting else 0)


class Launch:
    """One topology's processes. Everything it starts belongs to ``fleet``, which ends it."""

    def __init__(self, topology: Topology, plan: Plan, fleet: Fleet, say: Say) -> None:
        self.topology = topology
        self.plan = plan
        self._fleet = fleet
        self._say = say

    def start(self) -> None:
        """Start all and wait until each one answers.

        Raises:
            ProcessFailed: one ended, or was not up within ``defaults.start_timeout_s``.
        """
        if self.plan.pool is not None:
            self._start_pool(self.plan.pool)
        for wave in waves(self.plan.instances):
            started = [(self._server(instance), instance.url) for instance in wave]
            await_health(self._fleet, started, self.topology.defaults.start_timeout_s, self._say)
        router = self.plan.router
        await_health(self._fleet, [(self._fleet.start("router", router.argv), router.url)], ROUTER_START_S, self._say)

    def _start_pool(self, pool: PoolPlan) -> None:
        """Before the servers: it takes all of its memory, and they are told of it."""
        self._say(f"starting pool {pool.name} in {pool.dir}")
        if pool.new_key is not None:  # good for this run alone
            private_directory(pool.dir)
            with open(os.open(pool.new_key, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))
        process = self._fleet.start("pool", pool.argv)
        seconds = self.topology.defaults.start_timeout_s
        deadline = time.monotonic() + seconds
        while not (ready := [line for line in process.tail(8) if " serves " in line]):
            check(self._fleet)
            if time.monotonic() > deadline:
                raise ProcessFailed(process, f"was not up within {seconds:g} s (defaults.start_timeout_s)")
            time.sleep(POLL_S)
        at = f", HTTP API at {pool.url}" if pool.url else ""
        self._say(f"  {process.name:<12} {process.seconds:4.0f} s  ready: {ready[0].partition(': ')[2]}{at}")

    def _server(self, instance: Instance) -> Process:
        self._say(f"starting {instance.name} on {instance.url} ({instance.place})")
        return self._fleet.start(instance.name, instance.argv, env=instance.env)

    def check(self) -> None:
        """Raises:
        ProcessFailed: a process ended.
        """
        check(self._fleet)

    def hold(self) -> None:
        """Watch until a process ends or a signal comes.

        Raises:
            ProcessFailed: a process ended.
            Interrupted: a signal came.
        """
        while True:
            self.check()
            time.sleep(POLL_S)


def waves(instances: Sequence[Instance]) -> list[list[Instance]]:
    """Instances in groups that start together. Those that share a GPU start one after the other, for each measures
    what memory is free when it starts."""
    groups: list[list[Instance]] = []
    for instance in instances:
        for group in groups:
            if not any(set(other.gpus) & set(instance.gpus) for other in group):
                group.append(instance)
                break
        else:
            groups.append([instance])
    return groups
