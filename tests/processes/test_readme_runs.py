"""README's blocks for a machine without a GPU, typed line by line as a reader would, each in a terminal of its own.

They run in namespaces of their own, where README's ports and the pool's directory are free whatever else runs here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rig.documents import Block, Command, blocks
from tests.rig.servers import die_with_parent

REPO = Path(__file__).resolve().parents[2]
README = REPO / "README.md"
FORKING = REPO / "tests" / "rig" / "fork_server" / "forking.py"
UP_S = 400.0  # a server that starts as vLLM is installed, on a busy machine with two cores
ANSWER_S = 120.0
INSIDE = "ip link set lo up && mount -t tmpfs tmpfs /dev/shm && echo ready && exec cat"

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="namespaces need root"),
]


class Machine:
    """Terminals of a machine on which nothing else runs: its own loopback network and /dev/shm."""

    def __init__(self, folder: Path, *, forked: bool) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []
        self.logs: dict[str, Path] = {}
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", INSIDE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent(),
        )  # fmt: skip
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self.close()
            pytest.skip("namespaces can't be made here")
        self._path = os.pathsep.join([str(_programs(folder, forked)), os.environ["PATH"]])

    def close(self) -> None:
        for process in self._running:
            _signal(process, signal.SIGINT)  # Ctrl-C, as a reader ends them
        ends = time.monotonic() + 30
        for process in self._running:
            try:
                process.wait(max(0.1, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            _signal(process, signal.SIGKILL)
            process.wait(30)
        self._holder.kill()
        self._holder.communicate(timeout=30)

    def _argv(self, text: str) -> list[str]:
        inside = ["nsenter", "--target", str(self._holder.pid), "--net", "--mount"]
        return [*inside, "bash", "-c", f"cd {REPO}\n{text}"]

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": self._path, "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}

    def leave_running(self, command: Command) -> Path:
        """Type a command that runs on; what it says goes into a file."""
        log = self._folder / f"{len(self._running)}-{command.name}.log"
        with log.open("wb") as out:
            self._running.append(
                subprocess.Popen(
                    self._argv(command.text), env=self._environment, stdin=subprocess.DEVNULL, stdout=out,
                    stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent(),
                )
            )  # fmt: skip
        self.logs[command.text] = log
        return log

    def type(self, text: str, seconds: float = ANSWER_S) -> str:
        """What a command says that ends by itself; it must end well."""
        done = subprocess.run(
            self._argv(text), env=self._environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, f"{text}\nended with {done.returncode}: {done.stdout}{done.stderr}\n{self.said()}"
        return done.stdout

    def run_to_the_end(self, text: str) -> str:
        """All that a server says which must fail to start."""
        done = subprocess.run(
            self._argv(text), env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=UP_S, check=False,
        )  # fmt: skip
        assert done.returncode != 0, done.stdout
        return done.stdout

    def wait_for(self, said: str, log: Path) -> None:
        """Until a command that runs on has said so."""
        self._wait(lambda: said in log.read_text(errors="replace"), f"{log.name} never said {said!r}")

    def wait_healthy(self, port: str) -> None:
        probe = self._argv(f"curl -sf -m 5 http://127.0.0.1:{port}/health")
        self._wait(
            lambda: subprocess.run(probe, capture_output=True, check=False).returncode == 0, f"nothing on port {port}"
        )

    def _wait(self, done: object, what: str) -> None:
        assert callable(done)
        ends = time.monotonic() + UP_S
        while not done():
            ended = [process.args[-1] for process in self._running if process.poll() is not None]  # type: ignore[index]
            assert not ended, f"{ended} ended\n{self.said()}"
            assert time.monotonic() < ends, f"{what}\n{self.said()}"
            time.sleep(0.2)

    def said(self) -> str:
        """The last lines of all that runs on."""
        tails = (
            f"{log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]) for log in self.logs.values()
        )
        return "\n".join(tails)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def _programs(folder: Path, forked: bool) -> Path:
    """A folder with the programs of this Python's environment. ``forked``: vLLM's server forks its processes, which
    takes a quarter of the time; its arguments are the same."""
    made = folder / "bin"
    made.mkdir()
    python = made / "python"
    instead = (
        f'if [ "$1 $2" = "-m vllm.entrypoints.openai.api_server" ]; then shift 2; set -- {FORKING} "$@"; fi\n'
        if forked
        else ""
    )
    python.write_text(f'#!/bin/sh\n{instead}exec {sys.executable} "$@"\n')
    for name, module in (("pdlaunch", "launch.cli"), ("pdpool", "pool.cli"), ("pdrouter", "router.cli")):
        (made / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m pdtransport.{module} "$@"\n')
    for file in made.iterdir():
        file.chmod(0o755)
    return made


def start(machine: Machine, block: Block) -> list[str]:
    """Type a block: what it starts is up before the next command that asks something of it. What those said."""
    answers = []
    for command in block.commands:
        if not command.runs_on:
            answers.append(machine.type(command.text))
            continue
        log = machine.leave_running(command)
        if command.is_vllm or command.name == "pdrouter":
            machine.wait_healthy(command.option("--port"))
        elif command.name == "pdpool":
            machine.wait_for(" serves ", log)
        else:
            machine.wait_for("Ctrl-C stops it.", log)
    return answers


def block_with(*words: str) -> Block:
    """The one block of README that has all of these, and nothing of GPUs."""
    found = [block for block in blocks(README, "bash") if all(word in block.text for word in words)]
    (one,) = [block for block in found if "--gpu-memory" not in block.text and "CUDA" not in block.text]
    return one


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Machine]:
    with closing(Machine(tmp_path, forked=False)) as machine:
        yield machine


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Machine]:
    with closing(Machine(tmp_path, forked=True)) as machine:
        yield machine


needs_vllm = pytest.mark.skipif(shutil.which("curl") is None, reason="README asks with curl")


def pool_works(machine: Machine) -> None:
    asked, told = start(machine, block_with("pdpool", "kv_both"))
    answer = json.loads(asked)
    assert answer["choices"][0]["text"]
    chunks = answer["usage"]["prompt_tokens"] // 128  # vLLM's blocks on a CPU
    assert chunks > 1
    stored = re.search(r"\b(\d+) of [\d,]+ chunks", told)
    assert stored is not None, told
    assert int(stored[1]) >= chunks, told


@needs_vllm
@pytest.mark.long
def test_one_server_with_a_pool(quick: Machine) -> None:
    """The smallest use of all: a pool and one server, no prefill and decode; what a prompt left is in the pool."""
    pool_works(quick)


@needs_vllm
@pytest.mark.long
def test_one_server_with_a_pool_as_vllm_is_installed(slow: Machine) -> None:
    """The same with vLLM's own start."""
    pool_works(slow)


