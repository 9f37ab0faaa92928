"""The memory budget of a pool: allocates frames, evicts chunks to free them, and enforces quotas and pins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pdtransport.pool.core.eviction import Links, Order, Policy, PolicyName, make_policy
from pdtransport.pool.core.frames import Frames, frames_for
from pdtransport.pool.core.index import Index

NO_PIN, SOFT, HARD = 0, 1, 2
COMMON = 0  # the group of all tenants without a quota
HARD_PIN_SHARE = 0.5  # limit of hard-pinned frames, as a share of all: stores must always find chunks to evict


@dataclass
class Group:
    """Chunks that share a limit: those of one tenant with a quota, or of all tenants without one."""

    name: str
    limit: int  # frames
    weight: int  # under pressure, the group with the largest used / weight evicts first
    policy: Policy
    soft: Order  # soft-pinned chunks, least recently used first; evicted when the policy has no chunk to evict
    used: int = field(default=0)  # frames


class MemoryBudget:
    """Allocates the frames of a pool, with one eviction order for each group of tenants.

    Args:
        quotas: frames by tenant. Tenants without a quota form one group, which may use all frames; under pressure its
            weight is what the quotas leave.
        evicted: called with evicted entries, which have already left their order; it must free their frames.
    """

    def __init__(
        self,
        index: Index,
        frames: Frames,
        frame_bytes: int,
        policy: PolicyName,
        quotas: Mapping[str, int],
        evicted: Callable[[list[int]], None],
    ) -> None:
        self._index, self.frames, self.frame_bytes = index, frames, frame_bytes
        self._evicted = evicted
        links = Links(index.capacity)
        rest = max(1, frames.count - sum(quotas.values()))
        shares = [("", frames.count, rest), *((name, quota, max(1, quota)) for name, quota in quotas.items())]
        self.groups = [
            Group(name, limit, weight, make_policy(policy, links), Order(links)) for name, limit, weight in shares
        ]
        self._numbers = {group.name: number for number, group in enumerate(self.groups)}
        self.hard_frames = 0
        self._unpin_at: dict[int, float] = {}

    def group_of(self, tenant: str) -> int:
        return self._numbers.get(tenant, COMMON)

    def need(self, entry: int) -> int:
        """Number of frames that an entry's chunk takes."""
        return frames_for(self._index.nbytes[entry], self.frame_bytes)

    # -- frames ----------------------------------------------------------------------------------------------------

    def take(self, nbytes: int, number: int) -> bytes | None:
        """Allocate frames for a chunk of group ``number``, evicting other chunks as needed.

        Returns:
            Frame ids, uint32 each; None if the chunk exceeds the group's limit, or evicting every chunk that is neither
            referenced nor hard-pinned would not free enough frames.
        """
        need, group = frames_for(nbytes, self.frame_bytes), self.groups[number]
        if need > group.limit:
            return None
        while group.used + need > group.limit:
            if not self._evict_from(group):
                return None
        while self.frames.free < need:
            if not self.evict_one():
                return None
        group.used += need
        return self.frames.take(need)

    def take_all(self, needs: Sequence[int], number: int) -> bytes | None:
        """:meth:`take` for several chunks, which need ``needs`` frames; None, and no frames taken, if not all fit."""
        total, group = sum(needs), self.groups[number]
        if total > group.limit:
            return None
        group.used += total
        if len(self.groups) == 1:
            self._evict_frames(group, total - self.frames.free)
        while group.used > group.limit:
            if not self._evict_from(group):
                break
        while group.used <= group.limit and self.frames.free < total:
            if not self.evict_one():
                break
        frames = self.frames.take(total) if group.used <= group.limit else None
        if frames is None:
            group.used -= total
        return frames

    def give_back(self, frames: bytes, number: int) -> None:
        """Free frames of group ``number`` that have no reader and no writer."""
        self.frames.give_back(frames)
        self.groups[number].used -= len(frames) // 4

    def evict_one(self) -> bool:
        """Evict the next chunk, from the group under the most pressure; False if all are referenced or hard-pinned."""
        return any(self._evict_from(each) for each in self._by_pressure())

    def _by_pressure(self) -> list[Group]:
        if len(self.groups) == 1:
            return self.groups
        return sorted(self.groups, key=lambda group: group.used / group.weight, reverse=True)

    def _evict_from(self, group: Group) -> bool:
        entry = self._pick(group)
        if entry >= 0:
            self._evicted([entry])
        return entry >= 0

    def _evict_frames(self, group: Group, need: int) -> None:
        """Evict until ``need`` frames were freed, or no chunk of the group can be evicted."""
        entries: list[int] = []
        while need > 0 and (entry := self._pick(group)) >= 0:
            entries.append(entry)
            need -= self.need(entry)
        if entries:
            self._evicted(entries)

    def _pick(self, group: Group) -> int:
        """Remove the next entry to evict from its order and return it; -1 if none can be evicted."""
        entry = group.policy.evict(self._unreferenced)
        if entry < 0:
            entry = next(filter(self._unreferenced, group.soft.oldest_first()), -1)
            if entry >= 0:
                group.soft.remove(entry)
        return entry

    def _unreferenced(self, entry: int) -> bool:
        return self._index.refs[entry] == 0

    # -- eviction order --------------------------------------------------------------------------------------------

    def enter(self, entry: int) -> None:
        """Add a chunk that is in memory now to its eviction order."""
        group, pin = self.groups[self._index.group[entry]], self._index.pin[entry]
        if pin == NO_PIN:
            group.policy.add(entry, int.from_bytes(self._index.key(entry)[:8], "little"))
        elif pin == SOFT:
            group.soft.append(entry)
        else:
            self.hard_frames += self.need(entry)

    def enter_all(self, entries: list[int]) -> None:
        """:meth:`enter` for several chunks."""
        if group := self._common(entries):
            group.policy.add_all(entries, self._index.first_words(entries))
        else:
            for entry in entries:
                self.enter(entry)

    def touch_all(self, entries: list[int]) -> None:
        """:meth:`touch` for several chunks."""
        if group := self._common(entries):
            group.policy.touch_all(entries)
        else:
            for entry in entries:
                self.touch(entry)

    def _common(self, entries: list[int]) -> Group | None:
        """The one group that all these entries belong to; None if there are several, or an entry is pinned."""
        numbers = self._index.group_column[entries]
        if self._index.pin_column[entries].any() or (numbers != numbers[0]).any():
            return None
        return self.groups[numbers[0]]

    def leave(self, entry: int) -> None:
        """Remove a chunk from its eviction order, as it leaves memory other than by eviction."""
        group, pin = self.groups[self._index.group[entry]], self._index.pin[entry]
        if pin == NO_PIN:
            group.policy.remove(entry)
        elif pin == SOFT:
            group.soft.remove(entry)
        else:
            self.hard_frames -= self.need(entry)

    def touch(self, entry: int) -> None:
        """Note that a chunk was read."""
        group, pin = self.groups[self._index.group[entry]], self._index.pin[entry]
        if pin == NO_PIN:
            group.policy.touch(entry)
        elif pin == SOFT:
            group.soft.remove(entry)
            group.soft.append(entry)

    def pin(self, entry: int, pin: int, until: float | None = None) -> bool:
        """Pin a chunk that is in memory, or unpin it with NO_PIN.

        Args:
            until: time at which the pin expires; None: it does not.

        Returns:
            False if hard pins would exceed ``HARD_PIN_SHARE`` of the frames.
        """
        if self._index.pin[entry] != pin:
            if pin == HARD and self.hard_frames + self.need(entry) > HARD_PIN_SHARE * self.frames.count:
                return False
            self.leave(entry)
            self._index.pin[entry] = pin
            self.enter(entry)
        self._unpin_at.pop(entry, None)
        if until is not None and pin != NO_PIN:
            self._unpin_at[entry] = until
        return True

    def forget_pin(self, entry: int) -> None:
        """Clear the pin of a chunk that has left memory."""
        self._index.pin[entry] = NO_PIN
        self._unpin_at.pop(entry, None)

    def tick(self, now: float) -> None:
        """Remove pins that have expired."""
        for entry in [entry for entry, until in self._unpin_at.items() if until <= now]:
            self.pin(entry, NO_PIN)
