"""One store or load of one client: what it holds, what it waits for, what it is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import NamedTuple


class KeyVerdict(IntEnum):
    """The answer about one key of a store or load."""

    HAVE = 0  # store: published already, by whomever
    WRITE = 1  # store: fill these frames, then publish
    READ = 2  # load: copy from these frames, verify, then release
    MISS = 3  # load: not there
    FULL = 4  # no room: all the rest is referenced or pinned, or the chunk is larger than its limit
    BUSY = 5  # this client holds as much as it may: release first
    LATER = 6  # store: admission wants to see the key once more
    MISMATCH = 7  # the key is known with another length
    LOST = 8  # never on the wire: the deadline passed, the pool ended, or the operation was cancelled


class KeyAnswer(NamedTuple):
    """What a request is told about its key number ``place``. ``frames`` are uint32 ids."""

    place: int
    verdict: KeyVerdict
    checksum: int = 0
    frames: bytes = b""


class Grants(NamedTuple):
    """A request is told the same about all its keys: WRITE, or READ with their ``checksums``. ``frames`` are those of
    all, one after the other, ``counts`` how many each has."""

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
    """One client, as long as it lives."""

    name: str
    route: bytes = b""  # its connection
    held_bytes: int = 0
    requests: dict[int, PoolRequest] = field(default_factory=dict)


@dataclass(eq=False)
class PoolRequest:
    """One store or load. ``held`` and ``waits`` map a place to its entry."""

    session: ClientSession
    number: int
    store: bool
    group: int = 0
    form: int = 0  # how its chunks may be packed below memory, see codecs.Forms; 0: exactly
    held: dict[int, int] = field(default_factory=dict)
    waits: dict[int, int] = field(default_factory=dict)
