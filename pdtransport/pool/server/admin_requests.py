"""What people ask of a running pool: contents, pins, moves between tiers. Each answer is a bounded piece of work.

Whoever wants more asks again (:class:`pdtransport.pool.admin.pool_admin.PoolAdmin`): the pool keeps nothing of it, so
one that stops in the middle leaves nothing behind. Memory that a client reads or writes is not touched.
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
from pdtransport.pool.server.key_space_file import MAX_SPACES, SpaceFile
from pdtransport.protocol.messages import WireError

SWEPT = 1 << 18  # entries that one answer looks at, a millisecond or two
ROWS = 1024  # chunks of one answer of a sweep

# Flags of a chunk in an answer.
COMING, WRITING, USED, SOFT_PIN, HARD_PIN, PLAIN = 1, 2, 4, 8, 16, 32


class Control:
    """Beside a shelf, driven by the same thread.

    Args:
        kept: where key spaces are kept for the next start; None: nowhere.
    """

    def __init__(self, store: ChunkStore, kept: SpaceFile | None = None) -> None:
        self._store, self._kept = store, kept
        # As engines told them, the last one last.
        self._spaces: OrderedDict[str, None] = OrderedDict.fromkeys(kept.read() if kept is not None else ())

    # -- contents ---------------------------------------------------------------------------------------------------

    def look(self, asked: messages.Look, backlog: int) -> messages.Looked:
        """A row for each of these keys, or for what comes next in a sweep."""
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
        """Entries of visible chunks from ``first`` on, and where to go on (-1: that was all)."""
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
        group = self._store.room.group_of(tenant)
        if tenant and not group:
            raise WireError(f"tenant {tenant!r} has no quota here: the pool tells only such tenants' chunks apart")
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
        """Chunks and bytes by tier and tenant, of one part of the index."""
        store, index, first = self._store, self._store.index, asked.first
        end = min(first + SWEPT, index.fresh)
        tiers, groups = index.tier_column[first:end], np.asarray(index.group)[first:end]
        names, held = [group.name for group in store.room.groups], []
        sizes = [("memory", MEMORY, np.asarray(index.nbytes)), *((t.name, t.bit, t.stored) for t in store.lower)]
        for name, bit, nbytes in sizes:
            there = np.flatnonzero(tiers & bit)
            chunks = np.bincount(groups[there], minlength=len(names))
            stored = np.bincount(groups[there], weights=nbytes[first:end][there], minlength=len(names))
            held += [[name, names[i], int(chunks[i]), int(stored[i])] for i in np.flatnonzero(chunks).tolist()]
        return messages.Counted(request=asked.request, held=json.dumps(held), next=end if end < index.fresh else -1)

    # -- what is done about chunks ----------------------------------------------------------------------------------

    def manage(self, asked: messages.Manage, now: float) -> int:
        """Do it to those chunks that it can be done to; returns how many.

        ``pin``: keep them in memory (see :meth:`ChunkStore.pin`). ``drop``: forget them in all tiers. ``leave``: drop
        them from memory, if a tier below has them, and nobody uses or pinned them. ``fetch``: begin to bring them into
        memory. ``hint``: the same for a prompt's chunks, in their order, that a request will want: up to the first one
        that is not there, and as far as hints may fill memory. ``write``: begin to write those in memory to ``tier``;
        ``again``: even if it has them, with its codec of today.

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
                break  # a load ends here, too
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
            raise WireError(f"no tier {name!r} below memory; there are: {known}")
        return tier

    # -- key spaces -------------------------------------------------------------------------------------------------

    def introduce(self, space: str) -> None:
        """An engine says of what its chunks' keys are made."""
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
