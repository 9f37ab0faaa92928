"""The life cycle of a chunk: write grant, publish, read grants, eviction. No sockets, no threads.

Invariants:

* A chunk is *invisible* while its writer fills it, and *visible* once it is published in some tier.
* A chunk's frames are reused only when no reader and no writer holds them.
* Everything that a client holds belongs to one of its requests. Cancelling the request, or the death of its client,
releases all of it. Grants have no timeout.

Answers to clients collect in :attr:`ChunkStore.outbox`, jobs for the tiers below memory in :attr:`ChunkStore.jobs`. The
service (:mod:`pdtransport.pool.server.service`) drives the store and empties both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool.core import batches
from pdtransport.pool.core.index import EMPTY, FILLING, MAX_REFS, MEMORY, READY, key_rows
from pdtransport.pool.core.requests import KeyAnswer, KeyVerdict, PoolRequest
from pdtransport.pool.core.table import ChunkTable
from pdtransport.pool.core.tier_state import Delete, Promote, TierState, WriteBack
from pdtransport.pool.tiers.base import Stored

MAX_GHOSTS = 1 << 20  # keys that admission "twice" remembers, about 100 bytes each
INDEX_TRIES = 64  # chunks dropped, at most, to free one entry of a full index


class ChunkStore(ChunkTable):
    """All chunks of one pool, and what its clients ask of them."""

    # -- client requests --------------------------------------------------------------------------------------------

    def lookup(self, keys: bytes) -> tuple[int, int]:
        """The number of leading keys that are in a reachable tier, and how many of these are in memory."""
        reachable = MEMORY | sum(tier.bit for tier in self.lower if tier.up)
        there, in_memory = self.index.prefix(key_rows(keys), reachable, MEMORY)
        self.counters["lookups"] += 1
        self.counters["lookup_keys"] += len(keys) // KEY_BYTES
        self.counters["lookup_hits"] += there
        self.counters["lookup_hits_memory"] += in_memory
        return there, in_memory

    def store(self, request: PoolRequest, keys: bytes, sizes: Sequence[int]) -> None:
        """Answer each key: HAVE, WRITE, or the reason for a refusal.

        A key that another writer is filling is answered when that writer ends.
        """
        entries = self.index.find(key_rows(keys))
        if len(sizes) > 1 and batches.store(self, request, entries, keys, sizes):
            return
        begun: dict[bytes, int] = {}
        for number, (entry, nbytes) in enumerate(zip(entries.tolist(), sizes, strict=True)):
            key = keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]
            if entry >= 0 and (self.index.state[entry] == EMPTY or self.index.key(entry) != key):
                entry = -1  # evicted to make room for an earlier key of this request
            entry = begun.get(key, entry)
            if entry < 0:
                begun[key] = self._begin(request, number, key, nbytes)
            elif self.index.nbytes[entry] != nbytes:
                self._answer(request, KeyAnswer(number, KeyVerdict.MISMATCH))
            elif self.index.tiers[entry]:
                self._answer(request, KeyAnswer(number, KeyVerdict.HAVE))
            elif self.index.state[entry] == FILLING:
                self._wait(request, number, entry)
            else:  # dropped while a reader still holds it
                self._answer(request, KeyAnswer(number, KeyVerdict.BUSY))

    def load(self, request: PoolRequest, keys: bytes, sizes: Sequence[int]) -> None:
        """Answer each key: READ (the chunk is now referenced), MISS, or the reason for a refusal.

        A key that is being filled, by a writer or from a lower tier, is answered when the fill ends.
        """
        entries = self.index.find(key_rows(keys))
        if len(sizes) > 1 and batches.load(self, request, entries, sizes):
            return
        for number, (entry, nbytes) in enumerate(zip(entries.tolist(), sizes, strict=True)):
            if entry < 0 or not (self.index.tiers[entry] or self.index.state[entry] == FILLING):
                self._answer(request, KeyAnswer(number, KeyVerdict.MISS))
            elif self.index.nbytes[entry] != nbytes:
                self._answer(request, KeyAnswer(number, KeyVerdict.MISMATCH))
            elif self.index.state[entry] == FILLING:
                self.counters["waited_hits"] += 1
                self._wait(request, number, entry)
            elif not self.index.tiers[entry] & MEMORY and self._holder(entry) is None:  # its tier is down
                self._answer(request, KeyAnswer(number, KeyVerdict.MISS))
            elif self.index.tiers[entry] & MEMORY:
                self.counters["memory_hits"] += 1
                self._grant_read(request, number, entry)
            else:
                self._promote(request, number, entry)

    def publish(self, request: PoolRequest, written: Sequence[tuple[int, int]]) -> int:
        """Make chunks visible that the writer has filled.

        Args:
            written: place in the request, and checksum, of each chunk.

        Returns:
            How many became visible. Places that this request does not hold for writing are skipped.
        """
        if len(written) > 1 and batches.publish(self, request, written):
            return len(written)
        done = 0
        for number, checksum in written:
            entry = request.held.get(number)
            if entry is None or not request.store:
                continue
            self._give_up(request, number)
            self.index.checksum[entry] = checksum
            self._in_memory(entry)
            self.counters["stored_chunks"] += 1
            self.counters["stored_bytes"] += self.index.nbytes[entry]
            if self.lower:
                self.write_back(entry)
            done += 1
        return done

    def release(self, request: PoolRequest, numbers: Iterable[int]) -> None:
        """Release chunks: a reader has copied them or no longer needs them; a writer will not fill them."""
        for number in numbers:
            if number in request.waits:
                self._waiting(request.waits.pop(number)).remove((request, number))
            if number not in request.held:
                continue
            entry = self._give_up(request, number)
            if request.store:
                self._abandon(entry)
            else:
                self._unreference(entry)

    def cancel(self, request: PoolRequest) -> None:
        """Release everything that the request holds or waits for.

        Its client must be dead, or must have stopped copying.
        """
        self.release(request, [*request.waits, *request.held])
        self.outbox.pop(request, None)

    def damaged(self, request: PoolRequest, number: int) -> bool:
        """Check a chunk whose checksum a reader found wrong; drop it from memory if it is damaged.

        Returns:
            False if the chunk is intact or the request does not hold it.
        """
        entry = request.held.get(number)
        if entry is None or request.store:
            return False
        if not self.index.tiers[entry] & MEMORY:
            return True
        frames = self.frames_of[entry]
        assert frames is not None
        if self._verify(frames, self.index.nbytes[entry], self.index.checksum[entry]):
            self.counters["damage_denied"] += 1
            return False
        self.counters["damaged_memory"] += 1
        self.leave_memory(entry)
        return True

    def pin(self, keys: bytes, pin: int, until: float | None) -> int:
        """Pin the chunks that are in memory, or unpin them with NO_PIN; returns how many.

        A hard-pinned chunk is never evicted, a soft-pinned one only when its group has no unpinned chunk to evict.
        ``until``: time at which the pin expires; None: it does not.
        """
        done = 0
        for entry in self.entries(keys):
            done += entry >= 0 and bool(self.index.tiers[entry] & MEMORY) and self.budget.pin(entry, pin, until)
        return done

    def drop(self, keys: bytes) -> int:
        """Remove these chunks from every tier; returns how many there were.

        Readers keep the chunks that they hold until they release them.
        """
        done = 0
        for entry in self.entries(keys):
            if entry < 0 or not self.index.tiers[entry]:
                continue
            for tier in self.lower:
                self._drop_from(tier, entry)
            if self.index.tiers[entry] & MEMORY:
                self.leave_memory(entry)
            else:
                self._forget_if_gone(entry)
            done += 1
        return done

    # -- reports from lower tiers -----------------------------------------------------------------------------------

    def written_back(self, job: WriteBack, stored: int | None) -> None:
        """A write to a lower tier ended. ``stored``: bytes that the chunk takes there; None: the write failed."""
        entry, tier = job.entry, job.tier
        self.writeback_bytes -= job.nbytes
        tier.used -= job.reserved
        if (left := self.being_written.pop(entry) - 1) > 0:
            self.being_written[entry] = left
        if stored is None:
            self.counters[f"{tier.name}_write_failed"] += 1
        elif not self.index.tiers[entry]:  # dropped during the write
            self.jobs.append(Delete(tier, job.key, job.tenant, job.nbytes))
        else:
            if self.index.tiers[entry] & tier.bit:  # a scan of the tier has found it already
                tier.leave(entry)
            self.index.tiers[entry] |= tier.bit
            tier.enter(entry, stored)
            self.counters[f"{tier.name}_written_bytes"] += stored
        self._unreference(entry)

    def found_damaged(self, job: WriteBack) -> None:
        """A chunk in memory failed its checksum before it was written to a lower tier: drop it from memory."""
        self.counters["damaged_memory"] += 1
        if self.index.tiers[job.entry] & MEMORY:
            self.leave_memory(job.entry)
        self.written_back(job, None)

    def went_down(self, tier: TierState) -> None:
        """A tier can't be reached. Its chunks count as absent until it is up again."""
        if tier.up:
            self.counters[f"{tier.name}_went_down"] += 1
        tier.up = False

    def promoted(self, job: Promote, checksum: int | None) -> None:
        """A read from a lower tier ended.

        Args:
            checksum: of the chunk, which was verified. None: it could not be read. Then it is dropped from that tier,
                unless the tier is down, and read from the next tier that has it.
        """
        entry, tier = job.entry, job.tier
        if checksum is None and tier.up:
            self.counters[f"{tier.name}_read_failed"] += 1
            self._drop_from(tier, entry)
        holder = self._holder(entry)
        if holder is None or (checksum is None and holder is tier):  # dropped during the read, or unreachable
            self._abandon(entry)
            return
        if checksum is None:
            self.jobs.append(replace(job, tier=holder))
            return
        self.counters[f"{tier.name}_read_bytes"] += self.index.nbytes[entry]
        self.index.checksum[entry] = checksum
        if self.index.tiers[entry] & tier.bit:
            tier.touch(entry)
        self._in_memory(entry)

    def adopt(self, tier: TierState, found: Stored) -> bool:
        """Add a chunk to the index that a scan found in a lower tier.

        Returns:
            False if there is no room for it, the index has it in this tier already, or it knows its key with another
            length. A chunk without room is deleted from the tier, unless other pools share the tier.
        """
        entry, index = self.index.entry(found.key), self.index
        if entry >= 0 and (index.nbytes[entry] != found.nbytes or index.tiers[entry] & tier.bit):
            return False
        if tier.used + found.stored > tier.limit or (entry < 0 and len(index) >= index.capacity):
            if not tier.tier.shared:
                self.jobs.append(Delete(tier, found.key, found.tenant, found.nbytes))
            return False
        if entry < 0:
            entry = index.add(found.key)
            index.nbytes[entry], index.state[entry] = found.nbytes, READY
            index.group[entry] = self.budget.group_of(found.tenant)
        index.tiers[entry] |= tier.bit
        tier.enter(entry, found.stored)
        return True

    # -- steps of a chunk's life ------------------------------------------------------------------------------------

    def _begin(self, request: PoolRequest, number: int, key: bytes, nbytes: int) -> int:
        """Grant the request to write a chunk that the index lacks; returns its entry, -1 if refused."""
        frames, refusal = None, KeyVerdict.FULL
        key_hash = int.from_bytes(key[:8], "little")
        if self.settings.admission == "twice" and not self._seen.pop(key_hash):
            self._seen.add(key_hash, min(self.index.capacity, MAX_GHOSTS))
            refusal = KeyVerdict.LATER
        elif request.session.held_bytes + nbytes > self.settings.client_bytes:
            refusal = KeyVerdict.BUSY
        elif self._place_in_index():
            frames = self.budget.take(nbytes, request.group)
        if frames is None:
            self._answer(request, KeyAnswer(number, refusal))
            return -1
        entry = self.index.add(key)
        self.index.nbytes[entry], self.index.state[entry] = nbytes, FILLING
        self.index.group[entry], self.index.form[entry] = request.group, request.form
        self.frames_of[entry] = frames
        self.waiters[entry] = None
        self._grant_write(request, number, entry)
        return entry

    def _place_in_index(self) -> bool:
        """Free an entry of the index if it is full; returns whether one is free."""
        for _ in range(INDEX_TRIES):
            if len(self.index) < self.index.capacity:
                return True
            victim = next((tier for tier in reversed(self.lower) if len(tier)), None)
            if victim is not None:
                self._drop_coldest(victim)
            elif not self.budget.evict_one():
                return False
        return len(self.index) < self.index.capacity

    def _grant_write(self, request: PoolRequest, number: int, entry: int) -> None:
        frames = self.frames_of[entry]
        assert frames is not None
        request.held[number] = entry
        request.session.held_bytes += self.index.nbytes[entry]
        self._answer(request, KeyAnswer(number, KeyVerdict.WRITE, 0, frames))

    def _grant_read(self, request: PoolRequest, number: int, entry: int) -> None:
        nbytes, frames = self.index.nbytes[entry], self.frames_of[entry]
        assert frames is not None
        if request.session.held_bytes + nbytes > self.settings.client_bytes or self.index.refs[entry] == MAX_REFS:
            self._answer(request, KeyAnswer(number, KeyVerdict.BUSY))
            return
        self.index.refs[entry] += 1
        request.held[number] = entry
        request.session.held_bytes += nbytes
        self.budget.touch(entry)
        self.hints.loaded(entry)
        self.counters["loaded_chunks"] += 1
        self.counters["loaded_bytes"] += nbytes
        self._answer(request, KeyAnswer(number, KeyVerdict.READ, self.index.checksum[entry], frames))

    def _wait(self, request: PoolRequest, number: int, entry: int) -> None:
        request.waits[number] = entry
        self._waiting(entry).append((request, number))

    def _waiting(self, entry: int) -> deque[tuple[PoolRequest, int]]:
        waiting = self.waiters[entry]
        if waiting is None:  # created on demand: most entries never have a waiter
            waiting = self.waiters[entry] = deque()
        return waiting

    def _give_up(self, request: PoolRequest, number: int) -> int:
        entry = request.held.pop(number)
        request.session.held_bytes -= self.index.nbytes[entry]
        return entry

    def _in_memory(self, entry: int) -> None:
        """Make a chunk visible whose bytes are complete and verified, and answer the requests that wait for it."""
        self.index.state[entry] = READY
        self.index.tiers[entry] |= MEMORY
        self.budget.enter(entry)
        self.serve(entry, self.waiters.pop(entry))

    def serve(self, entry: int, waiting: Iterable[tuple[PoolRequest, int]] | None) -> None:
        """Answer the requests that waited for this entry to be filled."""
        for request, number in waiting or ():
            del request.waits[number]
            if request.store:
                self._answer(request, KeyAnswer(number, KeyVerdict.HAVE))
            else:
                self._grant_read(request, number, entry)

    def _abandon(self, entry: int) -> None:
        """The fill ended without the chunk's bytes: pass the write grant to the next waiting store.

        If no store waits, or none may hold that many more bytes, the frames are freed and all waiting requests are
        refused. The entry stays only if a lower tier has the chunk.
        """
        for request, number in list(waiters := self._waiting(entry)):
            if request.store and request.session.held_bytes + self.index.nbytes[entry] <= self.settings.client_bytes:
                waiters.remove((request, number))
                del request.waits[number]
                self._grant_write(request, number, entry)
                return
        del self.waiters[entry]
        self.counters["fills_abandoned"] += 1
        self.hints.left(entry)
        self.index.state[entry] = READY
        self._free_frames(entry)
        self._forget_if_gone(entry)
        for request, number in waiters:
            del request.waits[number]
            self._answer(request, KeyAnswer(number, KeyVerdict.BUSY if request.store else KeyVerdict.MISS))

    def _unreference(self, entry: int) -> None:
        self.index.refs[entry] -= 1
        if self.index.refs[entry] == 0 and not self.index.tiers[entry] & MEMORY:
            self._free_frames(entry)
            self._forget_if_gone(entry)

    # -- lower tiers ------------------------------------------------------------------------------------------------

    def _promote(self, request: PoolRequest, number: int, entry: int) -> None:
        tier = self._holder(entry)
        if tier is not None and self.bring_up(entry):
            self.counters[f"{tier.name}_hits"] += 1
            self._wait(request, number, entry)
        else:
            self._answer(request, KeyAnswer(number, KeyVerdict.FULL))

    def _answer(self, request: PoolRequest, part: KeyAnswer) -> None:
        self.counters[part.verdict.name.lower()] += 1
        parts = self.outbox.setdefault(request, [])
        assert isinstance(parts, list)  # Grants answer all keys of a request, so no further answer follows them
        parts.append(part)
