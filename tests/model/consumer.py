"""A decode worker around the real :class:`ConsumerTable`: its pages, its copies, and checks of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdtransport.protocol.actions import Action, BatchId, Failed, Fence, ReadBatch, Ready, Send
from pdtransport.protocol.consumer_table import ConsumerTable, GrantedPart
from pdtransport.protocol.messages import Ack, Batch, Code, GrantedGroup, Message
from tests.model.case import Broken, Case, Letter, Wanted, block_bytes, born, name_of
from tests.model.frozen import DEADLINE, RETRY, freeze, plain, wake
from tests.model.producer import JUNK, checksum, digest_of


@dataclass
class Lease:
    """Pages that are granted, or that the engine uses."""

    generations: dict[str, int] = field(default_factory=dict)  # peer -> of its grant
    verified: dict[str, set[tuple[int, int]]] = field(default_factory=dict)  # groups and blocks
    ended: str = ""


class Consumer:
    name = "c"

    def __init__(self, case: Case, incarnation: int = 1, before: Consumer | None = None) -> None:
        self.case = case
        self.incarnation = incarnation
        # No tombstones: an id that is over may be granted again, and only generations tell the two apart.
        self.book = ConsumerTable(case.limits(tombstones=0), first_generation=100 * incarnation + 1)
        self.up: set[str] = set()
        self.left = before.left if before else {wanted.name: wanted.times for wanted in case.wanted}
        self.cancels = before.cancels if before else case.consumer_cancels
        self.used: set[int] = before.used if before else set()  # generations, of all incarnations
        self.leases: dict[str, Lease] = {}
        self.content: dict[tuple[int, int, int], Any] = {}  # (group, page, first head) -> what is there; absent: junk
        self.placing: list[tuple[BatchId, Batch]] = []
        self.fences: list[tuple[str, str, int]] = []
        self.complete: set[tuple[str, int]] = set()  # (peer, generation) that may be acked
        self.out: list[Letter] = []

    @property
    def me(self) -> str:
        return born(self.name, self.incarnation)

    # -- what may happen here --------------------------------------------------------------------------------------

    def events(self) -> Iterator[tuple[Any, ...]]:
        for wanted in self.case.wanted:
            lease = self.leases.get(wanted.name)
            if lease is None and self.left[wanted.name] and self._may_begin(wanted):
                yield ("begin", wanted.name)
            elif lease is not None and lease.ended:
                yield ("use", wanted.name)
            elif lease is not None and self.cancels:
                yield ("cancel", wanted.name)
        for fence in self.fences:
            yield ("fence", *fence)
        yield from self.waits()

    def waits(self) -> Iterator[tuple[Any, ...]]:
        for transfer, peer in sorted(self.book._timers._when):
            yield ("retry", transfer, peer)
            yield ("deadline", transfer, peer)

    def _may_begin(self, wanted: Wanted) -> bool:
        taken = {at for name in self.leases for at in _places(self.case.of(name))}
        return not taken & _places(wanted) and {name_of(peer) for peer in self.up} >= set(wanted.producers)

    def do(self, event: tuple[Any, ...]) -> None:
        getattr(self, f"_on_{event[0]}")(*event[1:])

    def _on_begin(self, transfer: str) -> None:
        wanted = self.case.of(transfer)
        self.left[transfer] -= 1
        parts = []
        for name in wanted.producers:
            peer = max(peer for peer in self.up if name_of(peer) == name)  # the newest process of that name
            lo, hi = wanted.heads(name)
            groups = tuple(GrantedGroup(0, blocks, lo, hi) for blocks in wanted.blocks)
            parts.append(GrantedPart(peer, groups, tuple(block_bytes(group, lo, hi) for group in range(len(groups)))))
        lease = self.leases[transfer] = Lease(verified={part.peer: set() for part in parts})
        actions = self.book.begin(transfer, digest_of(transfer), wanted.blocks[0], parts, 0.0)
        for machine in self.book.machines(transfer):
            lease.generations[machine.peer] = machine.grant.generation
            if machine.grant.generation in self.used:
                raise Broken(f"{self.me} grants under generation {machine.grant.generation} a second time")
            self.used.add(machine.grant.generation)
        self._run(actions)

    def _on_cancel(self, transfer: str) -> None:
        self.cancels -= 1
        self._run(self.book.cancel(transfer, Code.CANCELLED, "the client left"))

    def _on_use(self, transfer: str) -> None:
        """The engine is through with the request."""
        self._check_pages(transfer, self.leases[transfer])
        self._give_back(transfer)

    def _on_retry(self, transfer: str, peer: str) -> None:
        wake(self.book._timers, (transfer, peer))
        self._run(self.book.tick(RETRY))

    def _on_deadline(self, transfer: str, peer: str) -> None:
        wake(self.book._timers, (transfer, peer))
        self._run(self.book.tick(DEADLINE))

    def _on_deliver(self, letter: Letter) -> None:
        message: Any = letter.message
        machine = self.book._machine(message.transfer, letter.sender)
        live = machine is not None and machine.grant.generation == message.generation and letter.to == self.me
        before = None if live else freeze(self.book)
        actions = self.book.on_message(letter.sender, message, 0.0)
        if not live and (freeze(self.book) != before or any(not isinstance(each, Send) for each in actions)):
            raise Broken(f"{self.me}: words about a grant that is not live changed something: {letter}")
        self._run(actions)

    def _on_copy(self, at: int, tags: tuple[Any, ...]) -> None:
        """A batch is placed and verified; ``tags``: what its sender's memory holds now."""
        batch_id, batch = self.placing.pop(at)
        transfer, peer, generation = batch_id[:3]
        self._write(transfer, peer, batch, tags)
        error = None if b"".join(checksum(tag) for tag in tags) == batch.checksums else "damaged: wrong checksum"
        if error is None:
            lease = self.leases[transfer]
            lease.verified[peer] |= _blocks(batch)
            if lease.verified[peer] >= {(group, block) for group, block, _ in self.case.of(transfer).parts}:
                self.complete.add((peer, generation))
        self._run(self.book.placed(batch_id, error, 0.0))

    def _on_copy_failed(self, at: int) -> None:
        batch_id, _ = self.placing.pop(at)
        self._run(self.book.placed(batch_id, "link: the process is gone", 0.0))

    def _write(self, transfer: str, peer: str, batch: Batch, tags: Sequence[Any]) -> None:
        """Every write into our pages."""
        lease, generation, first, blocks = self.leases.get(transfer), batch.generation, batch.first_block, batch.blocks
        what = f"{peer} writes blocks {first}..{first + blocks} of group {batch.group} of {transfer}"
        what += f" under generation {generation}"
        if lease is None or lease.ended:
            raise Broken(f"{what} into pages of {self.me} that were given back")
        if lease.generations.get(peer) != generation:
            raise Broken(f"{what}, granted was {lease.generations.get(peer)}")
        wanted = self.case.of(transfer)
        if batch.group >= len(wanted.pages) or not 0 <= first < first + blocks <= wanted.blocks[batch.group]:
            raise Broken(f"{what}, which were not granted")
        if lease.verified[peer] & _blocks(batch):
            raise Broken(f"{what} after they were verified")
        lo, _ = wanted.heads(name_of(peer))
        for page, tag in zip(wanted.pages[batch.group][first : first + blocks], tags, strict=True):
            self.content[batch.group, page, lo] = tag

    def _on_fence(self, transfer: str, peer: str, generation: int) -> None:
        self.fences.remove((transfer, peer, generation))
        self.placing = [each for each in self.placing if each[0][:2] != (transfer, peer)]
        self._run(self.book.fenced(transfer, peer, generation))

    def _on_lose(self, peer: str) -> None:
        """The channel to it is closed: nothing crosses any more."""
        self.up.discard(peer)
        self.placing = [each for each in self.placing if each[0].peer != peer]
        self._run(self.book.peer_lost(peer, "it fell silent"))

    def _on_meet(self, peer: str) -> None:
        self.up.add(peer)

    # -- what the machines ask for ---------------------------------------------------------------------------------

    def _run(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._check_said(action.peer, action.message)
                self.out.append(Letter(self.me, action.peer, plain(action.message)))
            elif isinstance(action, ReadBatch):
                lease = self.leases.get(action.id.transfer)
                if lease is None or lease.generations.get(action.id.peer) != action.id.generation:
                    raise Broken(f"{self.me} places {action.batch}, which is not granted now")
                self.placing = sorted([*self.placing, (action.id, action.batch)], key=lambda each: each[0])
            elif isinstance(action, Fence):
                self.fences = sorted([*self.fences, (action.transfer, action.peer, action.generation)])
            elif isinstance(action, Ready):
                lease = self._end(action.transfer, "ready")
                self._check_pages(action.transfer, lease)
            elif isinstance(action, Failed):
                if not action.reason:
                    raise Broken(f"{action} does not say why")
                self._end(action.transfer, "failed")
                self._give_back(action.transfer)
            else:
                raise Broken(f"a consumer can't {action}")

    def _end(self, transfer: str, how: str) -> Lease:
        lease = self.leases.get(transfer)
        if lease is None or lease.ended:
            raise Broken(f"{self.me}: {transfer} ends ({how}) and had ended before")
        if any(each[0].transfer == transfer for each in self.placing) or any(
            each[0] == transfer for each in self.fences
        ):
            raise Broken(f"{self.me}: {transfer} ends ({how}) while its pages are still written")
        lease.ended = how
        return lease

    def _give_back(self, transfer: str) -> None:
        del self.leases[transfer]
        for at in [at for at in self.content if at[:2] in _places(self.case.of(transfer))]:
            del self.content[at]

    def _check_pages(self, transfer: str, lease: Lease) -> None:
        """Each page holds what its producer, in this incarnation, computed for this transfer, and was verified."""
        wanted = self.case.of(transfer)
        for peer in lease.generations:
            lo, _ = wanted.heads(name_of(peer))
            for group, block, page in wanted.parts:
                tag = self.content.get((group, page, lo), JUNK)
                if (group, block) not in lease.verified[peer] or tag[:4] != (peer, transfer, group, block):
                    raise Broken(f"{self.me} believes page {page} of {transfer}, which holds {tag}")

    def _check_said(self, peer: str, message: Message) -> None:
        if isinstance(message, Ack) and (peer, message.generation) not in self.complete:
            raise Broken(f"{self.me} acks generation {message.generation} to {peer}, which is not complete")

    def drain(self) -> bool:
        """One step on the way to rest, with all peers silent from now on; False: there is none."""
        events = [event for event in self.events() if event[0] in ("use", "fence", "deadline")]
        if events:
            self.do(events[0])
        return bool(events)

    def held(self) -> str:
        """What is left when everything is over."""
        names = {"live transfers": self.book.live, "leases": len(self.leases), "copies": len(self.placing)}
        names |= {"fences": len(self.fences), "waits": len(self.book._timers._when)}
        return ", ".join(f"{count} {name}" for name, count in names.items() if count)


def _places(wanted: Wanted) -> set[tuple[int, int]]:
    """Groups and pages."""
    return {(group, page) for group, _, page in wanted.parts}


def _blocks(batch: Batch) -> set[tuple[int, int]]:
    return {(batch.group, block) for block in range(batch.first_block, batch.first_block + batch.blocks)}
