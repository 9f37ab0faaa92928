"""Administrative requests to a running pool: contents, pins, moves between tiers.

Invariants:

* Each answer is a bounded amount of work. For more, the client asks again
  (:class:`pdtransport.pool.admin.pool_admin.PoolAdmin`).
* The pool keeps no state between two requests, so a client that stops in the middle leaves nothing behind.
* Memory that a client reads or writes is not touched.
"""

from __future__ import annotations

import json
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from pdtransport.pool import messages
from pdtransport.pool.core.budget import HARD, NO_PIN, SOFT
from pdtransport.pool.core.index import FILLING, MEMORY, Entries
from pdtransport.pool.core.store import ChunkStore
from pdtransport.pool.core.tier_state import TierState
from pdtransport.pool.messages import COMING, HARD_PIN, PLAIN, SOFT_PIN, USED, WRITING
from pdtransport.pool.server.key_space_file import MAX_SPACES, SpaceFile
from pdtransport.protocol.messages import WireError

SWEPT = 1 << 18  # index entries that one answer covers: one or two milliseconds
ROWS = 1024  # chunks in one answer of a sweep


class AdminRequests:
    """Answers administrative requests about a chunk store, in the thread that drives the store.

    Args:
        kept: file that keeps key spaces for the next start; None: they are not kept.
    """

    def __init__(self, store: ChunkStore, kept: SpaceFile | None = None) -> None:
        self._store, self._kept = store, kept
        # JSON texts of engines' key spaces, the latest last.
        self._spaces: OrderedDict[str, None] = OrderedDict.fromkeys(kept.read() if kept is not None else ())

    # -- contents ---------------------------------------------------------------------------------------------------

    def look(self, asked: messages.Look, backlog: int) -> messages.Looked:
        """Describe each of the keys asked for, or the next slice of a sweep."""
        if not asked.sweep:
            entries, after = np.array(self._store.entries(asked.keys), dtype=np.int32), -1
            keys = asked.keys
        else:
            entries, after = self._sweep(asked.first, asked.tenant)
            keys = self._store.index.keys(entries)
        there = entries >= 0
        index, at = self._store.index, np.where(there, entries, 0)
        return messages.Looked(
            request=asked.request,
            keys=keys,
            sizes=(np.asarray(index.nbytes)[at] * there).astype("<u4").tobytes(),
            tiers=(index.tier_column[at] * there).astype("u1").tobytes(),
            flags=(self._flags(at) * there).astype("u1").tobytes(),
            next=after,
            backlog=backlog,
        )

    def _sweep(self, first: int, tenant: str | None) -> tuple[Entries, int]:
        """Entries of visible chunks from entry ``first`` on, and the entry to continue from (-1: end of the sweep)."""
        index = self._store.index
        end = min(first + SWEPT, index.fresh)
        chosen = index.tier_column[first:end] != 0
        if tenant is not None:
            chosen &= np.asarray(index.group)[first:end] == self._group(tenant)
        found = np.flatnonzero(chosen)[:ROWS]
        if len(found) == ROWS:
            end = first + int(found[-1]) + 1
        return (found + first).astype(np.int32), end if end < index.fresh else -1

    def _group(self, tenant: str) -> int:
        group = self._store.budget.group_of(tenant)
        if tenant and not group:
            raise WireError(f"tenant {tenant!r} has no quota in this pool, which can select only tenants with one")
        return group

    def _flags(self, entries: Entries) -> npt.NDArray[np.uint8]:
        store, index = self._store, self._store.index
        writes, writing = store.being_written, np.zeros(len(entries), dtype=np.int64)
        if writes:
            writing = np.array([writes[entry] for entry in entries.tolist()], dtype=np.int64)
        coming = np.asarray(index.state)[entries] == FILLING
        pin, nbytes, plain = np.asarray(index.pin)[entries], np.asarray(index.nbytes)[entries], np.zeros_like(coming)
        for tier in store.lower:
            plain |= (index.tier_column[entries] & tier.bit != 0) & (tier.stored[entries] >= nbytes)
        columns = (
            (COMING, coming),
            (WRITING, writing > 0),
            (USED, coming | (np.asarray(index.refs)[entries] > writing)),
            (SOFT_PIN, pin == SOFT),
            (HARD_PIN, pin == HARD),
            (PLAIN, plain),
        )
        return sum((bit * column.astype(np.uint8) for bit, column in columns), np.zeros(len(entries), dtype=np.uint8))

    def count(self, asked: messages.Count) -> messages.Counted:
        """Count chunks and bytes by tier and tenant, in one part of the index."""
        store, index, first = self._store, self._store.index, asked.first
        end = min(first + SWEPT, index.fresh)
        tiers, groups = index.tier_column[first:end], np.asarray(index.group)[first:end]
        names, held = [group.name for group in store.budget.groups], []
        sizes = [("memory", MEMORY, np.asarray(index.nbytes)), *((t.name, t.bit, t.stored) for t in store.lower)]
        for name, bit, nbytes in sizes:
            there = np.flatnonzero(tiers & bit)
            chunks = np.bincount(groups[there], minlength=len(names))
            stored = np.bincount(groups[there], weights=nbytes[first:end][there], minlength=len(names))
            held += [[name, names[i], int(chunks[i]), int(stored[i])] for i in np.flatnonzero(chunks).tolist()]
        return messages.Counted(request=asked.request, held=json.dumps(held), next=end if end < index.fresh else -1)

    # -- actions on chunks ------------------------------------------------------------------------------------------

    def manage(self, asked: messages.Manage, now: float) -> int:
        """Apply an action to those of the chunks that allow it; returns how many.

        * ``pin``: pin or unpin them (:meth:`ChunkStore.pin`).
        * ``drop``: remove them from all tiers.
        * ``leave``: drop them from memory, if a reachable lower tier has them and they are neither referenced nor
          pinned.
        * ``fetch``: begin to read them into memory.
        * ``hint``: the same for the chunks of a prompt, in order, that a request will load soon. Ends at the first
          chunk that the pool lacks, or when there is no more room for prefetched chunks.
        * ``write``: begin to write those in memory to ``tier``. With ``again`` also those that the tier has, packed
          with its present codec.

        Raises:
            WireError: there is no such tier.
        """
        store = self._store
        if asked.action == "pin":
            return store.pin(asked.keys, asked.pin, None if asked.for_s is None else now + asked.for_s)
        if asked.action == "drop":
            return store.drop(asked.keys)
        if asked.action == "hint":
            return self._hint(store.entries(asked.keys), now)
        tier = self._tier(asked.tier) if asked.action == "write" else None
        done = 0
        for entry in store.entries(asked.keys):
            if entry < 0 or not store.index.tiers[entry]:
                continue
            if asked.action == "leave":
                done += self._leave(entry)
            elif tier is not None:
                done += self._write(entry, tier, asked.again)
            else:
                done += self._fetch(entry)
        return done

    def _leave(self, entry: int) -> bool:
        index = self._store.index
        below = any(index.tiers[entry] & tier.bit and tier.up for tier in self._store.lower)
        if not index.tiers[entry] & MEMORY or not below or index.refs[entry] or index.pin[entry] != NO_PIN:
            return False
        self._store.leave_memory(entry)
        return True

    def _fetch(self, entry: int) -> bool:
        index = self._store.index
        if index.tiers[entry] & MEMORY or index.state[entry] == FILLING:
            return False
        return self._store.bring_up(entry)

    def _hint(self, entries: list[int], now: float) -> int:
        store, index, done = self._store, self._store.index, 0
        store.counters["hints"] += 1
        for entry in entries:
            if entry < 0 or not index.tiers[entry]:
                break  # the engine loads a prefix, which ends here
            if index.tiers[entry] & MEMORY or index.state[entry] == FILLING:
                continue
            nbytes = index.nbytes[entry]
            if not store.hints.fits(nbytes) or not store.bring_up(entry):
                store.counters["hints_cut"] += 1
                break
            store.hints.began(entry, nbytes, now)
            done += 1
        return done

    def _write(self, entry: int, tier: TierState, again: bool) -> bool:
        index = self._store.index
        if not index.tiers[entry] & MEMORY or (index.tiers[entry] & tier.bit and not again):
            return False
        return self._store.write_down(entry, tier)

    def _tier(self, name: str) -> TierState:
        tier = next((tier for tier in self._store.lower if tier.name == name), None)
        if tier is None:
            known = ", ".join(tier.name for tier in self._store.lower) or "none"
            raise WireError(f"no tier {name!r} below memory: choose one of {known}")
        return tier

    # -- key spaces -------------------------------------------------------------------------------------------------

    def introduce(self, space: str) -> None:
        """Remember an engine's key space."""
        if space == next(reversed(self._spaces), None):
            return
        self._spaces[space] = None
        self._spaces.move_to_end(space)
        while len(self._spaces) > MAX_SPACES:
            self._spaces.popitem(last=False)
        if self._kept is not None:
            self._kept.write(list(self._spaces))

    def spaces(self) -> tuple[str, ...]:
        return tuple(reversed(self._spaces))
