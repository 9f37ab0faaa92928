"""A prefill worker around the real :class:`ProducerTable`: its engine, its link, and checks of both."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from pdtransport.protocol.actions import Action, OfferBatch, Release, Send, WithdrawBatch
from pdtransport.protocol.consumer_table import TransferOver
from pdtransport.protocol.messages import Ack, Code, Revoke
from pdtransport.protocol.producer_table import ProducerTable
from tests.model.case import Broken, Case, Letter, block_bytes, born
from tests.model.frozen import DEADLINE, RETRY, freeze, plain, wake

JUNK = ("junk",)


def digest_of(transfer: str) -> bytes:
    return transfer.encode().ljust(16, b".")


def checksum(tag: Any) -> bytes:
    return zlib.crc32(repr(tag).encode()).to_bytes(8, "little")


class Producer:
    def __init__(self, case: Case, name: str, incarnation: int = 1) -> None:
        self.case = case
        self.name = name
        self.incarnation = incarnation
        self.book = ProducerTable(case.limits(tombstones=64), block_bytes)
        self.up: set[str] = set()
        # transfer -> computing | finished | released; by group, what each computed block holds
        self.engine = {each.name: "absent" for each in case.wanted if name in each.producers}
        self.blocks: dict[str, list[list[Any]]] = {transfer: self._none(transfer) for transfer in self.engine}
        self.cancels = case.producer_cancels
        self.preemptions = case.preemptions
        self.queue: list[OfferBatch] = []
        self.acked: set[tuple[str, str, int]] = set()
        self.revoked: set[tuple[str, str, int]] = set()
        self.out: list[Letter] = []

    @property
    def me(self) -> str:
        return born(self.name, self.incarnation)

    # -- what may happen here --------------------------------------------------------------------------------------

    def events(self) -> Iterator[tuple[Any, ...]]:
        for transfer, state in self.engine.items():
            whole = self._computed(transfer) == self.case.of(transfer).blocks
            if state == "absent":
                yield ("open", transfer)
            elif state == "computing":
                yield ("finish" if whole else "compute", transfer)
                if self.preemptions and any(self.blocks[transfer]):
                    yield ("preempt", transfer)
            if state in ("computing", "finished") and self.cancels:
                yield ("cancel", transfer)
        for at in range(len(self.queue)):
            yield ("stage", at)
        yield from self.waits()

    def waits(self) -> Iterator[tuple[Any, ...]]:
        for key in sorted(self.book._timers._when, key=repr):
            yield ("retry", *key)
            yield ("deadline", *key)

    def _none(self, transfer: str) -> list[list[Any]]:
        return [[] for _ in self.case.of(transfer).pages]

    def _computed(self, transfer: str) -> tuple[int, ...]:
        return tuple(map(len, self.blocks[transfer]))

    def do(self, event: tuple[Any, ...]) -> None:
        getattr(self, f"_on_{event[0]}")(*event[1:])

    def _on_open(self, transfer: str) -> None:
        blocks = self.case.of(transfer).blocks
        self.engine[transfer] = "computing"
        try:
            actions = self.book.open(transfer, digest_of(transfer), blocks[0], blocks, 0.0)
        except TransferOver as over:
            if not over.reason:
                raise Broken("refused without a reason") from over
            self.engine[transfer] = "released"
            return
        self._run(actions)

    def _on_compute(self, transfer: str) -> None:
        """One block more of one group: the blocks of the last group are the largest, and final last."""
        run = self.case.preemptions - self.preemptions  # what is computed anew may differ in its last bits
        for group, (blocks, most) in enumerate(zip(self.blocks[transfer], self.case.of(transfer).blocks, strict=True)):
            if len(blocks) < most:
                blocks.append((self.me, transfer, group, len(blocks), run))
                break
        self._run(self.book.pages_ready(transfer, self._computed(transfer), 0, 0.0))

    def _on_preempt(self, transfer: str) -> None:
        """Its pages are somebody else's at once; the machines were told before."""
        self.preemptions -= 1
        self.blocks[transfer] = self._none(transfer)
        self._run(self.book.pages_ready(transfer, self._computed(transfer), 0, 0.0))

    def _on_finish(self, transfer: str) -> None:
        self.engine[transfer] = "finished"
        self._run(self.book.finish(transfer, 0.0))

    def _on_cancel(self, transfer: str) -> None:
        self.cancels -= 1
        self.engine[transfer] = "finished"
        self._run(self.book.cancel(transfer, Code.CANCELLED, "the client left"))

    def _on_stage(self, at: int) -> None:
        push = self.queue.pop(at)
        blocks = self.blocks[push.id.transfer][push.group]
        tags = tuple(blocks[push.first_block : push.first_block + push.blocks])
        if len(tags) != push.blocks:
            raise Broken(f"{self.me} reads pages for {push}, which it does not hold")
        sums = b"".join(checksum(tag) for tag in tags)
        self._run(self.book.pushed(push.id, sums, bytes(8), 0.0))

    def _on_retry(self, *key: Any) -> None:
        wake(self.book._timers, key)
        self._run(self.book.tick(RETRY))

    def _on_deadline(self, *key: Any) -> None:
        wake(self.book._timers, key)
        self._run(self.book.tick(DEADLINE))

    def _on_deliver(self, letter: Letter) -> None:
        message: Any = letter.message
        if isinstance(message, Ack):
            self.acked.add((message.transfer, letter.sender, message.generation))
        elif isinstance(message, Revoke) and not self.book._is_foreign(letter.sender, message.transfer):
            self.revoked.add((message.transfer, letter.sender, message.generation))
        machines = {machine.peer: machine for machine in self.book.machines(message.transfer)}
        live = machines.get(letter.sender)
        if live is not None and live.grant.generation == message.generation and letter.to == self.me:
            del machines[letter.sender]
        before = {peer: freeze(machine) for peer, machine in machines.items()}
        actions = self.book.on_message(letter.sender, message, 0.0)
        for peer, machine in machines.items():
            if freeze(machine) != before[peer]:
                raise Broken(f"{self.me}: words about a grant that is not live changed that of {peer}: {letter}")
        self._run(actions)

    def _on_lose(self, peer: str) -> None:
        """The channel to it is closed: nothing of ours is under way any more."""
        self.up.discard(peer)
        self.queue = [push for push in self.queue if push.id.peer != peer]
        self._run(self.book.peer_lost(peer, "it fell silent"))

    def _on_meet(self, peer: str) -> None:
        self.up.add(peer)

    # -- what the machines ask for ---------------------------------------------------------------------------------

    def _run(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.out.append(Letter(self.me, action.peer, plain(action.message)))
            elif isinstance(action, OfferBatch):
                self._check_push(action)
                self.queue = sorted([*self.queue, action], key=lambda push: push.id)
            elif isinstance(action, WithdrawBatch):
                self._unstage(action)
            elif isinstance(action, Release):
                self._release(action)
            else:
                raise Broken(f"a producer can't {action}")

    def _check_push(self, push: OfferBatch) -> None:
        if push.id[:3] in self.revoked:
            raise Broken(f"{self.me} pushes batch {push.id.seq} of {push.id.transfer} after its grant was revoked")
        if any(other.id[:4] == push.id[:4] for other in self.queue):
            raise Broken(f"{self.me} pushes batch {push.id.seq} of {push.id.transfer} while it is under way")

    def _unstage(self, action: WithdrawBatch) -> None:
        self.queue = [push for push in self.queue if push.id != action.id]

    def _release(self, release: Release) -> None:
        transfer = release.transfer
        if self.engine[transfer] != "finished":
            raise Broken(f"{self.me}: Release of {transfer}, whose engine is {self.engine[transfer]}")
        if release.code is None and not any(each[0] == transfer for each in self.acked):
            raise Broken(f"{self.me}: Release of {transfer} as delivered, and nobody acked it")
        if release.code is not None and not release.reason:
            raise Broken(f"{self.me}: Release of {transfer} does not say why")
        self.engine[transfer] = "released"
        self.blocks[transfer] = self._none(transfer)

    def drain(self) -> bool:
        """One step on the way to rest, with all peers silent from now on; False: there is none."""
        events = [event for event in self.events() if event[0] not in ("open", "cancel", "preempt", "retry")]
        if events:
            self.do(events[0])
        return bool(events)

    def held(self) -> str:
        book = self.book
        names = {"live transfers": book.live, "early grants": book.early, "claims": len(book._early_claims)}
        names |= {"pushes": len(self.queue)}
        names |= {"waits": len(book._timers._when), "pages": sum(sum(self._computed(each)) for each in self.blocks)}
        return ", ".join(f"{count} {name}" for name, count in names.items() if count)
