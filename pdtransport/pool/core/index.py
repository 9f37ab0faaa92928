"""The index of all chunks: a hash table of fixed capacity in flat arrays.

An *entry* is a small integer that identifies a key as long as the key is in the table. A lookup of many keys is one
pass of array operations. The table is never resized, so it never pauses. The kernel commits its memory as entries come
into use.
"""

from __future__ import annotations

import ctypes
import operator
import secrets

import numpy as np
import numpy.typing as npt

from pdtransport.kernels.pages import _C
from pdtransport.kv.keys import KEY_BYTES

Entries = npt.NDArray[np.int32]
KeyRows = npt.NDArray[np.uint64]

MAX_ENTRIES = 1 << 30
MAX_REFS = (1 << 16) - 1
EMPTY, FILLING, READY = 0, 1, 2  # states of an entry
MEMORY = 1  # bit of the memory tier in the ``tiers`` column
_WORDS = KEY_BYTES // 8
_MASK = (1 << 64) - 1


if _C is not None:
    _C.pdt_find.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)
    _C.pdt_find.restype = None
    _C.pdt_prefix.argtypes = (
        *2 * (ctypes.c_void_p,),
        ctypes.c_uint64,
        *2 * (ctypes.c_uint8,),
        ctypes.c_void_p,
    )
    _C.pdt_prefix.restype = ctypes.c_uint64


def key_rows(packed: bytes) -> KeyRows:
    """Concatenated keys of 32 bytes as an array of shape (n, 4), uint64.

    Raises:
        ValueError: not a whole number of keys.
    """
    return np.frombuffer(packed, dtype=np.uint64).reshape(-1, _WORDS)


