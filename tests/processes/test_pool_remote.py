"""The pool for clients on other hosts: real processes on loopback, and in network namespaces."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from pydantic import ValidationError

from pdtransport.control.curve import make_keys
from pdtransport.errors import PoolUnavailable, SettingsError
from pdtransport.kernels.runs import run
from pdtransport.pool import messages
from pdtransport.pool.admin.pool_admin import AdminOutcome, Chosen, PoolAdmin
from pdtransport.pool.cli import main, parser, settings_from
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.remote.remote_messages import RemoteHello, RemotePublish
from pdtransport.pool.remote.session import Caller
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import PoolSettings, RemoteSettings
from pdtransport.settings import ControlSettings, LinkSettings, Settings
from tests.processes.control_rig import Raw
from tests.processes.pool_rig import CHUNK, Other, daemon, key, load, mine, names, status, store, until
from tests.rig.ports import Ports

PORTS = Ports()
ANSWER_S = 30.0
STAGING = 4 << 20


@pytest.fixture
def port() -> Iterator[int]:
    taken = PORTS.take(2)
    yield taken
    PORTS.give_back([taken, taken + 1])


@pytest.fixture
def pool(directory: Path, port: int) -> Iterator[Pool]:
    door = RemoteSettings(listen=f"127.0.0.1:{port}", liveness_s=2.5)
    with Pool(PoolSettings(dir=directory, memory_bytes=32 << 20, client_bytes=2 << 20, remote=door)) as made:
        yield made


def at(port: int, **more: Any) -> PoolClient:
    return PoolClient.connect(f"tcp://127.0.0.1:{port}", staging_bytes=STAGING, deadline_s=ANSWER_S, **more)


def nothing_held(pool: Pool) -> None:
    def idle() -> bool:
        found = pool.status()
        return not found["being_filled"] and not any(each["held_bytes"] for each in found["clients"])

    until(idle, f"something is still held: {pool.status()}")


@pytest.mark.parametrize("order", [("cma",), ("ucx",)])
def test_chunks_cross_both_ways(pool: Pool, directory: Path, port: int, order: tuple[Any, ...]) -> None:
    """What a remote client stores is found and loaded by one on the pool's host, and back; each byte is right."""
    settings = Settings(links=LinkSettings(order=order))
    with at(port, settings=settings) as far, PoolClient(directory=directory) as near:
        assert names(store(far, range(40))) == ["WRITE"] * 40
        assert names(load(near, [*range(40), 99])) == ["READ"] * 40 + ["MISS"]
        assert names(store(near, [40, 41])) == ["WRITE"] * 2
        done = load(far, [*range(42), 99])
        assert names(done) == ["READ"] * 42 + ["MISS"], done.error
        assert names(store(far, [41, 42])) == ["HAVE", "WRITE"]
        assert far.lookup([key(n) for n in (*range(43), 99)]).result().there == 43
        session: Any = far._wire.session
        until(lambda: session.staging.free == session.staging.count, "staging frames are still held")
    nothing_held(pool)


def test_chunks_of_all_lengths(pool: Pool, port: int) -> None:
    """Lengths that fill no frame, many small ones whose frames are more than all staging, one longer than it."""
    sizes = [8, 65536, 65544, 1 << 20, *[4096] * 200, STAGING + 8, 24]
    source = np.random.default_rng(5).integers(0, 256, sum(sizes), dtype=np.uint8)
    target = np.zeros_like(source)
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    keys = [key(n) for n in range(len(sizes))]
    with at(port) as far:
        out, back = (
            [run(memory.ctypes.data + start, size) for start, size in zip(starts, sizes, strict=True)]
            for memory in (source, target)
        )
        stored, loaded = far.store(keys, out).result(), far.load(keys, back).result()
    too_long = len(sizes) - 2
    assert {name for n, name in enumerate(names(stored)) if n != too_long} == {"WRITE"}, stored.error
    assert {name for n, name in enumerate(names(loaded)) if n != too_long} == {"READ"}, loaded.error
    assert names(stored)[too_long] in ("FULL", "BUSY")
    for n, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        assert n == too_long or np.array_equal(source[start : start + size], target[start : start + size])


