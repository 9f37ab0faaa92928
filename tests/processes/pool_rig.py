"""Real pools and real clients in processes of their own, for tests that kill, stop and damage them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing as mp
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

with contextlib.suppress(ImportError):
    import redis

from pdtransport.kernels import pages
from pdtransport.kernels.runs import Runs
from pdtransport.pool.client.pool_client import Copied, PoolClient
from pdtransport.pool.tiers.keyed_digest import keep_key
from pdtransport.settings import Settings

ANSWER_S = 30.0
CHUNK = 256 << 10
PAGE = 32 << 10

Bytes = npt.NDArray[np.uint8]


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def content(number: int, nbytes: int = CHUNK) -> Bytes:
    """What the chunk of this number holds: nothing that another one holds."""
    return np.random.default_rng(number).integers(0, 256, nbytes, dtype=np.uint8)


class Pages:
    """Memory of an engine: chunks scattered over pages in no order."""

    def __init__(self, chunks: int, nbytes: int = CHUNK) -> None:
        self.memory = np.zeros((chunks * nbytes // PAGE + 1, PAGE), dtype=np.uint8)
        order = np.random.default_rng(0).permutation(chunks * nbytes // PAGE)
        self.pages = order.reshape(chunks, nbytes // PAGE)

    def runs(self, place: int) -> Runs:
        runs = np.empty((self.pages.shape[1], 2), dtype=np.uint64)
        runs[:, 0] = self.memory.ctypes.data + self.pages[place] * PAGE
        runs[:, 1] = PAGE
        return runs

    def put(self, place: int, what: Bytes) -> None:
        self.memory[self.pages[place]] = what.reshape(-1, PAGE)

    def get(self, place: int) -> Bytes:
        return self.memory[self.pages[place]].reshape(-1)


def store(client: PoolClient, numbers: Sequence[int], **how: Any) -> Copied:
    memory = Pages(len(numbers))
    for place, number in enumerate(numbers):
        memory.put(place, content(number))
    return client.store([key(n) for n in numbers], [memory.runs(p) for p in range(len(numbers))], **how).result()


def load(client: PoolClient, numbers: Sequence[int], **how: Any) -> Copied:
    """Load, and assert that whatever is said to be loaded is what was stored."""
    memory = Pages(len(numbers))
    done = client.load([key(n) for n in numbers], [memory.runs(p) for p in range(len(numbers))], **how).result()
    for place, (number, verdict) in enumerate(zip(numbers, done.verdicts, strict=True)):
        if verdict.name == "READ":
            assert np.array_equal(memory.get(place), content(number)), f"chunk {number} is wrong"
    return done


def names(done: Copied) -> list[str]:
    return [verdict.name for verdict in done.verdicts]


def until(what: Callable[[], Any], why: str) -> Any:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise TimeoutError(why)


class Daemon:
    """A ``pdpool`` process."""

    def __init__(self, directory: Path, *options: str, memory: str = "16MiB", expect: bool = True) -> None:
        self.directory = directory
        command = [sys.executable, "-m", "pdtransport.pool.cli", "--dir", str(directory), "--memory-bytes", memory]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )
        if expect:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            assert "serves" in line, line + (self.process.stderr.read() if self.process.stderr else "")

    def url(self) -> str:
        """Of its HTTP API, which it tells once."""
        assert self.process.stdout is not None
        found = re.search(r"http://[^,\s]+", self.process.stdout.readline())
        assert found
        return found[0]

    def kill(self, how: int = signal.SIGKILL) -> None:
        self.process.send_signal(how)
        if how in (signal.SIGKILL, signal.SIGTERM):
            self.process.wait(ANSWER_S)
        if how == signal.SIGSTOP:
            stat = Path(f"/proc/{self.process.pid}/stat")
            until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it did not stop")

    def outcome(self) -> tuple[int, str]:
        """Exit status and standard error of one that ends by itself."""
        _, errors = self.process.communicate(timeout=ANSWER_S)
        return self.process.returncode, errors

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def daemon(directory: Path, *options: str, memory: str = "16MiB") -> Iterator[Daemon]:
    made = Daemon(directory, *options, memory=memory)
    try:
        yield made
    finally:
        made.close()


def status(client: PoolClient) -> dict[str, Any]:
    return json.loads(json.dumps(client.status().result()))  # type: ignore[no-any-return]


def mine(client: PoolClient) -> dict[str, Any]:
    """What the pool says of ``client``, in a test whose only further client is an :class:`Other`."""
    return next(each for each in status(client)["clients"] if each["name"] != "other")


class Other:
    """A client in a process of its own, of the pool in a directory or at an address. It can be told to halt in the
    middle of the next copy, half of it done."""

    def __init__(self, place: Path | str, settings: Settings | None = None) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, place, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.answer()

    def begin(self, verb: str, *arguments: Any) -> None:
        self._pipe.send((verb, arguments))

    def answer(self) -> Any:
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError("the other client does not answer")
        return self._pipe.recv()

    def ask(self, verb: str, *arguments: Any) -> Any:
        self.begin(verb, *arguments)
        return self.answer()

    def halt_in(self, verb: str, numbers: Sequence[int]) -> None:
        """Begin a store or load, and return when it stands in the middle of its copy."""
        self.ask("halt")
        self.begin(verb, list(numbers))
        assert self.answer() == "halted"

    def go_on(self) -> Any:
        """Let the copy end; what became of the store or load."""
        self._pipe.send(("go", ()))
        return self.answer()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(ANSWER_S)

    def close(self) -> None:
        self.kill()
        self._pipe.close()


def _serve(pipe: Connection, place: Path | str, settings: Settings | None) -> None:
    whole = pages.read_mapped
    how: dict[str, Any] = {"directory": place} if isinstance(place, Path) else {"address": place, "settings": settings}
    client = PoolClient(**how, deadline_s=ANSWER_S, who="other")
    halting, go = threading.Event(), threading.Event()

    def copy(src: Runs, dst: Runs, blocks: int = 0, **more: Any) -> Any:
        if halting.is_set():
            halting.clear()
            half = np.minimum(src[:, 1], 8)
            if len(src) == len(dst):
                whole(np.column_stack((src[:, 0], half)), np.column_stack((dst[:, 0], half)))
            pipe.send("halted")
            go.wait(ANSWER_S)
        return whole(src, dst, blocks, **more)

    pages.read_mapped = copy  # type: ignore[assignment]
    verbs: dict[str, Callable[..., Any]] = {
        "halt": halting.set,
        "lookup": lambda numbers: client.lookup([key(n) for n in numbers]).result().there,
    }

    def run(verb: str, arguments: tuple[Any, ...]) -> None:
        if verb in ("store", "load"):
            done = (store if verb == "store" else load)(client, *arguments)
            pipe.send((names(done), done.error))
        else:
            pipe.send(verbs[verb](*arguments))

    pipe.send("ready")
    while True:
        verb, arguments = pipe.recv()
        if verb == "go":
            go.set()
        else:
            threading.Thread(target=run, args=(verb, arguments), daemon=True).start()


# -- what can befall a chunk's file: (its path, another chunk's) ----------------------------------------------------


def damage_bit(path: Path, sibling: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte[0] ^ 4]))


def damage_header(path: Path, sibling: Path) -> None:
    with path.open("r+b") as file:
        file.seek(24)
        file.write(b"\xff")


def cut_off(path: Path, sibling: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def empty(path: Path, sibling: Path) -> None:
    os.truncate(path, 0)


def another_chunk(path: Path, sibling: Path) -> None:
    path.write_bytes(sibling.read_bytes())


def gone(path: Path, sibling: Path) -> None:
    path.unlink()


def unreadable(path: Path, sibling: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [damage_bit, damage_header, cut_off, empty, another_chunk, gone, unreadable]


class Redis:
    """A redis-server of our own, on a Unix socket, without persistence."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "redis.sock"
        self.digest_key = folder / "digest.key"  # of pools that use it
        keep_key(self.digest_key)
        self.start()

    def start(self, *options: str) -> None:
        command = ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, cwd=self.socket.parent)
        self.client = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=5)
        until(self.answers, "redis-server does not start")

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def settings(self, **options: Any) -> dict[str, Any]:
        return {"url": f"unix://{self.socket}", "bytes": 64 << 20, "timeout_s": 0.5, **options}
