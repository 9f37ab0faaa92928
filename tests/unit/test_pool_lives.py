"""Random lives of chunks: clients that store, load, die; tiers that fail, go and come back; memory that is damaged."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdtransport.pool import messages
from pdtransport.pool.core.budget import HARD, NO_PIN, SOFT
from pdtransport.pool.core.index import MEMORY, READY
from pdtransport.pool.core.requests import KeyVerdict, PoolRequest
from pdtransport.pool.core.store import ChunkStore
from pdtransport.pool.core.tier_state import Delete, Job, Promote, TierState, WriteBack
from pdtransport.pool.server.admin_requests import AdminRequests
from pdtransport.pool.settings import PoolSettings
from pdtransport.pool.tiers.base import Stored
from tests.unit.pool_rig import FRAME, Asker, MemoryTier, key, keys


class Lives(RuleBasedStateMachine):
    """Random clients over a tiny pool with a tier below: at every step, what is held is whole and nobody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = MemoryTier()
        made = PoolSettings.parse(
            {"memory_bytes": 1 << 20, "frame_bytes": FRAME, "max_chunks": 16, "client_bytes": 1 << 20,
             "quotas": {"q": 3 * FRAME}, "writeback_bytes": 4 * FRAME}
        )  # fmt: skip
        self.memory: dict[int, tuple[bytes, int]] = {}  # frame -> whose content it has
        self.chunk_store = ChunkStore(made, 6, self._whole, [TierState(self.tier, 2, 5 * FRAME, "lru")])
        self.control = AdminRequests(self.chunk_store)
        self.askers = [Asker(self.chunk_store), Asker(self.chunk_store), Asker(self.chunk_store, 1)]
        self.asked: list[tuple[PoolRequest, list[int]]] = []
        self.granted: dict[tuple[PoolRequest, int], tuple[bytes, bytes, KeyVerdict]] = {}  # -> key, frames, verdict

    @staticmethod
    def nbytes(number: int) -> int:
        return FRAME * (1 + number % 2)

    def _whole(self, frames: bytes, nbytes: int, checksum: int) -> bool:
        content = {self.memory[frame] for frame in memoryview(frames).cast("I")}
        return len(content) == 1 and next(iter(content))[1] == checksum

    def _fill(self, frames: bytes, whose: bytes) -> None:
        for frame in memoryview(frames).cast("I"):
            self.memory[frame] = (whose, int.from_bytes(whose[:7], "little"))

    def _settle(self) -> None:
        """Hear what the shelf says; writers do not write yet, readers check what they were granted."""
        outbox, self.chunk_store.outbox = self.chunk_store.outbox, {}
        for request, parts in outbox.items():
            numbers = next(numbers for known, numbers in self.asked if known is request)
            for part in parts if isinstance(parts, list) else parts.parts():
                whose = key(numbers[part.place])
                if part.verdict is KeyVerdict.WRITE:
                    assert len(part.frames) // 4 == self.nbytes(numbers[part.place]) // FRAME
                    self.granted[request, part.place] = (whose, part.frames, part.verdict)
                elif part.verdict is KeyVerdict.READ:
                    self.granted[request, part.place] = (whose, part.frames, part.verdict)
                    assert self._whole(part.frames, 0, part.checksum)

    @rule(who=st.integers(0, 2), numbers=st.lists(st.integers(0, 11), min_size=1, max_size=4), store=st.booleans())
    def ask(self, who: int, numbers: list[int], store: bool) -> None:
        asker = self.askers[who]
        request = asker._request(store)
        self.asked.append((request, numbers))
        sizes = [self.nbytes(number) for number in numbers]
        (self.chunk_store.store if store else self.chunk_store.load)(request, keys(*numbers), sizes)
        self._settle()

    @rule(pick=st.integers(0, 99), good=st.booleans())
    def finish_one(self, pick: int, good: bool) -> None:
        if not self.granted:
            return
        (request, place), (whose, frames, verdict) = list(self.granted.items())[pick % len(self.granted)]
        del self.granted[request, place]
        if verdict is KeyVerdict.WRITE and good:
            self._fill(frames, whose)
            assert self.chunk_store.publish(request, [(place, int.from_bytes(whose[:7], "little"))]) == 1
        elif verdict is KeyVerdict.WRITE:
            self._fill(frames, bytes(32))  # torn
            self.chunk_store.release(request, [place])
        else:
            self.chunk_store.release(request, [place])
        self._settle()

    @rule(who=st.integers(0, 2))
    def client_dies(self, who: int) -> None:
        for request, _ in self.asked:
            if request.session is self.askers[who].session:
                self.granted = {each: value for each, value in self.granted.items() if each[0] is not request}
                self.chunk_store.cancel(request)
        self._settle()

    @rule(number=st.integers(0, 11), kind=st.sampled_from([NO_PIN, SOFT, HARD]))
    def pin(self, number: int, kind: int) -> None:
        self.chunk_store.pin(key(number), kind, None)

    @rule(number=st.integers(0, 11))
    def drop(self, number: int) -> None:
        self.chunk_store.drop(key(number))
        self._settle()

    @rule(
        numbers=st.lists(st.integers(0, 11), max_size=4), action=st.sampled_from(["leave", "fetch", "write", "again"])
    )
    def people_move_chunks(self, numbers: list[int], action: Any) -> None:
        """Whatever they ask for, readers and writers keep what they hold."""
        again = action == "again"
        wish = messages.Manage(
            request=1, keys=keys(*numbers), action="write" if again else action, tier="below", again=again
        )
        self.control.manage(wish, 0.0)
        self.control.look(messages.Look(request=1, keys=keys(*numbers)), 0)
        self._settle()

    @rule(fail=st.booleans())
    def tier_works(self, fail: bool) -> None:
        jobs, self.chunk_store.jobs = list(self.chunk_store.jobs), type(self.chunk_store.jobs)()
        for job in jobs:
            self._work(job, fail)
        self._settle()

    @rule(number=st.integers(0, 11))
    def tier_is_scanned(self, number: int) -> None:
        """Another pool may have written it, or a scan sees our own write before we are told."""
        self.tier.held[key(number)] = b""
        self.chunk_store.adopt(
            self.chunk_store.lower[0], Stored(key(number), "", self.nbytes(number), self.nbytes(number))
        )
        self._settle()

    @rule(up=st.booleans())
    def tier_goes_or_comes(self, up: bool) -> None:
        self.chunk_store.lower[0].up = up

    @rule(pick=st.integers(0, 99))
    def memory_is_damaged(self, pick: int) -> None:
        """A reader says so, and it is true: its chunk's readers of the moment are the only ones who ever see it."""
        reads = [each for each, value in self.granted.items() if value[2] is KeyVerdict.READ]
        if reads:
            request, place = reads[pick % len(reads)]
            frames = self.granted[request, place][1]
            self._fill(frames, bytes(32))
            assert self.chunk_store.damaged(request, place)
            for other in [each for each, value in self.granted.items() if value[1] == frames]:
                del self.granted[other]
                self.chunk_store.release(other[0], [other[1]])
        self._settle()

    def _work(self, job: Job, fail: bool) -> None:
        if isinstance(job, WriteBack):
            if not self._whole(job.frames, job.nbytes, job.checksum):
                self.chunk_store.found_damaged(job)
                return
            if not fail:
                self.tier.held[job.key] = b""
            self.chunk_store.written_back(job, None if fail else job.nbytes)
        elif isinstance(job, Promote):
            found = job.key in self.tier.held and not fail
            self._fill(job.frames, job.key if found else bytes(32))
            self.chunk_store.promoted(job, int.from_bytes(job.key[:7], "little") if found else None)
        else:
            assert isinstance(job, Delete)
            self.tier.held.pop(job.key, None)

    @invariant()
    def what_is_held_is_whole_and_nobody_elses(self) -> None:
        """Readers' frames have their content all the time; writers' frames are theirs alone."""
        writers: set[int] = set()
        readers: set[int] = set()
        for whose, frames, verdict in self.granted.values():
            ids = set(memoryview(frames).cast("I").tolist())
            if verdict is KeyVerdict.READ:
                readers |= ids
                assert self._whole(frames, 0, int.from_bytes(whose[:7], "little"))
            else:
                assert not ids & writers
                writers |= ids
        assert not readers & writers

    @invariant()
    def accounts_balance(self) -> None:
        """Frames used are those of entries; limits hold; pinned and referenced chunks are where they should be."""
        kept = [frames for frames in self.chunk_store.frames_of if frames is not None]
        assert sum(len(frames) // 4 for frames in kept) == 6 - self.chunk_store.budget.frames.free
        assert len(set(b"".join(kept))) or not kept
        assert sum(group.used for group in self.chunk_store.budget.groups) == 6 - self.chunk_store.budget.frames.free
        assert self.chunk_store.budget.groups[1].used <= 3
        assert self.chunk_store.lower[0].used <= 5 * FRAME
        for entry, frames in enumerate(self.chunk_store.frames_of):
            if self.chunk_store.index.tiers[entry] & MEMORY:
                assert frames is not None
                assert self.chunk_store.index.state[entry] == READY

    def teardown(self) -> None:
        """When everybody is gone, everything can be dropped, and nothing leaked."""
        for who in range(3):
            self.client_dies(who)
        self.chunk_store.lower[0].up = True
        for _ in range(3):
            self.tier_works(fail=False)
        self.chunk_store.drop(keys(*range(12)))
        self.tier_works(fail=False)
        assert len(self.chunk_store.index) == 0
        assert self.chunk_store.budget.frames.free == 6
        assert self.chunk_store.lower[0].used == 0
        assert self.chunk_store.budget.hard_frames == 0
        assert not self.tier.held
        assert not self.chunk_store.being_written
        assert all(asker.session.held_bytes == 0 for asker in self.askers)


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
