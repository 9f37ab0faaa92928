"""Attacks by peers that speak the protocol and lie, by sockets that half speak it, and by clients of the pool."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import zmq

from pdtransport.pool.client import PoolClient
from pdtransport.protocol import messages
from tests.processes import pool_rig
from tests.siege.bystander import Effect
from tests.siege.fresh_peers import Impostor, Liar, Peer, hand_over
from tests.siege.fresh_rig import Process, measured

U64, I64 = (1 << 64) - 1, (1 << 63) - 1
DEEP = b"\x91" * 100_000 + b"\x90"
WIDE = b"\xdd\xff\xff\xff\xff"  # an array of 4 billion, says its head


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


def lies() -> dict[str, tuple[str, Callable[[dict[str, Any]], list[Any]]]]:
    """Name: (the kind of message that is changed, what is said instead)."""

    def put(**fields: Any) -> Callable[[dict[str, Any]], list[Any]]:
        return lambda said: [{**said, **fields}]

    found: dict[str, tuple[str, Callable[[dict[str, Any]], list[Any]]]] = {}
    odd: dict[str, dict[str, list[Any]]] = {
        "batch": {
            "nbytes": [U64, I64, 1], "first_block": [1 << 20, 15, 1], "blocks": [1 << 20, 15, 1], "seq": [(1 << 31) - 1, 7],
            "attempt": [1000, 1], "checksums": [b"", b"\0" * 128, b"\xff" * (8 << 17), b"x"],
            "offer": [b"", b"\0" * 100, DEEP, WIDE, b"\xff" * (1 << 20), b"\x80"],
        },
        "commit": {
            "batches": [0, 1, 1 << 31], "tokens": [U64, 1], "digest": [b"\0" * 32, b"\0" * 16], "first_token": [(1 << 31) - 1],
            "cached_tokens": [U64],
        },
        "accept": {"tokens_done": [U64], "known": [False], "generation": [1, I64]},
        "coming": {"due_us": [60_000_000], "blocks": [1 << 20], "first_block": [1 << 20], "offer": [DEEP, WIDE, b"x"]},
        "grant": {
            "blocks": [0, 1 << 20], "first_block": [1 << 20, 1], "head_lo": [65536, 1], "head_hi": [65536, 1], "window_bytes": [1, U64],
            "consumers": [4096, 2], "pages": [b"x", b"\xff" * (4 << 19)], "tokens": [1 << 26, 1], "first_token": [True],
            "digest": [b"\0" * 32],
        },
        "received": {"seqs": [[], list(range(65536)), [0] * 65536, [(1 << 31) - 1]]},
        "hello": {
            "links": [{}, {"cma": b""}, {"cma": DEEP}, {"cma": WIDE}, {"cma": b"\x80"}, {"x" * 1000: b""}],
            "world": [65536], "rank": [65535], "protocol": [U64],
        },
        "welcome": {
            "links": [{}, {"cma": b""}, {"cma": DEEP}, {"cma": WIDE}, {"cma": b"\x80"}], "world": [65536], "rank": [65535],
        },
        "link": {"body": [b"", DEEP, WIDE, b"\xff" * (1 << 20)], "link": ["none", ""]},
    }  # fmt: skip
    for kind, fields in odd.items():
        for name, values in fields.items():
            for i, value in enumerate(values):
                found[f"{kind}.{name}[{i}]"] = (kind, put(**{name: value}))

    def cma(**fields: Any) -> Callable[[dict[str, Any]], list[Any]]:
        def change(said: dict[str, Any]) -> list[Any]:
            card = {**msgpack.unpackb(said["links"]["cma"]), **fields}
            return [{**said, "links": {**said["links"], "cma": msgpack.packb(card)}}]

        return change

    for kind in ("hello", "welcome"):
        for name, value in (("pid", 1), ("pid", -1), ("pid", U64), ("pid", 0), ("start", U64), ("host", "x"), ("pid", "1"), ("v", U64)):
            found[f"{kind} cma {name}={value}"] = (kind, cma(**{name: value}))
    found["batch 200 times"] = ("batch", lambda said: [said] * 200)
    found["batch never"] = ("batch", lambda said: [])
    found["commit before its batches"] = ("accept", lambda said: [said, _commit(said)])
    found["ack at once"] = ("grant", lambda said: [said, _as(said, "ack")])
    found["received before"] = ("grant", lambda said: [said, {**_as(said, "received"), "seqs": list(range(100))}])
    found["nack for ever"] = ("received", lambda said: [{**_as(said, "nack"), "wants": [[0, a]], "reason": ""} for a in range(1000)])
    found["nack of all"] = ("received", lambda said: [{**_as(said, "nack"), "wants": [[s, 1] for s in range(65536)], "reason": ""}])
    found["nack instead"] = ("ack", lambda said: [{**_as(said, "nack"), "wants": [[0, 3]], "reason": "\0\ud7ff\n\x1b[31m"}])
    found["grant again and again"] = ("grant", lambda said: [said] * 500)
    found["grants of other generations"] = ("grant", lambda said: [{**said, "generation": g + 1} for g in range(200)])
    found["revoke and grant"] = ("grant", lambda said: [{**_as(said, "revoke"), "code": "cancelled", "reason": "x\ny"}, said])
    found["abort with a reason"] = ("accept", lambda said: [{**_as(said, "abort"), "code": "damaged", "reason": "a\nb\x1b[2J" * 50}])
    found["revoked unasked"] = ("accept", lambda said: [said, _as(said, "revoked")])
    found["each word twice"] = ("", lambda said: [said, said])
    found["no acks"] = ("ack", lambda said: [])
    for name, frame in {
        "int keys": msgpack.packb({1: 2, "v": 5, "kind": "ack"}),
        "kind a list": msgpack.packb({"v": 5, "kind": ["ack"]}),
        "kind a map": msgpack.packb({"v": 5, "kind": {"a": 1}}),
        "key twice": b"\x83\xa1v\x05\xa4kind\xa3ack\xa4kind\xa4ping",
        "ext": b"\xc7\xff\x01" + bytes(255),
        "timestamp": b"\xd6\xff\xff\xff\xff\xff",
        "unused byte": b"\xc1",
        "nil": b"\xc0",
        "float": msgpack.packb({"v": 5.0, "kind": "ping", "incarnation": float("nan")}),
        "bad utf-8": b"\x82\xa1v\x05\xa4kind\xa2\xff\xfe",
        "more than one": msgpack.packb({"v": 5, "kind": "watch"}) * 2,
        "map of 4 billion": b"\xdf\xff\xff\xff\xff",
        "bytes of 4 GiB": b"\xc6\xff\xff\xff\xff",
        "deep": DEEP,
        "empty": b"",
    }.items():
        found[f"frame {name}"] = ("accept", lambda said, frame=frame: [frame] * 20 + [said])
        found[f"frame {name}, up"] = ("grant", lambda said, frame=frame: [frame] * 20 + [said])
    return found


def _as(said: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"v": said["v"], "kind": kind, "transfer": said["transfer"], "generation": said["generation"]}


def _commit(said: dict[str, Any]) -> dict[str, Any]:
    return {**_as(said, "commit"), "batches": 0, "tokens": 256, "digest": b"\0" * 32}


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
                outcomes[name] = hand_over(prefill, decode, "lie-" + "".join(c if c.isalnum() else "-" for c in name), liar.port)
            finally:
                liar.close()

        with measured(effect, decode, probe), ThreadPoolExecutor(8) as threads:  # type: ignore[arg-type]
            list(threads.map(tell, chosen))
        time.sleep(1)
        wrong = {name: became for name, became in outcomes.items() if "wrong" in became or "late" in became or "Error" in became}
        assert not wrong, wrong
        effect.lines += [line for line in prefill.lines()]
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
    """A peer grants and claims 6,000 transfers that it made up, and one real one under 4,096 consumers, and takes none."""
    effect = Effect("a peer grants and claims 6,000 transfers each, takes none")
    with pair(folder) as (prefill, decode, probe):
        hello = _hello(folder, prefill, decode)
        frames = [messages.encode(_grant(f"made-up-{i}", i + 1)) for i in range(6000)]
        frames += [messages.encode(messages.Claim(transfer=f"claimed-{i}")) for i in range(6000)]
        with measured(effect, prefill, probe):  # type: ignore[arg-type]
            evil = Impostor(prefill.port, "grabber")
            welcome = evil.greet(hello)
            assert welcome is not None and welcome.kind == "welcome", welcome
            for frame in frames:
                evil.say(frame)
            time.sleep(3)
            evil.close()
        time.sleep(3)
        probe()
    return effect


def _grant(transfer: str, generation: int, **more: Any) -> messages.Grant:
    how: dict[str, Any] = {"first_block": 0, "blocks": 16, "tokens": 256, "digest": b"\0" * 32, "head_lo": 0, "head_hi": 2, "window_bytes": 1 << 20}
    return messages.Grant(transfer=transfer, generation=generation, **{**how, **more})


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
    with pair(folder) as (prefill, decode, probe):
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


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"[:2] + b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


def half_spoken() -> dict[str, bytes]:
    """What a socket says of ZeroMQ's own protocol before it falls silent or goes wrong."""
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    done = GREETING + b"\x04" + bytes([len(ready)]) + ready

    def typed(kind: bytes, identity: bytes = b"") -> bytes:
        body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
        if identity:
            body += b"\x08Identity" + struct.pack(">I", len(identity)) + identity
        return GREETING + (b"\x04" + bytes([len(body)]) if len(body) < 256 else b"\x06" + struct.pack(">Q", len(body))) + body

    return {
        "nothing": b"", "one byte": b"\xff", "signature": GREETING[:10], "no mechanism": GREETING[:12], "greeting": GREETING,
        "http": b"GET / HTTP/1.1\r\n\r\n", "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        "version 0": b"\x01\x00", "version 1": GREETING[:10] + b"\x01", "version 9": GREETING[:10] + b"\x09\x09" + GREETING[12:],
        "plain": GREETING.replace(b"NULL", b"PLAI"), "as server": GREETING[:32] + b"\x01" + bytes(31),
        "curve": GREETING[:12] + b"CURVE".ljust(20, b"\0") + bytes(32) + b"\x04\xc8\x05HELLO" + bytes(194),
        "command of 2 GiB": GREETING + b"\x06" + struct.pack(">Q", 1 << 31) + bytes(10_000),
        "command of 2**63": GREETING + b"\x06" + struct.pack(">Q", 1 << 63) + bytes(10_000),
        "half ready": done[:-5], "ready twice": done + done[64:], "error": GREETING + b"\x04\x07\x05ERROR\x01"[:9],
        "pub": typed(b"PUB"), "req": typed(b"REQ"), "router": typed(b"ROUTER"), "stream": typed(b"STREAM"), "long type": typed(b"X" * 5000),
        "long identity": typed(b"DEALER", b"i" * 60_000), "identity 0": typed(b"DEALER", b"\0abcd"),
        "frame of 2**63": done + b"\x02" + struct.pack(">Q", 1 << 63), "frame of 4 GiB": done + b"\x02" + struct.pack(">Q", 1 << 32) + bytes(9999),
        "flags": done + b"\xff\xff" * 100, "parts": done + b"\x01\x00" * 100_000, "last part missing": done + b"\x01\x01a" * 1000,
        "pings": done + b"\x04\x09\x04PING\x00\x10ab" * 20_000, "long ping": done + b"\x04\xff\x04PING\xff\xff" + bytes(249),
        "commands": done + b"\x04\x0a\x09SUBSCRIBE" * 5000, "empty frames": done + b"\x00\x00" * 100_000,
    }  # fmt: skip


