"""Starts a topology (servers first, then the router), watches it, and stops everything at the end."""

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
PROGRESS_S = 15.0  # report a process at least this often, even if its stage does not change
ROUTER_START_S = 60.0

Say = Callable[[str], None]


class ProcessFailed(PDTransportError):
    """A process ended or was not up in time. The text is for people: the reason, then the last log lines."""

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
    """A signal asked to stop. Not an Exception, so that no handler on the way swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Turns the first SIGINT, SIGTERM or SIGHUP into :class:`Interrupted`.

    After that, and while shielded, these signals only make the process group stop faster.
    """

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
    """Check that no process has ended.

    Raises:
        ProcessFailed: a process ended.
    """
    dead = fleet.dead()
    if dead is not None:
        raise ProcessFailed(dead, logs.ending(dead.poll() or 0))


def await_health(
    check: Callable[[], None], starting: Sequence[tuple[Process, str]], timeout_s: float, say: Say
) -> None:
    """Wait until each of ``starting`` (a process and its URL) answers, and report progress.

    ``check`` is called repeatedly.

    Raises:
        ProcessFailed: a process of the group ended, or one was not up in time.
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
    """The processes of one topology.

    All are started in ``fleet``, which stops them; files that they share are in ``folder``.
    """

    def __init__(self, topology: Topology, plan: Plan, fleet: ProcessGroup, folder: RunFolder, say: Say) -> None:
        self.topology = topology
        self.plan = plan
        self._fleet = fleet
        self._folder = folder
        self._say = say
        self._pool: PoolKeeper | None = None
        self.environment: Mapping[str, str] = {}  # common to all servers

    def start(self) -> None:
        """Start all processes and wait until each answers.

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
        """Start the pool before the servers: it takes all of its memory at once, and the servers need it."""
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
        """Check that all processes are running; restart a pool that has died.

        Raises:
            ProcessFailed: another process ended.
        """
        if self._pool is not None:
            self._pool.look()
        check(self._fleet)

    def hold(self) -> None:
        """Watch until a process ends or a signal arrives.

        Raises:
            ProcessFailed: a process ended.
            Interrupted: a signal arrived.
        """
        while True:
            self.check()
            time.sleep(POLL_S)


def waves(instances: Sequence[Instance]) -> list[list[Instance]]:
    """Groups of instances that start together.

    Instances that share a GPU start one after the other, because each measures the free memory when it starts.
    """
    groups: list[list[Instance]] = []
    for instance in instances:
        for group in groups:
            if not any(set(other.gpus) & set(instance.gpus) for other in group):
                group.append(instance)
                break
        else:
            groups.append([instance])
    return groups
