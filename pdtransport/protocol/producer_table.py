"""All transfers that one producer (prefill worker) sends: requests, their grants, and tombstones of ended ones.

Invariants: a transfer id is never used twice while its tombstone is kept, and a request's pages are released only after
every grant on it has ended.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pdtransport.protocol.actions import Action, BatchId, Limits, Peer, Release, Send
from pdtransport.protocol.consumer_table import TransferOver
from pdtransport.protocol.messages import (
    Abort,
    Accept,
    Claim,
    Code,
    ConsumerMessage,
    Grant,
    GrantedGroup,
    Nack,
    Received,
    Revoke,
    TransferId,
)
from pdtransport.protocol.producer import ProducerMachine
from pdtransport.protocol.states import PRODUCER_ENDS, ProducerState
from pdtransport.protocol.timers import TimerQueue

_HOLD = "hold"  # timer key of a request's own deadline, apart from those of its grants


class _Claimant(NamedTuple):
    """Timer key of a claim whose request has not arrived."""

    peer: Peer


@dataclass
class _Request:
    """One request whose pages this worker computes or holds."""

    prompt_digest: bytes
    tokens: int
    blocks: tuple[int, ...]  # by cache group
    ready: tuple[int, ...]  # likewise: leading blocks that are final
    tokens_done: int = 0
    finished: bool = False
    first_token: int | None = None
    cached_tokens: int | None = None
    cancelled: tuple[Code, str] | None = None
    adapter: str = ""  # display name, for messages
    consumers: int | None = None  # how many consumers will grant, as the first grant states
    grants: dict[Peer, ProducerMachine] = field(default_factory=dict)
    claimed_by: dict[Peer, float] = field(default_factory=dict)  # consumer -> time of its first claim
    hold_until: float = float("inf")


class ProducerTable:
    """The producer's transfers. Pure: events and time in, actions out.

    Args:
        block_bytes: ``(group, head_lo, head_hi)`` -> bytes of one block of a cache group on this worker; raises
            ValueError for heads that it does not hold.
        batch_bytes: peer -> the largest batch that the link to it takes; caps ``limits.batch_bytes``.
    """

    def __init__(
        self,
        limits: Limits,
        block_bytes: Callable[[int, int, int], int],
        batch_bytes: Callable[[Peer], int] | None = None,
    ) -> None:
        self.limits = limits
        self._batch_bytes = batch_bytes
        self.counters: Counter[str] = Counter()
        self._block_bytes = block_bytes
        self._requests: dict[TransferId, _Request] = {}
        self._early: OrderedDict[tuple[TransferId, Peer], tuple[Grant, float]] = OrderedDict()
        self._early_claims: OrderedDict[tuple[TransferId, Peer], float] = OrderedDict()
        self._over: OrderedDict[TransferId, tuple[Code | None, str]] = OrderedDict()
        self._timers: TimerQueue[tuple[TransferId, Peer]] = TimerQueue()

    # -- calls of the engine -------------------------------------------------------------------------------------

    def open(
        self,
        transfer: TransferId,
        prompt_digest: bytes,
        tokens: int,
        blocks: Sequence[int],
        now: float,
        adapter: str = "",
    ) -> list[Action]:
        """A request to hand over has arrived: ``tokens`` prompt tokens in ``blocks[group]`` blocks of each cache group.

        ``adapter`` is the display name, for error messages, of the adapter whose content ``prompt_digest`` covers.

        Raises:
            TransferOver: the id is live or over (used before, or given up by decode before the request arrived), or
                too many transfers are live.
        """
        if transfer in self._requests:
            raise TransferOver(Code.REUSED, "this transfer id is in use; mint one per dispatch")
        if transfer in self._over:
            code, reason = self._over[transfer]
            raise TransferOver(code or Code.REUSED, reason or "this transfer id was used before; mint one per dispatch")
        if len(self._requests) >= self.limits.max_transfers:
            raise TransferOver(Code.OVERLOADED, f"{len(self._requests)} transfers are live (max_transfers)")
        request = _Request(prompt_digest, tokens, tuple(blocks), (0,) * len(blocks), adapter=adapter)
        self._requests[transfer] = request
        actions: list[Action] = []
        for key in [key for key in self._early_claims if key[0] == transfer]:
            request.claimed_by[key[1]] = self._early_claims.pop(key)
            self._timers.set((transfer, _Claimant(key[1])), None)
        for key in [key for key in self._early if key[0] == transfer]:
            grant, _ = self._early.pop(key)
            self._timers.set(key, None)
            actions += self._serve(request, key[1], grant, now)
        return actions

    def cached(self, transfer: TransferId, tokens: int) -> None:
        """``tokens`` prompt tokens were found in caches, not computed. Call before the last block is ready."""
        request = self._requests.get(transfer)
        if request is not None:
            request.cached_tokens = tokens
            for machine in request.grants.values():
                machine.cached_tokens = tokens

    def pages_ready(self, transfer: TransferId, blocks: Sequence[int], tokens_done: int, now: float) -> list[Action]:
        """The first ``blocks[group]`` blocks are final; fewer than before after a preemption."""
        request = self._requests.get(transfer)
        if request is None:
            return []
        request.ready, request.tokens_done = tuple(blocks), tokens_done
        return self._each(transfer, request, lambda machine: machine.pages_ready(blocks, tokens_done, now))

    def upcoming(
        self, transfer: TransferId, since: Sequence[int], blocks: Sequence[int]
    ) -> list[tuple[ProducerMachine, int, int, int]]:
        """Batches, as ``(grant's machine, group, first block, blocks)``, that :meth:`pages_ready` would push.

        Blocks before ``since``, by group, count as pushed already. Changes no state.
        """
        request = self._requests.get(transfer)
        machines = request.grants.values() if request else ()
        return [(machine, *batch) for machine in machines for batch in machine.upcoming(since, blocks)]

    def finish(self, transfer: TransferId, now: float, first_token: int | None = None) -> list[Action]:
        """The engine has finished the request: from now on its pages are held only for the consumers.

        ``first_token`` goes into the commit of every grant that promises to continue from it.
        """
        request = self._requests.get(transfer)
        if request is None:
            return []
        request.finished, request.first_token = True, first_token
        request.hold_until = now + (self.limits.claim_s if request.claimed_by else self.limits.hold_s)
        self._timers.set((transfer, _HOLD), request.hold_until)
        actions = self._each(transfer, request, lambda machine: machine.finish(first_token, now))
        return actions + self._maybe_release(transfer, request)

    def cancel(self, transfer: TransferId, code: Code, reason: str) -> list[Action]:
        """The request was aborted here: ``Release`` follows once nothing reads its pages. Unknown ids are ignored."""
        request = self._requests.get(transfer)
        if request is None:
            return []
        request.finished = True
        request.cancelled = request.cancelled or (code, reason)
        actions = self._each(transfer, request, lambda machine: machine.cancel(code, reason))
        return actions + self._maybe_release(transfer, request)

    # -- events of links and peers -------------------------------------------------------------------------------

    def on_message(self, peer: Peer, message: ConsumerMessage, now: float) -> list[Action]:
        request = self._requests.get(message.transfer)
        if isinstance(message, Claim):
            return self._on_claim(request, peer, message, now)
        machine = request.grants.get(peer) if request else None
        if machine is not None and machine.grant.generation == message.generation:
            return self._run(machine, machine.on_message(message, now))
        if isinstance(message, Grant):
            return self._on_grant(request, machine, peer, message, now)
        if isinstance(message, Revoke):
            return self._on_revoke(request, machine, peer, message)
        if isinstance(message, (Received, Nack)) and request is None:
            code, reason = self._over.get(message.transfer, (None, ""))
            if code is not None:  # our Abort was lost
                return [self._abort(peer, message, code, reason)]
        self.counters["stale_messages"] += 1
        return []

    def pushed(self, batch: BatchId, checksums: bytes, offer: bytes, now: float) -> list[Action]:
        machine = self._machine(batch)
        if machine is None:
            return []
        return self._run(machine, machine.pushed(batch.seq, batch.attempt, checksums, offer, now))

    def push_failed(self, batch: BatchId, error: str) -> list[Action]:
        machine = self._machine(batch)
        if machine is None:
            return []
        self.counters["pushes_failed"] += 1
        return self._run(machine, machine.push_failed(batch.seq, batch.attempt, error))

    def peer_lost(self, peer: Peer, reason: str) -> list[Action]:
        for key in [key for key in self._early if key[1] == peer]:
            del self._early[key]
            self._timers.set(key, None)
        for key in [key for key in self._early_claims if key[1] == peer]:
            del self._early_claims[key]
            self._timers.set((key[0], _Claimant(peer)), None)
        actions: list[Action] = []
        for transfer, request in list(self._requests.items()):
            machine = request.grants.get(peer)
            if machine is not None:
                actions += self._run(machine, machine.peer_lost(reason))
            elif request.claimed_by.pop(peer, None) is not None and request.finished:
                request.cancelled = request.cancelled or (Code.PEER_LOST, reason)
                actions += self._maybe_release(transfer, request)
        return actions

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for transfer, peer in self._timers.due(now):
            request = self._requests.get(transfer)
            if (transfer, peer) in self._early:
                del self._early[transfer, peer]
                self.counters["early_grants_expired"] += 1
            elif isinstance(peer, _Claimant):
                self._early_claims.pop((transfer, peer.peer), None)
            elif request is not None and peer == _HOLD:
                actions += self._hold_ended(transfer, request, now)
            elif request is not None and peer in request.grants:
                machine = request.grants[peer]
                actions += self._run(machine, machine.tick(now))
        return actions

    def next_deadline(self) -> float | None:
        return self._timers.next()

    # -- queries -------------------------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        return len(self._requests)

    @property
    def early(self) -> int:
        return len(self._early)

    def promised(self, transfer: TransferId) -> bool:
        """Whether a consumer promised to continue from the first token if the commit names it."""
        return any(machine.grant.first_token for machine in self.machines(transfer))

    def machines(self, transfer: TransferId) -> list[ProducerMachine]:
        request = self._requests.get(transfer)
        return list(request.grants.values()) if request else []

    # -- grants --------------------------------------------------------------------------------------------------

    def _on_grant(
        self, request: _Request | None, machine: ProducerMachine | None, peer: Peer, grant: Grant, now: float
    ) -> list[Action]:
        if machine is not None:
            if grant.generation < machine.grant.generation:
                self.counters["stale_messages"] += 1
                return []
            return [self._abort(peer, grant, Code.REUSED, "this transfer id was granted before; mint one per dispatch")]
        if self._is_foreign(peer, grant.transfer):
            self.counters["foreign_messages"] += 1
            return [
                self._abort(peer, grant, Code.REUSED, "this transfer was granted by others; mint an id per dispatch")
            ]
        if request is not None:
            return self._serve(request, peer, grant, now)
        if grant.transfer in self._over:
            code, reason = self._over[grant.transfer]
            return [self._abort(peer, grant, code or Code.REUSED, reason or "this transfer id was used before")]
        key = (grant.transfer, peer)
        if key not in self._early:
            if len(self._early) >= self.limits.max_transfers:
                text = f"{len(self._early)} grants wait for their requests (max_transfers)"
                # A repeat of this grant must get the same answer.
                self._add_tombstone(grant.transfer, Code.OVERLOADED, text)
                return [self._abort(peer, grant, Code.OVERLOADED, text)]
            # The consumer gives up earlier; this bound is for one that never revokes its grant.
            until = now + 2 * self.limits.arrival_s
            self._early[key] = (grant, until)
            self._timers.set(key, until)
        elif grant.generation != self._early[key][0].generation:
            return [self._abort(peer, grant, Code.REUSED, "this transfer id was granted before; mint one per dispatch")]
        return [Send(peer, Accept(transfer=grant.transfer, generation=grant.generation, known=False))]

    def _serve(self, request: _Request, peer: Peer, grant: Grant, now: float) -> list[Action]:
        """Start serving ``grant`` from ``request``; abort a grant that does not match it."""
        problem = self._problem_with(request, grant)
        block_bytes = [1 if problem else self._bytes_of(group, wanted) for group, wanted in enumerate(grant.groups)]
        limits = self.limits
        if self._batch_bytes is not None:
            limits = replace(limits, batch_bytes=min(limits.batch_bytes, self._batch_bytes(peer)))
        machine = ProducerMachine(grant, peer, block_bytes, request.tokens, limits)
        machine.cached_tokens = request.cached_tokens
        request.grants[peer] = machine
        request.consumers = request.consumers or grant.consumers
        if request.cancelled is not None:
            return self._run(machine, machine.cancel(*request.cancelled))
        if problem:
            self.counters["grants_mismatched"] += 1
            return self._run(machine, machine.cancel(Code.MISMATCH, problem))
        actions = machine.start(now)
        if request.finished:
            actions += machine.finish(request.first_token, now)
        actions += machine.pages_ready(request.ready, request.tokens_done, now)
        return self._run(machine, actions)

    def _problem_with(self, request: _Request, grant: Grant) -> str:
        if grant.tokens != request.tokens:
            return f"prefill has {request.tokens} prompt tokens, decode expects {grant.tokens}"
        if grant.prompt_digest != request.prompt_digest:
            if grant.prompt_digest[:16] == request.prompt_digest[:16]:  # see kv.keys.with_adapter
                if request.adapter:
                    return f"prefill's {request.adapter} differs in content from decode's adapter, or decode has none"
                return "prefill computes without an adapter, decode with one"
            return "prefill and decode have different prompts under this transfer id"
        if len(grant.groups) != len(request.blocks):
            return f"decode granted {len(grant.groups)} cache groups, prefill has {len(request.blocks)}"
        for wanted, blocks in zip(grant.groups, request.blocks, strict=True):
            if wanted.blocks and wanted.first_block + wanted.blocks != blocks:
                return f"decode granted up to block {wanted.first_block + wanted.blocks}, the prompt has {blocks}"
        if request.consumers not in (None, grant.consumers):
            return f"one decode worker states {request.consumers} consumers, another states {grant.consumers}"
        try:
            for group, wanted in enumerate(grant.groups):
                self._bytes_of(group, wanted)
        except ValueError as error:
            return str(error)
        return ""

    def _bytes_of(self, group: int, wanted: GrantedGroup) -> int:
        """
        Raises:
            ValueError: this worker does not hold the wanted heads.
        """
        return self._block_bytes(group, wanted.head_lo, wanted.head_hi) if wanted.blocks else 1

    def _on_revoke(
        self, request: _Request | None, machine: ProducerMachine | None, peer: Peer, message: Revoke
    ) -> list[Action]:
        """Handle a Revoke of a grant that is not being served.

        The grant may still arrive, after its Revoke; it must not be served then.
        """
        key = (message.transfer, peer)
        early = self._early.get(key)
        if early is not None and early[0].generation == message.generation:
            del self._early[key]
            self._timers.set(key, None)
        if self._early_claims.pop(key, None) is not None:
            self._timers.set((message.transfer, _Claimant(peer)), None)
        code = Code.PEER_CANCELLED if message.code is Code.CANCELLED else message.code
        reason = message.reason or "decode gave up before prefill began"
        if machine is None and self._is_foreign(peer, message.transfer):
            self.counters["foreign_messages"] += 1
        elif request is None:
            if message.transfer not in self._over:
                self._add_tombstone(message.transfer, code, reason)  # refuses the request if it arrives later
        elif machine is None:
            request.cancelled = request.cancelled or (code, reason)
            return self._maybe_release(message.transfer, request)
        return []

    def _on_claim(self, request: _Request | None, peer: Peer, message: Claim, now: float) -> list[Action]:
        if request is None:
            if message.transfer not in self._over and len(self._early_claims) < self.limits.max_transfers:
                self._early_claims.setdefault((message.transfer, peer), now)
                self._timers.set((message.transfer, _Claimant(peer)), now + 2 * self.limits.arrival_s)
            return []
        since = request.claimed_by.setdefault(peer, now)
        if request.finished and peer not in request.grants:
            request.hold_until = max(request.hold_until, since + self.limits.claim_s)
            self._timers.set((message.transfer, _HOLD), request.hold_until)
        return []

    # -- ending --------------------------------------------------------------------------------------------------

    def _hold_ended(self, transfer: TransferId, request: _Request, now: float) -> list[Action]:
        if request.consumers is not None and len(request.grants) >= request.consumers:
            if any(ready < blocks for ready, blocks in zip(request.ready, request.blocks, strict=True)):
                return self.cancel(transfer, Code.CANCELLED, "the engine finished without computing the whole prompt")
            return []  # every consumer has granted: the grants have their own deadlines
        self.counters["holds_expired"] += 1
        held = self.limits.claim_s if request.claimed_by else self.limits.hold_s
        setting = "deadlines.claim_s" if request.claimed_by else "deadlines.hold_s"
        return self.cancel(transfer, Code.TIMEOUT, f"no decode instance took the pages within {held} s ({setting})")

    def _maybe_release(self, transfer: TransferId, request: _Request) -> list[Action]:
        if not request.finished or transfer not in self._requests:
            return []
        if any(machine.state not in PRODUCER_ENDS for machine in request.grants.values()):
            return []
        complete = request.consumers is not None and len(request.grants) >= request.consumers
        if not complete and request.cancelled is None:
            return []
        del self._requests[transfer]
        self._timers.set((transfer, _HOLD), None)
        code, reason = self._outcome(request)
        self._add_tombstone(transfer, code, reason)
        self.counters["transfers_released" if code is None else "transfers_given_up"] += 1
        if code is not None:
            self.counters[f"given_up_{code.value}"] += 1
        return [Release(transfer, code, reason)]

    @staticmethod
    def _outcome(request: _Request) -> tuple[Code | None, str]:
        """Code and reason of the transfer's end; no code if delivered: a cancel after the last ack does not count."""
        for machine in request.grants.values():
            if machine.state is not ProducerState.DONE:
                return machine.code or Code.CANCELLED, machine.reason
        if request.consumers is not None and len(request.grants) >= request.consumers:
            return None, ""
        return request.cancelled or (None, "")

    def _add_tombstone(self, transfer: TransferId, code: Code | None, reason: str) -> None:
        self._over[transfer] = (code, reason)
        while len(self._over) > self.limits.tombstones:
            self._over.popitem(last=False)

    # -- inside --------------------------------------------------------------------------------------------------

    def _is_foreign(self, peer: Peer, transfer: TransferId) -> bool:
        """Whether all consumers of the transfer have granted and ``peer`` is not one of them.

        Until all have granted, any peer that knows the id may be a consumer whose grant is in flight or was lost.
        """
        request = self._requests.get(transfer)
        if request is not None:
            grants = [machine.grant for machine in request.grants.values()]
            known = peer in request.grants
        else:
            early = {of: grant for (each, of), (grant, _) in self._early.items() if each == transfer}
            grants, known = list(early.values()), peer in early
        return not known and bool(grants) and len(grants) >= grants[0].consumers

    def _machine(self, batch: BatchId) -> ProducerMachine | None:
        request = self._requests.get(batch.transfer)
        machine = request.grants.get(batch.peer) if request else None
        return machine if machine is not None and machine.grant.generation == batch.generation else None

    def _each(
        self, transfer: TransferId, request: _Request, event: Callable[[ProducerMachine], list[Action]]
    ) -> list[Action]:
        actions: list[Action] = []
        for machine in list(request.grants.values()):
            actions += self._run(machine, event(machine))
        return actions

    def _run(self, machine: ProducerMachine, actions: list[Action]) -> list[Action]:
        transfer = machine.grant.transfer
        self._timers.set((transfer, machine.peer), machine.next_deadline())
        request = self._requests.get(transfer)
        if request is not None and machine.state in PRODUCER_ENDS:
            return actions + self._maybe_release(transfer, request)
        return actions

    @staticmethod
    def _abort(peer: Peer, about: Grant | Received | Nack, code: Code, reason: str) -> Action:
        code = Code.PEER_CANCELLED if code is Code.CANCELLED else code
        return Send(peer, Abort(transfer=about.transfer, generation=about.generation, code=code, reason=reason[:200]))
