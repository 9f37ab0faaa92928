"""What a tier below memory must be able to do. All calls may block; they run in the tier's own threads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pdtransport.errors import PDTransportError


class TierError(PDTransportError):
    """A tier could not do what it was asked; the text says why."""


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
    packs: bool = False  # whether it has a codec, so that chunks take less room there
    rescan_s: float = 0.0  # how often to look for what they wrote; 0: at start only

    def probe(self) -> None:  # noqa: B027 - most tiers are always there
        """See whether a tier that was down is there again.

        Raises:
            TierDown: it is not.
        """

    @abstractmethod
    def scan(self) -> Iterator[Stored]:
        """What is there at start; also tidies up what an unclean end left behind.

        Raises:
            TierError: the place can't be used.
        """

    @abstractmethod
    def write(self, key: bytes, tenant: str, parts: Sequence[memoryview], checksum: int) -> int:
        """Store a chunk, whole or not at all; returns the bytes it takes.

        Raises:
            TierError, OSError: it was not stored.
        """

    @abstractmethod
    def read(self, key: bytes, tenant: str, parts: Sequence[memoryview]) -> int:
        """Fill ``parts`` with a chunk of exactly their length; returns the checksum that it was stored with. Whether
        the bytes have it is for the caller to verify.

        Raises:
            TierError, OSError: it is not there, has another length, or can't be read.
        """

    @abstractmethod
    def delete(self, key: bytes, tenant: str, nbytes: int) -> None:
        """Remove a chunk; one that is not there is no error.

        Raises:
            TierError, OSError: it may still be there.
        """
