"""Batch operations of the chunk store: fast paths for requests whose chunks are all in the same state.

They use a few array operations instead of a few dozen steps per chunk, so that the service keeps up with GPUs.

:func:`store`, :func:`load` and :func:`publish` either do the whole batch, or return False and do nothing (although
:func:`store` may have evicted chunks). Then the chunk store handles the chunks one by one, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np

from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool.core.frames import frames_for
from pdtransport.pool.core.index import FILLING, MAX_REFS, MEMORY, READY, Entries, key_rows
from pdtransport.pool.core.requests import Grants, KeyVerdict, PoolRequest

if TYPE_CHECKING:
    from pdtransport.pool.core.table import ChunkTable


def store(store: ChunkTable, request: PoolRequest, entries: Entries, keys: bytes, sizes: Sequence[int]) -> bool:
    """Grant the request to write all its chunks, if the index has none of them and there is room for all."""
    index, session, count, nbytes = store.index, request.session, len(sizes), sum(sizes)
    if (
        int(entries.max()) >= 0
        or store.settings.admission != "all"
        or session.held_bytes + nbytes > store.settings.client_bytes
        or len(index) + count > index.capacity
        or len(set(np.frombuffer(keys, dtype=f"V{KEY_BYTES}").tolist())) < count
    ):
        return False
    counts = _frame_counts(store, sizes)
    frames = store.budget.take_all(counts, request.group)
    if frames is None:
        return False
    added = index.add_all(key_rows(keys))
    at = np.array(added)
    index.nbytes_column[at], index.state_column[at] = sizes, FILLING
    index.group_column[at], index.form_column[at] = request.group, request.form
    for entry, (first, last) in zip(added, pairwise(accumulate(counts, initial=0)), strict=True):
        store.frames_of[entry] = frames[4 * first : 4 * last]
    store.waiters.update(dict.fromkeys(added))
    request.held.update(enumerate(added))
    session.held_bytes += nbytes
    store.counters["write"] += count
    store.outbox[request] = Grants(KeyVerdict.WRITE, [0] * count, counts, frames)
    return True


def load(store: ChunkTable, request: PoolRequest, entries: Entries, sizes: Sequence[int]) -> bool:
    """Grant the request to read all its chunks, if all are in memory."""
    index, session, count, nbytes = store.index, request.session, len(sizes), sum(sizes)
    if (
        int(entries.min()) < 0
        or session.held_bytes + nbytes > store.settings.client_bytes
        or not (index.tier_column[entries] & MEMORY).all()
        or (index.nbytes_column[entries] != sizes).any()
        or int(index.refs_column[entries].max()) > MAX_REFS - count  # a key may occur several times in the request
    ):
        return False
    listed = entries.tolist()
    for entry in listed:
        index.refs[entry] += 1
    request.held.update(enumerate(listed))
    session.held_bytes += nbytes
    store.budget.touch_all(listed)
    if store.hints.nbytes:
        for entry in listed:
            store.hints.loaded(entry)
    for counter, more in (("memory_hits", count), ("loaded_chunks", count), ("loaded_bytes", nbytes), ("read", count)):
        store.counters[counter] += more
    frames = b"".join([store.frames_of[entry] or b"" for entry in listed])
    checksums = index.checksum_column[entries].tolist()
    store.outbox[request] = Grants(KeyVerdict.READ, checksums, _frame_counts(store, sizes), frames)
    return True


def publish(store: ChunkTable, request: PoolRequest, written: Sequence[tuple[int, int]]) -> bool:
    """Make chunks (place, checksum) visible, if the request holds all of them and no request waits for any."""
    index, held = store.index, request.held
    numbers, checksums = zip(*written, strict=True)
    if not request.store or len(set(numbers)) < len(numbers) or not held.keys() >= set(numbers):
        return False
    entries = [held[number] for number in numbers]
    if any(map(store.waiters.__getitem__, entries)):
        return False  # needs one step a chunk: a waiter is answered while the writer still holds the later chunks
    for number, entry in zip(numbers, entries, strict=True):
        del held[number], store.waiters[entry]
    at = np.array(entries)
    nbytes = int(index.nbytes_column[at].sum())
    request.session.held_bytes -= nbytes
    index.checksum_column[at] = np.array(checksums, dtype=np.uint64)
    index.state_column[at] = READY
    index.tier_column[at] |= MEMORY
    store.budget.enter_all(entries)
    store.counters["stored_chunks"] += len(entries)
    store.counters["stored_bytes"] += nbytes
    if store.lower:
        for entry in entries:
            store.write_back(entry)
    return True


def _frame_counts(store: ChunkTable, sizes: Sequence[int]) -> list[int]:
    if len(set(sizes)) == 1:
        return [frames_for(sizes[0], store.budget.frame_bytes)] * len(sizes)
    return [frames_for(size, store.budget.frame_bytes) for size in sizes]
