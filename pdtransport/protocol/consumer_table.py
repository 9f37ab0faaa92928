"""All transfers that one consumer (decode worker) receives: live grants, and tombstones of those that ended.

Invariants: every grant has a generation of its own, a message of another generation changes nothing, and a transfer id
is never used twice while its tombstone is kept.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdtransport.protocol.actions import Action, BatchId, Failed, Limits, Peer, Ready, Send
from pdtransport.protocol.consumer import ConsumerMachine
from pdtransport.protocol.messages import (
    Ack,
    Batch,
    Code,
    Commit,
    Generation,
    Grant,
    GrantedGroup,
    ProducerMessage,
    Revoke,
    TransferId,
)
from pdtransport.protocol.states import ConsumerState
from pdtransport.protocol.timers import TimerQueue


class TransferOver(Exception):
    """The transfer can't begin: its id is live or was used before, or too many transfers are live; see ``code``."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class GrantedPart:
    """The part of a transfer that is granted to one producer: one entry per cache group.

    ``block_bytes``: bytes of one block of each group, all its layers, for the heads that ``groups`` names.
    """

    peer: Peer
    groups: tuple[GrantedGroup, ...]
    block_bytes: tuple[int, ...]
    consumers: int = 1


@dataclass
class _Transfer:
    parts: dict[Peer, ConsumerMachine]
    first_failure: tuple[Code, str] | None = None
    first_tokens: set[int | None] = field(default_factory=set)
    cached_tokens: list[int | None] = field(default_factory=list)
    ended: set[Peer] = field(default_factory=set)


