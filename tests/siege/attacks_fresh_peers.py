"""Attacks by peers that speak the protocol and lie, by sockets that half speak it, and by clients of the pool."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import zmq

from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.protocol import messages
from tests.processes import pool_rig
from tests.siege.bystander import Effect
from tests.siege.fresh_lies import DEEP, WIDE, half_spoken, lies, made_up_grant, odd_words_to_the_pool
from tests.siege.fresh_peers import Impostor, Liar, Peer, hand_over
from tests.siege.fresh_rig import Process, measured


@contextmanager
def pair(folder: Path) -> Iterator[tuple[Peer, Peer, Callable[[], None]]]:
    """Prefill and decode, and a bystander: a transfer of theirs that has to arrive."""
    prefill, decode = Peer(folder, "prefill"), Peer(folder, "decode")
    ids = itertools.count()

    def probe() -> None:
        became = hand_over(prefill, decode, f"bystander-{next(ids)}")
        assert became == "right", became

    try:
        yield prefill, decode, probe
    finally:
        prefill.close()
        decode.close()


def peers_that_lie(folder: Path, some: int = 1) -> Effect:
    """A peer changes one word of each transfer: the transfer fails, or is right, and nobody else notices."""
    chosen = dict(list(lies().items())[::some])
    effect = Effect(f"peers with {len(chosen)} lies")
    with pair(folder) as (prefill, decode, probe):
        outcomes: dict[str, str] = {}

        def tell(name: str) -> None:
            kind, change = chosen[name]
            liar = Liar(prefill.port)
            liar.change = lambda up, said: change(said) if said.get("kind") == kind or not kind else [said]
            try:
                outcomes[name] = hand_over(
                    prefill, decode, "lie-" + "".join(c if c.isalnum() else "-" for c in name), liar.port
                )
            finally:
                liar.close()

        with measured(effect, decode, probe), ThreadPoolExecutor(8) as threads:  # type: ignore[arg-type]
            list(threads.map(tell, chosen))
        time.sleep(1)
        wrong = {
            name: became
            for name, became in outcomes.items()
            if "wrong" in became or "late" in became or "Error" in became
        }
        assert not wrong, wrong
        effect.lines += list(prefill.lines())
        probe()
        live = [peer.ask("status")["live"] for peer in (prefill, decode)]
        assert not any(live[1].values()), live
        (folder / "outcomes.json").write_text(json.dumps(outcomes, indent=1))
        effect.outcomes = outcomes  # type: ignore[attr-defined]
    return effect


def _hello(folder: Path, prefill: Peer, decode: Peer) -> dict[str, Any]:
    """A greeting as decode says it."""
    liar = Liar(prefill.port)
    try:
        assert hand_over(prefill, decode, "greeting", liar.port) == "right"
        return next(said for _, said in liar.heard if said["kind"] == "hello")
    finally:
        liar.close()
        pool_rig.until(lambda: any("is gone" in line for line in prefill.lines()), "the liar is not missed")


def grants_without_end(folder: Path) -> Effect:
    """A peer grants and claims 6,000 transfers that it made up, and takes none."""
    effect = Effect("a peer grants and claims 6,000 transfers each, takes none")
    with pair(folder) as (prefill, decode, probe):
        hello = _hello(folder, prefill, decode)
        frames = [messages.encode(made_up_grant(f"made-up-{i}", i + 1)) for i in range(6000)]
        frames += [messages.encode(messages.Claim(transfer=f"claimed-{i}")) for i in range(6000)]
        with measured(effect, prefill, probe):  # type: ignore[arg-type]
            evil = Impostor(prefill.port, "grabber")
            welcome = evil.greet(hello)
            assert welcome is not None
            assert welcome.kind == "welcome", welcome
            for frame in frames:
                evil.say(frame)
            time.sleep(3)
            evil.close()
        time.sleep(3)
        probe()
    return effect


def engines_without_end(folder: Path) -> Effect:
    """One process greets a worker as 400 engines of ever new names, each with links and a fingerprint, and stays."""
    effect = Effect("one process greets as 400 engines")
    with pair(folder) as (prefill, decode, probe):
        hello = _hello(folder, prefill, decode)
        with measured(effect, prefill, probe):  # type: ignore[arg-type]
            evil = [Impostor(prefill.port, f"engine-{i}" * 10) for i in range(40)]
            for _ in range(10):
                for i, each in enumerate(evil):
                    each.engine = f"engine-{time.monotonic_ns()}-{i}"
                    each.greet({**hello, "links": {f"l{j}": bytes(500) for j in range(16)}})
            time.sleep(2)
            for each in evil:
                each.close()
            time.sleep(3)
    return effect


def status_asked_without_end(folder: Path) -> Effect:
    """Strangers ask for the status and say Watch without end, and read nothing."""
    effect = Effect("20 strangers ask 2,000 times each for the status, read nothing")
    with pair(folder) as (prefill, _decode, probe):
        for _ in range(30):
            probe()
        with measured(effect, prefill, probe):  # type: ignore[arg-type]
            evil = [Impostor(prefill.port, f"reader-{i}") for i in range(20)]
            ask, watch = messages.encode(messages.StatusRequest()), messages.encode(messages.Watch())
            one = messages.encode(messages.StatusRequest(transfer="x" * 128))
            for _ in range(2000):
                for each in evil:
                    for frame in (ask, one, watch):
                        with contextlib.suppress(zmq.Again):
                            each.socket.send(frame, zmq.NOBLOCK)
            time.sleep(2)
            for each in evil:
                each.close()
            time.sleep(1)
    return effect


def half_handshakes(folder: Path) -> Effect:
    """TCP connections that speak ZeroMQ's own protocol half, wrongly, or in the name of another kind of socket."""
    found = half_spoken()
    effect = Effect(f"{len(found)} kinds of half a handshake, 5 of each, held open")
    with pair(folder) as (prefill, _decode, probe):
        held: list[socket.socket] = []
        with measured(effect, prefill, probe):  # type: ignore[arg-type]
            for data in found.values():
                for _ in range(5):
                    sock = socket.create_connection(("127.0.0.1", prefill.port), 10)
                    sock.settimeout(2)
                    with contextlib.suppress(OSError):
                        sock.sendall(data)
                    held.append(sock)
            time.sleep(2)
            for sock in held:
                sock.close()
    return effect