def half_handshakes(folder: Path) -> Effect:
    """TCP connections that speak ZeroMQ's own protocol half, wrongly, or in the name of another kind of socket."""
    found = half_spoken()
    effect = Effect(f"{len(found)} kinds of half a handshake, 5 of each, held open")
    with pair(folder) as (prefill, decode, probe):
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
        return msgpack.unpackb(self.socket.recv(), strict_map_key=False) if self.socket.poll(wait_s * 1000) else None

    def close(self) -> None:
        self.context.destroy(0)


def odd_words_to_the_pool() -> list[tuple[str, dict[str, Any]]]:
    """Each kind of message with each of its fields made odd."""
    key = pool_rig.key(1)
    plain: dict[str, dict[str, Any]] = {
        "hello": {"lock": 5, "name": "x", "tenant": ""},
        "lookup": {"request": 1, "keys": key},
        "store": {"request": 2, "keys": pool_rig.key(77), "sizes": struct.pack("<I", 4096), "codec": "", "grid": None},
        "load": {"request": 3, "keys": key, "sizes": struct.pack("<I", pool_rig.CHUNK)},
        "publish": {"request": 2, "indices": struct.pack("<I", 0), "checksums": bytes(8)},
        "release": {"request": 3, "indices": struct.pack("<I", 0)},
        "bye": {},
        "welcome": {"memory": "/etc/passwd", "nbytes": 1, "frame_bytes": 1, "client_bytes": 1},
        "answer": {"request": 1, "indices": b"", "verdicts": b"", "checksums": b"", "frames": b""},
    }
    odd: list[Any] = [
        None, -1, 0, U64, I64, -(1 << 63), 1.5, float("nan"), True, "", "x" * 100_000, "\0\n\x1b[2J", b"", b"\xff" * 4, b"\xff" * 31,
        b"\xff" * 32, b"\0" * 320_000, [], [1] * 1000, {}, {"a": {}}, "../../x", "tenant/../y",
    ]  # fmt: skip
    return [
        (kind, {**fields, name: value}) for kind, fields in plain.items() for name in fields for value in odd
    ] + [(kind, fields) for kind, fields in plain.items()]