class ConsumerTable:
    """The consumer's transfers. Pure: events and time in, actions out.

    A transfer has one part (grant) per producer; it is ready when all parts are, and fails when one does.

    Args:
        first_generation: must differ between incarnations of a worker, so that no old message matches a new grant.
    """

    def __init__(self, limits: Limits, first_generation: int) -> None:
        self.limits = limits
        self.counters: Counter[str] = Counter()
        self._generations = itertools.count(first_generation)
        self._live: dict[TransferId, _Transfer] = {}
        self._over: OrderedDict[TransferId, dict[Peer, tuple[Generation, bool]]] = OrderedDict()
        self._timers: TimerQueue[tuple[TransferId, Peer]] = TimerQueue()

    # -- calls of the engine -------------------------------------------------------------------------------------

    def begin(
        self,
        transfer: TransferId,
        prompt_digest: bytes,
        tokens: int,
        parts: Sequence[GrantedPart],
        now: float,
        first_token: bool = False,
    ) -> list[Action]:
        """Grant ``transfer``, a prompt of ``tokens`` tokens, to each of ``parts``.

        ``first_token`` promises to continue from the first token that prefill sampled, if the commit names it.

        Raises:
            TransferOver: the id is live or was used before, or too many transfers are live.
            ValueError: ``parts`` is empty, or names a peer twice.
        """
        if self.knows(transfer):
            raise TransferOver(Code.REUSED, "this transfer id was used before; mint one per dispatch")
        if len(self._live) >= self.limits.max_transfers:
            raise TransferOver(Code.OVERLOADED, f"{len(self._live)} transfers are live (max_transfers)")
        machines: dict[Peer, ConsumerMachine] = {}
        for part in parts:
            grant = Grant(
                transfer=transfer,
                generation=next(self._generations),
                groups=part.groups,
                tokens=tokens,
                prompt_digest=prompt_digest,
                consumers=part.consumers,
                window_bytes=self.limits.window_bytes,
                first_token=first_token,
            )
            machines[part.peer] = ConsumerMachine(grant, part.peer, part.block_bytes, self.limits)
        if len(machines) != len(parts) or not machines:
            raise ValueError("a transfer needs at least one part, each from another peer")
        self._live[transfer] = _Transfer(machines)
        actions: list[Action] = []
        for machine in machines.values():
            actions += self._run(machine, machine.start(now))
        return actions

    def cancel(self, transfer: TransferId, code: Code, reason: str) -> list[Action]:
        """Give up a transfer: ``Failed`` follows once its pages are free. Unknown ids are ignored."""
        live = self._live.get(transfer)
        if live is None:
            return []
        live.first_failure = live.first_failure or (code, reason)
        return self._each(list(live.parts.values()), lambda machine: machine.cancel(code, reason))

    def decline(self, transfer: TransferId, peer: Peer, code: Code, reason: str) -> list[Action]:
        """Tell ``peer`` that this transfer will not be granted, so that it need not hold the pages.

        Sent once: if the message is lost, the producer's own deadline ends its wait. Ignored for a transfer that is or
        was live here, since the end of that transfer tells the producer.
        """
        before = self._over.get(transfer)
        if transfer in self._live or (before is not None and peer in before):
            return []
        generation = next(self._generations)
        self._add_over(transfer, {**(before or {}), peer: (generation, False)})
        self.counters["transfers_declined"] += 1
        return [Send(peer, Revoke(transfer=transfer, generation=generation, code=code, reason=reason[:200]))]

    # -- events of links and peers -------------------------------------------------------------------------------

    def on_message(self, peer: Peer, message: ProducerMessage, now: float) -> list[Action]:
        machine = self._machine(message.transfer, peer)
        if machine is None:
            return self._answer_for_the_ended(peer, message)
        if message.generation != machine.grant.generation:
            self.counters["stale_messages"] += 1
            return []
        return self._run(machine, machine.on_message(message, now))

    def placed(self, batch: BatchId, error: str | None, now: float) -> list[Action]:
        machine = self._machine(batch.transfer, batch.peer)
        if machine is None or machine.grant.generation != batch.generation:
            return []
        if error is not None:
            self.counters["batches_damaged" if error.startswith("damaged") else "batches_failed"] += 1
        return self._run(machine, machine.placed(batch.seq, batch.attempt, error, now))

    def fenced(self, transfer: TransferId, peer: Peer, generation: int) -> list[Action]:
        machine = self._machine(transfer, peer)
        if machine is None or machine.grant.generation != generation:
            return []
        return self._run(machine, machine.fenced())

    def peer_lost(self, peer: Peer, reason: str) -> list[Action]:
        machines = [live.parts[peer] for live in self._live.values() if peer in live.parts]
        return self._each(machines, lambda machine: machine.peer_lost(reason))

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for transfer, peer in self._timers.due(now):
            machine = self._machine(transfer, peer)
            if machine is not None:
                actions += self._run(machine, machine.tick(now))
        return actions

    def next_deadline(self) -> float | None:
        return self._timers.next()

    # -- queries -------------------------------------------------------------------------------------------------

    def knows(self, transfer: TransferId) -> bool:
        """Whether the id is live, or was used and still has a tombstone."""
        return transfer in self._live or transfer in self._over

    @property
    def live(self) -> int:
        return len(self._live)

    def machines(self, transfer: TransferId) -> list[ConsumerMachine]:
        live = self._live.get(transfer)
        return list(live.parts.values()) if live else []

    # -- inside --------------------------------------------------------------------------------------------------

    def _machine(self, transfer: TransferId, peer: Peer) -> ConsumerMachine | None:
        live = self._live.get(transfer)
        return live.parts.get(peer) if live else None

    def _each(
        self, machines: Sequence[ConsumerMachine], event: Callable[[ConsumerMachine], list[Action]]
    ) -> list[Action]:
        actions: list[Action] = []
        for machine in machines:
            actions += self._run(machine, event(machine))
        return actions

    def _run(self, machine: ConsumerMachine, actions: list[Action]) -> list[Action]:
        """Record what ``machine`` did and return the actions to carry out.

        The Ready or Failed of a part is held back; that of the transfer follows once all its parts have ended.
        """
        transfer, peer = machine.grant.transfer, machine.peer
        self._timers.set((transfer, peer), machine.next_deadline())
        outward: list[Action] = [action for action in actions if not isinstance(action, (Ready, Failed))]
        live = self._live.get(transfer)
        if live is None:
            return outward
        if machine.state is ConsumerState.FENCING and live.first_failure is None:
            live.first_failure = (machine.code or Code.CANCELLED, machine.reason)
            others = [other for other in live.parts.values() if other is not machine]
            outward += self._each(
                others, lambda other: other.cancel(Code.PEER_CANCELLED, "another part of this transfer failed")
            )
        for action in actions:
            if isinstance(action, Ready):
                live.first_tokens.add(action.first_token)
                live.cached_tokens.append(action.cached_tokens)
        if len(outward) != len(actions) and machine.state in (ConsumerState.READY, ConsumerState.FAILED):
            live.ended.add(peer)
            if len(live.ended) == len(live.parts) and transfer in self._live:
                end = self._end(transfer, live)
                # Ready goes first: the engine waits for it, while prefill can wait for its Ack.
                outward = [end, *outward] if isinstance(end, Ready) else [*outward, end]
        return outward

    def _end(self, transfer: TransferId, live: _Transfer) -> Action:
        del self._live[transfer]
        ended = {peer: (m.grant.generation, m.state is ConsumerState.READY) for peer, m in live.parts.items()}
        self._add_over(transfer, ended)
        if live.first_failure is None and len(live.first_tokens) > 1:
            live.first_failure = (Code.MISMATCH, "prefill's workers committed different first tokens")
        if live.first_failure is None:
            self.counters["transfers_ready"] += 1
            known = [tokens for tokens in live.cached_tokens if tokens is not None]
            cached = min(known) if known and len(known) == len(live.cached_tokens) else None
            return Ready(transfer, next(iter(live.first_tokens), None), cached)
        code, reason = live.first_failure
        self.counters["transfers_failed"] += 1
        self.counters[f"failed_{code.value}"] += 1
        return Failed(transfer, code, reason)

    def _add_over(self, transfer: TransferId, ended: dict[Peer, tuple[Generation, bool]]) -> None:
        self._over[transfer] = ended
        while len(self._over) > self.limits.tombstones:
            self._over.popitem(last=False)

    def _answer_for_the_ended(self, peer: Peer, message: ProducerMessage) -> list[Action]:
        """Answer a message for a grant that has ended or never existed: Ack if it was ready, else Revoke.

        Late messages change no state.
        """
        generation, ready = self._over.get(message.transfer, {}).get(peer, (0, False))
        self.counters["late_messages" if message.generation == generation else "stale_messages"] += 1
        if not isinstance(message, (Batch, Commit)):
            return []
        if message.generation == generation and ready:
            return [Send(peer, Ack(transfer=message.transfer, generation=generation))]
        reason = "this grant is over" if generation else "no such grant here"
        return [
            Send(
                peer,
                Revoke(transfer=message.transfer, generation=message.generation, code=Code.UNKNOWN, reason=reason),
            )
        ]