def same_identity(folder: Path) -> Effect:
    """Sockets that take one another's routing id, and greet under it, one of them in parts."""
    effect = Effect("50 sockets of one routing id")
    with pair(folder) as (prefill, decode, probe):
        hello = _hello(folder, prefill, decode)
        with measured(effect, prefill, probe):  # type: ignore[arg-type]
            evil = [Impostor(prefill.port, f"twin-{i}", b"same") for i in range(50)]
            for each in evil:
                each.socket.send(msgpack.packb({**hello, "engine": each.engine, "incarnation": 5}), zmq.NOBLOCK)
                each.socket.send_multipart([b""] * 1000, zmq.NOBLOCK)
                each.socket.send_multipart([b"", msgpack.packb(hello)], zmq.NOBLOCK)
            time.sleep(1)
            for each in evil:
                each.close()
    return effect


# -- the pool --------------------------------------------------------------------------------------------------------


@contextmanager
def pooled(folder: Path, *options: str) -> Iterator[tuple[Process, Path, PoolClient, Callable[[], None]]]:
    directory = folder / "pool"
    process = Process(
        folder, "pool", "-m", "pdtransport.pool.cli", "--dir", str(directory), "--memory-bytes", "16MiB", *options
    )
    try:
        process.wait_for("serves")
        with PoolClient(directory=directory, who="bystander") as client:
            assert pool_rig.names(pool_rig.store(client, [1, 2, 3])) == ["WRITE"] * 3

            def probe() -> None:
                done = pool_rig.load(client, [1, 2, 3])
                assert pool_rig.names(done) == ["READ"] * 3, done

            yield process, directory, client, probe
    finally:
        process.close()