def test_what_other_chunks_left_in_a_frame_does_not_cross(pool: Pool, directory: Path, port: int) -> None:
    """Whole frames are sent; behind a chunk's end a remote client sees zeros, not another tenant's bytes."""
    secret = np.full(32 << 20, 0xA5, dtype=np.uint8)
    short = np.zeros(8, dtype=np.uint8)
    with PoolClient(directory=directory) as near, at(port) as far:
        pieces = [run(secret.ctypes.data + n * CHUNK, CHUNK) for n in range(128)]
        assert near.store([key(n) for n in range(128)], pieces).result().prefix == 128
        assert PoolAdmin(near).clear() == AdminOutcome(128, 128)
        assert near.store([key(1)], [run(short.ctypes.data, 8)]).result().prefix == 1
        assert far.load([key(1)], [run(short.ctypes.data, 8)]).result().prefix == 1
        session = far._wire.session
        assert session is not None
        assert session.mapping is not None
        with session.mapping.view(0, STAGING) as seen:
            assert b"\xa5" not in bytes(seen)


def test_whoever_watches_from_another_host_hears_of_every_chunk_that_goes(directory: Path, port: int) -> None:
    """Evicted and dropped ones, as on the pool's host; that the pool went, once; and nothing of the next one, until it
    watches that. While it stores and loads itself, and beside one that watches on the pool's host."""
    door = RemoteSettings(listen=f"127.0.0.1:{port}", liveness_s=2.5)
    settings = PoolSettings(dir=directory, memory_bytes=8 * CHUNK, remote=door)
    heard: list[list[bytes] | None] = []
    nearby: list[bytes] = []

    def hear(keys: Any) -> None:
        heard.append(None if keys is None else list(keys))

    with at(port) as far, PoolClient(directory=directory) as near:
        with Pool(settings) as pool:
            # A pool that began after its client is found within a second; who watches before hears that there is none.
            until(lambda: names(store(far, [100])) in (["WRITE"], ["HAVE"]), "the pool was not found")
            far.watch(hear)
            near.watch(lambda keys: nearby.extend(keys or ()))
            until(lambda: heard == [[]], "the watch did not begin")
            stored = [n for n, name in enumerate(names(store(far, range(12)))) if name == "WRITE"]
            load(far, stored)
            PoolAdmin(near).drop(Chosen((key(stored[-1]),)))
            there = {place.key for place in PoolAdmin(near).look([key(n) for n in stored]) if place.tiers}
            gone = sorted({key(n) for n in stored} - there)  # evicted ones, by whatever order they were stored in
            assert key(stored[-1]) in gone
            until(lambda: {each for keys in heard for each in keys or ()} >= set(gone), "not all were told of")
            until(lambda: set(nearby) >= set(gone), "the one nearby was not told of them")
            assert not there & {each for keys in heard for each in keys or ()}
            nothing_held(pool)
        until(lambda: heard[-1] is None, "its end was not told of")
        with Pool(settings) as pool:
            until(lambda: names(store(far, [100])) in (["WRITE"], ["HAVE"]), "the next pool was not found")
            assert pool._service.store.gone is None
            assert heard.count(None) == 1
            assert heard[-1] is None
            far.watch(hear)
            until(lambda: heard[-1] == [], "the second watch did not begin")
            assert names(store(far, [20])) == ["WRITE"]
            PoolAdmin(far).drop(Chosen((key(20),)))
            until(lambda: key(20) in (heard[-1] or ()), "nothing was told of the next pool's")


def test_one_that_watched_from_another_host_and_is_gone_is_forgotten(pool: Pool, port: int) -> None:
    """Its client is closed: nobody watches, and the pool gathers nothing any more."""
    heard: list[Any] = []
    with at(port) as far:
        far.watch(heard.append)
        until(lambda: heard == [[]], "the watch did not begin")
        assert pool._service.store.gone is not None
    until(lambda: pool._service.store.gone is None, "the pool still gathers what nobody hears")


def test_what_a_remote_client_holds_is_bounded(pool: Pool, directory: Path, port: int) -> None:
    """As for a local one: the pool's client_bytes. A halted one does not take the pool along."""
    other = Other(f"tcp://127.0.0.1:{port}")
    try:
        other.begin("store", list(range(100)))
        held = 0
        while not other._pipe.poll(0.01):
            held = max([held, *(each["held_bytes"] for each in pool.status()["clients"])])
        assert other.answer()[0] == ["WRITE"] * 100
        assert 0 < held <= 2 << 20
    finally:
        other.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("verb", ["store", "load"])
