"""Control channels for tests: driven here, in other processes, and through a TCP proxy that can be cut."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import zmq

from pdtransport.control.channel import ControlChannel, Event, Identity
from pdtransport.settings import ControlSettings

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
WAIT_S = 20.0  # for what should happen at once: the machine may be busy
FAST: dict[str, Any] = {"port": 0, "heartbeat_s": 0.1, "liveness_s": 5.0, "connect_s": 5.0}
FACTS = {"protocol_version": 1, "model": "tiny", "block_size": 16, "kv_heads": 4, "tp_size": 1}

E = TypeVar("E")
_incarnations = itertools.count(1000)


def identity(engine: str, rank: int = 0, world: int = 1, **facts: Any) -> Identity:
    return Identity(engine, rank, world, next(_incarnations), {**FACTS, **facts}, {"ucx": engine.encode()})


class Node:
    """One channel and all that it reported."""

    def __init__(self, engine: str, me: Identity | None = None, bind: bool = True, **settings: Any) -> None:
        self.me = me or identity(engine)
        self.channel = ControlChannel(ControlSettings(**{**FAST, **settings}), self.me)
        self.events: list[Event] = []
        self.port = int(self.channel.bind().rsplit(":", 1)[1]) if bind else 0

    def turn(self) -> None:
        now = time.monotonic()
        self.events += self.channel.receive(now)
        self.events += self.channel.tick(now)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def take(self, kind: type[E]) -> list[E]:
        """Events of one kind, which are then forgotten."""
        found = self.of(kind)
        self.events = [event for event in self.events if not isinstance(event, kind)]
        return found

    @property
    def counters(self) -> dict[str, int]:
        return self.channel.counters


class Bench:
    """Drives nodes in this thread, as a transport's I/O thread would."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def node(self, engine: str, **kwargs: Any) -> Node:
        node = Node(engine, **kwargs)
        self.nodes.append(node)
        return node

    def drop(self, node: Node) -> None:
        self.nodes.remove(node)
        node.channel.close()

    def turn(self) -> None:
        poller = zmq.Poller()
        wait = 0.05
        for node in self.nodes:
            for each in node.channel.sockets():
                poller.register(each, zmq.POLLIN)
            due = node.channel.next_deadline()
            wait = wait if due is None else min(wait, due - time.monotonic())
        poller.poll(max(1, round(wait * 1000)))
        for node in self.nodes:
            node.turn()

    def until(self, condition: Callable[[], Any], within_s: float = WAIT_S) -> None:
        """Turn until ``condition`` holds; fail after ``within_s``."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {within_s} s; events: {[n.events for n in self.nodes]}"
            self.turn()

    def run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.turn()

    def close(self) -> None:
        for node in self.nodes:
            node.channel.close()


class Stranger:
    """A bare DEALER socket: says whatever it likes."""

    def __init__(self, port: int, **options: Any) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        for name, value in options.items():
            setattr(self.socket, name, value)
        self.socket.connect(f"tcp://{HOST}:{port}")

    def send(self, *parts: bytes) -> None:
        self.socket.send_multipart(list(parts))

    def answers(self) -> list[bytes]:
        found = []
        with contextlib.suppress(zmq.Again):
            while True:
                found.append(self.socket.recv(zmq.NOBLOCK))
        return found

    def close(self) -> None:
        self.context.destroy(0)


class Raw:
    """ZMTP by hand over a plain socket, as libzmq would not say it: unending messages, or nothing at all.

    Raises:
        OSError: the other side hung up in the handshake.
    """

    GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    MORE, LONG = 1, 2  # flags of a frame

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port), timeout=WAIT_S)
        self._unsent = b""
        try:
            self.socket.sendall(self.GREETING + self.READY)
            self._take(len(self.GREETING))
            self._take(self._take(2)[1])  # its READY: what is sent before that is an error
            self.socket.setblocking(False)
        except BaseException:
            self.socket.close()
            raise

    def _take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            found = self.socket.recv(count - len(data))
            if not found:
                raise ConnectionResetError
            data += found
        return data

    @classmethod
    def frame(cls, body: bytes, *, more: bool = False) -> bytes:
        return bytes([cls.LONG | (cls.MORE if more else 0)]) + len(body).to_bytes(8, "big") + body

    def send(self, data: bytes) -> bool:
        """``data``, or as much of what was said before as goes out at once; False: the connection is closed."""
        self._unsent = self._unsent or data
        try:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def closed(self) -> bool:
        """Whether the other side hung up; what it said before is thrown away."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        self.socket.close()


class Child:
    """A channel in a process of its own (:mod:`tests.processes.control_peer`)."""

    def __init__(self, engine: str, log: Path | None = None, **config: Any) -> None:
        config = {"engine": engine, "facts": FACTS, "settings": FAST, "incarnation": next(_incarnations), **config}
        self.incarnation = config["incarnation"]
        with contextlib.ExitStack() as stack:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.processes.control_peer", json.dumps(config)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=None if log is None else stack.enter_context(log.open("wb")),
                text=True,
            )
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.events: list[dict[str, Any]] = []
        self.port = int(self.wait("bound")["port"])

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(json.loads(line))

    def poll(self) -> list[dict[str, Any]]:
        with contextlib.suppress(queue.Empty):
            while True:
                self.events.append(self._lines.get_nowait())
        return self.events

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.poll()]

    def wait(self, kind: str, within_s: float = WAIT_S) -> dict[str, Any]:
        """The next event of a kind, which is then forgotten."""
        deadline = time.monotonic() + within_s
        while True:
            for event in self.poll():
                if event["kind"] == kind:
                    self.events.remove(event)
                    return event
            assert time.monotonic() < deadline, f"no {kind} within {within_s} s: {self.events}"
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.signal(signal.SIGCONT)
        self.process.wait(10)
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


class Proxy:
    """TCP in front of ``target``: connections can be cut, and new ones turned away."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._stop = False
        self._listener: socket.socket | None = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> int:
        """Break all connections; how many there were. New ones may come at once."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
            for pair in pairs:
                for each in pair:
                    each.close()
        return len(pairs)

    def close(self) -> None:
        self._stop = True
        self._thread.join(5)
        self.cut()
        if self._listener is not None:
            self._listener.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._stop:
            with self._lock:
                pairs = list(self._pairs)
                sources = [each for pair in pairs for each in pair]
                ready, *_ = select.select([self._listener, *sources], [], [], 0.01)
                for each in ready:
                    if each is self._listener:
                        client, _ = self._listener.accept()
                        self._pairs.append((client, socket.create_connection((HOST, self._target))))
                    else:
                        self._forward(each, pairs)
            time.sleep(0.001)

    def _forward(self, source: socket.socket, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
        pair = next(pair for pair in pairs if source in pair)
        if pair not in self._pairs:
            return
        try:
            data = source.recv(1 << 16)
            (pair[1] if source is pair[0] else pair[0]).sendall(data)
        except OSError:
            data = b""
        if not data:
            self._pairs.remove(pair)
            for each in pair:
                each.close()


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    it = Bench()
    try:
        yield it
    finally:
        it.close()
