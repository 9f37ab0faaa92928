"""Brings a topology up and holds it: start the servers, wait for them, start the router, watch, end everything."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from pdtransport.errors import PDTransportError
from pdtransport.launch import logs, web
from pdtransport.launch.plan import Instance, Plan, PoolPlan
from pdtransport.launch.pool_keeper import PoolKeeper
from pdtransport.launch.processes import Process, ProcessGroup
from pdtransport.launch.rundir import RunFolder
from pdtransport.launch.topology import Topology
from pdtransport.pool.tiers.keyed_digest import keep_key

POLL_S = 0.25
PROGRESS_S = 15.0  # a role whose stage does not change is mentioned this often
ROUTER_START_S = 60.0

Say = Callable[[str], None]


class ProcessFailed(PDTransportError):
    """A process ended, or was not up in time. The text is for people: why, then its last log lines."""

    def __init__(self, process: Process, what: str) -> None:
        lines = process.tail(4096)
        cause = logs.likely_cause(lines, process.poll(), process.out_of_memory())
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

    def __init__(self, fleet: ProcessGroup) -> None:
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


def check(fleet: ProcessGroup) -> None:
    """Raises:
    ProcessFailed: a process ended.
    """
    dead = fleet.dead()
    if dead is not None:
        raise ProcessFailed(dead, logs.ending(dead.poll() or 0))


def await_health(
    check: Callable[[], None], starting: Sequence[tuple[Process, str]], timeout_s: float, say: Say
) -> None:
    """Wait until each of ``starting`` (a process and its URL) answers; tell how far they are. ``check`` is called
    again and again.

    Raises:
        ProcessFailed: a process of the fleet ended, or one was not up in time.
    """
    deadline = time.monotonic() + timeout_s
    waiting = [_Starting(process, url) for process, url in starting]
    while waiting:
        check()
        for one in list(waiting):
            if web.is_healthy(one.url):
                waiting.remove(one)
                say(f"  {one.process.name:<12} {one.process.seconds:4.0f} s  ready")
            else:
                one.progress(say)
        if waiting and time.monotonic() > deadline:
            check()
            raise ProcessFailed(waiting[0].process, f"was not up within {timeout_s:g} s (defaults.start_timeout_s)")
        time.sleep(POLL_S if waiting else 0)


class Deployment:
    """One topology's processes. Everything it starts belongs to ``fleet``, which ends it; files that they share are in
    ``folder``."""

    def __init__(self, topology: Topology, plan: Plan, fleet: ProcessGroup, folder: RunFolder, say: Say) -> None:
        self.topology = topology
        self.plan = plan
        self._fleet = fleet
        self._folder = folder
        self._say = say
        self._pool: PoolKeeper | None = None
        self.environment: Mapping[str, str] = {}  # of all servers

    def start(self) -> None:
        """Start all and wait until each one answers.

        Raises:
            ProcessFailed: one ended, or was not up within ``defaults.start_timeout_s``.
            RunError: the run's folder can't be written.
        """
        if self.plan.pool is not None:
            self._start_pool(self.plan.pool)
        self.environment = {"VLLM_RPC_BASE_PATH": str(self._folder.make_socket_folder())}
        for wave in waves(self.plan.instances):
            started = [(self._server(instance), instance.url) for instance in wave]
            await_health(self.check, started, self.topology.defaults.start_timeout_s, self._say)
        router = self.plan.router
        await_health(self.check, [(self._fleet.start("router", router.argv), router.url)], ROUTER_START_S, self._say)

    def _start_pool(self, pool: PoolPlan) -> None:
        """Before the servers: it takes all of its memory, and they are told of it."""
        self._say(f"starting pool {pool.name} in {pool.dir}")
        if pool.digest_key is not None:
            keep_key(pool.digest_key)
        if pool.new_key is not None:
            self._folder.make_pool_key()
        keeper = PoolKeeper(pool, self._fleet, self._say)
        seconds = self.topology.defaults.start_timeout_s
        deadline = time.monotonic() + seconds
        while not (told := keeper.ready()):
            self.check()
            if time.monotonic() > deadline:
                raise ProcessFailed(keeper.process, f"was not up within {seconds:g} s (defaults.start_timeout_s)")
            time.sleep(POLL_S)
        keeper.serves(told)
        self._pool = keeper

    def _server(self, instance: Instance) -> Process:
        self._say(f"starting {instance.name} on {instance.url} ({instance.place})")
        return self._fleet.start(instance.name, instance.argv, env={**self.environment, **instance.env})

    def check(self) -> None:
        """See whether all live; start a pool again that does not.

        Raises:
            ProcessFailed: another process ended.
        """
        if self._pool is not None:
            self._pool.look()
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
