"""What a peer, a socket or a client of the pool may say that no honest one would."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-untyped]

from pdtransport.protocol import messages
from tests.processes import pool_rig

U64, I64 = (1 << 64) - 1, (1 << 63) - 1


DEEP = b"\x91" * 100_000 + b"\x90"


WIDE = b"\xdd\xff\xff\xff\xff"  # an array of 4 billion, says its head


# First block, blocks and heads of a cache group, none of them what was agreed on.
_GROUPS = (
    (0, 16, 0, 65536),
    (0, 0, 0, 2),
    (0, 1 << 20, 0, 2),
    (1 << 20, 16, 0, 2),
    (1, 16, 0, 2),
    (0, 16, 65536, 65536),
    (0, 16, 1, 1),
    (0, 16, 0, 1),
)


def lies() -> dict[str, tuple[str, Callable[[dict[str, Any]], list[Any]]]]:
    """Name: (the kind of message that is changed, what is said instead)."""

    def before(frame: bytes) -> Callable[[dict[str, Any]], list[Any]]:
        return lambda said: [frame] * 20 + [said]

    def put(**fields: Any) -> Callable[[dict[str, Any]], list[Any]]:
        return lambda said: [{**said, **fields}]

    found: dict[str, tuple[str, Callable[[dict[str, Any]], list[Any]]]] = {}
    odd: dict[str, dict[str, list[Any]]] = {
        "batch": {
            "nbytes": [U64, I64, 1],
            "group": [63, 1, -1],
            "first_block": [1 << 20, 15, 1],
            "blocks": [1 << 20, 15, 1],
            "seq": [(1 << 31) - 1, 7],
            "attempt": [1000, 1],
            "checksums": [b"", b"\0" * 128, b"\xff" * (8 << 17), b"x"],
            "offer": [b"", b"\0" * 100, DEEP, WIDE, b"\xff" * (1 << 20), b"\x80"],
        },
        "commit": {
            "batches": [0, 1, 1 << 31],
            "tokens": [U64, 1],
            "digest": [b"\0" * 32, b"\0" * 16],
            "first_token": [(1 << 31) - 1],
            "cached_tokens": [U64],
        },
        "accept": {"tokens_done": [U64], "known": [False], "generation": [1, I64]},
        "hint": {"blocks": [1 << 20], "first_block": [1 << 20], "group": [63, 1], "offer": [DEEP, WIDE, b"x"]},
        "grant": {
            "groups": [
                [],
                *([list(group)] for group in _GROUPS),
                [list(_GROUPS[0])] * 2,
                [list(_GROUPS[0])] * 64,
                [list(_GROUPS[0])] * 65536,
                [[0, 16, 0]],
                DEEP,
            ],
            "window_bytes": [1, U64],
            "consumers": [4096, 2],
            "tokens": [1 << 26, 1],
            "first_token": [True],
            "prompt_digest": [b"\0" * 32],
        },
        "received": {"seqs": [[], list(range(65536)), [0] * 65536, [(1 << 31) - 1]]},
        "hello": {
            "links": [{}, {"cma": b""}, {"cma": DEEP}, {"cma": WIDE}, {"cma": b"\x80"}, {"x" * 1000: b""}],
            "world": [65536],
            "rank": [65535],
            "protocol": [U64],
        },
        "welcome": {
            "links": [{}, {"cma": b""}, {"cma": DEEP}, {"cma": WIDE}, {"cma": b"\x80"}],
            "world": [65536],
            "rank": [65535],
        },
        "link": {"body": [b"", DEEP, WIDE, b"\xff" * (1 << 20)], "link": ["none", ""]},
    }
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
        for name, value in (
            ("pid", 1),
            ("pid", -1),
            ("pid", U64),
            ("pid", 0),
            ("start", U64),
            ("host", "x"),
            ("pid", "1"),
            ("v", U64),
        ):
            found[f"{kind} cma {name}={value}"] = (kind, cma(**{name: value}))
    found["batch 200 times"] = ("batch", lambda said: [said] * 200)
    found["batch never"] = ("batch", lambda said: [])
    found["commit before its batches"] = ("accept", lambda said: [said, _commit(said)])
    found["ack at once"] = ("grant", lambda said: [said, _as(said, "ack")])
    found["received before"] = ("grant", lambda said: [said, {**_as(said, "received"), "seqs": list(range(100))}])
    found["nack for ever"] = (
        "received",
        lambda said: [{**_as(said, "nack"), "wants": [[0, a]], "reason": ""} for a in range(1000)],
    )
    found["nack of all"] = (
        "received",
        lambda said: [{**_as(said, "nack"), "wants": [[s, 1] for s in range(65536)], "reason": ""}],
    )
    found["nack instead"] = (
        "ack",
        lambda said: [{**_as(said, "nack"), "wants": [[0, 3]], "reason": "\0\ud7ff\n\x1b[31m"}],
    )
    found["grant again and again"] = ("grant", lambda said: [said] * 500)
    found["grants of other generations"] = ("grant", lambda said: [{**said, "generation": g + 1} for g in range(200)])
    found["revoke and grant"] = (
        "grant",
        lambda said: [{**_as(said, "revoke"), "code": "cancelled", "reason": "x\ny"}, said],
    )
    found["abort with a reason"] = (
        "accept",
        lambda said: [{**_as(said, "abort"), "code": "damaged", "reason": "a\nb\x1b[2J" * 50}],
    )
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
        found[f"frame {name}"] = ("accept", before(frame))
        found[f"frame {name}, up"] = ("grant", before(frame))
    return found


def _as(said: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"v": said["v"], "kind": kind, "transfer": said["transfer"], "generation": said["generation"]}


def _commit(said: dict[str, Any]) -> dict[str, Any]:
    return {**_as(said, "commit"), "batches": 0, "tokens": 256, "digest": b"\0" * 32}


def made_up_grant(transfer: str, generation: int, **more: Any) -> messages.Grant:
    how: dict[str, Any] = {
        "groups": (messages.GrantedGroup(0, 16, 0, 2),),
        "tokens": 256,
        "prompt_digest": b"\0" * 32,
        "window_bytes": 1 << 20,
    }
    return messages.Grant(transfer=transfer, generation=generation, **{**how, **more})


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)


def half_spoken() -> dict[str, bytes]:
    """What a socket says of ZeroMQ's own protocol before it falls silent or goes wrong."""
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    done = GREETING + b"\x04" + bytes([len(ready)]) + ready

    def typed(kind: bytes, identity: bytes = b"") -> bytes:
        body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
        if identity:
            body += b"\x08Identity" + struct.pack(">I", len(identity)) + identity
        return (
            GREETING
            + (b"\x04" + bytes([len(body)]) if len(body) < 256 else b"\x06" + struct.pack(">Q", len(body)))
            + body
        )

    return {
        "nothing": b"",
        "one byte": b"\xff",
        "signature": GREETING[:10],
        "no mechanism": GREETING[:12],
        "greeting": GREETING,
        "http": b"GET / HTTP/1.1\r\n\r\n",
        "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        "version 0": b"\x01\x00",
        "version 1": GREETING[:10] + b"\x01",
        "version 9": GREETING[:10] + b"\x09\x09" + GREETING[12:],
        "plain": GREETING.replace(b"NULL", b"PLAI"),
        "as server": GREETING[:32] + b"\x01" + bytes(31),
        "curve": GREETING[:12] + b"CURVE".ljust(20, b"\0") + bytes(32) + b"\x04\xc8\x05HELLO" + bytes(194),
        "command of 2 GiB": GREETING + b"\x06" + struct.pack(">Q", 1 << 31) + bytes(10_000),
        "command of 2**63": GREETING + b"\x06" + struct.pack(">Q", 1 << 63) + bytes(10_000),
        "half ready": done[:-5],
        "ready twice": done + done[64:],
        "error": GREETING + b"\x04\x07\x05ERROR\x01"[:9],
        "pub": typed(b"PUB"),
        "req": typed(b"REQ"),
        "router": typed(b"ROUTER"),
        "stream": typed(b"STREAM"),
        "long type": typed(b"X" * 5000),
        "long identity": typed(b"DEALER", b"i" * 60_000),
        "identity 0": typed(b"DEALER", b"\0abcd"),
        "frame of 2**63": done + b"\x02" + struct.pack(">Q", 1 << 63),
        "frame of 4 GiB": done + b"\x02" + struct.pack(">Q", 1 << 32) + bytes(9999),
        "flags": done + b"\xff\xff" * 100,
        "parts": done + b"\x01\x00" * 100_000,
        "last part missing": done + b"\x01\x01a" * 1000,
        "pings": done + b"\x04\x09\x04PING\x00\x10ab" * 20_000,
        "long ping": done + b"\x04\xff\x04PING\xff\xff" + bytes(249),
        "commands": done + b"\x04\x0a\x09SUBSCRIBE" * 5000,
        "empty frames": done + b"\x00\x00" * 100_000,
    }


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
        None,
        -1,
        0,
        U64,
        I64,
        -(1 << 63),
        1.5,
        float("nan"),
        True,
        "",
        "x" * 100_000,
        "\0\n\x1b[2J",
        b"",
        b"\xff" * 4,
        b"\xff" * 31,
        b"\xff" * 32,
        b"\0" * 320_000,
        [],
        [1] * 1000,
        {},
        {"a": {}},
        "../../x",
        "tenant/../y",
    ]
    changed = [(kind, {**said, name: value}) for kind, said in plain.items() for name in said for value in odd]
    return changed + list(plain.items())
