"""The engine of a prefill server: it computes in steps, is preempted, and frees pages. Its ranks take each step
together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pdtransport.protocol.messages import Code
from pdtransport.transfer.engine import TransferEngine
from pdtransport.transfer.outcome import Outcome
from tests.sim.memory import Violation, cell
from tests.sim.plan import BLOCK_SIZE, Request
from tests.sim.worker import Worker
from tests.sim.world import Instance

if TYPE_CHECKING:
    from tests.sim.run import SimWorld

STRANGER = "a stranger took it back"
LET_GO = "nobody asked for it"
AGAIN_S = 0.05  # pause before a step that finds no pages is tried again


@dataclass(eq=False)
class Job:
    """One request in the engine; the owner of its transfer."""

    request: Request
    owing: set[int] = field(default_factory=set)  # ranks whose Release is owed
    pages: list[int] = field(default_factory=list)
    tokens: int = 0  # computed
    steps: int = 0  # how often a step was begun or undone
    resumes_at: float = 0.0
    promised: bool = False
    let_go: bool = False  # unless decode waits for it
    over: bool = False  # finished or aborted

    @property
    def prompt(self) -> int:
        return self.request.prompt if self.request.producer_prompt is None else self.request.producer_prompt

    def pages_for(self, tokens: int) -> list[int]:
        return self.pages[: -(-tokens // BLOCK_SIZE)]


class PrefillEngine(Instance):
    world: SimWorld

    def __init__(self, world: SimWorld, name: str, tp: int) -> None:
        self.jobs: dict[str, Job] = {}
        self.free = list(range(world.plan.pages))
        self._computations = itertools.count(1)
        super().__init__(world, name, tp, lambda _world, instance, rank: Worker(world, instance, rank))

    def restart(self) -> None:
        self.jobs, self.free = {}, list(range(self.world.plan.pages))
        super().restart()

    def _later(self, delay: float, event: Any, *args: Any) -> None:
        self.world.at(delay, self.workers[0], event, *args)

    def _each(self, call: Any) -> None:
        for worker in self.workers:
            worker.call(call)

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        if not self.alive:
            return
        if self.world.tracing:
            self.world.say(f"{self.name} gets {request.transfer}")
        job = Job(request, set(range(self.tp)))
        for worker in self.workers:
            worker.call(partial(self._open, job, worker))
        accepted = sorted(job.owing)
        if not accepted:
            if request.open_twice:  # whoever was refused may not speak of the other one's transfer
                self._each(lambda engine: engine.producer.pages_ready(job, request.transfer, [], 0))
                self._each(lambda engine: engine.producer.cancel(job, request.transfer, Code.CANCELLED, STRANGER))
            return
        self.jobs[request.transfer] = job
        if len(accepted) < self.tp:
            self.abort(job)
            return
        self._begin_step(job)
        for after in request.preempt_at:
            self._later(after, self._preempt, job)
        if request.producer_abort_at is not None:
            self._later(request.producer_abort_at, self.abort, job)
        if request.let_go_at is not None:
            self._later(request.let_go_at, self._let_go, job)

    def _open(self, job: Job, worker: Worker, engine: TransferEngine) -> None:
        def promised() -> None:
            job.promised = True

        transfer, request = job.request.transfer, job.request
        on_end = worker.hears(partial(self._on_end, job, worker))
        engine.producer.open(job, transfer, digest_of(job.prompt), request.tokens, on_end, promised)
        if request.cached_tokens is not None:
            engine.producer.cached(job, transfer, request.cached_tokens)

    def _on_end(self, job: Job, worker: Worker, outcome: Outcome) -> None:
        """Nothing reads this rank's pages any more; or the transfer was refused."""
        transfer, rank = job.request.transfer, worker.id.rank
        worker.ended(outcome, f"lets go of {transfer}")
        if outcome.reason == STRANGER:
            raise Violation(f"{worker}: {outcome} by somebody who does not own it")
        if rank not in job.owing:
            raise Violation(f"{worker}: Release of {transfer}, which is not owed")
        job.owing.discard(rank)
        if self.jobs.get(transfer) is not job:
            if outcome.ok:
                raise Violation(f"{worker}: {transfer} was delivered before it was opened")
            return  # refused at once
        granted = worker.grants.keys() - worker.lost_grants
        if outcome.reason == LET_GO and any(name == transfer for name, _ in granted):
            raise Violation(f"{worker} lets go of {transfer}, for which decode has granted room")
        if not job.over and not job.let_go:
            raise Violation(f"{worker}: Release of {transfer} while the engine still computes it")
        if outcome.ok:
            worker.check_delivered(transfer)
        worker.check_unread(job.pages)
        worker.released[transfer] = outcome
        self.world.counters[f"released {outcome.code or 'delivered'}"] += 1
        if not job.owing:
            job.over = True
            del self.jobs[transfer]
            self._give_back(job.pages)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _begin_step(self, job: Job) -> None:
        if job.over:
            return
        request = job.request
        if self.world.now < job.resumes_at or len(self.free) < request.blocks - len(job.pages):
            self._later(AGAIN_S, self._begin_step, job)
            return
        while len(job.pages) < request.blocks:
            job.pages.append(self.free.pop())
        tokens = min(request.tokens, job.tokens + request.step_tokens)
        job.steps += 1
        if request.foretold:
            transfer = request.transfer
            pages = job.pages_for(tokens)
            self._each(lambda engine: engine.producer.prepare(job, transfer, pages, tokens, event=1))
        self._later(request.step_s, self._end_step, job, job.steps, tokens)

    def _end_step(self, job: Job, step: int, tokens: int) -> None:
        if job.over or step != job.steps:
            return
        computation = next(self._computations)
        for block in range(job.tokens // BLOCK_SIZE, -(-tokens // BLOCK_SIZE)):
            filled = min(BLOCK_SIZE, tokens - block * BLOCK_SIZE)
            for worker in self.workers:
                lo = worker.memory.head_lo
                heads = range(lo, lo + worker.memory.heads)
                cells = [cell(job.prompt, block, head, filled, computation) for head in heads]
                self.world.computed[worker.id].update(cells)
                worker.memory.compute(job.pages[block], cells)
        job.tokens = tokens
        self._say_ready(job)
        if tokens < job.request.tokens:
            self._begin_step(job)
        else:
            self._later(job.request.lazy_finish_s, self._finish, job)

    def _say_ready(self, job: Job) -> None:
        transfer, tokens = job.request.transfer, job.tokens
        pages = job.pages_for(tokens)
        self._each(lambda engine: engine.producer.pages_ready(job, transfer, pages, tokens))

    def _preempt(self, job: Job) -> None:
        """Pages go to somebody else at once; the workers were told before."""
        if job.over or not job.pages:
            return
        whole = job.tokens // BLOCK_SIZE
        keep = self.world.rng.randint(0, whole)
        keep = keep if self.world.rng.random() < 0.5 else 0
        gone, job.pages = job.pages[keep:], job.pages[:keep]
        job.tokens = min(job.tokens, keep * BLOCK_SIZE)
        job.steps += 1
        if self.world.tracing:
            self.world.say(f"{self.name} preempts {job.request.transfer}, keeps {keep} blocks")
        self._say_ready(job)
        for worker in self.workers:
            worker.check_unread(gone)
        self._give_back(gone)
        job.resumes_at = self.world.now + job.request.resume_s
        self._later(job.request.resume_s, self._begin_step, job)

    def _finish(self, job: Job) -> None:
        if job.over or job.tokens < job.request.tokens:
            return
        job.over = True
        transfer = job.request.transfer
        token = job.prompt if job.promised else None
        self.world.told[transfer] = token
        self._each(lambda engine: engine.producer.finish(job, transfer, token))

    def abort(self, job: Job) -> None:
        transfer = job.request.transfer
        if self.jobs.get(transfer) is not job:
            return
        if self.world.tracing:
            self.world.say(f"{self.name} aborts {transfer}")
        job.over = True
        self._each(lambda engine: engine.producer.cancel(job, transfer, Code.CANCELLED, "the client left"))

    def _let_go(self, job: Job) -> None:
        job.let_go = True
        self._each(lambda engine: engine.producer.let_go(job, job.request.transfer, LET_GO))

    def reload(self) -> None:
        self._stop_all()
        for worker in self.workers:
            worker.reload()

    def shut_down(self) -> None:
        self._stop_all()
        super().shut_down()
        if self.jobs:
            raise Violation(f"{self.name} is closed, and goes on with {list(self.jobs)}")

    def _stop_all(self) -> None:
        for job in self.jobs.values():
            job.over = True

    def _give_back(self, pages: list[int]) -> None:
        for page in pages:
            self.free.insert(0, page)
            for worker in self.workers:
                worker.memory.scribble(page)

    def leftovers(self) -> list[str]:
        found = [text for worker in self.workers for text in worker.leftovers()]
        if self.jobs or len(self.free) != self.world.plan.pages:
            found.append(f"{self.name}: {self.world.plan.pages - len(self.free)} pages leaked, jobs {list(self.jobs)}")
        return found


def digest_of(prompt: int) -> bytes:
    return prompt.to_bytes(16, "little")