def pool_hears_odd_words(folder: Path) -> Effect:
    """A process of the same user says each word to the pool with each field made odd, greeted or not."""
    words = odd_words_to_the_pool()
    effect = Effect(f"{len(words)} odd words to the pool, before and after a greeting")
    with pooled(folder) as (process, directory, client, probe), measured(effect, process, probe):
        for greeted in (False, True):
            stranger = PoolStranger(directory)
            if greeted:
                stranger.hello()
            for kind, fields in words:
                if kind == "bye" and greeted:
                    continue
                stranger.say(kind, **fields)
                time.sleep(0.001)
            for frame in (b"", DEEP, WIDE, b"\xc1", b"\xdf\xff\xff\xff\xff", msgpack.packb({1: 2}), msgpack.packb({"v": 2, "kind": []})):
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
    with pooled(folder) as (process, directory, client, probe), measured(effect, process, probe):
        for i in range(300):
            stranger = PoolStranger(directory, lock=(None, 5, 0)[i % 3])
            if stranger.hello() is not None:
                stranger.say("store", request=1, keys=pool_rig.key(1000 + i), sizes=struct.pack("<I", 12 << 20), codec="", grid=None)
                stranger.hear(0.2)
            stranger.close()
        time.sleep(1)
        with PoolClient(directory=directory, who="after") as after:
            until = time.monotonic() + 10
            while "WRITE" not in pool_rig.names(pool_rig.store(after, [60])) and time.monotonic() < until:
                time.sleep(0.2)
            assert pool_rig.names(pool_rig.load(after, [60])) == ["READ"], "the room of strangers that are gone is not back"
    return effect