def test_a_remote_client_that_is_gone_gives_everything_up(
    pool: Pool, directory: Path, port: int, verb: str, how: int
) -> None:
    """Killed or stopped in the middle of a copy: what it held is free, its key can be stored by others; and when it
    goes on, nothing of it changes the pool."""
    other = Other(f"tcp://127.0.0.1:{port}")
    try:
        with PoolClient(directory=directory, deadline_s=ANSWER_S) as near:
            if verb == "load":
                assert store(near, [1, 2]).prefix == 2
            other.halt_in(verb, [1, 2])
            assert any(each["held_bytes"] for each in pool.status()["clients"])
            other.signal(how)
            nothing_held(pool)
            assert names(store(near, [1, 2])) == (["HAVE"] * 2 if verb == "load" else ["WRITE"] * 2)
            assert names(load(near, [1, 2])) == ["READ"] * 2
            if how == signal.SIGSTOP:
                other.signal(signal.SIGCONT)
                found, _ = other.go_on()
                assert "WRITE" not in found
                # Calls under way when it notices that it was given up are LOST.
                until(lambda: other.ask("load", [1, 2])[0] == ["READ"] * 2, "it did not come back")
            assert names(load(near, [1, 2])) == ["READ"] * 2
    finally:
        other.close()


@pytest.mark.parametrize("where", ["near", "far"])
def test_a_cancelled_copy_holds_nothing(pool: Pool, directory: Path, port: int, where: str) -> None:
    """At whatever moment: its memory is the caller's, the pool's and the staging frames are free."""
    memory = np.random.default_rng(1).integers(0, 256, 8 << 20, dtype=np.uint8)
    pieces = [run(memory.ctypes.data + n * CHUNK, CHUNK) for n in range(32)]
    with PoolClient(directory=directory) if where == "near" else at(port) as client:
        assert store(client, [99]).prefix == 1
        for number in range(12):
            begin = client.store if number % 2 else client.load
            pending = begin([key(100 + n) for n in range(32)], pieces)
            time.sleep(0.002 * number)
            pending.cancel()
            pending.result()
        nothing_held(pool)
        staging = getattr(client._wire.session, "staging", None)
        until(lambda: staging is None or staging.free == staging.count, "staging frames are lost")
        assert names(load(client, [99])) == ["READ"]


def test_a_pool_that_is_killed_and_comes_back(directory: Path, port: int) -> None:
    """In the middle of copies: they end, with a reason; without a pool all is over at once; then it is found again."""
    door = ("--listen", f"127.0.0.1:{port}")
    with at(port) as far:
        begun = time.monotonic()
        assert names(store(far, [1])) == ["LOST"]
        with pytest.raises(PoolUnavailable, match="can't be reached"):
            far.lookup([key(1)]).result()
        assert time.monotonic() - begun < ANSWER_S / 2
        with daemon(directory, *door) as service:
            until(lambda: names(store(far, range(16))) != ["LOST"] * 16, "the pool was not found")
            assert names(load(far, range(16))) == ["READ"] * 16
            memory = np.zeros(16 * CHUNK, dtype=np.uint8)
            pieces = [run(memory.ctypes.data + n * CHUNK, CHUNK) for n in range(16)]
            pending = [far.load([key(n) for n in range(16)], pieces) for _ in range(4)]
            service.kill()
            ended = [each.result() for each in pending]
            assert "LOST" in names(ended[-1])
            assert ended[-1].error
        with daemon(directory, *door):
            until(lambda: names(store(far, [1])) == ["WRITE"], "the pool was not found again")
            assert names(load(far, [1])) == ["READ"]


def test_only_who_holds_a_key_comes_in(directory: Path, port: int, tmp_path: Path) -> None:
    """CURVE as everywhere: our pair opens the door, another one, or none, does not."""
    ours, others = (make_keys(tmp_path / name) for name in ("ours", "others"))

    def control(pair: tuple[Path, Path]) -> dict[str, Any]:
        return {"curve_public_key_file": pair[0], "curve_secret_key_file": pair[1]}

    door = RemoteSettings(listen=f"127.0.0.1:{port}", **control(ours))
    with Pool(PoolSettings(dir=directory, memory_bytes=8 << 20, remote=door)) as pool:
        with at(port, settings=Settings(control=ControlSettings(**control(ours)))) as far:
            assert names(store(far, [1])) == ["WRITE"]
            assert names(load(far, [1])) == ["READ"]
        public = others[0].read_text().strip()
        for settings in (
            ControlSettings(),
            ControlSettings(**control(others), curve_server_key=ours[0].read_text().strip()),
            ControlSettings(**control(others), curve_server_key=public),
        ):
            with at(port, settings=Settings(control=settings)) as stranger:
                assert stranger.store([key(1)], [run(np.zeros(8).ctypes.data, 8)], deadline_s=2.0).result().prefix == 0
        assert [each["name"] for each in pool.status()["clients"]] == []


