"""Ends that strangers and accidents bring about: no descriptor is left, the pool dies, a second launch takes the first
one's place."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pdtransport.launch.cli import NOT_STARTED
from pdtransport.pool.client.pool_client import PoolClient
from tests.processes.launch_rig import Rig, launched, wait_for
from tests.processes.pool_rig import key
from tests.siege.bystander import Effect, idle, processor_s, resident, settled, watched

DESCRIPTORS = 96  # that the pool may open; it has about half of them at rest
CONNECTIONS = 160
HELD_S = 3.0  # asyncio tries again every second
FIRST_PORT = 21380


@dataclass
class EndsEffect(Effect):
    """With what else there is to know of an end.

    Args:
        answers: Statuses of the bystander's requests.
        said: What the launcher said.
        kept: Whether what was there is as it was: the files of a first launch, the pool's process.
        shared: Files of pools' memory that nobody uses.
    """

    answers: list[int] = field(default_factory=list)
    said: str = ""
    kept: bool = True
    shared: list[str] = field(default_factory=list)


@contextmanager
def _place() -> Iterator[Path]:
    """For a pool's socket and memory: in memory, with a short path."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pdt-siege-") as folder:
        yield Path(folder)


def pool_api_without_descriptors(folder: Path) -> Effect:
    """More silent connections to the pool's HTTP API than it may open files."""
    effect = EndsEffect(f"{CONNECTIONS} connections to the pool's API, {DESCRIPTORS} descriptors")
    (folder / "key").write_text("k" * 32)
    (folder / "key").chmod(0o600)
    log = folder / "log"
    with ExitStack() as stack:
        place = stack.enter_context(_place())
        errors = stack.enter_context(log.open("wb"))
        command = [sys.executable, "-m", "pdtransport.pool.cli", "--dir", str(place), "--memory-bytes", "1MiB"]
        pool = subprocess.Popen(
            [*command, "--http", "127.0.0.1:0", "--http-key-file", str(folder / "key")],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS)),
        )
        stack.callback(pool.communicate)
        stack.callback(pool.kill)
        assert pool.stdout is not None
        pool.stdout.readline()
        url = urlsplit(pool.stdout.readline().split()[4].rstrip(","))
        client = stack.enter_context(PoolClient(directory=place))

        def look_up() -> None:
            client.lookup([key(1)]).result()

        idle(effect, look_up)
        effect.memory_before = resident(pool.pid)
        before = processor_s(pool.pid)
        with watched(effect, look_up), ExitStack() as connections:
            for _ in range(CONNECTIONS):
                one = connections.enter_context(socket.socket())
                one.settimeout(5)
                one.connect((url.hostname, url.port))
            time.sleep(HELD_S)
            with PoolClient(directory=place) as newcomer:
                newcomer.lookup([key(1)]).result()
        effect.kept = pool.poll() is None
        effect.processor_s = processor_s(pool.pid) - before
        effect.memory_after = settled(pool.pid, effect.memory_before)
        effect.lines = log.read_text().splitlines()
    return effect


def _under_a_launch(
    effect: EndsEffect, folder: Path, attack: Callable[[Rig, Path], None], settings: dict[str, object] | None = None
) -> Effect:
    """A bystander sends requests through a launch's router while ``attack`` goes on."""
    with _place() as place, launched(folder, FIRST_PORT) as rig:
        rig.data["pool"] = {"dir": str(place), "memory_bytes": "256MiB", **(settings or {})}
        rig.up()
        rig.wait_up()
        assert rig.process is not None

        def complete() -> None:
            effect.answers.append(rig.complete()[0])

        idle(effect, complete)
        effect.memory_before = resident(rig.process.pid)
        before = processor_s(rig.process.pid)
        with watched(effect, complete):
            attack(rig, place)
        effect.processor_s = processor_s(rig.process.pid) - before
        effect.memory_after = settled(rig.process.pid, effect.memory_before)
        rig.process.send_signal(signal.SIGINT)
        _, effect.said = rig.end()
        effect.lines = [line for line in effect.said.partition("Ctrl-C stops it.\n")[2].splitlines() if "pool" in line]
        effect.shared = [path.name for path in place.glob("*.memory")]
    return effect


def pool_killed_under_a_launch(folder: Path) -> Effect:
    """SIGKILL of the pool."""
    effect = EndsEffect("SIGKILL of the pool under pdlaunch")

    def kill(rig: Rig, place: Path) -> None:
        pid, [memory] = rig.pool_pid(), place.glob("*.memory")
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not memory.exists())
        wait_for(lambda: rig.pool_pid() not in (0, pid) and list(place.glob("*.memory")))

    return _under_a_launch(effect, folder, kill)


def second_launch_of_a_pool(folder: Path) -> Effect:
    """A second launch with the first one's pool."""
    effect = EndsEffect("a second pdlaunch up with the first one's pool")
    disk = {"disk": {"path": str(folder / "disk"), "bytes": "64MiB"}}

    def launch(rig: Rig, place: Path) -> None:
        kept = {path: path.read_bytes() for path in (*rig.run_dir.glob("*.key"), *place.glob("*.key"))}
        (folder / "other").mkdir()
        with launched(folder / "other", FIRST_PORT + 5) as other:
            other.data = {**other.data, "name": "other", "pool": rig.data["pool"]}
            other.up()
            status, said = other.end()
        assert status == NOT_STARTED, said
        assert f"a pool 'default' already runs in {place}" in said
        assert list(other.pids.iterdir()) == []  # it has started no server
        effect.kept = bool(kept) and {path: path.read_bytes() for path in kept} == kept

    return _under_a_launch(effect, folder, launch, disk)
