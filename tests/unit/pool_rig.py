"""A tier for tests of the shelf: the test does its work itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pdtransport.pool.tiers import Stored, Tier


class MemoryTier(Tier):
    """Holds keys; never called by the shelf, which only hands out jobs."""

    name = "below"
    overhead_bytes = 0
    threads = 1

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}

    def scan(self) -> Iterator[Stored]:
        return iter(())

    def write(self, key: bytes, tenant: str, parts: Sequence[memoryview], checksum: int) -> int:
        raise AssertionError

    def read(self, key: bytes, tenant: str, parts: Sequence[memoryview]) -> int:
        raise AssertionError

    def delete(self, key: bytes, tenant: str, nbytes: int) -> None:
        raise AssertionError