class PoolStranger:
    """A bare socket at a pool's door."""

    def __init__(self, directory: Path, lock: Any = None) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(f"ipc://{directory}/default.sock")
        self.lock = int.from_bytes(os.urandom(7), "big") if lock is None else lock

    def say(self, kind: str, **fields: Any) -> None:
        with contextlib.suppress(zmq.Again):
            self.socket.send(msgpack.packb({"v": 2, "kind": kind, **fields}), zmq.NOBLOCK)

    def hello(self, **fields: Any) -> Any:
        self.say("hello", **{"lock": self.lock, "name": "stranger", "tenant": "", **fields})
        return self.hear()

    def hear(self, wait_s: float = 3.0) -> Any:
        return (
            msgpack.unpackb(self.socket.recv(), strict_map_key=False)
            if self.socket.poll(round(wait_s * 1000))
            else None
        )

    def close(self) -> None:
        self.context.destroy(0)


def pool_hears_odd_words(folder: Path) -> Effect:
    """A process of the same user says each word to the pool with each field made odd, greeted or not."""
    words = odd_words_to_the_pool()
    effect = Effect(f"{len(words)} odd words to the pool, before and after a greeting")
    with pooled(folder) as (process, directory, _client, probe), measured(effect, process, probe):
        for greeted in (False, True):
            stranger = PoolStranger(directory)
            if greeted:
                stranger.hello()
            for kind, fields in words:
                if kind == "bye" and greeted:
                    continue
                stranger.say(kind, **fields)
                time.sleep(0.001)
            for frame in (
                b"",
                DEEP,
                WIDE,
                b"\xc1",
                b"\xdf\xff\xff\xff\xff",
                msgpack.packb({1: 2}),
                msgpack.packb({"v": 2, "kind": []}),
            ):
                stranger.socket.send(frame)
                stranger.socket.send_multipart([frame] * 100)
            time.sleep(0.5)
            stranger.close()
        time.sleep(0.5)
        with PoolClient(directory=directory, who="after") as after:
            assert pool_rig.names(pool_rig.store(after, [50, 51])) == ["WRITE"] * 2
            assert pool_rig.names(pool_rig.load(after, [50, 51])) == ["READ"] * 2
    return effect


def pool_clients_that_hold(folder: Path) -> Effect:
    """Processes that store without publishing, under no lock, another's lock or the same one, and go."""
    effect = Effect("300 strangers take all room of the pool and publish nothing")
    with pooled(folder) as (process, directory, _client, probe), measured(effect, process, probe):
        for i in range(300):
            stranger = PoolStranger(directory, lock=(None, 5, 0)[i % 3])
            if stranger.hello() is not None:
                stranger.say(
                    "store",
                    request=1,
                    keys=pool_rig.key(1000 + i),
                    sizes=struct.pack("<I", 12 << 20),
                    codec="",
                    grid=None,
                )
                stranger.hear(0.2)
            stranger.close()
        time.sleep(1)
        with PoolClient(directory=directory, who="after") as after:
            until = time.monotonic() + 10
            while "WRITE" not in pool_rig.names(pool_rig.store(after, [60])) and time.monotonic() < until:
                time.sleep(0.2)
            assert pool_rig.names(pool_rig.load(after, [60])) == ["READ"], (
                "the room of strangers that are gone is not back"
            )
    return effect


def pool_locks_taken(folder: Path) -> Effect:
    """A process of the same user locks the whole lock file of the pool, and others come and go meanwhile."""
    import fcntl

    effect = Effect("somebody locks the pool's whole lock file")
    with pooled(folder) as (process, directory, _client, probe), measured(effect, process, probe):
        child = os.fork()
        if child == 0:
            fd = os.open(directory / "default.lock", os.O_RDWR)
            with contextlib.suppress(OSError):
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 0)
            for i in range(1000):
                with contextlib.suppress(OSError):
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1 << 20, i << 20)
            time.sleep(4)
            os._exit(0)
        time.sleep(0.3)
        start = time.monotonic()
        with PoolClient(directory=directory, who="newcomer", deadline_s=2) as late:
            pool_rig.store(late, [70])
        assert time.monotonic() - start < 15, "a client hangs"
        os.waitpid(child, 0)
    return effect


