"""Without keys the user decides: whose the other end of a local connection is, asked of the kernel, on both ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from pdtransport.control import owners
from pdtransport.control.channel import ConnectFailed, ControlChannel, PeerUp, StatusRequested
from pdtransport.control.client import StatusUnavailable, fetch_status
from pdtransport.control.door import Door
from pdtransport.control.handshake import facts
from pdtransport.control.owners import Owners, held
from pdtransport.control.watching import WorkerWatch
from pdtransport.errors import PoolUnavailable, SettingsError
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.server.service import Pool
from pdtransport.protocol.messages import Hello, Refused, StatusRequest, Watch, encode
from pdtransport.settings import ControlSettings
from tests.processes.control_rig import FAST, HOST, WAIT_S, Bench, Raw, bench, identity
from tests.processes.pool_rig import key, until
from tests.processes.test_pool_remote import at, pool, port

__all__ = ["pool", "port"]  # fixtures
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def rig() -> Iterator[Bench]:
    with bench() as it:
        yield it


@contextlib.contextmanager
def another_user(run: Callable[[int], None]) -> Iterator[int]:
    """A process of another user's that runs ``run`` with one end of a pipe; yields the other end."""
    ours, theirs = os.pipe()
    "".encode("idna")  # an import, which another user may not be able to read
    child = os.fork()
    if child == 0:
        try:
            os.close(ours)
            os.setuid(NOBODY)
            run(theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        yield ours
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ours)


def told(pipe: int) -> bytes:
    """What the other process wrote; empty if nothing is there yet."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 4096)
    except BlockingIOError:
        return b""


def listens(pipe: int) -> None:
    """A worker of another user's, which welcomes everybody: its own look-up is off."""
    channel = ControlChannel(ControlSettings(**FAST, allow_plaintext=True), identity("theirs"))
    os.write(pipe, channel.bind().rpartition(":")[2].encode())
    while True:
        time.sleep(0.005)
        for event in [*channel.receive(time.monotonic()), *channel.tick(time.monotonic())]:
            if isinstance(event, StatusRequested):
                event.reply("{}")


@pytest.fixture
def foreign_port() -> Iterator[int]:
    with another_user(listens) as pipe:
        yield int(os.read(pipe, 16))


