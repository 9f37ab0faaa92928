"""What people ask of a running pool: contents, pins, moves between tiers. Each answer is a bounded piece of work.

Whoever wants more asks again (:class:`pdtransport.pool.admin.pool_admin.PoolAdmin`): the pool keeps nothing of it, so
one that stops in the middle leaves nothing behind. Memory that a client reads or writes is not touched.
"""

from __future__ import annotations

import json
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from pdtransport.pool import messages as say
from pdtransport.pool.core.budget import HARD, NO_PIN, SOFT
from pdtransport.pool.core.index import FILLING, MEMORY, Entries
from pdtransport.pool.core.store import Shelf
from pdtransport.pool.core.tier_state import Lower
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

    def __init__(self, shelf: Shelf, kept: SpaceFile | None = None) -> None:
        self._shelf, self._kept = shelf, kept
        # As engines told them, the last one last.
        self._spaces: OrderedDict[str, None] = OrderedDict.fromkeys(kept.read() if kept is not None else ())

    # -- contents ---------------------------------------------------------------------------------------------------

    def look(self, asked: say.Look, backlog: int) -> say.Looked:
        """A row for each of these keys, or for what comes next in a sweep."""
        if not asked.sweep:
            entries, after = np.array(self._shelf.entries(asked.keys), dtype=np.int32), -1
            keys = asked.keys
        else:
            entries, after = self._sweep(asked.first, asked.tenant)
            keys = self._shelf.index.keys(entries)
        there = entries >= 0
        index, at = self._shelf.index, np.where(there, entries, 0)
        return say.Looked(
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
        index = self._shelf.index
        end = min(first + SWEPT, index.fresh)
        chosen = index.tier_column[first:end] != 0
        if tenant is not None:
            chosen &= np.asarray(index.group)[first:end] == self._group(tenant)
        found = np.flatnonzero(chosen)[:ROWS]
        if len(found) == ROWS:
            end = first + int(found[-1]) + 1
        return (found + first).astype(np.int32), end if end < index.fresh else -1

    def _group(self, tenant: str) -> int:
        group = self._shelf.room.group_of(tenant)
        if tenant and not group:
            raise WireError(f"tenant {tenant!r} has no quota here: the pool tells only such tenants' chunks apart")
        return group

    def _flags(self, entries: Entries) -> npt.NDArray[np.uint8]:
        shelf, index = self._shelf, self._shelf.index
        writes, writing = shelf.being_written, np.zeros(len(entries), dtype=np.int64)
        if writes:
            writing = np.array([writes[entry] for entry in entries.tolist()], dtype=np.int64)
        coming = np.asarray(index.state)[entries] == FILLING
        pin, nbytes, plain = np.asarray(index.pin)[entries], np.asarray(index.nbytes)[entries], np.zeros_like(coming)
        for tier in shelf.lower:
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

    def count(self, asked: say.Count) -> say.Counted:
        """Chunks and bytes by tier and tenant, of one part of the index."""
        shelf, index, first = self._shelf, self._shelf.index, asked.first
        end = min(first + SWEPT, index.fresh)
        tiers, groups = index.tier_column[first:end], np.asarray(index.group)[first:end]
        names, held = [group.name for group in shelf.room.groups], []
        sizes = [("memory", MEMORY, np.asarray(index.nbytes)), *((t.name, t.bit, t.stored) for t in shelf.lower)]
        for name, bit, nbytes in sizes:
            there = np.flatnonzero(tiers & bit)
            chunks = np.bincount(groups[there], minlength=len(names))
            stored = np.bincount(groups[there], weights=nbytes[first:end][there], minlength=len(names))
            held += [[name, names[i], int(chunks[i]), int(stored[i])] for i in np.flatnonzero(chunks).tolist()]
        return say.Counted(request=asked.request, held=json.dumps(held), next=end if end < index.fresh else -1)

    # -- what is done about chunks ----------------------------------------------------------------------------------

    def manage(self, asked: say.Manage, now: float) -> int:
        """Do it to those chunks that it can be done to; returns how many.

        ``pin``: keep them in memory (see :meth:`Shelf.pin`). ``drop``: forget them in all tiers. ``leave``: drop them
        from memory, if a tier below has them, and nobody uses or pinned them. ``fetch``: begin to bring them into
        memory. ``hint``: the same for a prompt's chunks, in their order, that a request will want: up to the first one
        that is not there, and as far as hints may fill memory. ``write``: begin to write those in memory to ``tier``;
        ``again``: even if it has them, with its codec of today.

        Raises:
            WireError: there is no such tier.
        """
        shelf = self._shelf
        if asked.action == "pin":
            return shelf.pin(asked.keys, asked.pin, None if asked.for_s is None else now + asked.for_s)
        if asked.action == "drop":
            return shelf.drop(asked.keys)
        if asked.action == "hint":
            return self._hint(shelf.entries(asked.keys), now)
        tier = self._tier(asked.tier) if asked.action == "write" else None
        done = 0
        for entry in shelf.entries(asked.keys):
            if entry < 0 or not shelf.index.tiers[entry]:
                continue
            if asked.action == "leave":
                done += self._leave(entry)
            elif tier is not None:
                done += self._write(entry, tier, asked.again)
            else:
                done += self._fetch(entry)
        return done

    def _leave(self, entry: int) -> bool:
        index = self._shelf.index
        below = any(index.tiers[entry] & tier.bit and tier.up for tier in self._shelf.lower)
        if not index.tiers[entry] & MEMORY or not below or index.refs[entry] or index.pin[entry] != NO_PIN:
            return False
        self._shelf.leave_memory(entry)
        return True

    def _fetch(self, entry: int) -> bool:
        index = self._shelf.index
        if index.tiers[entry] & MEMORY or index.state[entry] == FILLING:
            return False
        return self._shelf.bring_up(entry)

    def _hint(self, entries: list[int], now: float) -> int:
        shelf, index, done = self._shelf, self._shelf.index, 0
        shelf.counters["hints"] += 1
        for entry in entries:
            if entry < 0 or not index.tiers[entry]:
                break  # a load ends here, too
            if index.tiers[entry] & MEMORY or index.state[entry] == FILLING:
                continue
            nbytes = index.nbytes[entry]
            if not shelf.hints.fits(nbytes) or not shelf.bring_up(entry):
                shelf.counters["hints_cut"] += 1
                break
            shelf.hints.began(entry, nbytes, now)
            done += 1
        return done

    def _write(self, entry: int, tier: Lower, again: bool) -> bool:
        index = self._shelf.index
        if not index.tiers[entry] & MEMORY or (index.tiers[entry] & tier.bit and not again):
            return False
        return self._shelf.write_down(entry, tier)

    def _tier(self, name: str) -> Lower:
        tier = next((tier for tier in self._shelf.lower if tier.name == name), None)
        if tier is None:
            known = ", ".join(tier.name for tier in self._shelf.lower) or "none"
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