def pool_http_odd(folder: Path) -> Effect:
    """The pool's HTTP API under bodies of all shapes, by who holds a key."""
    import urllib.error
    import urllib.request

    (folder / "keys").write_text("pool-key-1\n")
    (folder / "keys").chmod(0o600)
    effect = Effect("odd bodies to the pool's HTTP API")
    with pooled(folder, "--http", "127.0.0.1:0", "--http-key-file", str(folder / "keys")) as (
        process,
        _directory,
        _client,
        probe,
    ):
        url = process.wait_for("http://").split("http://")[1].split()[0].rstrip(",.")
        odd: list[Any] = [
            "1e999",
            "-1e999",
            "NaN",
            "null",
            "true",
            "-1",
            "1.5",
            "[]",
            "{}",
            '""',
            '"\\ud800"',
            "9" * 4400,
            "[1e999]",
            "[-1]",
            "[true]",
            '["a"]',
            "[" * 2000 + "]" * 2000,
            '["\\ud800"]',
            "[99999999999999999999999]",
            "[" + "1," * 300_000 + "1]",
            '"' + "ab" * 32 + '"',
            '["' + "ab" * 32 + '"]',
            '["' + "zz" * 32 + '"]',
            "1e308",
            "-0.0",
        ]
        wrong = []
        with measured(effect, process, probe):
            for verb, name, value in itertools.product(
                ("lookup", "pin", "hint", "prefetch", "move", "clear", "unpin", "compress"),
                ("tokens", "keys", "for_s", "tenant", "salt", "cache_salt", "model", "pin", "to"),
                odd,
            ):
                if verb == "clear" and name not in ("tokens", "keys", "salt"):
                    continue
                if len(value) > 100_000 and verb not in ("lookup", "hint"):
                    continue
                more = "" if name in ("tokens", "keys", "tenant") else '"tokens": [1, 2, 3], '
                data = f'{{{more}"{name}": {value}}}'.encode()
                request = urllib.request.Request(
                    f"http://{url}/pool/{verb}",
                    data,
                    {"Authorization": "Bearer pool-key-1", "Content-Type": "application/json"},
                )
                try:
                    with urllib.request.urlopen(request, timeout=30) as reply:
                        code = reply.status
                except urllib.error.HTTPError as error:
                    code = error.code
                    if code >= 500:
                        wrong.append(f"{verb} {name} {value[:40]}: {code} {error.read()[:200]!r}")
        assert not wrong, "\n".join(wrong)
    return effect


def planted_fifos(folder: Path) -> Effect:
    """Named pipes, links and folders were left where the pool looks for its disk's files, while others could."""
    effect = Effect("named pipes, links and folders in the disk tier's directory")
    disk = folder / "disk"
    disk.mkdir(mode=0o700)
    victim = folder / "victim"
    victim.write_text("precious")
    os.mkfifo(disk / "spaces.json")
    os.mkfifo(disk / "lock")
    for i, name in enumerate(
        (f"{pool_rig.key(9).hex()}.{pool_rig.CHUNK}", pool_rig.key(8).hex(), "00", "ff", "t-", "tmp")
    ):
        if i % 2:
            os.mkfifo(disk / name)
        else:
            (disk / name).symlink_to(victim)
    (disk / "loop").symlink_to(disk)
    with pooled(folder, "--disk", str(disk), "--disk-bytes", "64MiB") as (process, _directory, client, probe):
        pool_rig.store(client, list(range(200, 260)))  # all of its memory was touched
        with measured(effect, process, probe):
            pool_rig.store(client, list(range(100, 140)))
            time.sleep(1)
            pool_rig.load(client, list(range(100, 140)))
            with contextlib.suppress(OSError):
                for path in list(disk.rglob("*"))[:50]:
                    if path.is_file() and not path.is_symlink() and path.stat().st_size > 1000:
                        path.unlink()
                        os.mkfifo(path)
            pool_rig.load(client, list(range(100, 140)))
    assert victim.read_text() == "precious"
    return effect
