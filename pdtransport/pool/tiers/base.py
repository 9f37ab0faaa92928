"""The interface of a tier below memory. All calls may block; they run in the tier's own threads.

A tier holds *sealed* chunks: a header of ``HEADER_BYTES`` and a payload, both opaque to the tier
(:mod:`pdtransport.pool.tiers.envelope`). Where others can write to the tier, a keyed digest follows the payload
(:mod:`pdtransport.pool.tiers.keyed_digest`), which is opaque to the tier as well.
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
DIGEST_BYTES = 32  # length of the keyed digest after the payload, for tiers whose chunks carry one

Place = Callable[[bytes], list[memoryview]]


class TierError(PDTransportError):
    """A call to a tier failed; the text says why."""


class Damaged(TierError):
    """The chunk to be written does not have its checksum."""


class TierDown(TierError):
    """A tier can't be reached for now; its chunks may still be there."""


class Stored(NamedTuple):
    """A chunk that a scan found in a tier: ``nbytes`` of content, which takes ``stored`` bytes there."""

    key: bytes
    tenant: str
    nbytes: int
    stored: int


class Tier(ABC):
    """Stores chunks below memory. Calls for one key never overlap."""

    name: str
    overhead_bytes: int  # maximum bytes that a chunk takes beyond its content, without a digest
    threads: int  # number of threads that call the tier
    shared: bool = False  # whether other pools write to it too
    rescan_s: float = 0.0  # how often to scan for chunks of other pools; 0: at start only
    exposed: str = "others may write to it"  # why its chunks need a keyed digest; empty: only this user can write to it

    def probe(self) -> None:  # noqa: B027 - most tiers are always there
        """Check whether a tier that was down can be reached again.

        Raises:
            TierDown: it can't.
        """

    def close(self) -> None:  # noqa: B027 - most tiers have nothing to give back
        """Free resources; the pool makes no call after this."""

    @abstractmethod
    def scan(self) -> Iterator[Stored]:
        """Iterate over the chunks that the tier holds; also removes remains of writes that a crash interrupted.

        Raises:
            TierError: the tier can't be read.
        """

    @abstractmethod
    def write(self, key: bytes, tenant: str, nbytes: int, pieces: Sequence[bytes | memoryview]) -> int:
        """Store a chunk atomically; returns the bytes that it takes in the tier.

        Args:
            nbytes: bytes of the chunk's content.
            pieces: the sealed chunk, header first.

        Raises:
            TierError, OSError: the chunk was not stored.
        """

    def write_checked(
        self, key: bytes, tenant: str, nbytes: int, pieces: Sequence[bytes | memoryview], checksum: int
    ) -> int:
        """Verify an unpacked chunk's checksum, then :meth:`write` it.

        ``pieces`` holds the header, then the chunk's plain bytes. A tier that copies the bytes anyway can override this
        and compute the checksum during that copy.

        Raises:
            Damaged: the bytes have another checksum.
            TierError, OSError: as :meth:`write`.
        """
        check(int(pages.checksum(runs_of(pieces[1:]), 1)[0]), checksum)
        return self.write(key, tenant, nbytes, pieces)

    @abstractmethod
    def read(self, key: bytes, tenant: str, nbytes: int, place: Place) -> int | None:
        """Read a sealed chunk.

        Call ``place(header)`` for the buffers that the rest of the sealed chunk goes to. Fill them completely, and
        check that nothing is left over. The caller verifies the bytes.

        Returns:
            The checksum of the bytes now in the buffers, if it was computed during the copy; else None.

        Raises:
            TierError, OSError: the chunk is missing, has another length, or can't be read; and whatever ``place``
                raises.
        """

    @abstractmethod
    def delete(self, key: bytes, tenant: str, nbytes: int) -> None:
        """Remove a chunk; a missing chunk is not an error.

        Raises:
            TierError, OSError: the chunk may still be there.
        """


def runs_of(pieces: Sequence[bytes | memoryview]) -> Runs:
    """Addresses and lengths of the pieces: (n, 2) uint64."""
    return np.array([(address_of(piece), len(piece)) for piece in pieces], dtype=np.uint64).reshape(-1, 2)


def address_of(piece: bytes | memoryview) -> int:
    return int(np.frombuffer(piece, dtype=np.uint8).ctypes.data) if len(piece) else 0


def check(found: int, checksum: int) -> None:
    """Compare a chunk's checksum with the expected one.

    Raises:
        Damaged: they differ.
    """
    if found != checksum:
        raise Damaged("the chunk in memory is damaged: its checksum differs")


def fill(value: bytes | memoryview, place: Place) -> None:
    """Implement :meth:`Tier.read` for a sealed chunk that was read into memory as a whole.

    Raises:
        TierError: its length is not what its header says; and whatever ``place`` raises.
    """
    payload = memoryview(value)[HEADER_BYTES:]
    parts = place(bytes(value[:HEADER_BYTES]))
    if len(payload) != sum(map(len, parts)):
        raise TierError("the chunk is damaged: it has another length")
    first = 0
    for part in parts:
        part[:] = payload[first : first + len(part)]
        first += len(part)
