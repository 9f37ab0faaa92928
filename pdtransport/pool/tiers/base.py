"""What a tier below memory must be able to do. All calls may block; they run in the tier's own threads.

A tier holds *sealed* chunks: a header of ``HEADER_BYTES`` and a payload, opaque to it
(:mod:`pdtransport.pool.tiers.envelope`). Where others can write, the payload ends with a keyed digest
(:mod:`pdtransport.pool.tiers.keyed_digest`); the tier need not know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pdtransport.errors import PDTransportError
from pdtransport.kernels import pages
from pdtransport.kernels.runs import Runs
from pdtransport.kv.keys import KEY_BYTES

HEADER_BYTES = 44 + KEY_BYTES
DIGEST_BYTES = 32  # behind the payload, where a tier's chunks carry a keyed digest

Place = Callable[[bytes], list[memoryview]]


class TierError(PDTransportError):
    """A tier could not do what it was asked; the text says why."""


class Damaged(TierError):
    """What should be written does not have its checksum."""


class TierDown(TierError):
    """A tier can't be reached for now; what it holds may still be there."""


class Stored(NamedTuple):
    """A chunk that a tier holds since an earlier run: ``nbytes`` of content in ``stored`` bytes."""

    key: bytes
    tenant: str
    nbytes: int
    stored: int


class Tier(ABC):
    """A place for chunks. Calls about one key never overlap."""

    name: str
    overhead_bytes: int  # that a chunk may take beyond its content
    threads: int  # that may call at once
    shared: bool = False  # whether other pools write there too
    rescan_s: float = 0.0  # how often to look for what they wrote; 0: at start only
    exposed: str = "others may write to it"  # why its chunks need a keyed digest; empty: only this user can write there

    def probe(self) -> None:  # noqa: B027 - most tiers are always there
        """See whether a tier that was down is there again.

        Raises:
            TierDown: it is not.
        """

    def close(self) -> None:  # noqa: B027 - most tiers have nothing to give back
        """The pool ends: no call comes after this."""

    @abstractmethod
    def scan(self) -> Iterator[Stored]:
        """What is there at start; also tidies up what an unclean end left behind.

        Raises:
            TierError: the place can't be used.
        """

    @abstractmethod
    def write(self, key: bytes, tenant: str, nbytes: int, pieces: Sequence[bytes | memoryview]) -> int:
        """Store a chunk of ``nbytes`` of content, sealed in ``pieces``, whole or not at all; returns the bytes that it
        takes.

        Raises:
            TierError, OSError: it was not stored.
        """

    def write_checked(
        self, key: bytes, tenant: str, nbytes: int, pieces: Sequence[bytes | memoryview], checksum: int
    ) -> int:
        """As :meth:`write`, of a chunk whose bytes stand in ``pieces`` as they are, behind the header, and only if they
        have this checksum. A tier that copies them anyway can take it on the way.

        Raises:
            Damaged: they have another.
            TierError, OSError: as :meth:`write`.
        """
        check(int(pages.checksum(runs_of(pieces[1:]), 1)[0]), checksum)
        return self.write(key, tenant, nbytes, pieces)

    @abstractmethod
    def read(self, key: bytes, tenant: str, nbytes: int, place: Place) -> int | None:
        """Read a sealed chunk: ``place(header)`` says where the payload goes; fill all of that, and see that nothing is
        left over. Whether the bytes are right is for the caller to verify: the checksum of the payload as it stands
        there now, if it was taken on the way, else None.

        Raises:
            TierError, OSError: it is not there, has another length, can't be read; and what ``place`` raises.
        """

    @abstractmethod
    def delete(self, key: bytes, tenant: str, nbytes: int) -> None:
        """Remove a chunk; one that is not there is no error.

        Raises:
            TierError, OSError: it may still be there.
        """


def runs_of(pieces: Sequence[bytes | memoryview]) -> Runs:
    """Where they lie."""
    return np.array([(address_of(piece), len(piece)) for piece in pieces], dtype=np.uint64).reshape(-1, 2)


def address_of(piece: bytes | memoryview) -> int:
    return int(np.frombuffer(piece, dtype=np.uint8).ctypes.data) if len(piece) else 0


def check(found: int, checksum: int) -> None:
    """Raises:
    Damaged: they differ.
    """
    if found != checksum:
        raise Damaged("the chunk in memory is damaged: its checksum differs")


def fill(value: bytes | memoryview, place: Place) -> None:
    """What :meth:`Tier.read` does with a sealed chunk that lies in memory.

    Raises:
        TierError: it has another length than its header says; and what ``place`` raises.
    """
    payload = memoryview(value)[HEADER_BYTES:]
    parts = place(bytes(value[:HEADER_BYTES]))
    if len(payload) != sum(map(len, parts)):
        raise TierError("the chunk is damaged: it has another length")
    first = 0
    for part in parts:
        part[:] = payload[first : first + len(part)]
        first += len(part)
