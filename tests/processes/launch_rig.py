"""``pdlaunch`` on a topology of stand-ins: the real launcher, guards and router, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pdtransport.launch import guard
from pdtransport.launch.rundir import read_record

REPO = Path(__file__).resolve().parents[2]
FIRST_PORT = 21310
UP_S = 60.0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(what: Any, seconds: float = UP_S, instead: Any = lambda: "") -> Any:
    """``instead``: says what is there when it does not happen."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := what():
            return value
        time.sleep(0.05)
    raise AssertionError(f"did not happen in time {instead()}")


class Rig:
    """A topology of stand-ins, and the pdlaunch that runs it."""

    def __init__(self, folder: Path, first_port: int = FIRST_PORT) -> None:
        self.folder = folder
        self.first_port = first_port
        self.environment = {"TMPDIR": str(folder)}  # a killed pdlaunch leaves a folder there
        self.pids = folder / "pids"
        self.pids.mkdir()
        self.run_dir = folder / "run"
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text('{"num_attention_heads": 8}')
        (model / "model.safetensors").write_bytes(b"x")
        self.data: dict[str, Any] = {
            "apiVersion": "pdtransport/v1",
            "name": "rig",
            "model": {"id": "./model"},
            "defaults": {
                "stop_timeout_s": 2,
                "start_timeout_s": 30,
                "args": {"kv-cache-memory-bytes": 1 << 20, "pids": str(self.pids)},
            },
            "roles": {
                "prefill": {"port": first_port, "control_port": first_port + 2, "args": {}},
                "decode": {"port": first_port + 1, "control_port": first_port + 3, "args": {}},
            },
            "router": {"port": first_port + 4},
            "preflight": {"golden_prompt": False},
        }
        self.process: subprocess.Popen[str] | None = None

    @property
    def file(self) -> Path:
        path = self.folder / "topology.yaml"
        path.write_text(yaml.safe_dump(self.data))
        return path

    def up(self, *options: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "tests.processes.launch_standins", "up", str(self.file)]
        self.process = subprocess.Popen(
            [*argv, "--run-dir", str(self.run_dir), *options],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environment},
        )
        return self.process

    @property
    def url(self) -> str:
        """Of the router."""
        return f"http://127.0.0.1:{self.first_port + 4}"

    def wait_up(self) -> None:
        process = self.process
        assert process is not None

        def serves() -> bool:
            record = read_record(self.run_dir) or {}
            return (record.get("pid"), record.get("state")) == (process.pid, "serving")

        wait_for(lambda: serves() or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]

    def end(self) -> tuple[int, str]:
        assert self.process is not None
        output = self.process.communicate(timeout=UP_S)[0]
        return self.process.returncode, output

    def everyone(self) -> list[int]:
        """Every process of the run: the servers' own notes, and all below pdlaunch."""
        assert self.process is not None
        noted = [int(path.name) for path in self.pids.iterdir()]
        return sorted({*noted, *guard.descendants(self.process.pid)})

    def pool_pid(self) -> int:
        """Of the pool itself, not of its guard; 0: none runs."""
        assert self.process is not None
        for pid in guard.descendants(self.process.pid):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"pdtransport.pool.cli" in command and b"guard.py" not in command:
                return pid
        return 0

    def complete(self) -> tuple[int, str]:
        """Send a request through the router: its status and what was written."""
        body = json.dumps({"model": "rig", "prompt": "x", "max_tokens": 3}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=UP_S) as answer:
                return answer.status, json.load(answer)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextmanager
def launched(folder: Path, first_port: int = FIRST_PORT) -> Iterator[Rig]:
    """A rig, of which nothing is left afterwards even if the test failed."""
    made = Rig(folder, first_port)
    try:
        yield made
    finally:
        if made.process is not None:
            if made.process.poll() is None:
                made.process.kill()
            made.process.communicate()
            for pid in made.everyone():  # only where a test failed
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
