"""Clients of a shelf, and a tier whose work the test does itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from pdtransport.pool.core.requests import ClientSession, KeyAnswer, KeyVerdict, PoolRequest
from pdtransport.pool.core.store import ChunkStore
from pdtransport.pool.core.tier_state import TierState
from pdtransport.pool.settings import PoolSettings
from pdtransport.pool.tiers.base import Place, Stored, Tier

FRAME = 4096


class MemoryTier(Tier):
    """Holds keys; never called by the shelf, which only hands out jobs."""

    name = "below"
    overhead_bytes = 0
    threads = 1

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}

    def scan(self) -> Iterator[Stored]:
        return iter(())

    def write(self, key: bytes, tenant: str, nbytes: int, pieces: Sequence[bytes | memoryview]) -> int:
        raise AssertionError

    def read(self, key: bytes, tenant: str, nbytes: int, place: Place) -> None:
        raise AssertionError

    def delete(self, key: bytes, tenant: str, nbytes: int) -> None:
        raise AssertionError


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def keys(*numbers: int) -> bytes:
    return b"".join(map(key, numbers))


def chunk_store(frames: int = 4, lower: Sequence[TierState] = (), **options: Any) -> ChunkStore:
    made = PoolSettings.parse(
        {"memory_bytes": 1 << 20, "frame_bytes": FRAME, "max_chunks": 64, "client_bytes": 1 << 20, **options}
    )
    return ChunkStore(made, frames, lambda _frames, _nbytes, checksum: checksum != 666, lower)


class Asker:
    """One client of a shelf."""

    def __init__(self, on: ChunkStore, group: int = 0) -> None:
        self.chunk_store, self.session, self.group, self.number = on, ClientSession("test"), group, 0

    def _request(self, store: bool) -> PoolRequest:
        self.number += 1
        return PoolRequest(self.session, self.number, store, self.group)

    def store(self, *numbers: int, nbytes: int = FRAME) -> PoolRequest:
        request = self._request(True)
        self.chunk_store.store(request, keys(*numbers), [nbytes] * len(numbers))
        return request

    def load(self, *numbers: int, nbytes: int = FRAME) -> PoolRequest:
        request = self._request(False)
        self.chunk_store.load(request, keys(*numbers), [nbytes] * len(numbers))
        return request

    def put(self, *numbers: int, nbytes: int = FRAME) -> list[KeyVerdict]:
        """Store and publish whatever may be."""
        request = self.store(*numbers, nbytes=nbytes)
        verdicts = self.told(request)
        self.chunk_store.publish(request, [(place, 7) for place in list(request.held)])
        return verdicts

    def told(self, request: PoolRequest) -> list[KeyVerdict]:
        return [part.verdict for part in self.parts(request)]

    def parts(self, request: PoolRequest) -> list[KeyAnswer]:
        told = self.chunk_store.outbox.pop(request, [])
        return told if isinstance(told, list) else list(told.parts())
