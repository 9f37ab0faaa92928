"""Clients' requests: the chunks that a store or load holds, those it waits for, and the answers to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import NamedTuple


class KeyVerdict(IntEnum):
    """The answer to one key of a store or load."""

    HAVE = 0  # store: the chunk is published already
    WRITE = 1  # store: fill these frames, then publish
    READ = 2  # load: copy from these frames, verify, then release
    MISS = 3  # load: the pool does not have the chunk
    FULL = 4  # no room: all other chunks are referenced or hard-pinned, or the chunk exceeds its group's limit
    BUSY = 5  # the client holds as much as it may: release first; or a dropped chunk of this key still has readers
    LATER = 6  # store: admission "twice" accepts the key the next time
    MISMATCH = 7  # the pool has the key with another length
    LOST = 8  # set by the client, never sent: the deadline passed, the pool ended, or the operation was cancelled


class KeyAnswer(NamedTuple):
    """The answer to one key: ``place`` is its position in the request, ``frames`` are uint32 ids."""

    place: int
    verdict: KeyVerdict
    checksum: int = 0
    frames: bytes = b""


class Grants(NamedTuple):
    """One answer for all keys of a request, which all have one verdict: WRITE, or READ with their ``checksums``.

    ``frames`` holds the uint32 ids of all keys' frames in order, ``counts`` the number of frames of each key.
    """

    verdict: KeyVerdict
    checksums: Sequence[int]
    counts: Sequence[int]
    frames: bytes

    def parts(self) -> Iterator[KeyAnswer]:
        ends = accumulate(self.counts, initial=0)
        for place, (checksum, (first, last)) in enumerate(zip(self.checksums, pairwise(ends), strict=True)):
            yield KeyAnswer(place, self.verdict, checksum, self.frames[4 * first : 4 * last])


@dataclass(eq=False)
class ClientSession:
    """A connected client and its open requests."""

    name: str
    route: bytes = b""  # ZeroMQ routing id of its connection
    held_bytes: int = 0
    requests: dict[int, PoolRequest] = field(default_factory=dict)


@dataclass(eq=False)
class PoolRequest:
    """One store or load. ``held`` and ``waits`` map a key's place in the request to its entry in the index."""

    session: ClientSession
    number: int
    store: bool
    group: int = 0
    form: int = 0  # how lower tiers may pack its chunks, see codecs.Forms; 0: losslessly
    held: dict[int, int] = field(default_factory=dict)
    waits: dict[int, int] = field(default_factory=dict)
