"""Attacks on a worker's control port by whoever can reach it: the bystander is a live peer, and its words are echoed.

Attackers run in a process of their own and speak ZMTP by hand.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgpack

from pdtransport.control import handshake
from pdtransport.control.channel import MessageReceived, PeerDown, PeerId, PeerUp
from pdtransport.control.client import fetch_status
from pdtransport.control.events import Identity
from pdtransport.protocol.messages import PROTOCOL_VERSION, Claim, Hello, Ping, StatusRequest, Watch, encode
from tests.processes.control_rig import FACTS, HOST, WAIT_S, Bench, Child, Node, Raw, bench
from tests.siege.bystander import Effect, idle, processor_s, resident, settled, watched

ATTACK_S = 1.0
AT_ONCE = 8  # connections of an attacker that keeps them busy
IDLE = 2000  # connections that say nothing
BYSTANDER = Identity("bystander", 0, 1, secrets.randbits(60) | 1, FACTS)
NOBODY = 65534


class Bystander:
    """A live peer of the worker."""

    def __init__(self, worker: Child) -> None:
        self._bench, self._count = Bench(), itertools.count()
        self.node = Node("bystander", me=BYSTANDER, bind=False)
        self._bench.nodes.append(self.node)
        self._peer = PeerId("worker", 0, worker.incarnation)
        self.node.channel.connect(HOST, worker.port)
        self._bench.until(lambda: self.node.of(PeerUp))

    def ask(self) -> None:
        """Say a word, and wait for its echo."""
        word = Claim(transfer=f"t{next(self._count)}")
        assert self.node.channel.send(self._peer, word), self.node.events
        self._bench.until(lambda: MessageReceived(self._peer, word) in self.node.events)
        self.node.take(MessageReceived)

    def close(self) -> None:
        self._bench.close()


@dataclass
class Siege:
    """What an attack did, beside its effect on the bystander."""

    effect: Effect
    counters: dict[str, int]  # of the worker, since it started
    descriptors: int  # that the worker had open at most


@contextlib.contextmanager
def worker_with_a_log(folder: Path) -> Iterator[tuple[Child, Path]]:
    log = folder / "worker.log"
    with Child("worker", log=log) as worker:
        yield worker, log


def besiege(
    attack: Callable[[int], object], worker: Child, log: Path, until: tuple[str, int], *, newcomer: bool = True
) -> Siege:
    """Watch a bystander while ``attack`` runs in a process of its own. Nobody whom it knows may be lost.

    Args:
        attack: gets the worker's port, and does not return.
        until: a counter of the worker, and by how much it must grow before the attack ends.
        newcomer: a peer comes up in the midst of it.
    """
    effect, bystander, pid = Effect(attack.__name__.strip("_").replace("_", " ")), Bystander(worker), worker.process.pid
    lines, most = len(log.read_text().splitlines()), 0

    def counters() -> dict[str, int]:
        found: dict[str, int] = fetch_status(HOST, worker.port, timeout_s=WAIT_S)["counters"]
        return found

    try:
        counter, enough = until[0], counters()[until[0]] + until[1]
        idle(effect, bystander.ask)
        effect.memory_before, processor = resident(pid), processor_s(pid)
        worker.poll().clear()  # what an earlier attack left
        with attacker(attack, worker.port), watched(effect, bystander.ask):
            began, met = time.monotonic(), not newcomer
            while time.monotonic() < began + ATTACK_S or counters()[counter] < enough:
                assert time.monotonic() < began + WAIT_S, f"not {enough} {counter} within {WAIT_S} s: {counters()}"
                time.sleep(0.05)
                most = max(most, len(os.listdir(f"/proc/{pid}/fd")))
                if not met and time.monotonic() > began + ATTACK_S / 2:
                    met = a_newcomer_is_served(worker.port)
        effect.processor_s = processor_s(pid) - processor
        bystander.ask()
        assert not bystander.node.of(PeerDown), bystander.node.events
        lost = [event for event in worker.poll() if event["kind"] == "down"]
        lost = [event for event in lost if event["incarnation"] == bystander.node.me.incarnation]
        assert not lost, lost[:3]
        told = counters()
        effect.memory_after = settled(pid, effect.memory_before)
    finally:
        bystander.close()
    effect.lines = log.read_text().splitlines()[lines:]
    return Siege(effect, told, most)


@contextlib.contextmanager
def attacker(attack: Callable[[int], object], port: int) -> Iterator[None]:
    """A process that attacks until the block ends. It has no use for what it inherits."""
    child = os.fork()
    if child == 0:
        try:
            os.nice(10)  # as if it had a machine of its own
            attack(port)
        except BaseException:  # noqa: BLE001 - nothing of the parent's may run here
            traceback.print_exc()
        os._exit(1)
    try:
        yield
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the attacker gave up"
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def a_newcomer_is_served(port: int) -> bool:
    """It comes up while everything else goes on."""
    with bench() as it:
        newcomer = it.node("newcomer", bind=False)
        newcomer.channel.connect(HOST, port)
        it.until(lambda: newcomer.of(PeerUp))
    return True


# -- what attackers do, in their process ---------------------------------------------------------------------------


def _again_and_again(port: int, words: Callable[[int], bytes]) -> None:
    """``AT_ONCE`` connections that say ``words`` as fast as they go out, each opened again when it is closed."""
    numbers, connections = itertools.count(), [_connected(port) for _ in range(AT_ONCE)]
    while True:
        for n, one in enumerate(connections):
            if not one.send(words(next(numbers))) or one.closed():
                one.close()
                connections[n] = _connected(port)


def _connected(port: int) -> Raw:
    while True:
        with contextlib.suppress(OSError):
            return Raw(port)


def _hello(number: int, engine: str = "bystander", incarnation: int | None = None, breaks: int = 0) -> bytes:
    me = replace(BYSTANDER, engine=engine, incarnation=incarnation or 1_000_000 + number)
    return Raw.frame(encode(handshake.facts(Hello, me, breaks)))


def _bomb() -> bytes:
    """A Hello just under the bound, of as many objects as its bytes can name."""
    empty = msgpack.packb({"v": PROTOCOL_VERSION, "kind": "hello", "fingerprint": None})[:-1]
    return Raw.frame((empty + b"\xdd\x00\x03\xe0\x00" + b"\x80" * 0x3E000)[: (256 << 10) - 1])


def _say_hello_in_a_live_peers_name(port: int) -> None:
    """New processes of that name by the dozen, which live as long as they please."""
    connections = [Raw(port) for _ in range(20)]
    for number in itertools.count():
        one = connections[number % len(connections)]
        incarnation = 1_000_000 + number % len(connections)
        one.send(_hello(number, incarnation=incarnation) + Raw.frame(encode(Ping(incarnation=incarnation))))
        one.closed()
        time.sleep(0.01)


def _come_as_the_process_that_the_status_tells_of(port: int) -> None:
    """What the status and a report tell of an incarnation, and all that can be made of it."""
    told = handshake.told_incarnation(BYSTANDER.incarnation)
    _again_and_again(port, lambda number: _hello(number, incarnation=told, breaks=number + 1))


def _flood_with_large_frames(port: int) -> None:
    bomb = _bomb()
    _again_and_again(port, lambda _number: bomb)


def _send_messages_without_an_end(port: int) -> None:
    part = Raw.frame(bytes(1 << 20), more=True)
    _again_and_again(port, lambda _number: part)


def _ask_for_the_status_without_a_pause(port: int) -> None:
    question = Raw.frame(encode(StatusRequest())) + Raw.frame(encode(Watch()))
    _again_and_again(port, lambda _number: question)


def _hold_idle_connections(port: int) -> None:
    """Half of them greeted, half silent; each is opened again when it is closed."""
    held: list[socket.socket] = []
    while True:
        for n in range(IDLE):
            one = socket.create_connection((HOST, port))
            if n % 2:
                one.sendall(Raw.GREETING + Raw.READY)
            held.append(one)
        for one in held[:-IDLE]:
            one.close()
        del held[:-IDLE]


def _connect_and_leave(port: int) -> None:
    while True:
        with socket.create_connection((HOST, port)) as one:
            one.sendall(Raw.GREETING + Raw.READY + _hello(0))


def come_as_another_user(port: int) -> None:
    """Needs root: a test's alone."""
    "".encode("idna")  # an import, which another user may not be able to read
    os.setuid(NOBODY)
    _again_and_again(port, lambda number: _hello(number, engine=f"e{number}"))


# -- attacks -------------------------------------------------------------------------------------------------------


def _beside_a_bystander(attack: Callable[[int], object], folder: Path) -> Effect:
    with worker_with_a_log(folder) as (worker, log):
        return besiege(attack, worker, log, ("frames_in", 0)).effect


def say_hello_in_a_live_peers_name(folder: Path) -> Effect:
    return _beside_a_bystander(_say_hello_in_a_live_peers_name, folder)


def come_as_the_process_that_the_status_tells_of(folder: Path) -> Effect:
    return _beside_a_bystander(_come_as_the_process_that_the_status_tells_of, folder)


def flood_with_large_frames(folder: Path) -> Effect:
    return _beside_a_bystander(_flood_with_large_frames, folder)


def send_messages_without_an_end(folder: Path) -> Effect:
    return _beside_a_bystander(_send_messages_without_an_end, folder)


def ask_for_the_status_without_a_pause(folder: Path) -> Effect:
    return _beside_a_bystander(_ask_for_the_status_without_a_pause, folder)


def hold_idle_connections(folder: Path) -> Effect:
    return _beside_a_bystander(_hold_idle_connections, folder)


def connect_and_leave(folder: Path) -> Effect:
    return _beside_a_bystander(_connect_and_leave, folder)
