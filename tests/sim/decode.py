"""The engine of a decode server: it allocates pages, has transfers received into them, and uses what it is told is
ready."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pdtransport.kv.groups import GONE
from pdtransport.protocol.messages import Code
from pdtransport.transfer.consumer import ReceiveRequest, WantedBlocks
from pdtransport.transfer.engine import TransferEngine
from pdtransport.transfer.outcome import Outcome
from tests.sim.memory import Lease, Lent, Violation
from tests.sim.network import FIRST_PORT
from tests.sim.plan import Request
from tests.sim.prefill import STRANGER, digest_of
from tests.sim.worker import Worker
from tests.sim.world import Instance

if TYPE_CHECKING:
    from tests.sim.run import SimWorld

USE_S = 0.3  # how long the engine reads pages that arrived
ASK_AGAIN_S = 0.2  # pause before a request that finds no pages is tried again


@dataclass(eq=False)
class Attempt:
    """One request in the engine."""

    request: Request
    leases: list[Lease] = field(default_factory=list)  # by rank; each the owner of its worker's transfer
    ends: dict[int, bool] = field(default_factory=dict)  # rank -> whether it ended well


class DecodeEngine(Instance):
    world: SimWorld

    def __init__(self, world: SimWorld, name: str, tp: int) -> None:
        self.attempts: list[Attempt] = []
        super().__init__(world, name, tp, lambda _world, instance, rank: Worker(world, instance, rank))

    def restart(self) -> None:
        self.attempts = []
        super().restart()

    def _later(self, delay: float, event: Any, *args: Any) -> None:
        self.world.at(delay, self.workers[0], event, *args)

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Begin as soon as there are pages; until then ask prefill to hold its own."""
        if not self.alive:
            return
        transfer, where = request.transfer, (request.producer, FIRST_PORT, self.world.plan.producers[request.producer])
        if request.declines:
            self._decline(request, where)
            return
        wanted = self._wanted(request)
        short = [
            len(free) < len(blocks) for worker in self.workers for free, blocks in zip(worker.free, wanted, strict=True)
        ]
        if any(short):
            for worker in self.workers:
                worker.call(lambda engine: engine.consumer.claim(transfer, *where))
            self._later(ASK_AGAIN_S, self.submit, request)
            return
        attempt = Attempt(request)
        self.attempts.append(attempt)
        attempt.leases = [self._lend(worker, request, wanted) for worker in self.workers]
        for worker, lease in zip(self.workers, attempt.leases, strict=True):
            worker.call(partial(self._fetch, attempt, worker, lease, where))
        if request.consumer_abort_at is not None:
            self._later(request.consumer_abort_at, self.abort, attempt)

    def _wanted(self, request: Request) -> list[range]:
        """By cache group, the blocks to receive, as pdtransport.engine finds them. Checked against the windows
        themselves: those that the prompt's last token, which is computed here, attends to, and that are not held."""
        tables, groups = self.world.plan.tables, self.world.plan.groups
        handed, held = tables.handed(request.tokens), request.held_tokens
        ends = tables.counts(handed)
        if held >= handed:
            return [range(end, end) for end in ends]
        live = [group.first_live(handed) for group in groups]
        blocks = [[GONE] * first + [0] * (end - first) for first, end in zip(live, ends, strict=True)]
        firsts, found = tables.missing(blocks, held, handed)
        for group, first, ids, end in zip(groups, firsts, found, ends, strict=True):
            since = request.tokens - group.window if group.window is not None else 0
            attended = range(max(held, since), request.tokens)
            behind = {token // group.block_size for token in attended if token < end * group.block_size}
            if behind != set(range(first, first + len(ids))):
                raise Violation(f"{self.name} asks for {len(ids)} blocks from {first} on, and attends to {attended}")
        return [range(first, end) for first, end in zip(firsts, ends, strict=True)]

    def _lend(self, worker: Worker, request: Request, wanted: list[range]) -> Lease:
        groups = tuple(
            Lent(blocks.start, [free.pop() for _ in blocks]) for free, blocks in zip(worker.free, wanted, strict=True)
        )
        lease = Lease(request.transfer, request.prompt, self.world.plan.tables.handed(request.tokens), groups)
        lease.first_token, lease.cached_tokens = request.first_token and lease.anything, request.cached_tokens
        for number, lent in enumerate(groups):
            for page in lent.pages:
                worker.memory.groups[number].scribble(page)
                worker.lent[number, page] = lease
        return lease

    def _fetch(
        self, attempt: Attempt, worker: Worker, lease: Lease, where: tuple[str, int, int], engine: TransferEngine
    ) -> None:
        request = attempt.request
        known = lease.transfer in worker.leases or engine.consumer.receiving.knows(lease.transfer)
        if not known:
            worker.leases[lease.transfer] = lease

        def ended(outcome: Outcome) -> None:
            if known != (outcome.code == Code.REUSED.value and not lease.generations):
                raise Violation(f"{worker}: {outcome}, though its id was {'' if known else 'not '}used before")
            self._on_end(attempt, worker, lease, outcome)

        if not known and not lease.anything:
            worker.owed.append((lease.transfer, None))
        wanted = ReceiveRequest(
            lease.transfer,
            *where,
            digest_of(request.prompt),
            lease.tokens,
            tuple(WantedBlocks(lent.first, lent.pages) for lent in lease.groups),
            lease.first_token,
        )
        engine.consumer.fetch(lease, wanted, worker.hears(ended))
        if known:  # whoever was refused may not speak of the other one's transfer
            engine.consumer.cancel(lease, lease.transfer, Code.CANCELLED, STRANGER)

    def _decline(self, request: Request, where: tuple[str, int, int]) -> None:
        code, why = Code.REJECTED, "the prompt is too long"
        for worker in self.workers:
            worker.owed.append((request.transfer, code))
            worker.call(lambda engine: engine.consumer.decline(request.transfer, code, why, *where))
        self.world.outcome(request.transfer, "declined")

    def abort(self, attempt: Attempt) -> None:
        if attempt not in self.attempts:
            return
        transfer = attempt.request.transfer
        if self.world.tracing:
            self.world.say(f"{self.name} aborts {transfer}")
        self._cancel(attempt, Code.CANCELLED, "the client left")

    def _cancel(self, attempt: Attempt, code: Code, why: str) -> None:
        for worker, lease in zip(self.workers, attempt.leases, strict=True):
            worker.call(partial(_cancel, lease, code, why))

    def reload(self) -> None:
        for worker in self.workers:
            worker.reload()

    # -- ends ----------------------------------------------------------------------------------------------------

    def _on_end(self, attempt: Attempt, worker: Worker, lease: Lease, outcome: Outcome) -> None:
        """The transfer has ended on this rank: nothing writes its pages any more."""
        transfer = lease.transfer
        worker.ended(outcome, f"ends {transfer}")
        if lease.ended:
            raise Violation(f"{worker}: a second end of {transfer}: {outcome}")
        if outcome.reason == STRANGER:
            raise Violation(f"{worker}: {outcome} by somebody who does not own it")
        lease.ended = outcome.code or "ready"
        if outcome.ok:
            worker.check_pages(lease)
            self._check_words(lease, outcome)
        else:
            self.world.counters[f"failed {outcome.code}"] += 1
            worker.give_back(lease)
        if lease.anything or outcome.code == Code.REUSED.value:
            worker.owed.append((transfer, Code(outcome.code) if outcome.code else None))
        self.world.at(0.0, worker, self._ended, attempt, worker, outcome.ok)

    def _check_words(self, lease: Lease, outcome: Outcome) -> None:
        told = self.world.told.get(lease.transfer) if lease.first_token else None
        if outcome.first_token != told:
            raise Violation(f"{outcome} goes on from {outcome.first_token}, prefill gave out {told}")
        if lease.anything and outcome.cached_tokens != lease.cached_tokens:
            raise Violation(f"{outcome} names other cached tokens than prefill found: {lease.cached_tokens}")

    def _ended(self, attempt: Attempt, worker: Worker, good: bool) -> None:
        if not good and all(attempt.ends.values()):
            self._cancel(attempt, Code.PEER_CANCELLED, "another rank failed")
        attempt.ends[worker.id.rank] = good
        if len(attempt.ends) < self.tp:
            return
        good = all(attempt.ends.values())
        reused = all(lease.ended == Code.REUSED.value for lease in attempt.leases)
        if not reused:
            self.world.outcome(attempt.request.transfer, "ready" if good else "failed")
        self._later(USE_S if good else 0.0, self._used, attempt, good)

    def _used(self, attempt: Attempt, good: bool) -> None:
        """The engine attended to the pages and is through with them: they must be what they were."""
        for worker, lease in zip(self.workers, attempt.leases, strict=True):
            if lease.ended != "ready":
                continue
            if good:
                worker.check_pages(lease)
            worker.give_back(lease)
        self.attempts.remove(attempt)

    def leftovers(self) -> list[str]:
        found = [text for worker in self.workers for text in worker.leftovers()]
        return found + [f"{self.name}: {attempt.request.transfer} never ended" for attempt in self.attempts]


def _cancel(lease: Lease, code: Code, why: str, engine: TransferEngine) -> None:
    engine.consumer.cancel(lease, lease.transfer, code, why)
