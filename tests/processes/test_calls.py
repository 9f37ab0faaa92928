"""Calls to endpoints that others name: how often, to how many, and to whom; real sockets, and a clock on the wall."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pdtransport.control import limits, names
from pdtransport.control.channel import ConnectFailed, PeerUp
from pdtransport.control.dialer import Pauses
from tests.processes.control_rig import HOST, Bench, bench

WANT_S = 0.02  # somebody asks so often


@pytest.fixture
def rig() -> Iterator[Bench]:
    with bench() as it:
        yield it


class Door:
    """A TCP server that counts who comes, and does as it is told with them."""

    def __init__(self, answer: Callable[[socket.socket], None] = socket.socket.close) -> None:
        self._server = socket.create_server((HOST, 0), backlog=1024)
        self.port = self._server.getsockname()[1]
        self._answer = answer
        self._kept: list[socket.socket] = []
        self.came: list[float] = []
        self._over = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._server, selectors.EVENT_READ)
            while not self._over:
                if waiting.select(0.02):
                    came, _ = self._server.accept()
                    self.came.append(time.monotonic())
                    self._kept.append(came)
                    self._answer(came)

    def close(self) -> None:
        self._over = True
        self._thread.join(10)
        for each in (self._server, *self._kept):
            each.close()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wanted(rig: Bench, channel: Any, port: int, seconds: float) -> None:
    """Somebody asks for the endpoint again and again."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        channel.connect(HOST, port)
        rig.run(WANT_S)


def http(came: socket.socket) -> None:
    with contextlib.suppress(OSError):
        came.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        came.close()


@pytest.mark.parametrize("answer", [socket.socket.close, http], ids=["hangs up", "speaks HTTP"])
def test_tries_at_an_endpoint_back_off_while_somebody_asks(rig: Bench, answer: Callable[[socket.socket], None]) -> None:
    """However often it is asked for: the pauses double, up to a second. 0, .1, .3, .7, 1.5, 2.5: before, it was ten a
    second."""
    node = rig.node("d", connect_s=1.0)
    with Door(answer) as door:
        wanted(rig, node.channel, door.port, 2.5)
        assert 3 <= len(door.came) <= 9  # each pause may be half as long
        assert node.of(ConnectFailed)


def test_tries_in_the_background_are_few_and_end(rig: Bench) -> None:
    """Once nobody asks: 15 within the minute after which it is forgotten, where there were 600."""
    now, tries, pauses = 0.0, 0, Pauses()
    while now < limits.RETRY_FOR_S:
        pause = pauses.take(limits.RETRY_MAX_S)
        assert pause <= limits.RETRY_MAX_S
        now, tries = now + pause, tries + 1
    assert tries < 25
    node = rig.node("d", connect_s=0.2)
    with Door() as door:
        node.channel.connect(HOST, door.port)
        rig.run(2.5)
        assert 3 <= len(door.came) <= 8


def test_pauses_differ(rig: Bench) -> None:
    """Many workers that lost one peer don't come back all at the same moment."""
    assert len({Pauses().take(1.0) for _ in range(20)}) > 10
    first = [Pauses().take(1.0) for _ in range(100)]
    assert limits.RECONNECT_S / 2 <= min(first) <= max(first) <= limits.RECONNECT_S
    pauses = Pauses()
    assert all(pauses.take(0.3) <= 0.3 for _ in range(20))


def test_a_peer_that_comes_up_is_found_within_a_second_while_somebody_asks(rig: Bench) -> None:
    """However long it was away: backing off costs the first hand-over after a restart no more."""
    node, gone = rig.node("d", connect_s=0.3), rig.node("p")
    port = gone.port
    rig.drop(gone)
    wanted(rig, node.channel, port, 2.5)
    late = rig.node("p", bind=False)
    late.channel.bind(port)
    began = time.monotonic()
    while not node.of(PeerUp):
        assert time.monotonic() < began + 20
        wanted(rig, node.channel, port, WANT_S)
    assert node.channel._dialers


