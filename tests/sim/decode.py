"""A decode server: its engine allocates pages, takes transfers into them and uses what it is told is ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pdtransport.kv.geometry import consumers_of, head_range, head_sources
from pdtransport.protocol.actions import Action, BatchId, Failed, Fence, ReadBatch, Ready, Send
from pdtransport.protocol.consumer_table import ConsumerTable, GrantedPart, TransferOver
from pdtransport.protocol.messages import Ack, Batch, Claim, Code, Grant
from pdtransport.protocol.states import CONSUMER_ENDS
from tests.sim.memory import DAMAGE, Lease, Memory, cell, checksum
from tests.sim.plan import HEAD_BYTES, TOTAL_HEADS, Request
from tests.sim.prefill import PrefillWorker, digest_of
from tests.sim.world import Instance, PeerId, Violation, Worker, World

MASK = (1 << 20) - 1  # of the computation in a cell
USE_S = 0.3  # how long the engine reads pages that arrived


@dataclass(eq=False)
class Placing:
    """A batch on its way into our pages."""

    id: BatchId
    batch: Batch
    left: int
    stopped: bool = False
    sums: dict[int, bytes] = field(default_factory=dict)


class DecodeWorker(Worker):
    def __init__(self, world: World, instance: Instance, rank: int) -> None:
        super().__init__(world, instance, rank)
        lo, hi = head_range(rank, instance.tp, TOTAL_HEADS)
        self.memory = Memory(lo, hi, world.plan.pages)
        self.receiving = ConsumerTable(world.plan.limits, first_generation=instance.incarnation * 10_000 + 1)
        self.leases: dict[str, Lease] = {}
        self.free = list(range(world.plan.pages))
        self.placing: list[Placing] = []
        self.complete_parts: dict[str, set[tuple[PeerId, int]]] = {}

    # -- the engine's words --------------------------------------------------------------------------------------

    def begin(self, request: Request, producers: list[PeerId], tp: int) -> bool:
        """Grant; the caller checked that there are pages and that the peers are not lost."""
        memory = self.memory
        blocks = request.blocks - request.held
        pages = [self.free.pop() for _ in range(blocks)]
        for page in pages:
            memory.scribble(page)
        parts = []
        for source in head_sources(memory.head_lo, memory.head_hi, tp, TOTAL_HEADS, self.id.rank):
            peer = producers[source.rank]
            parts.append(
                GrantedPart(
                    peer=peer,
                    head_lo=source.head_lo,
                    head_hi=source.head_hi,
                    consumers=len(consumers_of(source.rank, tp, self.instance.tp, TOTAL_HEADS)),
                    block_bytes=(source.head_hi - source.head_lo) * HEAD_BYTES,
                )
            )
        heads = {part.peer: (part.head_lo, part.head_hi) for part in parts}
        lease = Lease(request.transfer, request.prompt, request.held, pages, heads)  # type: ignore[arg-type]
        lease.verified = {part.peer: set() for part in parts}  # type: ignore[misc]
        lease.first_token = request.first_token
        lease.cached_tokens = request.cached_tokens
        now = self.world.now
        digest = digest_of(request.prompt)
        try:
            actions = self.receiving.begin(
                request.transfer, digest, request.tokens, request.held, blocks, parts, now, request.first_token
            )
        except TransferOver as over:
            if not over.reason:
                raise Violation("refused without a reason") from over
            self.free.extend(pages)
            return False
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, Grant):
                lease.generations[action.peer] = action.message.generation  # type: ignore[index]
        self.complete_parts[request.transfer] = set()
        self.leases[request.transfer] = lease
        self.do(actions)
        return True

    # -- Worker --------------------------------------------------------------------------------------------------

    def on_message(self, peer: PeerId, message: Any) -> list[Action]:
        return self.receiving.on_message(peer, message, self.world.now)

    def peer_lost(self, peer: PeerId, reason: str) -> list[Action]:
        return self.receiving.peer_lost(peer, reason)

    def on_lost(self, peer: PeerId) -> None:
        """The channel is closed: our copies from it stop."""
        for placing in [p for p in self.placing if p.id.peer == peer]:
            placing.stopped = True
            self.placing.remove(placing)

    def tick(self) -> list[Action]:
        return self.receiving.tick(self.world.now)

    def next_deadline(self) -> float | None:
        return self.receiving.next_deadline()

    def fingerprint(self, message: Any) -> object:
        return [
            (m.peer, m.grant.generation, m.state, m.code, m._commit, m.bytes_verified, len(m._slots), m._deadline)
            for m in self.receiving.machines(message.transfer)
        ]

    def live_generation(self, peer: PeerId, transfer: str) -> int | None:
        for machine in self.receiving.machines(transfer):
            if machine.peer == peer and machine.state not in CONSUMER_ENDS:
                return machine.grant.generation
        return None

    def check(self) -> None:
        """No page has two owners, and none is lost."""
        owned = len(self.free) + sum(len(lease.pages) for lease in self.leases.values())
        if owned != self.world.plan.pages:
            raise Violation(f"{self.id}: {owned} pages of {self.world.plan.pages}")

    # -- actions -------------------------------------------------------------------------------------------------

    def do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                if isinstance(action.message, Ack):
                    self._check_ack(action.peer, action.message)  # type: ignore[arg-type]
                self.send(action.peer, action.message)  # type: ignore[arg-type]
            elif isinstance(action, ReadBatch):
                self._on_place(action)
            elif isinstance(action, Fence):
                delay = self.world.rng.uniform(0.0, self.world.plan.bytes.fence_delay)
                self.world.at(delay, self, self._on_fence, action)
            elif isinstance(action, Ready):
                self._on_ready(action)
            elif isinstance(action, Failed):
                self._on_failed(action)
            else:
                raise Violation(f"a consumer can't {action}")

    def _on_place(self, action: ReadBatch) -> None:
        batch, lease = action.batch, self.leases[action.id.transfer]
        if lease.generations.get(action.id.peer) != batch.generation:
            raise Violation(f"{self.id} places {batch} of another generation")
        first = batch.first_block - lease.first_block
        if not 0 <= first < first + batch.blocks <= len(lease.pages):
            raise Violation(f"{self.id} places {batch}, which was not granted")
        placing = Placing(action.id, batch, batch.blocks)
        self.placing.append(placing)
        for index in range(batch.blocks):
            delay = self.world.rng.uniform(0.0, self.world.plan.bytes.copy_delay)
            self.world.at(delay, self, self._copy, placing, index)

    def _copy(self, placing: Placing, index: int) -> None:
        """Fetch one block, and sum it up."""
        if placing.stopped:
            return
        batch, peer = placing.batch, placing.id.peer
        lease = self.leases.get(placing.id.transfer)
        if lease is None:
            raise Violation(f"{self.id} still copies into pages of {placing.id.transfer}, which were given back")
        lo, hi = lease.heads[peer]
        block = batch.first_block + index
        page = lease.pages[block - lease.first_block]
        cells = self._fetch(placing, index, lo, hi)
        if cells is None:
            return
        if self._fault("corrupt"):
            cells[-1] ^= DAMAGE
        lease.may_write(peer, batch.generation, block, page, lo, hi)
        self.memory.write(page, lo, cells)
        placing.sums[index] = checksum(self.memory.read(page, lo, hi))
        placing.left -= 1
        if placing.left == 0:
            self._placed(placing)

    def _fetch(self, placing: Placing, index: int, lo: int, hi: int) -> list[int] | None:
        """What the sender has there right now; None: this ended the placing."""
        source = self.world.worker(placing.id.peer)
        if not isinstance(source, PrefillWorker):
            self._end(placing, "link: the process is gone")
            return None
        if self._fault("error"):
            self._end(placing, "link: the copy failed")
            return None
        key = int.from_bytes(placing.batch.offer, "little")
        if self.world.link(placing.id.peer, self.id) == "direct":
            staged = source.offered[key]
            return source.memory.read(staged.pages[index], staged.lo, staged.hi)
        slot = source.staged.get(key)
        if slot is None or slot.copy is None:
            self._end(placing, "damaged: the sender withdrew the batch")
            return None
        return list(slot.copy[index])

    def _placed(self, placing: Placing) -> None:
        batch = placing.batch
        data = b"".join(placing.sums[index] for index in range(batch.blocks))
        if self.world.plan.limits.checksums and data != batch.checksums:
            self._end(placing, "damaged: wrong checksum")
            return
        lease = self.leases[placing.id.transfer]
        lease.verified[placing.id.peer].update(range(batch.first_block, batch.first_block + batch.blocks))
        self._end(placing, None)

    def _end(self, placing: Placing, error: str | None) -> None:
        placing.stopped = True
        self.placing.remove(placing)
        batch = placing.batch
        if self.world.tracing:
            self.world.say(f"{self.id} placed {placing.id.transfer} seq={batch.seq}.{batch.attempt}: {error or 'good'}")
        self.do(self.receiving.placed(placing.id, error, self.world.now))

    def _on_fence(self, fence: Fence) -> None:
        if self.world.tracing:
            self.world.say(f"{self.id} fenced {fence.transfer} {fence.peer}")
        for placing in [p for p in self.placing if p.id[:2] == (fence.transfer, fence.peer)]:
            placing.stopped = True
            self.placing.remove(placing)
        self.do(self.receiving.fenced(fence.transfer, fence.peer, fence.generation))

    def _check_ack(self, peer: PeerId, ack: Ack) -> None:
        lease = self.leases.get(ack.transfer)
        if lease is not None and lease.generations.get(peer) == ack.generation:
            wanted = set(range(lease.first_block, lease.first_block + len(lease.pages)))
            if lease.verified[peer] != wanted:
                raise Violation(f"{self.id} acks {ack.transfer} with blocks {lease.verified[peer]} of {wanted}")
            self.complete_parts[ack.transfer].add((peer, ack.generation))
        elif (peer, ack.generation) not in self.complete_parts.get(ack.transfer, set()):
            raise Violation(f"{self.id} acks {ack.transfer} to {peer}, which never was complete")

    def _close(self, transfer: str, word: str) -> Lease:
        if self.world.tracing:
            self.world.say(f"{self.id} {word} {transfer}")
        lease = self.leases.get(transfer)
        if lease is None or lease.ended:
            raise Violation(f"{self.id}: {word} for {transfer}, which is not owed")
        lease.ended, lease.open = word, False
        return lease

    def _on_ready(self, ready: Ready) -> None:
        lease = self._close(ready.transfer, "Ready")
        self.check_pages(lease)
        engine: Any = self.instance
        told = self.world.told.get(ready.transfer) if lease.first_token else None
        if ready.first_token != told:
            raise Violation(f"{ready} goes on from {ready.first_token}, prefill gave out {told}")
        if lease.pages and ready.cached_tokens != lease.cached_tokens:
            raise Violation(f"{ready} names other cached tokens than prefill found: {lease.cached_tokens}")
        engine.on_end(self, ready.transfer, True)

    def _on_failed(self, failed: Failed) -> None:
        if not isinstance(failed.code, Code) or not failed.reason:
            raise Violation(f"{failed} does not say why")
        self.world.counters[f"failed {failed.code.value}"] += 1
        self._close(failed.transfer, f"Failed({failed.code.value}: {failed.reason})")
        self.give_back(failed.transfer)
        engine: Any = self.instance
        engine.on_end(self, failed.transfer, False)

    def give_back(self, transfer: str) -> None:
        for page in self.leases.pop(transfer).pages:
            self.memory.scribble(page)
            self.free.append(page)

    def check_pages(self, lease: Lease) -> None:
        """Every page is what that producer computed for that prompt, and was verified here."""
        for peer, (lo, hi) in lease.heads.items():
            source: Any = self.world.computed[peer]
            for block, page in enumerate(lease.pages, lease.first_block):
                if block not in lease.verified[peer]:
                    raise Violation(f"{self.id}: block {block} of {lease.transfer} is used but was never verified")
                for head, value in enumerate(self.memory.read(page, lo, hi), lo):
                    wanted = cell(lease.prompt, block, head, 0)
                    if value & ~MASK != wanted or value not in source:
                        raise Violation(f"{self.id}: block {block} of {lease.transfer}, head {head} holds {value:x}")

    def _fault(self, name: str) -> bool:
        rate = getattr(self.world.plan.bytes, name)
        return bool(rate) and self.world.now < self.world.plan.faults_end and self.world.rng.random() < rate

    def leftovers(self) -> list[str]:
        found = {
            "live transfers": self.receiving.live,
            "agenda": self.receiving.next_deadline() or 0,
            "placements": len(self.placing),
            "leases": len(self.leases),
            "pages": self.world.plan.pages - len(self.free),
        }
        return [f"{self.id}: {name} left: {count}" for name, count in found.items() if count]


class DecodeEngine(Instance):
    def __init__(self, world: World, name: str, tp: int) -> None:
        self.wanted: dict[str, dict[int, bool | None]] = {}  # transfer -> rank -> how it ended
        super().__init__(world, name, tp, DecodeWorker)

    def restart(self) -> None:
        self.wanted = {}
        super().restart()

    def submit(self, request: Request, since: float | None = None) -> None:
        """Begin as soon as there are pages; until then ask prefill to hold its own."""
        if not self.alive:
            return
        since = self.world.now if since is None else since
        source = self.world.instances[request.producer]
        producers = [worker.id for worker in source.workers]
        never_met = not source.alive and source.died_at < self.born_at
        if never_met or any(peer in worker.lost for worker in self.workers for peer in producers):
            self.world.outcome(request.transfer, "no connection")
            return  # no connection, no transfer: decode computes by itself
        if request.declines:
            self._decline(request, producers)
            return
        needed = request.blocks - request.held
        if any(len(worker.free) < needed for worker in self.workers):  # type: ignore[attr-defined]
            self._claim(request, producers)
            self.world.at(0.2, self.workers[0], self.submit, request, since)
            return
        if request.transfer in self.wanted:
            for worker in self.workers:
                if worker.begin(request, producers, source.tp):  # type: ignore[attr-defined]
                    raise Violation(f"{request.transfer} was begun twice")
            return
        begun = [worker.begin(request, producers, source.tp) for worker in self.workers]  # type: ignore[attr-defined]
        if not any(begun):
            self.world.outcome(request.transfer, "refused")
            return
        self.wanted[request.transfer] = {rank: None for rank, yes in enumerate(begun) if yes}
        if not all(begun):
            self.abort(request.transfer)
        elif request.consumer_abort_at is not None:
            self.world.at(request.consumer_abort_at, self.workers[0], self.abort, request.transfer)
        self._rearm()

    def _decline(self, request: Request, producers: list[PeerId]) -> None:
        for worker in self.workers:
            for peer in producers:
                book: ConsumerTable = worker.receiving  # type: ignore[attr-defined]
                worker.do(book.decline(request.transfer, peer, Code.REJECTED, "the prompt is too long"))
        self.world.outcome(request.transfer, "declined")
        self._rearm()

    def _claim(self, request: Request, producers: list[PeerId]) -> None:
        for worker in self.workers:
            for peer in producers:
                worker.send(peer, Claim(transfer=request.transfer))

    def abort(self, transfer: str) -> None:
        if transfer not in self.wanted:
            return
        if self.world.tracing:
            self.world.say(f"{self.name} aborts {transfer}")
        for worker in self.workers:
            worker.do(worker.receiving.cancel(transfer, Code.CANCELLED, "the client left"))  # type: ignore[attr-defined]
        self._rearm()

    def on_end(self, worker: DecodeWorker, transfer: str, ready: bool) -> None:
        self.world.at(0.0, worker, self._ended, worker, transfer, ready)

    def _ended(self, worker: DecodeWorker, transfer: str, ready: bool) -> None:
        ranks = self.wanted[transfer]
        if not ready and all(end is not False for end in ranks.values()):
            for other in self.workers:
                text = "another rank failed"
                other.do(other.receiving.cancel(transfer, Code.PEER_CANCELLED, text))  # type: ignore[attr-defined]
            self._rearm()
        ranks[worker.id.rank] = ready
        if any(end is None for end in ranks.values()):
            return
        good = all(ranks.values())
        self.world.outcome(transfer, "ready" if good else "failed")
        self.world.at(USE_S if good else 0.0, self.workers[0], self._used, transfer, good)

    def _used(self, transfer: str, good: bool) -> None:
        """The engine attended to the pages and is through with them: they must be what they were."""
        for worker in self.workers:
            if not isinstance(worker, DecodeWorker) or transfer not in worker.leases:
                continue
            if good:
                worker.check_pages(worker.leases[transfer])
            worker.give_back(transfer)
        del self.wanted[transfer]

    def _rearm(self) -> None:
        for worker in self.workers:
            worker.check()
            worker.rearm()

    def leftovers(self) -> list[str]:
        found = [text for worker in self.workers for text in worker.leftovers()]  # type: ignore[attr-defined]
        return found + [f"{self.name}: {transfer} never ended" for transfer in self.wanted]