@needs_root
def test_nothing_that_another_user_says_is_looked_at(rig: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a Hello, nor a question for the status, nor a wish to watch; one line names both users and the remedy."""
    node = rig.node("p")
    words = [encode(facts(Hello, identity("theirs"), 0)), encode(StatusRequest()), encode(Watch())]

    def says(pipe: int) -> None:
        for word in words:
            raw = Raw(node.port)
            raw.send(Raw.frame(word))
            while not raw.closed():
                time.sleep(0.001)
        os.write(pipe, b"all were closed")

    with another_user(says) as pipe:
        rig.until(lambda: told(pipe) == b"all were closed")
    assert node.counters["callers_refused"] == len(words)
    assert node.events == []
    assert not node.channel.watched
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"it belongs to user {NOBODY}, this process to user 0" in line
    assert "pdlaunch keys" in line


@needs_root
def test_a_worker_of_another_user_is_not_believed(rig: Bench, foreign_port: int) -> None:
    """Whoever took a worker's port can't come in its name, nor tell a status, or how transfers ended, in its place."""
    node = rig.node("d")
    node.channel.connect(HOST, foreign_port)
    rig.until(lambda: node.of(ConnectFailed))
    (failed,) = node.of(ConnectFailed)
    assert (failed.field, failed.refused) == ("user", True)
    assert f"{HOST}:{foreign_port}: it belongs to user {NOBODY}" in failed.reason
    assert not node.of(PeerUp)
    with pytest.raises(StatusUnavailable, match=f"it belongs to user {NOBODY}.*pdlaunch keys"):
        fetch_status(HOST, foreign_port, timeout_s=WAIT_S)
    with zmq.Context() as context:
        watch = WorkerWatch(context, HOST, foreign_port, ControlSettings(), None)
        try:
            watch.ask()
            heard: list[object] = []
            until(lambda: heard.extend(watch.read(10)[0]) or heard, "nothing was heard")
        finally:
            watch.close()
    assert all(isinstance(message, Refused) and message.field == "user" for message in heard)


@needs_root
def test_a_pool_of_another_user_is_not_believed(foreign_port: int) -> None:
    with at(foreign_port) as far, pytest.raises(PoolUnavailable, match=f"it belongs to user {NOBODY}"):
        far.lookup([key(1)]).result()


@needs_root
def test_another_user_is_no_client_of_the_pool(pool: Pool, directory: Path, port: int) -> None:
    def says(pipe: int) -> None:
        raw = Raw(port)
        raw.send(Raw.frame(b"whatever"))
        while not raw.closed():
            time.sleep(0.001)
        os.write(pipe, b"closed")

    with another_user(says) as pipe:
        until(lambda: told(pipe) == b"closed", "the connection stands")
    with at(port) as far, PoolClient(directory=directory) as near:
        assert far.lookup([key(1)]).result() == near.lookup([key(1)]).result()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_an_open_connection_has_an_owner_and_a_closed_one_has_none(
    family: socket.AddressFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a process that is gone, or has it not yet, is nobody's: root's neither, as tables may say."""
    asked = Owners()
    with socket.create_server(("::1" if family == socket.AF_INET6 else HOST, 0), family=family) as server:
        here = socket.create_connection(server.getsockname()[:2])
        with pytest.raises(ConnectionResetError):
            asked.complaint(here)  # nobody has accepted it
        there, _ = server.accept()
        assert asked.complaint(here) == asked.complaint(there) == ""
        with held(there.fileno()) as same:
            assert (same.getsockname(), same.getpeername()) == (there.getsockname(), there.getpeername())
            assert asked.complaint(same) == ""
        monkeypatch.setattr(asked, "_user", NOBODY - 1)
        monkeypatch.setattr(owners, "ROOT", -1)
        assert f"it belongs to user {os.geteuid()}, this process to user {NOBODY - 1}" in asked.complaint(there)
        here.close()
        with pytest.raises(OSError):
            asked.complaint(there)
        there.close()


def test_a_kernel_that_does_not_tell_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed where it can't be known: with the settings that open it."""
    monkeypatch.setattr(owners, "_SOCK_DIAG", 31)  # no such protocol
    with pytest.raises(SettingsError, match=r"the owners of local connections.*curve_\*_key_file.*allow_plaintext"):
        ControlChannel(ControlSettings(**FAST), identity("a"))
    ControlChannel(ControlSettings(**FAST, allow_plaintext=True), identity("a")).close()


def test_a_descriptor_that_is_another_files_by_now_is_left_alone() -> None:
    """libzmq closes connections when it likes, and the system gives their descriptors out again: to a client of the
    engine's own server, say."""
    with socket.create_server((HOST, 0)) as server, socket.create_server((HOST, 0)) as other:
        door = Door(server.getsockname()[1], None, most=8)
        with socket.create_connection(other.getsockname()) as client, other.accept()[0] as taken:
            door.accepted(taken.fileno(), 0.0)
            caller = door.of(taken.fileno())
            assert caller is not None
            with pytest.raises(OSError, match="another file's"):
                door.identify(caller)
            door.cut(caller)
            taken.sendall(b"still open")
            assert client.recv(16) == b"still open"
            assert len(door) == 0
        with socket.create_connection(server.getsockname()) as client, server.accept()[0] as taken:
            door.accepted(taken.fileno(), 0.0)
            caller = door.of(taken.fileno())
            assert caller is not None
            assert door.identify(caller) == ""
            door.cut(caller)
            assert client.recv(16) == b""


def test_descriptors_bound_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few files may be open, few connections are: at most half, and the newest goes if the others are known."""
    with socket.create_server((HOST, 0)) as server, contextlib.ExitStack() as stack:
        monkeypatch.setattr("pdtransport.control.door.raise_limit", lambda wanted: 256 + 4)
        door = Door(server.getsockname()[1], None)
        for number in range(3):
            stack.enter_context(socket.create_connection(server.getsockname()))
            taken = stack.enter_context(server.accept()[0])
            assert bool(door.accepted(taken.fileno(), float(number))) == (number == 2)
            caller = door.of(taken.fileno())
            assert (caller is None) == (number == 2)
            if caller is not None:
                door.know(caller)
        assert len(door) == 2


def test_a_dead_connections_frame_costs_no_newer_connection_of_its_descriptor() -> None:
    """An answer to what a connection left behind can't be sent. The descriptor that libzmq tells of it is a newer
    connection's by now: were that one forgotten, nothing that it says would ever be heard."""
    with socket.create_server((HOST, 0)) as server, socket.create_connection(server.getsockname()):
        door = Door(server.getsockname()[1], None)
        taken = server.accept()[0]
        with taken:
            door.accepted(taken.fileno(), 0.0)
            caller = door.of(taken.fileno())
            assert caller is not None
            assert door.identify(caller) == ""
            door.lost(caller)
            assert door.of(taken.fileno()) is caller
        door.lost(caller)
        assert len(door) == 0
