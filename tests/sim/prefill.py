"""The engine of a prefill server: it computes in steps, is preempted, and frees pages. Its ranks take each step
together."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pdtransport.kv.groups import GONE
from pdtransport.protocol.messages import Code
from pdtransport.transfer.engine import TransferEngine
from pdtransport.transfer.outcome import Outcome
from tests.sim.memory import Cell, Violation, cell
from tests.sim.plan import Group, Request
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
    pages: list[list[int]] = field(default_factory=list)  # by cache group; GONE: given back
    tokens: int = 0  # computed
    steps: int = 0  # how often a step was begun or undone
    resumes_at: float = 0.0
    promised: bool = False
    let_go: bool = False  # unless decode waits for it
    gave_early: bool = False  # a block that decode still attends to
    over: bool = False  # finished or aborted

    @property
    def prompt(self) -> int:
        return self.request.prompt if self.request.producer_prompt is None else self.request.producer_prompt


class PrefillEngine(Instance):
    world: SimWorld

    def __init__(self, world: SimWorld, name: str, tp: int) -> None:
        self.jobs: dict[str, Job] = {}
        self.groups, self.tables = world.plan.groups, world.plan.tables
        self.free = self._all_pages(world.plan.pages_of)
        self._computations = itertools.count(1)
        super().__init__(world, name, tp, lambda _world, instance, rank: Worker(world, instance, rank))

    def _all_pages(self, count: Callable[[Group], int]) -> list[list[int]]:
        return [list(range(count(group))) for group in self.groups]

    def restart(self) -> None:
        self.jobs, self.free = {}, self._all_pages(self.world.plan.pages_of)
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
        job = Job(request, set(range(self.tp)), [[] for _ in self.groups])
        for worker in self.workers:
            worker.call(partial(self._open, job, worker))
        accepted = sorted(job.owing)
        if not accepted:
            if request.open_twice:  # whoever was refused may not speak of the other one's transfer
                self._each(
                    lambda engine: engine.producer.pages_ready(job, request.transfer, [[]] * len(self.groups), 0)
                )
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
        engine.producer.open(job, transfer, digest_of(job.prompt), self._handed(job), on_end, promised)
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
        refused = job.gave_early and outcome.code == Code.MISMATCH.value
        if not job.over and not job.let_go and not refused:
            raise Violation(f"{worker}: Release of {transfer} while the engine still computes it")
        if outcome.ok:
            worker.check_delivered(transfer)
        worker.check_unread(_held(job.pages))
        worker.released[transfer] = outcome
        self.world.counters[f"released {outcome.code or 'delivered'}"] += 1
        if not job.owing:
            job.over = True
            del self.jobs[transfer]
            self._give_back(job.pages)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _handed(self, job: Job) -> int:
        """The tokens of the prompt that are handed over."""
        return self.tables.handed(job.request.tokens)

    def _told(self, job: Job, tokens: int) -> tuple[list[list[int]], int]:
        """What the workers are told once ``tokens`` tokens are computed."""
        tokens = min(tokens, self._handed(job))
        return [ids[:end] for ids, end in zip(job.pages, self.tables.counts(tokens), strict=True)], tokens

    def _begin_step(self, job: Job) -> None:
        if job.over:
            return
        request = job.request
        self._give_back_what_nobody_attends_to(job)
        lacking = [end - len(ids) for ids, end in zip(job.pages, self.tables.counts(request.tokens), strict=True)]
        short = any(len(free) < count for free, count in zip(self.free, lacking, strict=True))
        if self.world.now < job.resumes_at or short:
            self._later(AGAIN_S, self._begin_step, job)
            return
        for ids, free, count in zip(job.pages, self.free, lacking, strict=True):
            ids += [free.pop() for _ in range(count)]
        tokens = min(request.tokens, job.tokens + request.step_tokens)
        job.steps += 1
        if request.foretold and job.tokens < self._handed(job):
            transfer = request.transfer
            pages, told = self._told(job, tokens)
            self._each(lambda engine: engine.producer.prepare(job, transfer, pages, told, event=1))
        self._later(request.step_s, self._end_step, job, job.steps, tokens)

    def _give_back_what_nobody_attends_to(self, job: Job) -> None:
        for number, group in enumerate(self.groups):
            for block in range(min(len(job.pages[number]), group.first_live(job.tokens))):
                self.world.counters["given back"] += job.pages[number][block] != GONE
                self._give_back_block(job, number, block)

    def _give_back_block(self, job: Job, number: int, block: int) -> None:
        page = job.pages[number][block]
        if page == GONE:
            return
        job.pages[number][block] = GONE
        for worker in self.workers:
            worker.check_unread({(number, page)})
        self._give_back([[page] if each == number else [] for each in range(len(self.groups))])

    def _end_step(self, job: Job, step: int, tokens: int) -> None:
        if job.over or step != job.steps:
            return
        before, computation = job.tokens, next(self._computations)
        for number in range(len(self.groups)):
            self._compute(job, number, tokens, computation)
        job.tokens = tokens
        if before < self._handed(job):
            if job.request.gives_back_early and tokens >= self._handed(job):
                self._give_back_early(job)
            self._say_ready(job)
        if job.over:
            return
        if tokens < job.request.tokens:
            self._begin_step(job)
        else:
            self._later(job.request.lazy_finish_s, self._finish, job)

    def _compute(self, job: Job, number: int, tokens: int, computation: int) -> None:
        size = self.groups[number].block_size
        for block in range(job.tokens // size, -(-tokens // size)):
            filled = min(size, tokens - block * size)
            for worker in self.workers:
                memory = worker.memory.groups[number]
                what = [Cell(job.prompt, number, block, filled, head) for head in range(memory.head_lo, memory.head_hi)]
                cells = [cell(each, computation) for each in what]
                self.world.computed[worker.id].update(cells)
                memory.compute(job.pages[number][block], cells)

    def _give_back_early(self, job: Job) -> None:
        """The last block of a group with a window is gone before anybody has heard of it."""
        for number, group in enumerate(self.groups):
            if group.window is not None:
                job.gave_early = True
                self.world.counters["gave back early"] += 1
                self._give_back_block(job, number, self.tables.counts(self._handed(job))[number] - 1)
                return

    def _say_ready(self, job: Job) -> None:
        transfer = job.request.transfer
        pages, tokens = self._told(job, job.tokens)
        self._each(lambda engine: engine.producer.pages_ready(job, transfer, pages, tokens))

    def _preempt(self, job: Job) -> None:
        """Pages go to somebody else at once; the workers were told before."""
        if job.over or not any(job.pages):
            return
        keep = self._kept(job)
        ends = self.tables.counts(keep)
        gone = [ids[end:] for ids, end in zip(job.pages, ends, strict=True)]
        job.pages = [ids[:end] for ids, end in zip(job.pages, ends, strict=True)]
        job.tokens = keep
        job.steps += 1
        if self.world.tracing:
            self.world.say(f"{self.name} preempts {job.request.transfer}, keeps {keep} tokens")
        self._say_ready(job)
        for worker in self.workers:
            worker.check_unread(_held(gone))
        self._give_back(gone)
        job.resumes_at = self.world.now + job.request.resume_s
        self._later(job.request.resume_s, self._begin_step, job)

    def _kept(self, job: Job) -> int:
        """How many tokens a preempted request still has: whole blocks of all groups, and what the next token attends
        to."""
        unit = max(self.tables.block_sizes)
        keep = self.world.rng.randint(0, job.tokens // unit) * unit
        keep = keep if self.world.rng.random() < 0.5 else 0
        for group, ids, end in zip(self.groups, job.pages, self.tables.counts(keep), strict=True):
            if GONE in ids[group.first_live(keep) : end]:
                return 0
        return keep

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

    def _give_back(self, pages: list[list[int]]) -> None:
        for number, page in sorted(_held(pages)):
            self.free[number].insert(0, page)
            for worker in self.workers:
                worker.memory.groups[number].scribble(page)

    def leftovers(self) -> list[str]:
        found = [text for worker in self.workers for text in worker.leftovers()]
        if self.jobs or [sorted(free) for free in self.free] != self._all_pages(self.world.plan.pages_of):
            found.append(f"{self.name}: pages leaked, free are {self.free}, jobs {list(self.jobs)}")
        return found


def _held(pages: list[list[int]]) -> set[tuple[int, int]]:
    return {(number, page) for number, ids in enumerate(pages) for page in ids if page != GONE}


def digest_of(prompt: int) -> bytes:
    return prompt.to_bytes(16, "little")
