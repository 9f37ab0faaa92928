"""The router as a process of its own, in front of servers of the rig."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.rig.client import Order
from tests.rig.lost_prefill import LostPrefill
from tests.rig.ports import HOST
from tests.rig.servers import POLL_S, PORTS, Server, ServerFailed, die_with_parent

START_S = 60.0
STOP_S = 15.0


@dataclass
class RunningRouter:
    """Ends with the thread that started it."""

    url: str
    log: Path
    command: Sequence[str]
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, url: str, log: Path, command: Sequence[str]) -> RunningRouter:
        return cls(url, log, command, _launched(command, log))

    def again(self) -> None:
        """Start it again on its port, once it is dead; see :meth:`wait_ready`."""
        self.process.wait(STOP_S)
        self.process = _launched(self.command, self.log)

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_ready(self) -> None:
        """
        Raises:
            ServerFailed: it is not up in time; with its last log lines.
        """
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get_json("/health")  # asks for no key
            except (urllib.error.URLError, OSError, ValueError):
                time.sleep(POLL_S)
            else:
                return
        raise ServerFailed(f"the router did not start; its log:\n{self.log.read_text(errors='replace')[-4000:]}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_S)

    def get_json(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
            return json.load(answer)


@contextmanager
def routed(
    prefills: Sequence[Server | LostPrefill],
    decodes: Sequence[Server],
    logs: Path,
    order: Order,
    *more: str,
    told: bool = True,
) -> Iterator[RunningRouter]:
    """A router for the length of a ``with`` block, with ``more`` options. It is ``told`` where workers are, or has to
    find out.

    Raises:
        ServerFailed: it did not start; with its last log lines.
    """
    port = PORTS.take()
    log_file = logs / f"router-{port}.log"
    command = [sys.executable, "-m", "pdtransport.router.cli", "--port", str(port), "--dispatch", order, *more]
    for flag, servers in (("--prefill", prefills), ("--decode", decodes)):
        command += [flag, *(f"{s.url}@{HOST}:{s.control_port}/{s.spec.tp}" if told else s.url for s in servers)]
    log_file.write_bytes(b"")
    router = RunningRouter.start(f"http://{HOST}:{port}", log_file, command)
    try:
        router.wait_ready()
        yield router
    finally:
        router.stop()
        PORTS.give_back([port])


def _launched(command: Sequence[str], log_file: Path) -> subprocess.Popen[bytes]:
    with log_file.open("ab") as log:
        return subprocess.Popen(
            command, cwd=log_file.parent, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent()
        )