@needs_vllm
@pytest.mark.long
def test_a_pair_by_hand(slow: Machine) -> None:
    """Two servers that are told nothing but their roles, and the router: the answer was disaggregated."""
    (asked,) = start(slow, block_with("kv_producer", "pdrouter"))
    paths = re.findall(r"(?im)^x-pd-path: (.*)$", asked)
    assert paths == ["disaggregated"], f"{asked}\n{slow.said()}"
    assert json.loads(asked.partition("\n\n")[2])["choices"][0]["text"]


@needs_vllm
@pytest.mark.long
def test_a_second_server_of_a_role_is_told_which_setting(quick: Machine) -> None:
    """Its control port is taken: it ends, and a line of its log names the port, the setting and the variable. With
    the setting it comes up beside the first."""
    first = next(command for command in block_with("kv_producer", "pdrouter").commands if command.is_vllm)
    quick.leave_running(first)
    quick.wait_healthy("8100")
    again = first.text.replace("8100", "8101")
    ended = quick.run_to_the_end(again)
    told = [line for line in ended.splitlines() if "control.port: port 7670" in line]
    assert told, ended[-5000:]
    assert "PDTRANSPORT_CONTROL_PORT=N" in told[0]
    quick.leave_running(replace(first, text=f"PDTRANSPORT_CONTROL_PORT=7680 {again}"))
    quick.wait_healthy("8101")


@needs_vllm
@pytest.mark.long
def test_one_file(slow: Machine) -> None:
    """`pdlaunch topology.yaml` brings it up, proves it, and invites."""
    start(slow, block_with("pdlaunch examples/"))
