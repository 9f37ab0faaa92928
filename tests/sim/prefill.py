"""A prefill server: its engine computes, is preempted and frees pages; its workers push them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pdtransport.kv.geometry import head_range
from pdtransport.protocol.actions import Action, BatchId, OfferBatch, Release, Send, WithdrawBatch
from pdtransport.protocol.consumer_table import TransferOver
from pdtransport.protocol.messages import Ack, Code, Grant, Revoke
from pdtransport.protocol.messages import Received as ReceivedMessage
from pdtransport.protocol.producer_table import ProducerTable
from pdtransport.protocol.states import PRODUCER_ENDS, ProducerState
from tests.sim.memory import DAMAGE, JUNK, Memory, cell, checksum
from tests.sim.plan import BLOCK_SIZE, HEAD_BYTES, TOTAL_HEADS, Request
from tests.sim.world import Instance, PeerId, Violation, Worker, World


@dataclass
class Staged:
    """What a receiver may still fetch."""

    id: BatchId
    pages: list[int]
    lo: int
    hi: int
    copy: list[list[int]] | None  # in a slot; None: the receiver reads the pages themselves


class PrefillWorker(Worker):
    def __init__(self, world: World, instance: Instance, rank: int) -> None:
        super().__init__(world, instance, rank)
        lo, hi = head_range(rank, instance.tp, TOTAL_HEADS)
        self.memory = Memory(lo, hi, world.plan.pages)
        self.sending = ProducerTable(world.plan.limits, self._block_bytes)
        self.pages_of: dict[str, list[int]] = {}
        self.prompt_of: dict[str, int] = {}
        self.computed: set[int] = world.computed.setdefault(self.id, set())  # type: ignore[attr-defined]
        self.queue: list[OfferBatch] = []
        self.staged: dict[int, Staged] = {}  # key -> what it offers
        self.offered: dict[int, Staged] = {}  # the same, never forgotten: addresses that receivers know
        self.opened: set[str] = set()
        self.released: dict[str, tuple[Code | None, str]] = {}
        self.in_flight: dict[tuple[str, PeerId, int], dict[int, int]] = defaultdict(dict)  # seq -> bytes
        self.grants: dict[tuple[str, PeerId], Grant] = {}
        self.revoked: set[tuple[str, PeerId, int]] = set()  # transfer, peer, generation
        self._keys = itertools.count(1)

    def _block_bytes(self, lo: int, hi: int) -> int:
        if not self.memory.head_lo <= lo < hi <= self.memory.head_hi:
            raise ValueError(f"heads {lo}..{hi} are not held here")
        return (hi - lo) * HEAD_BYTES

    # -- the engine's words --------------------------------------------------------------------------------------

    def open(self, request: Request) -> bool:
        prompt = request.prompt if request.producer_prompt is None else request.producer_prompt
        digest = digest_of(prompt)
        try:
            actions = self.sending.open(request.transfer, digest, request.tokens, request.blocks, self.world.now)
        except TransferOver as over:
            if not over.reason:
                raise Violation("refused without a reason") from over
            return False
        if request.transfer in self.released:
            del self.released[request.transfer]
        self.opened.add(request.transfer)
        self.prompt_of[request.transfer] = prompt
        self.pages_of[request.transfer] = []
        if request.cached_tokens is not None:
            self.sending.cached(request.transfer, request.cached_tokens)
        self.do(actions)
        return True

    def compute(self, transfer: str, page: int, block: int, computation: int) -> None:
        prompt = self.prompt_of[transfer]
        heads = range(self.memory.head_lo, self.memory.head_hi)
        cells = [cell(prompt, block, head, computation) for head in heads]
        self.computed.update(cells)
        self.memory.pages[page] = cells

    def pages_ready(self, request: Request, pages: Sequence[int], blocks: int) -> None:
        if request.transfer in self.pages_of:
            self.pages_of[request.transfer] = list(pages)
        tokens = request.tokens if blocks == request.blocks else blocks * BLOCK_SIZE
        self.do(self.sending.pages_ready(request.transfer, blocks, tokens, self.world.now))

    # -- Worker --------------------------------------------------------------------------------------------------

    def on_message(self, peer: PeerId, message: Any) -> list[Action]:
        if isinstance(message, Grant):
            self.grants.setdefault((message.transfer, peer), message)
        elif isinstance(message, Revoke) and not self.sending._is_foreign(peer, message.transfer):
            self.revoked.add((message.transfer, peer, message.generation))
        elif isinstance(message, ReceivedMessage):
            for seq in message.seqs:
                self.in_flight[message.transfer, peer, message.generation].pop(seq, None)
        elif isinstance(message, Ack):
            self.in_flight.pop((message.transfer, peer, message.generation), None)
        return self.sending.on_message(peer, message, self.world.now)

    def peer_lost(self, peer: PeerId, reason: str) -> list[Action]:
        return self.sending.peer_lost(peer, reason)

    def on_lost(self, peer: PeerId) -> None:
        """The channel to a lost peer is closed: nothing more is staged for it."""
        self.queue = [push for push in self.queue if push.id.peer != peer]
        self.staged = {key: staged for key, staged in self.staged.items() if staged.id.peer != peer}

    def tick(self) -> list[Action]:
        return self.sending.tick(self.world.now)

    def next_deadline(self) -> float | None:
        return self.sending.next_deadline()

    def fingerprint(self, message: Any) -> object:
        return [
            (m.peer, m.grant.generation, m.state, m.code, m._next_block, m._in_flight, len(m._out), m._commit)
            for m in self.sending.machines(message.transfer)
        ]

    def live_generation(self, peer: PeerId, transfer: str) -> int | None:
        for machine in self.sending.machines(transfer):
            if machine.peer == peer and machine.state not in PRODUCER_ENDS:
                return machine.grant.generation
        return None

    def check(self) -> None:
        """Bytes in flight, as the wire saw them, never exceed the window of the grant."""
        limits = self.world.plan.limits
        for (transfer, peer, generation), seqs in self.in_flight.items():
            grant = self.grants.get((transfer, peer))
            if not seqs or grant is None or grant.generation != generation:
                continue
            block = (grant.head_hi - grant.head_lo) * HEAD_BYTES
            batch = max(1, limits.batch_bytes // block) * block
            if sum(seqs.values()) > max(batch, min(limits.window_bytes, grant.window_bytes)):
                raise Violation(f"{self.id}: {sum(seqs.values())} bytes of {transfer} in flight, window exceeded")

    # -- actions -------------------------------------------------------------------------------------------------

    def do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.send(action.peer, action.message)  # type: ignore[arg-type]
            elif isinstance(action, OfferBatch):
                self._on_push(action)
            elif isinstance(action, WithdrawBatch):
                self._on_unstage(action)
            elif isinstance(action, Release):
                self._on_release(action)
            else:
                raise Violation(f"a producer can't {action}")

    def _on_push(self, push: OfferBatch) -> None:
        transfer, peer, generation = grant_id = push.id[:3]
        grant = self.grants[transfer, peer]
        if grant.generation != generation or (grant.head_lo, grant.head_hi) != (push.head_lo, push.head_hi):
            raise Violation(f"{push} was not granted")
        if grant_id in self.revoked:
            raise Violation(f"{push} comes after its grant was revoked")
        end = grant.first_block + grant.blocks
        if not grant.first_block <= push.first_block < push.first_block + push.blocks <= end:
            raise Violation(f"{push} lies outside its grant")
        self.in_flight[grant_id][push.id.seq] = push.blocks * self._block_bytes(push.head_lo, push.head_hi)
        self.queue.append(push)
        self.world.at(self.world.rng.uniform(0.0, 0.01), self, self._stage, push)

    def _stage(self, push: OfferBatch) -> None:
        if push not in self.queue:
            return  # withdrawn meanwhile
        kind = self.world.link(self.id, push.id.peer)
        if kind == "slots" and sum(s.copy is not None for s in self.staged.values()) >= self.world.plan.bytes.slots:
            self.world.at(0.02, self, self._stage, push)  # all slots are busy
            return
        self.queue.remove(push)
        if self._fault("error"):
            self._push_failed(push, "link: the send failed")
            return
        pages = self.pages_of[push.id.transfer][push.first_block : push.first_block + push.blocks]
        if len(pages) != push.blocks:
            raise Violation(f"{push} names blocks that the request has no pages for")
        copy = [self.memory.read(page, push.head_lo, push.head_hi) for page in pages]
        key = next(self._keys)
        staged = Staged(push.id, pages, push.head_lo, push.head_hi, copy if kind == "slots" else None)
        self.staged[key] = self.offered[key] = staged
        self._pushed(push, [checksum(cells) for cells in copy], key)

    def _pushed(self, push: OfferBatch, sums: list[bytes], key: int) -> None:
        data = b"".join(sums) if self.world.plan.limits.checksums else b""
        offer = key.to_bytes(8, "little")
        self.do(self.sending.pushed(push.id, data, offer, self.world.now))

    def _push_failed(self, push: OfferBatch, error: str) -> None:
        self.do(self.sending.push_failed(push.id, error))

    def _on_unstage(self, action: WithdrawBatch) -> None:
        for push in [push for push in self.queue if push.id == action.id]:
            self.queue.remove(push)
        self.staged = {key: staged for key, staged in self.staged.items() if staged.id != action.id}

    def _on_release(self, release: Release) -> None:
        if self.world.tracing:
            self.world.say(f"{self.id} Release {release.transfer} {release.code} {release.reason}")
        if release.transfer not in self.opened or release.transfer in self.released:
            raise Violation(f"{self.id}: Release of {release.transfer}, which is not owed")
        if release.code is not None and not release.reason:
            raise Violation(f"{self.id}: Release({release.code}) without a reason")
        self._check_delivered(release)
        self.released[release.transfer] = (release.code, release.reason)
        self.world.counters[f"released {release.code.value if release.code else 'delivered'}"] += 1
        for page in self.pages_of.pop(release.transfer):
            self.memory.scribble(page)
        engine: Any = self.instance
        engine.on_release(self.id.rank, release.transfer)

    def _check_delivered(self, release: Release) -> None:
        """Pages are only given up as delivered if every consumer worker really has them."""
        machines = [self.sending.machines(release.transfer)]
        for (transfer, peer), grant in self.grants.items():
            target: Any = self.world.worker(peer)
            if release.code is not None or transfer != release.transfer or target is None:
                continue
            if (self.id, grant.generation) not in target.complete_parts.get(transfer, set()):
                raise Violation(f"{self.id}: Release of {transfer} as delivered, but {peer} has not verified it")
        if any(m.state is not ProducerState.DONE for group in machines for m in group if release.code is None):
            raise Violation(f"{self.id}: Release of {release.transfer} as delivered before the ack")

    def _fault(self, name: str) -> bool:
        rate = getattr(self.world.plan.bytes, name)
        return bool(rate) and self.world.now < self.world.plan.faults_end and self.world.rng.random() < rate

    def leftovers(self) -> list[str]:
        sending = self.sending
        found = {
            "live transfers": sending.live,
            "early grants": sending.early,
            "early claims": len(sending._early_claims),
            "agenda": sending.next_deadline() or 0,
            "queued pushes": len(self.queue),
            "staged batches": len(self.staged),
            "pages": len(self.pages_of),
        }
        return [f"{self.id}: {name} left: {count}" for name, count in found.items() if count]


@dataclass
class Job:
    """One request in the engine."""

    request: Request
    ranks: set[int]  # whose Release is owed
    pages: list[int] = field(default_factory=list)
    ready: int = 0
    resumes_at: float = 0.0
    started: bool = False
    over: bool = False  # finished or aborted


class PrefillEngine(Instance):
    """All ranks take each step together."""

    def __init__(self, world: World, name: str, tp: int) -> None:
        self.jobs: dict[str, Job] = {}
        self.free = list(range(world.plan.pages))
        self._computations = itertools.count(1)
        super().__init__(world, name, tp, PrefillWorker)

    def restart(self) -> None:
        self.jobs, self.free = {}, list(range(self.world.plan.pages))
        super().restart()

    def _later(self, delay: float, event: Any, *args: Any) -> None:
        self.world.at(delay, self.workers[0], event, *args)

    def submit(self, request: Request) -> None:
        if not self.alive:
            return
        if self.world.tracing:
            self.world.say(f"{self.name} gets {request.transfer}")
        accepted = [worker.open(request) for worker in self.workers]  # type: ignore[attr-defined]
        if not any(accepted):
            return
        job = Job(request, {rank for rank, yes in enumerate(accepted) if yes})
        self.jobs[request.transfer] = job
        if not all(accepted):
            self.abort(request.transfer)
            return
        self._later(request.step_s, self._step, job)
        for after in request.preempt_at:
            self._later(after, self._preempt, job)
        if request.producer_abort_at is not None:
            self._later(request.producer_abort_at, self.abort, request.transfer)
        self._rearm()

    def _step(self, job: Job) -> None:
        if job.over or self.jobs.get(job.request.transfer) is not job:
            return
        request = job.request
        if self.world.now < job.resumes_at or len(self.free) < request.blocks - len(job.pages):
            self._later(0.05, self._step, job)
            return
        while len(job.pages) < request.blocks:
            job.pages.append(self.free.pop())
        new = min(request.blocks, job.ready + request.step_blocks)
        computation = next(self._computations)
        for worker in self.workers:
            for block in range(job.ready, new):
                worker.compute(request.transfer, job.pages[block], block, computation)  # type: ignore[attr-defined]
        job.ready = new
        self._say_ready(job)
        if new < request.blocks:
            self._later(request.step_s, self._step, job)
        else:
            self._later(request.lazy_finish_s, self._finish, job)

    def _say_ready(self, job: Job) -> None:
        for worker in self.workers:
            worker.pages_ready(job.request, job.pages, job.ready)  # type: ignore[attr-defined]
        self._rearm()

    def _preempt(self, job: Job) -> None:
        """Pages go to somebody else at once; the workers were told before."""
        if job.over or not job.pages:
            return
        keep = self.world.rng.randint(0, job.ready)
        keep = keep if self.world.rng.random() < 0.5 else 0
        was_complete = job.ready == job.request.blocks
        gone, job.pages = job.pages[keep:], job.pages[:keep]
        job.ready = keep
        if self.world.tracing:
            self.world.say(f"{self.name} preempts {job.request.transfer}, keeps {keep} blocks")
        self._say_ready(job)
        self._give_back(gone)
        job.resumes_at = self.world.now + job.request.resume_s
        if was_complete:
            self._later(job.request.resume_s, self._step, job)

    def _finish(self, job: Job) -> None:
        if job.over or job.ready < job.request.blocks:
            return
        job.over = True
        transfer = job.request.transfer
        promised = any(worker.sending.promised(transfer) for worker in self.workers)  # type: ignore[attr-defined]
        token = first_token_of(job.request) if promised else None
        self.world.told[transfer] = token
        for worker in self.workers:
            worker.do(worker.sending.finish(transfer, self.world.now, token))  # type: ignore[attr-defined]
        self._rearm()

    def abort(self, transfer: str) -> None:
        job = self.jobs.get(transfer)
        if job is None:
            return
        if self.world.tracing:
            self.world.say(f"{self.name} aborts {transfer}")
        job.over = True
        for worker in self.workers:
            worker.do(worker.sending.cancel(transfer, Code.CANCELLED, "the client left"))  # type: ignore[attr-defined]
        self._rearm()

    def on_release(self, rank: int, transfer: str) -> None:
        job = self.jobs[transfer]
        if not job.over:
            raise Violation(f"{self.name}: Release of {transfer} while the engine still computes it")
        job.ranks.discard(rank)
        if not job.ranks:
            del self.jobs[transfer]
            self._give_back(job.pages)

    def _give_back(self, pages: list[int]) -> None:
        for page in pages:
            self.free.insert(0, page)
            for worker in self.workers:
                worker.memory.scribble(page)  # type: ignore[attr-defined]

    def _rearm(self) -> None:
        for worker in self.workers:
            worker.check()
            worker.rearm()

    def leftovers(self) -> list[str]:
        found = [text for worker in self.workers for text in worker.leftovers()]  # type: ignore[attr-defined]
        if self.jobs or len(self.free) != self.world.plan.pages:
            found.append(f"{self.name}: {self.world.plan.pages - len(self.free)} pages leaked, jobs {list(self.jobs)}")
        return found


def digest_of(prompt: int) -> bytes:
    return prompt.to_bytes(16, "little")


def first_token_of(request: Request) -> int:
    return request.prompt if request.producer_prompt is None else request.producer_prompt


def is_junk(value: int) -> bool:
    return bool(value & (JUNK | DAMAGE))
