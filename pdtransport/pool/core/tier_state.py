"""A tier below memory as the shelf sees it: what it holds, what must go, and the work it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pdtransport.pool.core.eviction import Links, Policy, PolicyName, make_policy
from pdtransport.pool.core.index import Index
from pdtransport.pool.tiers.base import DIGEST_BYTES, Tier
from pdtransport.pool.tiers.codecs import Codec, Lossy
from pdtransport.pool.tiers.keyed_digest import Signer


class TierState:
    """The account of one tier.

    Args:
        bit: its bit in the index's ``tiers`` column.
        limit: bytes that it may hold, what is being written included.
        codec: packs what is written there, unless the chunk has one of its own.
        signer: makes and verifies the digests that its chunks carry; None: they need none.
    """

    def __init__(
        self,
        tier: Tier,
        bit: int,
        limit: int,
        policy: PolicyName,
        codec: Codec | None = None,
        signer: Signer | None = None,
    ) -> None:
        self.codec, self.signer = codec, signer
        self.overhead_bytes = tier.overhead_bytes + (DIGEST_BYTES if signer is not None else 0)
        self.tier, self.name, self.bit, self.limit = tier, tier.name, bit, limit
        self.up = True  # reachable; what a tier holds that is not does not count as there
        self.used = 0  # bytes, those reserved for writes under way included
        self._policy_name = policy
        self._policy: Policy
        self._index: Index

    def attach(self, index: Index) -> None:
        self._index = index
        self._policy = make_policy(self._policy_name, Links(index.capacity))
        self.stored = np.zeros(index.capacity, dtype=np.uint32)  # bytes that each entry's chunk takes there
        self._stored = self.stored.data

    def __len__(self) -> int:
        return len(self._policy)

    def enter(self, entry: int, stored: int) -> None:
        """The tier holds the entry's chunk now, in ``stored`` bytes."""
        self._stored[entry] = stored
        self.used += stored
        self._policy.add(entry, int.from_bytes(self._index.key(entry)[:8], "little"))

    def leave(self, entry: int) -> None:
        self._policy.remove(entry)
        self.used -= self._stored[entry]

    def touch(self, entry: int) -> None:
        self._policy.touch(entry)

    def make_room(self, nbytes: int, drop_coldest: Callable[[], bool]) -> bool:
        """Drop until so many bytes fit; False if what is being written takes the room."""
        if nbytes > self.limit:
            return False
        while self.used + nbytes > self.limit:
            if not drop_coldest():
                return False
        return True

    def coldest(self) -> int:
        """The entry to go next; it has left. -1: there is none."""
        entry = self._policy.evict(lambda _entry: True)
        if entry >= 0:
            self.used -= self._stored[entry]
        return entry


@dataclass(frozen=True)
class WriteBack:
    """Write a chunk, which stays referenced until this is done, to a tier. ``reserved`` bytes are set aside for it."""

    tier: TierState
    entry: int
    key: bytes
    tenant: str
    nbytes: int
    checksum: int
    frames: bytes
    reserved: int
    lossy: Lossy | None = None  # how it may be packed with loss


@dataclass(frozen=True)
class Promote:
    """Read a chunk from a tier into these frames, and verify it."""

    tier: TierState
    entry: int
    key: bytes
    tenant: str
    nbytes: int
    frames: bytes


@dataclass(frozen=True)
class Delete:
    """Remove a chunk from a tier."""

    tier: TierState
    key: bytes
    tenant: str
    nbytes: int


Job = WriteBack | Promote | Delete