def pool_locks_taken(folder: Path) -> Effect:
    """A process of the same user locks the whole lock file of the pool, and others come and go meanwhile."""
    import fcntl

    effect = Effect("somebody locks the pool's whole lock file")
    with pooled(folder) as (process, directory, client, probe):
        with measured(effect, process, probe):
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
    with pooled(folder, "--http", "127.0.0.1:0", "--http-key-file", str(folder / "keys")) as (process, directory, client, probe):
        url = process.wait_for("http://").split("http://")[1].split()[0].rstrip(",.")
        odd: list[Any] = [
            "1e999", "-1e999", "NaN", "null", "true", "-1", "1.5", "[]", "{}", '""', '"\\ud800"', "9" * 4400, "[1e999]", "[-1]", "[true]",
            '["a"]', "[" * 2000 + "]" * 2000, '["\\ud800"]', "[99999999999999999999999]", "[" + "1," * 300_000 + "1]", '"' + "ab" * 32 + '"',
            '["' + "ab" * 32 + '"]', '["' + "zz" * 32 + '"]', "1e308", "-0.0",
        ]  # fmt: skip
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
                    f"http://{url}/pool/{verb}", data, {"Authorization": "Bearer pool-key-1", "Content-Type": "application/json"}
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
    """Another user of a shared directory left named pipes, links and folders where the pool looks for its disk's files."""
    effect = Effect("named pipes, links and folders in the disk tier's directory")
    disk = folder / "disk"
    disk.mkdir(mode=0o700)
    victim = folder / "victim"
    victim.write_text("precious")
    os.mkfifo(disk / "spaces.json")
    os.mkfifo(disk / "lock")
    for i, name in enumerate((f"{pool_rig.key(9).hex()}.{pool_rig.CHUNK}", pool_rig.key(8).hex(), "00", "ff", "t-", "tmp")):
        if i % 2:
            os.mkfifo(disk / name)
        else:
            (disk / name).symlink_to(victim)
    (disk / "loop").symlink_to(disk)
    with (
        pooled(folder, "--disk", str(disk), "--disk-bytes", "64MiB") as (process, directory, client, probe),
        measured(effect, process, probe),
    ):
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
