"""The router as a process of its own, in front of servers of the rig."""

from __future__ import annotations

import json
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
from tests.rig.ports import HOST
from tests.rig.servers import POLL_S, PORTS, Server, ServerFailed, die_with_parent
from tests.rig.straying import Straying

START_S = 60.0
STOP_S = 15.0


@dataclass(frozen=True)
class RunningRouter:
    url: str
    log: Path
    pid: int

    def get_json(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
            return json.load(answer)


@contextmanager
def routed(
    prefills: Sequence[Server | Straying], decodes: Sequence[Server], logs: Path, order: Order, *more: str
) -> Iterator[RunningRouter]:
    """A router for the length of a ``with`` block, with ``more`` options.

    Raises:
        ServerFailed: it did not start; with its last log lines.
    """
    port = PORTS.take()
    log_file = logs / f"router-{port}.log"
    command = [sys.executable, "-m", "pdtransport.router.cli", "--port", str(port), "--dispatch", order, *more]
    for flag, servers in (("--prefill", prefills), ("--decode", decodes)):
        command += [flag, *(f"{s.url}@{HOST}:{s.control_port}/{s.spec.tp}" for s in servers)]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=logs, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent()
        )
    try:
        router = RunningRouter(f"http://{HOST}:{port}", log_file, process.pid)
        _wait_ready(router, process)
        yield router
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)
        PORTS.give_back([port])


def _wait_ready(router: RunningRouter, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            router.get_json("/health")  # asks for no key
        except (urllib.error.URLError, OSError, ValueError):
            time.sleep(POLL_S)
        else:
            return
    raise ServerFailed(f"the router did not start; its log:\n{router.log.read_text(errors='replace')[-4000:]}")