def test_endpoints_that_lead_nowhere_take_each_others_place_and_no_peers(
    rig: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client names ports by the thousand: so many are tried at once, the newest has its chance, the oldest hears that
    it is given up, and who is connected stays."""
    monkeypatch.setattr("pdtransport.control.channel.MAX_TRIED", 8)
    node, friend, late = rig.node("d"), rig.node("p"), rig.node("q")
    node.channel.connect(HOST, friend.port)
    rig.until(lambda: node.of(PeerUp))
    with Door(lambda _: None) as mute:
        for number in range(30):
            node.channel.connect(f"127.0.1.{number + 1}", mute.port)
        assert len(node.channel._dialers) == 9
        node.channel.connect(HOST, late.port)
        rig.until(lambda: len(node.of(PeerUp)) == 2)
    assert len(node.of(ConnectFailed)) == 23
    assert "8 other endpoints were requested since" in node.of(ConnectFailed)[0].reason


def test_new_endpoints_are_called_so_often_a_second(rig: Bench) -> None:
    """What one client asks for costs everybody's thread a bounded time; endpoints that led to a peer don't count."""
    node, friend = rig.node("d"), rig.node("p")
    node.channel.connect(HOST, friend.port)
    rig.until(lambda: node.of(PeerUp))
    began = time.monotonic()
    for number in range(1000):
        node.channel.connect("127.0.2.1", 1000 + number)
    may = limits.NEW_PER_S * (1 + time.monotonic() - began)
    rig.until(lambda: len(node.of(ConnectFailed)) >= 1000 - limits.MAX_TRIED)
    refused = [failed for failed in node.of(ConnectFailed) if "new endpoints per second" in failed.reason]
    assert limits.NEW_PER_S - 2 <= 1000 - len(refused) <= may
    assert all(failed.refused for failed in refused)
    assert len(node.channel._dialers) <= limits.MAX_TRIED + 1


def test_an_endpoint_that_led_to_a_peer_is_called_again_whatever_strangers_ask_for(
    rig: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill that was away for an hour comes back while somebody names thousands of ports: its place is not theirs."""
    monkeypatch.setattr("pdtransport.control.dialer.RETRY_FOR_S", 0.2)
    node, gone = rig.node("d", connect_s=1.0), rig.node("p")
    node.channel.connect(HOST, gone.port)
    rig.until(lambda: node.of(PeerUp))
    port = gone.port
    rig.drop(gone)
    rig.until(lambda: not node.channel._dialers)
    back = rig.node("p", bind=False)
    back.channel.bind(port)
    node.take(PeerUp)
    for number in range(500):
        node.channel.connect("127.0.2.1", 1000 + number)
    node.channel.connect(HOST, port)
    for number in range(500):
        node.channel.connect("127.0.2.1", 2000 + number)
    rig.until(lambda: node.of(PeerUp))


def test_an_address_that_may_not_be_called_opens_no_socket(rig: Bench) -> None:
    """``control.peers`` holds for the Python API as well once it is set; the reason names it."""
    node = rig.node("d", peers=["10.0.0.0/8"])
    before = len(node.channel.sockets())
    with Door() as door:
        node.channel.connect(HOST, door.port)
        rig.until(lambda: node.of(ConnectFailed))
        rig.run(0.3)
        assert not door.came
    (failed,) = node.of(ConnectFailed)
    assert failed.refused
    assert "control.peers" in failed.reason
    assert len(node.channel.sockets()) == before


def resolving(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], str]) -> None:
    def found(name: str, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answer(name), 0))]

    monkeypatch.setattr(names.socket, "getaddrinfo", found)


def test_the_address_that_was_checked_is_the_one_that_is_called(rig: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that changes its mind after the check leads nowhere else: nobody looks it up again."""
    node, there = rig.node("d", peers=["127.0.0.0/24"], allow_plaintext=True), rig.node("p")
    answers = iter([HOST, "127.0.0.99", "127.0.0.99"])
    resolving(monkeypatch, lambda _: next(answers))
    node.channel.connect("rebound", there.port)
    rig.until(lambda: node.of(PeerUp))
    assert node.of(PeerUp)[0].endpoint == ("rebound", there.port)
    assert next(answers) == "127.0.0.99", "it was looked up once"


def test_a_name_without_an_answer_holds_up_nobody(rig: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's resolver may take half a minute: peers are alive meanwhile, and who asked hears in time."""
    stuck = threading.Event()

    def slow(name: str) -> str:
        stuck.wait(30)
        return HOST

    node = rig.node("d", connect_s=1.0, liveness_s=1.0, allow_plaintext=True)
    friend = rig.node("p", liveness_s=1.0)
    resolving(monkeypatch, slow)
    try:
        node.channel.connect(HOST, friend.port)
        rig.until(lambda: node.of(PeerUp))
        node.channel.connect("slow.example.org", friend.port)
        rig.until(lambda: node.of(ConnectFailed))
        rig.run(1.5)
        assert not [event for event in node.events if type(event).__name__ == "PeerDown"]
        assert "slow.example.org" in node.of(ConnectFailed)[0].reason
    finally:
        stuck.set()
