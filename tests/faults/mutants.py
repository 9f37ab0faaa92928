"""Bugs made on purpose in exchange and links, which the rig must find: ``python -m tests.faults.mutation``.

Rules of the protocol itself are broken in :mod:`tests.sim.mutants`. Here it is what ties them to real memory: each
mutant is patched into fresh worker processes, and the rig runs until it finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pdtransport.kernels.reference import memory
from pdtransport.links.memory import SlotRing
from pdtransport.links.reading import PullChannel, Tickets
from pdtransport.links.ucx.channel import UcxChannel
from pdtransport.protocol.actions import Action, Ready
from pdtransport.protocol.messages import Code
from pdtransport.protocol.producer import ProducerMachine
from pdtransport.transfer import consumer as consumer_module
from pdtransport.transfer.consumer import ConsumerDriver
from pdtransport.transfer.peers import Peers
from pdtransport.transfer.producer import ProducerDriver


def trusts_the_link() -> None:
    """Checksums are not looked at."""
    for kind in (PullChannel, UcxChannel):
        receive = kind.receive

        def unchecked(
            self: Any, key: int, offer: bytes, runs: Any, checksums: bytes, *rest: Any, receive: Any = receive
        ) -> None:
            receive(self, key, offer, runs, b"", *rest)

        kind.receive = unchecked  # type: ignore[method-assign]


def damage_is_fine() -> None:
    """A batch that arrived damaged counts as placed."""
    placed = ConsumerDriver._placed

    def patched(self: ConsumerDriver, action: Any, error: str | None) -> None:
        placed(self, action, None if error and error.startswith("damaged") else error)

    ConsumerDriver._placed = patched  # type: ignore[method-assign]


def fences_late() -> None:
    """Pages are given back while the link may still write them."""

    def patched(self: ConsumerDriver, action: Any) -> None:
        self.run(self.receiving.fenced(action.transfer, action.peer, action.generation))

    ConsumerDriver._fence = patched  # type: ignore[method-assign]


def keeps_tickets() -> None:
    """A released offer's ticket stays taken, and stands."""
    Tickets.revoke = lambda self, ticket: None  # type: ignore[method-assign, assignment]


def keeps_slots() -> None:
    """One staging slot in ten is not given back."""
    give_back, count = SlotRing.give_back, [0]

    def patched(self: SlotRing, slot: int) -> None:
        count[0] += 1
        if count[0] % 10:
            give_back(self, slot)

    SlotRing.give_back = patched  # type: ignore[method-assign]


def keeps_channels() -> None:
    """The channel of a peer that is gone is not closed."""
    for kind in (PullChannel, UcxChannel):
        kind.close = lambda self: None  # type: ignore[method-assign, assignment]


def forgets_staged() -> None:
    """A batch that decode has is not released on the link."""

    def patched(self: ProducerDriver, action: Any) -> None:
        self._staged.pop((action.transfer, action.peer, action.generation, action.seq, action.attempt), None)

    ProducerDriver._unstage = patched  # type: ignore[method-assign]


def wrong_place() -> None:
    """Batches after the first land one page too early."""
    place = ConsumerDriver._place

    def patched(self: ConsumerDriver, action: Any) -> None:
        sink = self._sinks[action.transfer]
        groups, batch = list(sink.wanted.groups), action.batch
        first, pages = groups[batch.group]
        if batch.first_block > first:
            groups[batch.group] = consumer_module.WantedBlocks(first, pages[-1:] + pages[:-1])
            sink.wanted = replace(sink.wanted, groups=tuple(groups))
        place(self, action)

    ConsumerDriver._place = patched  # type: ignore[method-assign]


def overruns() -> None:
    """A copy changes the byte behind what it was granted."""
    for kind in (PullChannel, UcxChannel):
        receive = kind.receive

        def patched(self: Any, key: int, offer: bytes, runs: Any, *rest: Any, receive: Any = receive) -> None:
            checksums, blocks, done = rest

            def then(error: str | None) -> None:
                memory(int(runs[-1].sum()), 1)[0] ^= 1
                done(error)

            receive(self, key, offer, runs, checksums, blocks, then)

        kind.receive = patched  # type: ignore[method-assign]


def ignores_withdrawal() -> None:
    """Pages that the engine took back (preemption) are still sent."""
    ready = ProducerMachine.pages_ready

    def patched(self: ProducerMachine, blocks: Sequence[int], tokens_done: int, now: float) -> list[Action]:
        return ready(self, tuple(map(max, blocks, self._ready)), tokens_done, now)

    ProducerMachine.pages_ready = patched  # type: ignore[method-assign]
    PullChannel.release = lambda self, key: None  # type: ignore[method-assign, assignment]


def never_gives_up() -> None:
    """A peer that died is not told to the transfers that wait for it."""
    ConsumerDriver.peer_lost = lambda self, peer, reason: None  # type: ignore[method-assign, assignment]
    ProducerDriver.peer_lost = lambda self, peer, reason: None  # type: ignore[method-assign, assignment]
    consumer_module.ConsumerDriver.tick = lambda self, now: None  # type: ignore[method-assign, assignment]


def says_ready_early() -> None:
    """Ready is reported with the commit, before the last batch is verified."""
    run = ConsumerDriver.run

    def patched(self: ConsumerDriver, actions: Sequence[Action]) -> None:
        run(self, actions)
        for transfer, sink in list(self._sinks.items()):
            if "committed" in sink.record.events:
                run(self, [Ready(transfer)])

    ConsumerDriver.run = patched  # type: ignore[method-assign]


def loses_waiters() -> None:
    """Requests that wait for a peer are forgotten when it goes."""
    Peers._fail_waiters = lambda self, endpoint, why: None  # type: ignore[method-assign, assignment]


def counts_nothing() -> None:
    """Ends are not counted."""
    end = ConsumerDriver._end

    def patched(self: ConsumerDriver, transfer: str, code: Code | None, reason: str) -> None:
        end(self, transfer, code, reason)
        self._counters["fetches_ok"] = 0

    ConsumerDriver._end = patched  # type: ignore[method-assign]


def breaks_in_the_thread() -> None:
    """Every hundredth turn of the I/O thread raises."""
    tick, count = Peers.tick, [0]

    def patched(self: Peers, now: float) -> None:
        count[0] += 1
        if count[0] % 100 == 0:
            raise RuntimeError("made on purpose")
        tick(self, now)

    Peers.tick = patched  # type: ignore[method-assign]


MUTANTS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        trusts_the_link,
        damage_is_fine,
        fences_late,
        keeps_tickets,
        keeps_slots,
        keeps_channels,
        forgets_staged,
        wrong_place,
        overruns,
        ignores_withdrawal,
        never_gives_up,
        says_ready_early,
        loses_waiters,
        counts_nothing,
        breaks_in_the_thread,
    )
}