class Index:
    """A hash table of at most ``capacity`` keys, with chaining.

    Beside the key it has columns that the chunk store reads and writes by entry: ``nbytes`` (uint32), ``checksum``
    (uint64), ``refs`` (uint16), ``state``, ``tiers``, ``pin``, ``form`` (uint8) and ``group`` (uint16). Each is a
    memoryview, for access to single values, and also a numpy array, for many entries at once: ``nbytes_column`` and so
    on (``tier_column`` for ``tiers``). All are zero in a new entry.
    """

    def __init__(self, capacity: int) -> None:
        if not 1 <= capacity <= MAX_ENTRIES:
            raise ValueError(f"an index of {capacity} entries; 1 to {MAX_ENTRIES} are allowed")
        self.capacity = capacity
        bits = max(4, capacity.bit_length())  # keys per bucket when the table is full: 0.5 to 1
        # A random odd multiplier for each word of a key: clients can't choose keys that all hash to one chain.
        self._factors = [secrets.randbits(64) | 1 for _ in range(_WORDS)]
        self._multipliers = np.array(self._factors, dtype=np.uint64)
        self._bits, self._shift = 64 - bits, np.uint64(64 - bits)
        self._keys = np.zeros((capacity, _WORDS), dtype=np.uint64)
        self._heads = np.full(1 << bits, -1, dtype=np.int32)
        self._chain = np.zeros(capacity, dtype=np.int32)
        self._head, self._next = self._heads.data, self._chain.data
        self._raw = self._keys.data.cast("B")
        self._words = self._raw.cast("Q")
        self._fresh = 0  # entries from here on were never used
        self._free = -1  # head of the free list of removed entries, linked through ``_chain`` like the buckets
        self.count = 0
        self.tier_column = np.zeros(capacity, dtype=np.uint8)
        self.tiers = self.tier_column.data
        self._of_table = np.array(
            [
                self._multipliers.ctypes.data,
                self._shift,
                *(each.ctypes.data for each in (self._keys, self._heads, self._chain, self.tier_column)),
            ],
            dtype=np.uint64,
        )
        self._table = self._of_table.ctypes.data  # a table_t of csrc/table.c
        self.nbytes_column = np.zeros(capacity, dtype=np.uint32)
        self.checksum_column = np.zeros(capacity, dtype=np.uint64)
        self.refs_column = np.zeros(capacity, dtype=np.uint16)
        self.state_column, self.pin_column, self.form_column = (np.zeros(capacity, dtype=np.uint8) for _ in range(3))
        self.group_column = np.zeros(capacity, dtype=np.uint16)
        self.nbytes, self.checksum = self.nbytes_column.data, self.checksum_column.data
        self.refs, self.state = self.refs_column.data, self.state_column.data
        self.pin, self.form, self.group = self.pin_column.data, self.form_column.data, self.group_column.data

    def find(self, keys: KeyRows) -> Entries:
        """The entry of each key, -1 if it is absent: int32 of shape (n,)."""
        if _C is not None:
            keys, out = np.ascontiguousarray(keys), np.empty(len(keys), dtype=np.int32)
            _C.pdt_find(self._table, keys.ctypes.data, len(keys), out.ctypes.data)
            return out
        found = self._heads[self._buckets(keys)]
        rows = np.flatnonzero((self._keys[found] != keys).any(axis=1) & (found >= 0))
        while len(rows):  # keys not found yet: follow their chains
            found[rows] = at = self._chain[found[rows]]
            rows = rows[(self._keys[at] != keys[rows]).any(axis=1) & (at >= 0)]
        return found

    def prefix(self, keys: KeyRows, reachable: int, memory: int) -> tuple[int, int]:
        """The number of leading keys that are in a tier of ``reachable``, and how many of these are in ``memory``.

        Both arguments are masks of bits of the ``tiers`` column.
        """
        entries = self.find(keys)
        if _C is not None:
            held = ctypes.c_uint64()
            there = _C.pdt_prefix(
                self._table, entries.ctypes.data, len(entries), reachable, memory, ctypes.addressof(held)
            )
            return there, held.value
        tiers = np.where(entries >= 0, self.tier_column[entries], 0)
        missing = np.flatnonzero(tiers & reachable == 0)
        there = int(missing[0]) if len(missing) else len(entries)
        return there, int(np.count_nonzero(tiers[:there] & memory))

    def entry(self, key: bytes) -> int:
        """The entry of one key, -1 if it is absent."""
        return int(self.find(key_rows(key))[0])

    def key(self, entry: int) -> bytes:
        return bytes(self._raw[entry * KEY_BYTES : (entry + 1) * KEY_BYTES])

    @property
    def fresh(self) -> int:
        """Entries from this one on were never used."""
        return self._fresh

    def keys(self, entries: Entries) -> bytes:
        """The keys of these entries, concatenated."""
        return self._keys[entries].tobytes()

    def first_words(self, entries: list[int]) -> list[int]:
        """The first 8 bytes of each key, as an integer."""
        words: list[int] = self._keys[entries, 0].tolist()
        return words

    def add(self, key: bytes) -> int:
        """Add a key that the table lacks; returns its entry.

        Raises:
            IndexError: the table is full.
        """
        if self._free >= 0:
            entry = self._free
            self._free = self._next[entry]
        elif self._fresh < self.capacity:
            entry = self._fresh
            self._fresh += 1
        else:
            raise IndexError(f"the index is full ({self.capacity} entries)")
        self._raw[entry * KEY_BYTES : (entry + 1) * KEY_BYTES] = key
        bucket = self._bucket(entry)
        self._next[entry], self._head[bucket] = self._head[bucket], entry
        self.count += 1
        return entry

    def add_all(self, keys: KeyRows) -> list[int]:
        """Add distinct keys that the table lacks; returns their entries.

        Raises:
            IndexError: the table has no room for all of them; none was added.
        """
        if self.count + len(keys) > self.capacity:
            raise IndexError(f"the index has no room for {len(keys)} more entries ({self.capacity} in all)")
        entries: list[int] = []
        free, head, after = self._free, self._head, self._next
        while free >= 0 and len(entries) < len(keys):
            entries.append(free)
            free = after[free]
        self._free = free
        more = len(keys) - len(entries)
        entries += range(self._fresh, self._fresh + more)
        self._fresh += more
        self._keys[entries] = keys
        for entry, bucket in zip(entries, self._buckets(keys).tolist(), strict=True):
            after[entry], head[bucket] = head[bucket], entry
        self.count += len(entries)
        return entries

    def remove(self, entry: int) -> None:
        """Remove an entry. The next :meth:`add` may reuse its number."""
        bucket = self._bucket(entry)
        at = self._head[bucket]
        if at == entry:
            self._head[bucket] = self._next[entry]
        else:
            while self._next[at] != entry:
                at = self._next[at]
            self._next[at] = self._next[entry]
        for column in (self.tiers, self.nbytes, self.checksum, self.refs, self.state, self.pin, self.form, self.group):
            column[entry] = 0
        self._next[entry], self._free = self._free, entry
        self.count -= 1

    def remove_all(self, entries: list[int]) -> None:
        """Remove distinct entries."""
        at = np.array(entries)
        head, after = self._head, self._next
        for entry, bucket in zip(entries, self._buckets(self._keys[at]).tolist(), strict=True):
            place = head[bucket]
            if place == entry:
                head[bucket] = after[entry]
            else:
                while after[place] != entry:
                    place = after[place]
                after[place] = after[entry]
            after[entry], self._free = self._free, entry
        self.tier_column[at] = self.nbytes_column[at] = self.checksum_column[at] = self.refs_column[at] = 0
        self.state_column[at] = self.pin_column[at] = self.form_column[at] = self.group_column[at] = 0
        self.count -= len(entries)

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes_committed(self) -> int:
        """Bytes of memory that the table uses: the buckets, and all entries that were ever in use."""
        columns = sum(view.itemsize for view in (self.tiers, self.nbytes, self.checksum, self.refs, self.state))
        each = KEY_BYTES + 4 + columns + self.pin.itemsize + self.form.itemsize + self.group.itemsize
        return self._heads.nbytes + self._fresh * each

    def _buckets(self, keys: KeyRows) -> npt.NDArray[np.uint64]:
        return (keys @ self._multipliers) >> self._shift

    def _bucket(self, entry: int) -> int:
        words = self._words[entry * _WORDS : (entry + 1) * _WORDS]
        return (sum(map(operator.mul, words, self._factors)) & _MASK) >> self._bits
