"""Transports in processes of their own, which are told what to do line by line, and a liar between two of them.

Run as a program this file is one such process.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import zmq

from pdtransport import KVGeometry, Settings, Transport, prompt_digest
from pdtransport.errors import PDTransportError
from pdtransport.protocol import messages

PATIENCE_S = 60.0
BLOCKS, TAKEN, TOKENS = 256, 16, 16
SHAPE = (2, BLOCKS, 2, TOKENS, 64)
PROMPT = list(range(TAKEN * TOKENS))
DIGEST = prompt_digest(PROMPT)
DEADLINES = {
    "answer_s": 1.0,
    "arrival_s": 2.0,
    "queue_s": 3.0,
    "stall_s": 2.0,
    "verify_s": 2.0,
    "hold_s": 2.0,
    "claim_s": 3.0,
    "ack_s": 2.0,
}


class Peer:
    """One transport in a process of its own; its log is a file, and its answers come over a pipe."""

    def __init__(self, folder: Path, name: str, settings: dict[str, Any] | None = None) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "tests.siege.fresh_peers", json.dumps(settings or {"deadlines": DEADLINES})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._answers: dict[int, queue.Queue[Any]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port: int = self.ask("port")

    @property
    def pid(self) -> int:
        return self.child.pid

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def begin(self, verb: str, *arguments: Any) -> Callable[[], Any]:
        assert self.child.stdin is not None
        with self._lock:
            number = next(self._numbers)
            self._answers[number] = queue.Queue()
            self.child.stdin.write((json.dumps([number, verb, arguments]) + "\n").encode())
            self.child.stdin.flush()

        def answer() -> Any:
            try:
                return self._answers[number].get(timeout=PATIENCE_S)
            except queue.Empty:
                raise TimeoutError(f"{verb} {arguments} is not answered: {self.lines()[-3:]}") from None
            finally:
                del self._answers[number]

        return answer

    def ask(self, verb: str, *arguments: Any) -> Any:
        return self.begin(verb, *arguments)()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            number, value = json.loads(line)
            self._answers[number].put(value)

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)


def hand_over(prefill: Peer, decode: Peer, transfer: str, port: int | None = None) -> str:
    """One transfer from one to the other: ``right``, ``wrong``, or why it failed."""
    offered = prefill.begin("offer", transfer)
    taken = decode.ask("take", transfer, port or prefill.port)
    offered()
    return str(taken)


Change = Callable[[dict[str, Any]], "list[dict[str, Any] | bytes]"]


class Liar:
    """Stands between a decode worker and a prefill worker, each of which takes it for a peer of another name than the
    real one, and changes what is said through it."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.change: Callable[[bool, dict[str, Any]], list[dict[str, Any] | bytes]] = lambda down, said: [said]
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.linger = 0
        self.port = self._front.bind_to_random_port("tcp://127.0.0.1")
        self._over = threading.Event()
        self.heard: list[tuple[bool, dict[str, Any]]] = []
        self._incarnations: dict[int, int] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        backs: dict[bytes, zmq.Socket[bytes]] = {}
        while not self._over.is_set():
            poller = zmq.Poller()
            for sock in (self._front, *backs.values()):
                poller.register(sock, zmq.POLLIN)
            ready = dict(poller.poll(50))
            if self._front in ready:
                who, *parts = self._front.recv_multipart()
                if who not in backs:
                    backs[who] = self._context.socket(zmq.DEALER)
                    backs[who].linger = 0
                    backs[who].connect(f"tcp://127.0.0.1:{self._target}")
                for changed in self._changed(True, parts):
                    backs[who].send_multipart(changed)
            for who, back in backs.items():
                if back in ready:
                    for changed in self._changed(False, back.recv_multipart()):
                        self._front.send_multipart([who, *changed])

    def _changed(self, up: bool, parts: list[bytes]) -> list[list[bytes]]:
        try:
            said = msgpack.unpackb(parts[-1])
        except ValueError:
            return [parts]
        if not isinstance(said, dict):
            return [parts]
        self.heard.append((up, dict(said)))
        if "engine" in said:
            self._incarnations[said["incarnation"]] = said["incarnation"] ^ self.port
            said["engine"] = f"liar-{self.port}-{said['engine']}"
        if "incarnation" in said:
            both = {**self._incarnations, **{fake: real for real, fake in self._incarnations.items()}}
            said["incarnation"] = both.get(said["incarnation"], said["incarnation"])
        return [
            [*parts[:-1], each if isinstance(each, bytes) else msgpack.packb(each)] for each in self.change(up, said)
        ]

    def close(self) -> None:
        self._over.set()
        self._thread.join(PATIENCE_S)
        self._context.destroy(0)