def test_what_can_not_be_is_refused_in_one_line(directory: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Addresses that are none, doors without keys, ports in use: cause, setting, remedy."""
    for address in ("127.0.0.1:1", "tcp://x", "tcp://x:0", "udp://x:1", "tcp://x:99999"):
        with pytest.raises(SettingsError, match=r"pool\.address"):
            PoolClient.connect(address)
    with pytest.raises(SettingsError, match=r"pool\.address: 10\.1\.2\.3 is not this machine, and there are no CURVE"):
        PoolClient.connect("tcp://10.1.2.3:7000")
    place = ["--dir", str(directory), "--memory-bytes", "1MiB"]
    for listen, said in (("nowhere", "HOST:PORT"), ("0.0.0.0:7700", "CURVE keys"), ("127.0.0.1:65535", "65534")):
        assert main([*place, "--listen", listen]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1, error
    with zmq.Context() as context, context.socket(zmq.REP) as holder:
        holder.bind(f"tcp://127.0.0.1:{port}")
        assert main([*place, "--listen", f"127.0.0.1:{port}"]) == 2
    assert "in use" in capsys.readouterr().err


def test_garbage_and_lies_harm_their_sender_only(pool: Pool, directory: Path, port: int) -> None:
    """Bytes that are no message, words out of turn, chunks that were not granted: refused, and others are served."""
    publish = RemotePublish(
        request=1, indices=bytes(4), checksums=bytes(8), transfer="0" * 32, host="127.0.0.1", port=1
    )
    hello = RemoteHello(name="liar", staging_bytes=1 << 20)
    with at(port) as far, zmq.Context() as context, context.socket(zmq.DEALER) as liar:
        assert store(far, [1]).prefix == 1
        liar.connect(f"tcp://127.0.0.1:{port}")
        for frames, answered in (
            ([b"garbage"], "not a"),
            ([b"a", b"b"], "several parts"),
            ([messages.encode(messages.Lookup(request=5, keys=b""))], "say Hello first"),
            ([messages.encode(hello)], ""),
            ([messages.encode(hello)], "already"),
            ([messages.encode(messages.Load(request=1, keys=key(1), sizes=np.uint32(CHUNK).tobytes()))], ""),
            (
                [messages.encode(messages.Load(request=1, keys=key(1), sizes=np.uint32(CHUNK).tobytes()))],
                "already in progress",
            ),
            ([messages.encode(publish)], "not granted"),
        ):
            liar.send_multipart(frames)
            until(lambda: liar.poll(10), "no answer")
            answer = liar.recv()
            if answered:
                refused = messages.from_pool(answer)
                assert isinstance(refused, messages.PoolRefused)
                assert answered in refused.reason
        assert names(load(far, [1])) == ["READ"]
        assert mine(far)["name"]
    nothing_held(pool)


@pytest.mark.parametrize("host", ["10.1.2.3", "127.0.0.9", "elsewhere.example.org", "0.0.0.0"])
def test_a_client_has_nobody_called_but_itself(
    pool: Pool, port: int, host: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool fetches what a client stores: from the address that its connection comes from, whatever it says. An
    address that is another one's is not called; the client hears that nothing was stored, and one line says why. A
    name, which may mean anything, is not asked for."""
    monkeypatch.setattr("pdtransport.pool.remote.remote_wire.RemotePublish", partial(published_at, host))
    with at(port) as far:
        for number in range(3):
            assert store(far, [number]).prefix == (0 if host[0].isdigit() and host != "0.0.0.0" else 1)
    nothing_held(pool)
    lines = [record.getMessage() for record in caplog.records if "remote.peers" in record.getMessage()]
    assert len(lines) == (1 if host[0].isdigit() and host != "0.0.0.0" else 0)
    assert all(host in line for line in lines)


def published_at(elsewhere: str, **facts: Any) -> RemotePublish:
    return RemotePublish(**{**facts, "host": elsewhere})


def test_networks_of_clients_may_be_named(port: int) -> None:
    """For clients whose pages are at another interface than the one that they call from."""
    caller = Caller("10.9.9.9", RemoteSettings(listen="127.0.0.1:7", peers=("127.0.0.0/30",)).networks)
    assert [caller.where(host) for host in ("127.0.0.1", "127.0.0.9", "10.9.9.9", "::ffff:10.9.9.9")] == [
        "127.0.0.1",
        "",
        "10.9.9.9",
        "10.9.9.9",
    ]
    for wrong in ("prefill-1", "curve:" + "a" * 40, "10.1.2.3/8"):
        with pytest.raises(ValidationError, match="peers"):
            RemoteSettings(listen="127.0.0.1:7", peers=(wrong,))
    options = ["--listen", f"127.0.0.1:{port}", "--remote-peers", "10.1.0.0/16", "--remote-peers", "10.2.3.4"]
    remote = settings_from(parser().parse_args(options)).remote
    assert remote is not None
    assert remote.peers == ("10.1.0.0/16", "10.2.3.4/32")


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: 10.213.78.1 and .2."""
    both = f"pdp{os.getpid()}a", f"pdp{os.getpid()}b"
    ip = shutil.which("ip")
    if ip is None or subprocess.run([ip, "netns", "add", both[0]], capture_output=True).returncode:
        pytest.skip("needs the right to make network namespaces")
    try:
        commands = [f"netns add {both[1]}", f"link add {both[0]}v type veth peer name {both[1]}v"]
        for number, name in enumerate(both, 1):
            commands += [
                f"link set {name}v netns {name}",
                f"-n {name} addr add 10.213.78.{number}/24 dev {name}v",
                f"-n {name} link set {name}v up",
                f"-n {name} link set lo up",
            ]
        for command in commands:
            subprocess.run([ip, *command.split()], check=True, timeout=10)
        yield both
    finally:
        for name in both:
            subprocess.run([ip, "netns", "del", name], capture_output=True, timeout=10)


CLIENT = """
import sys, time
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.settings import ControlSettings, LinkSettings, Settings
from tests.processes.pool_rig import load, names, store
control = ControlSettings(host="10.213.78.2", allow_plaintext=True)
settings = Settings(control=control, links=LinkSettings(order=("ucx",)))
with PoolClient.connect("tcp://10.213.78.1:7800", settings, deadline_s=30.0, staging_bytes=4 << 20) as far:
    print(*names(store(far, range(24))), flush=True)
    print(*names(load(far, range(24))), flush=True)
    for _ in sys.stdin:  # each line: load once more, with a short deadline
        done = load(far, range(24), deadline_s=2.0)
        print(done.prefix, done.error, flush=True)
"""


@pytest.mark.parametrize(
    "frame",
    [
        Raw.frame(b"garbage"),
        Raw.frame(bytes(64 << 10), more=True),
        Raw.frame(messages.encode(messages.Lookup(request=5, keys=b""))),
    ],
    ids=["garbage", "a message without an end", "questions"],
)
def test_whoever_did_not_say_hello_has_a_budget(pool: Pool, port: int, frame: bytes) -> None:
    """Of frames, and of bytes where no frame comes to an end: then its connection is closed, and clients are served."""
    stranger = Raw(port)
    with at(port) as far:
        until(lambda: not stranger.send(frame) or stranger.closed(), "it was not cut off")
        assert names(store(far, range(3))) == ["WRITE"] * 3
        assert names(load(far, range(3))) == ["READ"] * 3
    stranger.close()


@pytest.mark.netns
def test_chunks_cross_between_network_namespaces(directory: Path, namespaces: tuple[str, str]) -> None:
    """Two network stacks, one cable: what two hosts see of each other. A dead cable costs the copies, which end in
    time, and the pool gives up what the lost client held; a mended one serves again."""
    inside = [["ip", "netns", "exec", name, sys.executable] for name in namespaces]
    door = ["--listen", "10.213.78.1:7800", "--remote-allow-plaintext", "--remote-liveness-s", "2"]
    command = ["-m", "pdtransport.pool.cli", "--dir", str(directory), "--memory-bytes", "32MiB", *door]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([*inside[0], *command], **pipes) as service,
        subprocess.Popen([*inside[1], "-c", CLIENT], **pipes) if _serves(service) else service as client,
        PoolClient(directory=directory) as near,
    ):
        try:
            assert _line(client) == " ".join(["WRITE"] * 24)
            assert _line(client) == " ".join(["READ"] * 24)
            assert names(load(near, range(24))) == ["READ"] * 24
            cable = ["ip", "-n", namespaces[0], "link", "set", f"{namespaces[0]}v"]
            subprocess.run([*cable, "down"], check=True, timeout=10)
            assert _again(client).startswith("0 ")
            until(lambda: all(not each["held_bytes"] for each in status(near)["clients"]), "something is still held")
            subprocess.run([*cable, "up"], check=True, timeout=10)
            until(lambda: _again(client).startswith("24"), "the pool was not found again")
        finally:
            for process in (client, service):
                process.kill()


def _serves(service: subprocess.Popen[str]) -> bool:
    return "serves" in _line(service)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _again(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return _line(process)
