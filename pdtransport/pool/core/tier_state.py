"""A lower tier as the chunk store sees it: the chunks that it holds, its eviction order, and its jobs."""

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
    """Space accounting and eviction order of one tier.

    Args:
        bit: the tier's bit in the index's ``tiers`` column.
        limit: bytes that it may hold, writes in flight included.
        codec: packs chunks written to it, unless a chunk asks for a lossy codec; None: chunks are not packed.
        signer: makes and verifies the keyed digests of its chunks; None: chunks carry none.
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
        self.up = True  # reachable; the chunks of an unreachable tier count as absent
        self.used = 0  # bytes, those reserved for writes in flight included
        self._policy_name = policy
        self._policy: Policy
        self._index: Index

    def attach(self, index: Index) -> None:
        self._index = index
        self._policy = make_policy(self._policy_name, Links(index.capacity))
        self.stored = np.zeros(index.capacity, dtype=np.uint32)  # bytes that each entry's chunk takes in this tier
        self._stored = self.stored.data

    def __len__(self) -> int:
        return len(self._policy)

    def enter(self, entry: int, stored: int) -> None:
        """Account for a chunk that the tier holds now, in ``stored`` bytes."""
        self._stored[entry] = stored
        self.used += stored
        self._policy.add(entry, int.from_bytes(self._index.key(entry)[:8], "little"))

    def leave(self, entry: int) -> None:
        self._policy.remove(entry)
        self.used -= self._stored[entry]

    def touch(self, entry: int) -> None:
        self._policy.touch(entry)

    def make_room(self, nbytes: int, drop_coldest: Callable[[], bool]) -> bool:
        """Drop chunks until ``nbytes`` more fit; False if they can't, since writes in flight take the room."""
        if nbytes > self.limit:
            return False
        while self.used + nbytes > self.limit:
            if not drop_coldest():
                return False
        return True

    def coldest(self) -> int:
        """Remove the next entry to evict from the order and return it; -1 if there is none."""
        entry = self._policy.evict(lambda _entry: True)
        if entry >= 0:
            self.used -= self._stored[entry]
        return entry


@dataclass(frozen=True)
class WriteBack:
    """Write a chunk to a tier. The chunk stays referenced, and ``reserved`` bytes set aside, until the job ends."""

    tier: TierState
    entry: int
    key: bytes
    tenant: str
    nbytes: int
    checksum: int
    frames: bytes
    reserved: int
    lossy: Lossy | None = None  # lossy packing that the chunk's client allows; None: none


@dataclass(frozen=True)
class Promote:
    """Read a chunk from a tier into these frames and verify it."""

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
