"""Eviction policies: LRU, FIFO, MRU, LFU and S3-FIFO behind one interface.

A policy orders entries (small integers, see :mod:`pdtransport.pool.core.index`); it knows nothing of bytes or tiers.
The orders are linked lists in flat arrays, which the policies of a memory budget's groups share: 8 bytes an entry, and
each list operation is O(1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import get_args

import numpy as np

from pdtransport.pool.settings import PolicyName

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)

Usable = Callable[[int], bool]

LFU_MAX = 63  # use counts are capped here; chunks at the cap are evicted least recently used first
S3_MAX = 3  # cap of S3-FIFO's use counts
S3_SMALL = 10  # the small queue's target size: one tenth of all entries
S3_TURNS = 512  # chunks that one eviction may send on another round: bounds how long a request waits for it


class Links:
    """Storage for linked lists of entries ``0 .. capacity - 1``; an entry is in at most one list at a time."""

    def __init__(self, capacity: int) -> None:
        self.before = np.zeros(capacity, dtype=np.int32).data
        self.after = np.zeros(capacity, dtype=np.int32).data
        self.uses = np.zeros(capacity, dtype=np.uint8).data  # use counts, for lfu and s3fifo


class Order:
    """A doubly linked list of entries, oldest first."""

    def __init__(self, links: Links) -> None:
        self._before, self._after = links.before, links.after
        self._first = self._last = -1
        self.count = 0

    def append(self, entry: int) -> None:
        self._before[entry], self._after[entry] = self._last, -1
        if self._last >= 0:
            self._after[self._last] = entry
        else:
            self._first = entry
        self._last = entry
        self.count += 1

    def extend(self, entries: list[int]) -> None:
        if not entries:
            return
        before, after, last = self._before, self._after, self._last
        if last < 0:
            self._first = entries[0]
        else:
            after[last] = entries[0]
        for entry, following in zip(entries, [*entries[1:], -1], strict=True):
            before[entry], after[entry] = last, following
            last = entry
        self._last = last
        self.count += len(entries)

    def renew(self, entries: list[int]) -> None:
        """Move these entries to the end, in this order."""
        before, after = self._before, self._after
        for entry in entries:
            last = self._last
            if entry == last:
                continue
            ahead, behind = before[entry], after[entry]
            before[behind] = ahead
            if ahead >= 0:
                after[ahead] = behind
            else:
                self._first = behind
            before[entry], after[entry], after[last] = last, -1, entry
            self._last = entry

    def remove(self, entry: int) -> None:
        before, after = self._before[entry], self._after[entry]
        if before >= 0:
            self._after[before] = after
        else:
            self._first = after
        if after >= 0:
            self._before[after] = before
        else:
            self._last = before
        self.count -= 1

    def oldest_first(self) -> Iterator[int]:
        """Iterate over entries; the caller may remove the entry just yielded."""
        at = self._first
        while at >= 0:
            after = self._after[at]
            yield at
            at = after

    def newest_first(self) -> Iterator[int]:
        at = self._last
        while at >= 0:
            before = self._before[at]
            yield at
            at = before


class Policy(ABC):
    """An eviction order. A chunk has the same ``key_hash`` each time it is added."""

    @abstractmethod
    def add(self, entry: int, key_hash: int) -> None:
        """Add a chunk."""

    @abstractmethod
    def touch(self, entry: int) -> None:
        """Note that a chunk was read."""

    def add_all(self, entries: list[int], key_hashes: list[int]) -> None:
        """:meth:`add` for several chunks."""
        for entry, key_hash in zip(entries, key_hashes, strict=True):
            self.add(entry, key_hash)

    def touch_all(self, entries: list[int]) -> None:
        """:meth:`touch` for several chunks."""
        for entry in entries:
            self.touch(entry)

    @abstractmethod
    def remove(self, entry: int) -> None:
        """Remove a chunk that leaves other than by eviction."""

    @abstractmethod
    def evict(self, usable: Usable) -> int:
        """Remove and return the next chunk to evict among those that are ``usable``; -1 if there is none.

        Unusable chunks (referenced ones) are skipped. There are few of them, since clients may hold a bounded amount.
        """

    @abstractmethod
    def __len__(self) -> int: ...


class Fifo(Policy):
    """First in, first out."""

    def __init__(self, links: Links) -> None:
        self._order = Order(links)

    def add(self, entry: int, key_hash: int) -> None:
        self._order.append(entry)

    def add_all(self, entries: list[int], key_hashes: list[int]) -> None:
        self._order.extend(entries)

    def touch(self, entry: int) -> None:
        pass

    def remove(self, entry: int) -> None:
        self._order.remove(entry)

    def _candidates(self) -> Iterator[int]:
        return self._order.oldest_first()

    def evict(self, usable: Usable) -> int:
        for entry in self._candidates():
            if usable(entry):
                self._order.remove(entry)
                return entry
        return -1

    def __len__(self) -> int:
        return self._order.count


class Lru(Fifo):
    """Least recently used."""

    def touch(self, entry: int) -> None:
        self._order.renew([entry])

    def touch_all(self, entries: list[int]) -> None:
        self._order.renew(entries)


class Mru(Lru):
    """Most recently used: for scans larger than memory, so that at least their beginning stays."""

    def _candidates(self) -> Iterator[int]:
        return self._order.newest_first()


class Lfu(Policy):
    """Least frequently used; among chunks with equal counts, the least recently used."""

    def __init__(self, links: Links) -> None:
        self._uses = links.uses
        self._orders = [Order(links) for _ in range(LFU_MAX + 1)]

    def add(self, entry: int, key_hash: int) -> None:
        self._uses[entry] = 0
        self._orders[0].append(entry)

    def touch(self, entry: int) -> None:
        self.remove(entry)
        self._uses[entry] = min(LFU_MAX, self._uses[entry] + 1)
        self._orders[self._uses[entry]].append(entry)

    def remove(self, entry: int) -> None:
        self._orders[self._uses[entry]].remove(entry)

    def evict(self, usable: Usable) -> int:
        for order in self._orders:
            for entry in order.oldest_first():
                if usable(entry):
                    order.remove(entry)
                    return entry
        return -1

    def __len__(self) -> int:
        return sum(order.count for order in self._orders)


class Ghosts:
    """A bounded set of the hashes of recently seen keys; the oldest are dropped first."""

    def __init__(self) -> None:
        self._seen: dict[int, None] = {}

    def add(self, key_hash: int, limit: int) -> None:
        self._seen.pop(key_hash, None)
        self._seen[key_hash] = None
        while len(self._seen) > limit:
            del self._seen[next(iter(self._seen))]

    def pop(self, key_hash: int) -> bool:
        """Remove a hash; returns whether it was present."""
        return self._seen.pop(key_hash, self) is None

    def __len__(self) -> int:
        return len(self._seen)


class S3Fifo(Policy):
    """S3-FIFO: two FIFO queues and a ghost list. Chunks used once leave soon, chunks that are read again stay.

    A new chunk enters the small queue. At the head of that queue it moves to the main queue if it was read at least
    twice; else it is evicted and its hash goes to the ghost list. A chunk that is added while its hash is on the ghost
    list enters the main queue directly. In the main queue a chunk with a use count above 0 goes round again.
    """

    def __init__(self, links: Links) -> None:
        self._uses = links.uses
        self._small, self._main = Order(links), Order(links)
        self._in_small: dict[int, int] = {}  # entry -> hash of its key
        self._ghosts = Ghosts()

    def add(self, entry: int, key_hash: int) -> None:
        self._uses[entry] = 0
        if self._ghosts.pop(key_hash):
            self._main.append(entry)
        else:
            self._small.append(entry)
            self._in_small[entry] = key_hash

    def touch(self, entry: int) -> None:
        self._uses[entry] = min(S3_MAX, self._uses[entry] + 1)

    def remove(self, entry: int) -> None:
        (self._small if self._in_small.pop(entry, None) is not None else self._main).remove(entry)

    def evict(self, usable: Usable) -> int:
        small_first = self._small.count * S3_SMALL >= len(self)
        for queue in (self._from_small, self._from_main) if small_first else (self._from_main, self._from_small):
            entry = queue(usable)
            if entry >= 0:
                return entry
        return self._from_main(usable)  # the small queue may just have moved all its chunks to the main one

    def _from_small(self, usable: Usable) -> int:
        for entry in self._small.oldest_first():
            if self._uses[entry] >= 2:
                self._small.remove(entry)
                del self._in_small[entry]
                self._uses[entry] = 0
                self._main.append(entry)
            elif usable(entry):
                self._small.remove(entry)
                self._ghosts.add(self._in_small.pop(entry), max(16, len(self)))
                return entry
        return -1

    def _from_main(self, usable: Usable) -> int:
        for entry, _turn in zip(self._main.oldest_first(), range(S3_TURNS), strict=False):
            if self._uses[entry] == 0 and usable(entry):
                self._main.remove(entry)
                return entry
            self._uses[entry] = max(0, self._uses[entry] - 1)
            self._main.remove(entry)
            self._main.append(entry)
        for entry in self._main.oldest_first():  # S3_TURNS reached: evict the first usable chunk, whatever its count
            if usable(entry):
                self._main.remove(entry)
                return entry
        return -1

    def __len__(self) -> int:
        return self._small.count + self._main.count


def make_policy(name: PolicyName, links: Links) -> Policy:
    kinds: dict[PolicyName, Callable[[Links], Policy]] = {
        "lru": Lru, "fifo": Fifo, "mru": Mru, "lfu": Lfu, "s3fifo": S3Fifo
    }  # fmt: skip
    return kinds[name](links)
