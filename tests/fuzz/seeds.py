"""Inputs to begin with: well-formed ones, made from the code, and those under ``corpus/`` that taught us something."""

from __future__ import annotations

import random
from pathlib import Path

import msgpack

from pdtransport.protocol.messages import PROTOCOL_VERSION

HERE = Path(__file__).parent
PACKS = HERE / "corpus"
EXAMPLE_FILES = HERE.parents[1] / "examples"
TOPOLOGIES = (
    b"",
    b"[]",
    b"a: &a [*a]",
    b"apiVersion: pdtransport/v1\nmodel: {path: x}\nroles: {prefill: {count: 1}, decode: {count: 1}}\n",
    b"a: {<<: {b: 1}, b: 2}\n? [1]\n: 2\n",
    b"x: !!python/object/apply:os.system [true]\n",
    b"t: 2001-01-01\nn: 0x_\nf: .inf\ns: 190:20:30\n",
)


_KEPT, _NOW = b"\xa1v\x01", b"\xa1v" + bytes([PROTOCOL_VERSION])  # under another version all would end at the version


def kept(target: str) -> list[bytes]:
    """What earlier runs found worth keeping."""
    pack = PACKS / f"{target}.pack"
    return [each.replace(_KEPT, _NOW) for each in msgpack.unpackb(pack.read_bytes())] if pack.exists() else []


def write_pack(target: str, inputs: list[bytes]) -> None:
    (PACKS / f"{target}.pack").write_bytes(msgpack.packb([each.replace(_NOW, _KEPT) for each in inputs]))


def seeds(target: str) -> list[bytes]:
    if target in ("http", "params", "pool"):
        from tests.fuzz import openings

        made = {"http": openings.HTTP, "params": openings.PARAMS, "pool": openings.POOL}[target]
        return [*made, *(file.read_bytes() for file in sorted((PACKS / target).glob("*"))), *kept(target)]
    found = [file.read_bytes().replace(_KEPT, _NOW) for file in sorted((PACKS / target).glob("*"))] + kept(target)
    if target == "topology":
        return [*TOPOLOGIES, *(file.read_bytes() for file in sorted(EXAMPLE_FILES.glob("*.yaml"))), *found]
    if target == "exports":
        made = [
            {"v": 1, "host": "h/4:1", "pid": 7, "start": 9, "at": 4096, "cookie": bytes(32)},
            {"v": 1, "address": bytes(48)},
            [4096, 5, 64, bytes(16)],
            [4096, 5, 0, bytes(32)],
            [64, bytes(40)],
        ]
        return [*(msgpack.packb(each) for each in made), *found]
    from tests.fuzz.talk import CONVERSATION, FRAMES, SEPARATOR

    return [*FRAMES, *CONVERSATION, SEPARATOR.join(CONVERSATION), *found]


def mutated(inputs: list[bytes], chance: random.Random) -> bytes:
    """One of ``inputs``, changed in a few places."""
    data = bytearray(chance.choice(inputs))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        what = chance.randrange(5)
        if what == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif what == 1 and data:
            data[at % len(data)] = chance.choice((0, 1, 127, 128, 192, 193, 255, chance.randrange(256)))
        elif what == 2:
            del data[at : at + chance.choice((1, 2, 8, len(data)))]
        elif what == 3:
            other = chance.choice(inputs)
            begin = chance.randrange(len(other) + 1)
            data[at:at] = other[begin : begin + chance.choice((1, 4, 16, 64, len(other)))]
        else:
            data[at:at] = chance.randbytes(chance.choice((1, 2, 8)))
    return bytes(data)
