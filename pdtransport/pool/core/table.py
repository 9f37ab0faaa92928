"""Where every chunk is: the index, the frames in memory, the tiers below. No sockets, no threads.

:class:`~pdtransport.pool.core.store.ChunkStore` adds what clients ask for, chunk by chunk, and
:mod:`~pdtransport.pool.core.batches` the same for many chunks at once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np

from pdtransport.pool.core.budget import MemoryBudget
from pdtransport.pool.core.eviction import Ghosts
from pdtransport.pool.core.frames import Frames
from pdtransport.pool.core.index import FILLING, MEMORY, READY, Index, key_rows
from pdtransport.pool.core.prefetched import SHARE, Hints
from pdtransport.pool.core.requests import Grants, KeyAnswer, PoolRequest
from pdtransport.pool.core.tier_state import Delete, Job, Promote, TierState, WriteBack
from pdtransport.pool.settings import PoolSettings
from pdtransport.pool.tiers.codecs import Forms


class ChunkTable:
    """The chunks of one pool and where they are stored.

    Args:
        frames: number of frames in the pool's memory.
        verify: ``verify(frames, nbytes, checksum)``: whether the bytes in these frames still have this checksum.
        lower: tiers below memory, fastest first.
    """

    def __init__(
        self,
        settings: PoolSettings,
        frames: int,
        verify: Callable[[bytes, int, int], bool],
        lower: Sequence[TierState] = (),
    ) -> None:
        self.settings = settings
        self.index = Index(settings.max_chunks)
        quotas = {name: limit // settings.frame_bytes for name, limit in settings.quotas.items()}
        self.budget = MemoryBudget(
            self.index, Frames(frames), settings.frame_bytes, settings.policy, quotas, self._evicted
        )
        self.lower = list(lower)
        for tier in self.lower:
            tier.attach(self.index)
        self.jobs: deque[Job] = deque()
        self.gone: list[bytes] | None = None  # keys that left the index, for clients that watch; None: no watchers
        self.outbox: dict[PoolRequest, list[KeyAnswer] | Grants] = {}
        self.counters: Counter[str] = Counter()
        self.forms = Forms(self.counters)  # how chunks are packed below memory, by the index's ``form`` column
        self.hints = Hints(frames * settings.frame_bytes // SHARE, self.counters)
        self._verify = verify
        self.frames_of: list[bytes | None] = [None] * settings.max_chunks  # by entry, if in memory or being filled
        # Requests that wait for an entry, by entry. Has a key for each entry that is being filled, and for no other.
        self.waiters: dict[int, deque[tuple[PoolRequest, int]] | None] = {}
        self._seen = Ghosts()  # keys that admission "twice" has seen once
        self.being_written: Counter[int] = Counter()  # by entry: writes to lower tiers, queued or in flight
        self.writeback_bytes = 0  # queued or in flight to lower tiers, all tiers together

    @property
    def being_filled(self) -> int:
        """Number of chunks that a writer is filling, or that a lower tier is being read into."""
        return len(self.waiters)

    def entries(self, keys: bytes) -> list[int]:
        """The entry of each key, -1 if the index lacks it."""
        return self.index.find(key_rows(keys)).tolist()

    # -- out of memory ----------------------------------------------------------------------------------------------

    def _evicted(self, entries: list[int]) -> None:
        """Take chunks out of memory that the budget has evicted; none of them is referenced."""
        index = self.index
        self.counters["evicted_chunks"] += len(entries)
        if len(entries) == 1 or len(self.budget.groups) > 1:
            for entry in entries:
                self.left_memory(entry)
            return
        at = np.array(entries)
        index.tier_column[at] &= ~MEMORY & 0xFF
        for entry in entries:
            self.budget.forget_pin(entry)
            self.hints.left(entry)
        self.budget.give_back(
            b"".join([self.frames_of[entry] or b"" for entry in entries]), int(index.group_column[at[0]])
        )
        for entry in entries:
            self.frames_of[entry] = None
        if index.tier_column[at].any():
            entries = at[index.tier_column[at] == 0].tolist()
        if self.gone is not None:
            self.gone += map(index.key, entries)
        if entries:
            index.remove_all(entries)

    def leave_memory(self, entry: int) -> None:
        """Make the chunk invisible in memory at once; its frames are freed when the last reader releases them."""
        self.budget.leave(entry)
        self.left_memory(entry)

    def left_memory(self, entry: int) -> None:
        self.index.tiers[entry] &= ~MEMORY & 0xFF
        self.budget.forget_pin(entry)
        self.hints.left(entry)
        if self.index.refs[entry] == 0:
            self._free_frames(entry)
            self._forget_if_gone(entry)

    def _free_frames(self, entry: int) -> None:
        frames, self.frames_of[entry] = self.frames_of[entry], None
        assert frames is not None
        self.budget.give_back(frames, self.index.group[entry])

    def _forget_if_gone(self, entry: int) -> None:
        if not self.index.tiers[entry] and self.index.state[entry] == READY and self.frames_of[entry] is None:
            if self.gone is not None:
                self.gone.append(self.index.key(entry))
            self.index.remove(entry)

    # -- lower tiers ------------------------------------------------------------------------------------------------

    def _tenant(self, entry: int) -> str:
        return self.budget.groups[self.index.group[entry]].name

    def _holder(self, entry: int) -> TierState | None:
        """The fastest reachable lower tier that has the chunk."""
        return next((tier for tier in self.lower if tier.up and self.index.tiers[entry] & tier.bit), None)

    def bring_up(self, entry: int) -> bool:
        """Queue a read of a chunk into memory; False if there is no room, or no reachable tier has it.

        The chunk must not be in memory.
        """
        tier, nbytes = self._holder(entry), self.index.nbytes[entry]
        busy = self.index.refs[entry]  # it was dropped from memory while a reader still holds its frames
        frames = None if busy or tier is None else self.budget.take(nbytes, self.index.group[entry])
        if frames is None or tier is None:
            return False
        self.frames_of[entry] = frames
        self.index.state[entry] = FILLING
        self.waiters[entry] = None
        self.jobs.append(Promote(tier, entry, self.index.key(entry), self._tenant(entry), nbytes, frames))
        return True

    def write_back(self, entry: int) -> None:
        for tier in self.lower:
            if not self.index.tiers[entry] & tier.bit and not self.write_down(entry, tier):
                self.counters[f"{tier.name}_write_skipped"] += 1

    def write_down(self, entry: int, tier: TierState) -> bool:
        """Queue a write of a chunk in memory to a lower tier, even if the tier has it.

        Returns:
            False if too many bytes are queued, the tier is down, or it has no room.
        """
        nbytes, frames = self.index.nbytes[entry], self.frames_of[entry]
        assert frames is not None
        reserved = nbytes + tier.overhead_bytes
        queued = self.writeback_bytes + nbytes
        if not tier.up or queued > self.settings.writeback_bytes:
            return False
        if not tier.make_room(reserved, lambda: self._drop_coldest(tier)):
            return False
        tier.used += reserved
        self.writeback_bytes += nbytes
        self.being_written[entry] += 1
        self.index.refs[entry] += 1
        checksum, tenant = self.index.checksum[entry], self._tenant(entry)
        lossy, key = self.forms[self.index.form[entry]], self.index.key(entry)
        self.jobs.append(WriteBack(tier, entry, key, tenant, nbytes, checksum, frames, reserved, lossy))
        return True

    def _drop_coldest(self, tier: TierState) -> bool:
        entry = tier.coldest()
        if entry >= 0:
            self.counters[f"{tier.name}_evicted_chunks"] += 1
            self._gone_from(tier, entry)
        return entry >= 0

    def _drop_from(self, tier: TierState, entry: int) -> None:
        if self.index.tiers[entry] & tier.bit:
            tier.leave(entry)
            self._gone_from(tier, entry)

    def _gone_from(self, tier: TierState, entry: int) -> None:
        self.index.tiers[entry] &= ~tier.bit & 0xFF
        key, nbytes = self.index.key(entry), self.index.nbytes[entry]
        self.jobs.append(Delete(tier, key, self._tenant(entry), nbytes))
        self._forget_if_gone(entry)
