"""Start and stop real vLLM servers, each in a process group of its own with its log in a file."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.rig import device as place
from tests.rig.device import PLACE, Device
from tests.rig.ports import HOST, Ports, listens

REPOSITORY = Path(__file__).resolve().parents[2]
TINY_LM = REPOSITORY / "examples" / "models" / "tiny-lm"
MODEL_NAME = "tiny-lm"

START_S = 240.0  # 8 to 25 s on an idle machine with two cores, several at once and on a busy one far more
TERM_S = 10.0  # after SIGTERM; then SIGKILL
KILL_S = 10.0  # after SIGKILL, before we say that a process is stuck in the kernel
POLL_S = 0.1
LOG_LINES = 40
ERROR_LINES = 12
_FRAME = re.compile(r"\] +(File |[\^~]| )|Traceback")  # lines of a stack trace but its last
PR_SET_PDEATHSIG = 1

Connector = Literal["none", "pdtransport", "nixl", "nixl-push"]
NIXL = {"nixl": "NixlConnector", "nixl-push": "NixlPushConnector"}
KVRole = Literal["kv_producer", "kv_consumer", "kv_both"]


class ServerFailed(Exception):
    """A server did not come up, or ended; the text ends with its last log lines."""


@dataclass(frozen=True)
class ServerSpec:
    """What to start. Defaults are those of the token-equality tests: small chunks, and what ``tests.rig.device`` reads
    from the environment.

    Args:
        replicas: data-parallel ones.
        cores: ``VLLM_CPU_OMP_THREADS_BIND``: cores of each rank, ranks apart by ``|``.
        max_batched_tokens: None leaves vLLM's default.
        extra_config: ``kv_connector_extra_config`` without the control port, which the rig picks.
        connector_module: where vLLM finds the connector's class; "" is the installed one.
        cards: GPUs that it sees, its own first (a tensor-parallel server's ranks take the first ones); none: as we do.
        load_format: vLLM's; None reads weights. ``dummy`` ones make fast servers whose answers mean nothing.
        script: what Python runs in place of vLLM's server: a file that starts it.
    """

    name: str
    connector: Connector = "none"
    kv_role: KVRole = "kv_both"
    tp: int = 1
    replicas: int = 1
    cores: str = "0"
    block_size: int = PLACE.block_size
    dtype: str = PLACE.dtype
    max_num_seqs: int = 16
    max_model_len: int = 8192
    max_batched_tokens: int | None = 256
    kv_cache_bytes: int = 512 << 20
    blocks: int | None = None
    load_failure_policy: Literal["fail", "recompute"] | None = None
    extra_config: Mapping[str, Any] = field(default_factory=dict)
    connector_module: str = ""
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    model: Path = TINY_LM
    load_format: str | None = None
    device: Device = PLACE.device
    eager: bool = PLACE.eager
    asynchronous: bool | None = PLACE.asynchronous
    cards: tuple[int, ...] = PLACE.cards
    script: Path | None = None

    @property
    def workers(self) -> int:
        return self.tp * self.replicas

    def numerics(self) -> dict[str, Any]:
        """The flags that an answer's bits depend on."""
        facts = {
            "tp": self.tp,
            "cores": self.cores,
            "block_size": self.block_size,
            "dtype": self.dtype,
            "max_batched_tokens": self.max_batched_tokens,
            "max_num_seqs": self.max_num_seqs,
        }
        if self.device == "cuda":
            facts |= {"card": place.card(), "eager": self.eager, "invariant": PLACE.invariant}
        return facts

    def command(self, port: int, control_port: int) -> list[str]:
        command = [sys.executable]
        command += [str(self.script)] if self.script else ["-m", "vllm.entrypoints.openai.api_server"]
        flags: dict[str, Any] = {
            "--model": self.model,
            "--served-model-name": MODEL_NAME,
            "--host": HOST,
            "--port": port,
            "--dtype": self.dtype,
            "--block-size": self.block_size,
            "--max-model-len": self.max_model_len,
            "--max-num-seqs": self.max_num_seqs,
            "--kv-cache-memory-bytes": self.kv_cache_bytes,
            "--tensor-parallel-size": self.tp,
            "--uvicorn-log-level": "warning",
            "--seed": 0,
        }
        if self.replicas > 1:
            flags["--data-parallel-size"] = self.replicas
        if self.max_batched_tokens is not None:
            flags["--max-num-batched-tokens"] = self.max_batched_tokens
        if self.load_format is not None:
            flags["--load-format"] = self.load_format
        if self.blocks is not None:
            flags["--num-gpu-blocks-override"] = self.blocks
        if self.connector != "none":
            flags["--kv-transfer-config"] = json.dumps(self.transfer_config(control_port))
        for flag, value in flags.items():
            command += [flag, str(value)]
        return [*command, *place.flags(self.device, self.eager, self.asynchronous, self.tp), *self.args]

    def transfer_config(self, control_port: int) -> dict[str, Any]:
        config: dict[str, Any] = {"kv_role": self.kv_role}
        if self.load_failure_policy is not None:
            config["kv_load_failure_policy"] = self.load_failure_policy
        if self.connector in NIXL:
            return {**config, "kv_connector": NIXL[self.connector], "engine_id": self.engine_id(control_port)}
        if self.connector_module:
            config["kv_connector_module_path"] = self.connector_module
        extra = {**self.extra_config, "control": {**self.extra_config.get("control", {}), "port": control_port}}
        return {**config, "kv_connector": "PDTransportConnector", "kv_connector_extra_config": extra}

    def engine_id(self, control_port: int) -> str:
        """Names a NIXL server to its peers."""
        return f"{self.name}-{control_port}"

    def environment(self, control_port: int) -> dict[str, str]:
        env = {**os.environ, **place.environment(self.device, self.cores, self.name, self.cards, self.tp)}
        if self.connector in NIXL:
            env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = HOST
            env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(control_port)
        return {**env, **self.env}


PORTS = Ports()


def die_with_parent() -> Callable[[], None]:
    """For ``preexec_fn``: the child gets SIGTERM when the thread that started it ends, however that happens."""
    libc = ctypes.CDLL(None)  # loaded before the fork
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def group_members(pgid: int) -> list[int]:
    """Process ids of a process group, zombies left out."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text()
        except OSError:
            continue  # it ended meanwhile
        state, _, group = stat.rpartition(")")[2].split()[:3]
        if int(group) == pgid and state != "Z":
            found.append(int(entry))
    return found


class Server:
    """One running server. Use :func:`fleet`, which ends what it starts."""

    def __init__(self, spec: ServerSpec, logs: Path) -> None:
        self.spec = spec
        self.port = PORTS.take()
        self.control_port = PORTS.take(spec.workers)
        self.log = logs / f"{spec.name}-{self.port}.log"
        self.launch()

    def launch(self) -> None:
        """Start its processes; again, on the same ports, once all of them are gone. They end with this thread."""
        self.started_at = time.monotonic()
        self.ready_s: float | None = None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.spec.command(self.port, self.control_port),
                env=self.spec.environment(self.control_port),
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        self.pgid = self.process.pid

    def __repr__(self) -> str:
        return f"<Server {self.spec.name} on {self.port}>"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def tail(self, lines: int = LOG_LINES) -> str:
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join(text[-lines:])

    def first_errors(self, lines: int = ERROR_LINES) -> str:
        """What the engine complained of first: the end of its log is the API server's, which only says that it died."""
        text = self.log.read_text(errors="replace").splitlines()
        found = [line for line in text if " ERROR " in line and not _FRAME.search(line)]
        return "\n".join(found[:lines])

    def failed(self, what: str) -> ServerFailed:
        text = f"server {self.spec.name!r} {what}; last lines of {self.log}:\n{self.tail()}"
        return ServerFailed(f"{text}\nfirst errors:\n{self.first_errors()}")

    def healthy(self, timeout_s: float = 2.0) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=timeout_s) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait_ready(self, deadline: float) -> None:
        """Wait until it answers.

        Raises:
            ServerFailed: it ended, or ``deadline`` (``time.monotonic``) passed.
        """
        while not (listens(self.members(), self.port) and self.healthy()):
            if self.process.poll() is not None:
                raise self.failed(f"ended with status {self.process.returncode} before it was up")
            if time.monotonic() > deadline:
                raise self.failed("did not come up in time")
            time.sleep(POLL_S)
        self.ready_s = time.monotonic() - self.started_at

    def must_live(self) -> None:
        """Raises ServerFailed unless the server still runs and answers."""
        if self.process.poll() is not None:
            raise self.failed(f"ended with status {self.process.returncode}")
        if not self.healthy(timeout_s=20.0):
            raise self.failed("no longer answers /health")

    def members(self) -> list[int]:
        return group_members(self.pgid)

    def workers(self) -> list[int]:
        """Process ids of the model workers, by rank. A lone worker on a GPU lives in its engine's process."""
        return self._titled("VLLM::Worker") or self._titled("VLLM::EngineCore")

    def engines(self) -> list[int]:
        """Process ids of the engines' cores, one a data-parallel replica."""
        return self._titled("VLLM::EngineCore")

    def _titled(self, start: str) -> list[int]:
        named = []
        for pid in self.members():
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            except OSError:
                continue
            if title.startswith(start):
                named.append((title, pid))
        return [pid for _, pid in sorted(named)]

    def signal(self, number: int) -> None:
        """Send a signal to every process of the server."""
        try:
            os.killpg(self.pgid, number)
        except ProcessLookupError:
            pass

    def pause_engine(self, paused: bool = True) -> None:
        """Stop the engine, as a long step would hold it up, or let it go on; its HTTP server answers meanwhile."""
        for pid in self.engines():
            os.kill(pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, as a crash would end it."""
        self.signal(signal.SIGKILL)
        self._gone_within(KILL_S)

    def stop(self) -> None:
        """End it: SIGTERM, then SIGKILL for what is left.

        Raises:
            ServerFailed: a process survived SIGKILL.
        """
        self.signal(signal.SIGCONT)  # a stopped process can't act on SIGTERM
        self.process.terminate()
        if not self._gone_within(TERM_S):
            self.signal(signal.SIGKILL)
            if not self._gone_within(KILL_S):
                raise self.failed(f"left processes {self.members()} after SIGKILL")

    def _gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.process.poll()  # reaps it
            if not self.members():
                return True
            time.sleep(POLL_S)
        return not self.members()


_running: list[Server] = []


def stop_all(servers: Iterable[Server]) -> None:
    """Stop servers side by side; raises the first error after all were tried."""
    servers = list(servers)
    for server in servers:
        server.signal(signal.SIGCONT)
        server.process.terminate()
    errors = []
    for server in servers:
        try:
            server.stop()
        except ServerFailed as error:
            errors.append(error)
        if server in _running:
            _running.remove(server)
        PORTS.give_back([server.port, *range(server.control_port, server.control_port + server.spec.workers)])
    if errors:
        raise errors[0]


@atexit.register
def _stop_leftovers() -> None:
    stop_all(list(_running))


def start(specs: Sequence[ServerSpec], logs: Path | None = None, timeout_s: float = START_S) -> list[Server]:
    """Start servers side by side (in turn where ``PDT_START`` says so) and wait until all answer; on failure none is
    left.

    Raises:
        ServerFailed: with the last log lines of the one that failed.
    """
    logs = logs or Path(tempfile.mkdtemp(prefix="pdtransport-rig-"))
    servers: list[Server] = []
    deadline = time.monotonic() + timeout_s
    try:
        for spec in specs:
            server = Server(spec, logs)
            servers.append(server)
            _running.append(server)
            if not PLACE.together:
                server.wait_ready(deadline)
        for server in servers:
            server.wait_ready(deadline)
    except BaseException:
        stop_all(servers)
        raise
    return servers


@contextmanager
def fleet(*specs: ServerSpec, logs: Path | None = None, timeout_s: float = START_S) -> Iterator[list[Server]]:
    """Servers for the length of a ``with`` block."""
    servers = start(specs, logs, timeout_s)
    try:
        yield servers
    finally:
        stop_all(servers)