class Impostor:
    """A bare socket that greets a worker as an equal peer, and then says what it likes."""

    def __init__(self, port: int, engine: str, identity: bytes | None = None) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        if identity is not None:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.engine = engine

    def say(self, message: Any) -> None:
        self.socket.send(message if isinstance(message, bytes) else messages.encode(message))

    def hear(self, wait_s: float = 10.0) -> Any:
        return messages.decode(self.socket.recv_multipart()[-1]) if self.socket.poll(round(wait_s * 1000)) else None

    def hear_kind(self, kind: str, wait_s: float = 10.0) -> Any:
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            heard = self.hear(until - time.monotonic())
            if heard is not None and heard.kind == kind:
                return heard
        return None

    def greet(self, hello: dict[str, Any]) -> Any:
        """With what a real peer said in its greeting, under a name of its own."""
        own = {**hello, "engine": self.engine, "incarnation": int.from_bytes(os.urandom(7), "big")}
        self.socket.send(msgpack.packb(own))
        return self.hear()

    def close(self) -> None:
        self.context.destroy(0)


def _serve() -> None:
    memory = np.zeros(SHAPE, np.uint8)
    pattern = np.random.default_rng(7).integers(1, 256, (SHAPE[0], TAKEN, *SHAPE[2:]), dtype=np.uint8)
    memory[:, :TAKEN] = pattern
    places: queue.Queue[int] = queue.Queue()
    for place in range(1, BLOCKS // TAKEN):
        places.put(place)
    told = threading.Lock()

    def tell(number: int, value: Any) -> None:
        with told:
            sys.stdout.write(json.dumps([number, value]) + "\n")
            sys.stdout.flush()

    settings = Settings.parse(json.loads(sys.argv[1]))
    with Transport(KVGeometry.of_array(memory), settings, engine=f"engine-{os.getpid()}", port=0) as transport:

        def offer(transfer: str) -> str:
            offered = transport.offer(transfer, DIGEST, tokens=len(PROMPT))
            for done in range(64, len(PROMPT) + 1, 64):
                offered.ready(list(range(TAKEN)), tokens=done)
            offered.finish()
            try:
                offered.result(timeout_s=30)
            except PDTransportError as error:
                return str(getattr(error, "code", error))
            return "done"

        def take(transfer: str, port: int) -> str:
            place = places.get()
            pages = list(range(place * TAKEN, (place + 1) * TAKEN))
            memory[:, pages] = 0
            try:
                transport.receive(transfer, DIGEST, len(PROMPT), pages, host="127.0.0.1", port=port).result(
                    timeout_s=30
                )
            except PDTransportError as error:
                kept = memory[:, pages].copy()
                time.sleep(0.2)
                late = "" if np.array_equal(kept, memory[:, pages]) else "written late: "
                return late + str(getattr(error, "code", "") or type(error).__name__)
            else:
                return "right" if np.array_equal(memory[:, pages], pattern) else "wrong"
            finally:
                places.put(place)

        verbs: dict[str, Callable[..., Any]] = {
            "offer": offer,
            "take": take,
            "port": lambda: transport.port,
            "status": lambda: json.loads(json.dumps(transport.status(), default=str)),
        }

        def run(number: int, verb: str, arguments: list[Any]) -> None:
            try:
                tell(number, verbs[verb](*arguments))
            except Exception as error:  # noqa: BLE001  # told to whoever asked
                tell(number, f"{type(error).__name__}: {error}")

        for line in sys.stdin:
            threading.Thread(target=run, args=json.loads(line), daemon=True).start()


if __name__ == "__main__":
    _serve()
