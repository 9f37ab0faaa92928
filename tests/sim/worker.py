"""One worker process: the real transfer engine with its drivers, on simulated memory, links and control channel, and
the checks that see all that it does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pdtransport.control.channel import Event, Identity, MessageReceived, PeerDown, PeerId
from pdtransport.io.cuda_events import CudaEventQueue
from pdtransport.kv.geometry import HOST
from pdtransport.protocol import actions as act
from pdtransport.protocol.messages import Ack, Batch, Code, Ended, Grant, GrantedGroup, Message, Received, Revoke
from pdtransport.protocol.states import CONSUMER_ENDS, PRODUCER_ENDS, ConsumerState
from pdtransport.settings import Settings
from pdtransport.transfer.engine import TransferEngine
from pdtransport.transfer.link_setup import Scratch
from pdtransport.transfer.outcome import OnOutcome, Outcome
from pdtransport.transport import fingerprint_of
from tests.sim.control import SimControl
from tests.sim.link import SimLink
from tests.sim.memory import Lease, Memory, Violation, read_cell
from tests.sim.plan import LINK_KINDS, Plan
from tests.sim.world import Process

if TYPE_CHECKING:
    from tests.sim.run import SimWorld
    from tests.sim.world import Instance

MAX_TURNS = 1000  # in a row, without a pause: an I/O thread that does not rest
MAX_SLEEP_S = 1.0  # as that of pdtransport.io.reactor
_DEFAULTS = Settings()


def settings_of(plan: Plan) -> Settings:
    """The settings of all workers of a plan; its sizes and deadlines are smaller than users may choose."""
    limits, defaults = plan.limits, _DEFAULTS
    links = {
        "order": LINK_KINDS,
        "batch_bytes": limits.batch_bytes,
        "window_bytes": limits.window_bytes,
        "probe_bytes": plan.probe_bytes,
        "min_bandwidth_bytes_s": plan.floor_bytes_s,
    }
    changes = {
        "links": defaults.links.model_copy(update=links),
        "deadlines": defaults.deadlines.model_copy(
            update={name: getattr(limits, name) for name in type(defaults.deadlines).model_fields}
        ),
        "integrity": defaults.integrity.model_copy(update={"checksum": "full" if limits.checksums else "off"}),
        "max_transfers": limits.max_transfers,
        "tombstones": limits.tombstones,
    }
    return defaults.model_copy(update=changes)


class Worker(Process):
    def __init__(self, world: SimWorld, instance: Instance, rank: int) -> None:
        self.world = world
        self.instance = instance
        self.id = PeerId(instance.name, rank, instance.incarnation)
        self.alive = True
        self.memory = Memory(world.processes, rank, instance.tp, world.plan)
        world.processes += 1
        self.links = {name: SimLink(name, self) for name in LINK_KINDS}
        fingerprint = fingerprint_of(self.memory.geometry, instance.tp)
        exports = {name: link.export() for name, link in self.links.items()}
        me = Identity(instance.name, rank, instance.tp, instance.incarnation, dict(fingerprint), exports)
        self.control = SimControl(self, me)
        self._over: set[tuple[type, str]] = set()  # kinds of machines and transfers that have ended there
        scratch = Scratch(min(world.plan.probe_bytes, world.plan.limits.batch_bytes))
        self.engine = TransferEngine(
            world.settings,
            me,
            self.memory.geometry,
            self.control,
            dict(self.links),
            {},
            "both",
            scratch,
            CudaEventQueue(HOST),
            world.clock,
            world.clock,
        )
        for half in (self.engine.producer, self.engine.consumer):
            half.run = partial(self._does, half.run)  # type: ignore[method-assign]
        self._wakes_at = float("inf")
        self._ends = 0
        # The producer's side, as the wire and the links show it:
        self.grants: dict[tuple[str, PeerId], Grant] = {}
        self.lost_grants: set[tuple[str, PeerId]] = set()  # of peers that were lost since
        self.released: dict[str, Outcome] = {}
        self._revoked: set[tuple[str, PeerId, int]] = set()
        self._in_flight: dict[tuple[str, PeerId, int], dict[int, int]] = defaultdict(dict)  # seq -> bytes
        # The consumer's:
        self.leases: dict[str, Lease] = {}
        self.lent: dict[tuple[int, int], Lease] = {}  # group, page -> its lease
        self.free = [list(range(world.plan.pages_of(group))) for group in world.plan.groups]
        self.complete: dict[str, set[tuple[PeerId, int]]] = defaultdict(set)  # transfer -> verified generations
        self.owed: list[tuple[str, Code | None]] = []  # reports to watchers
        self._announced: dict[tuple[PeerId, int], Batch] = {}  # sender, key

    def __str__(self) -> str:
        return f"{self.id.engine}.{self.id.rank}#{self.id.incarnation}"

    # -- the I/O thread ------------------------------------------------------------------------------------------

    def call(self, call: Callable[[TransferEngine], None]) -> None:
        """What the engine's thread posts."""
        call(self.engine)
        self.wake()

    def wake(self, when: float | None = None) -> None:
        when = self.world.now if when is None else max(when, self.world.now)
        if when < self._wakes_at:
            self._wakes_at = when
            self.world.at_time(when, self, self._run, when)

    def _run(self, planned: float) -> None:
        if planned != self._wakes_at:
            return  # another wake-up came first
        self._wakes_at = float("inf")
        self.turns()

    def turns(self) -> None:
        for _ in range(MAX_TURNS):
            if not self.engine.turn(self.world.now) and self.engine.arm():
                break
        else:
            raise Violation(f"{self} does not rest")
        due = self.engine.next_deadline()
        if due is not None:
            self.wake(due)
        if self.engine.producer.live()["queued_pushes"]:
            self.wake(self.world.now + MAX_SLEEP_S)

    def reload(self) -> None:
        ending: set[str] = set()
        self.call(lambda engine: ending.update(engine.change_fingerprint({}, "other weights")))
        self._check_let_go(ending)

    def _check_let_go(self, ending: set[str]) -> None:
        """Once the engine is told that none of ``ending`` uses pages, none does."""
        ending = self.engine.live_of(ending)
        if ending:
            self.world.at(0.01, self, self._check_let_go, ending)
        elif offers := [key for link in self.links.values() for channel in link.channels for key in channel.offered]:
            raise Violation(f"{self} was told that its pages are not used, but offers {offers}")

    def shut_down(self) -> None:
        self.engine.close()
        going_on = [transfer for transfer, lease in self.leases.items() if not lease.ended]
        going_on += [f"key {r.key}" for link in self.links.values() for c in link.channels for r in c.readings]
        if going_on:
            raise Violation(f"{self} is closed, and goes on with {going_on}")

    # -- forged words --------------------------------------------------------------------------------------------

    def live_generation(self, peer: PeerId, message: Any) -> int | None:
        """That of the grant which the message is about, if it is live here."""
        for machine in self._machines(message.transfer):
            if machine.peer == peer and machine.state not in CONSUMER_ENDS | PRODUCER_ENDS:
                generation: int = machine.grant.generation
                return generation
        return None

    def hear_forged(self, peer: PeerId, message: Any) -> None:
        """A message of a generation that is not live: it may be answered, and must change nothing."""
        self.turns()
        before = self._fingerprint(message.transfer)
        if self.world.tracing:
            self.world.say(f"{self} <- {peer}: forged {message}")
        self.engine._on_event(MessageReceived(peer, message), self.world.now)
        self.turns()
        if before != self._fingerprint(message.transfer):
            raise Violation(f"a message of a generation that is not live changed something: {message}")
        self.check()

    def _machines(self, transfer: str) -> list[Any]:
        return [*self.engine.producer.sending.machines(transfer), *self.engine.consumer.receiving.machines(transfer)]

    def _fingerprint(self, transfer: str) -> object:
        calls = [link.calls for link in self.links.values()]
        found = [self._ends, calls, self.engine.producer.live(), self.engine.consumer.live()]
        hidden = ("_slots", "_out", "_in_flight", "_commit", "_next_block", "_deadline", "bytes_verified")
        for machine in self._machines(transfer):
            parts = [getattr(machine, name, None) for name in hidden]
            sizes = [len(part) if isinstance(part, dict | list) else part for part in parts]
            found.append([machine.peer, machine.grant.generation, machine.state, machine.code, *sizes])  # type: ignore[list-item]
        return found

    # -- what the control channel shows --------------------------------------------------------------------------

    def sees(self, event: Event) -> None:
        """The engine is about to handle this."""
        if not isinstance(event, MessageReceived):
            return
        peer, message = event.peer, event.message
        if isinstance(message, Grant):
            self.grants.setdefault((message.transfer, peer), message)
        elif isinstance(message, Revoke):
            self._revoked.add((message.transfer, peer, message.generation))
        elif isinstance(message, Received):
            for seq in message.seqs:
                self._in_flight[message.transfer, peer, message.generation].pop(seq, None)
        elif isinstance(message, Ack):
            self._in_flight.pop((message.transfer, peer, message.generation), None)
        elif isinstance(message, Batch):
            self._announced.setdefault((peer, int.from_bytes(message.offer[:8], "little")), message)

    def saw(self, event: Event) -> None:
        """The engine has handled this: what went to or came from a peer that is lost is over."""
        if not isinstance(event, PeerDown):
            return
        self.lost_grants.update(key for key in self.grants if key[1] == event.peer)
        over = {*PRODUCER_ENDS, *CONSUMER_ENDS, ConsumerState.FENCING}
        halves = (self.engine.producer.sending._requests, self.engine.consumer.receiving._live)
        for transfer in [transfer for half in halves for transfer in half]:
            if any(m.peer == event.peer and m.state not in over for m in self._machines(transfer)):
                raise Violation(f"{self} goes on with {transfer}, though {event.peer} is lost")

    def says(self, peer: PeerId, message: Message) -> None:
        """The drivers send this."""
        if isinstance(message, Grant):
            self._says_grant(peer, message)
        elif isinstance(message, Batch):
            self._says_batch(peer, message)
        elif isinstance(message, Ack):
            self._says_ack(peer, message)

    def _says_batch(self, peer: PeerId, batch: Batch) -> None:
        grant = self.grants.get((batch.transfer, peer))
        if grant is None or grant.generation != batch.generation:
            raise Violation(f"{self} announces {batch}, which was not granted")
        if (batch.transfer, peer, batch.generation) in self._revoked:
            raise Violation(f"{self} announces {batch} after its grant was revoked")

    def _says_grant(self, peer: PeerId, grant: Grant) -> None:
        lease = self.leases.get(grant.transfer)
        if lease is None or lease.ended:
            raise Violation(f"{self} grants pages of {grant.transfer}, which has none")
        granted = {number: group for number, group in enumerate(grant.groups) if group.blocks}
        for number, group in granted.items():
            if range(group.first_block, group.first_block + group.blocks) != lease.groups[number].blocks:
                raise Violation(f"{self} grants {grant}, lent was {lease}")
        if grant.tokens != lease.tokens:
            raise Violation(f"{self} grants {grant}, lent was {lease}")
        if lease.generations.setdefault(peer, grant.generation) != grant.generation:
            raise Violation(f"{self} grants {grant.transfer} to {peer} twice")
        lease.heads[peer] = {number: (group.head_lo, group.head_hi) for number, group in granted.items()}
        lease.verified.setdefault(peer, set())

    def _says_ack(self, peer: PeerId, ack: Ack) -> None:
        lease = self.leases.get(ack.transfer)
        part = peer, ack.generation
        if lease is not None and lease.generations.get(peer) == ack.generation:
            if lease.verified[peer] != lease.asked(peer):
                raise Violation(f"{self} acks {ack.transfer} with {lease.verified[peer]} of {lease.asked(peer)}")
            self.complete[ack.transfer].add(part)
        elif part not in self.complete[ack.transfer]:
            raise Violation(f"{self} acks {ack.transfer} to {peer}, which never was complete")

    def reports(self, report: Ended) -> None:
        """The drivers tell watchers how a transfer ended."""
        if (report.transfer, report.code) not in self.owed:
            raise Violation(f"{self} reports {report}, owed are {self.owed}")
        if report.code is not None and not report.reason:
            raise Violation(f"{self} reports {report} without a reason")
        self.owed.remove((report.transfer, report.code))

    # -- what the machines ask for -------------------------------------------------------------------------------

    def _does(self, run: Callable[[Sequence[act.Action]], None], actions: Sequence[act.Action]) -> None:
        """The drivers are about to carry these out; a second end they would overlook."""
        for action in actions:
            if isinstance(action, act.OfferBatch):
                self._pushes(action)
            elif isinstance(action, act.Release | act.Ready | act.Failed):
                end = act.Release if isinstance(action, act.Release) else act.Ready, action.transfer
                if end in self._over:
                    raise Violation(f"{self}: {action}, a second end")
                self._over.add(end)
        run(actions)

    def _pushes(self, push: act.OfferBatch) -> None:
        key = push.id.transfer, push.id.peer
        grant = self.grants[key]
        group = grant.groups[push.group]
        if (grant.generation, group.head_lo, group.head_hi) != (push.id.generation, push.head_lo, push.head_hi):
            raise Violation(f"{push} was not granted")
        if (*key, push.id.generation) in self._revoked:
            raise Violation(f"{push} comes after its grant was revoked")
        end = group.first_block + group.blocks
        if not group.first_block <= push.first_block < push.first_block + push.blocks <= end:
            raise Violation(f"{push} lies outside its grant")
        self._in_flight[(*key, push.id.generation)][push.id.seq] = push.blocks * self._block_bytes(push.group, group)

    def _block_bytes(self, number: int, group: GrantedGroup) -> int:
        return (group.head_hi - group.head_lo) * self.world.plan.groups[number].head_bytes

    # -- what the links show -------------------------------------------------------------------------------------

    def reads(self, peer: PeerId, key: int, runs: list[tuple[int, int]]) -> None:
        """A link begins to place a batch."""
        if runs and self.memory.where(runs[0]) is None:
            return  # scratch memory
        batch = self._announced.get((peer, key))
        if batch is None:
            raise Violation(f"{self} reads key {key} of {peer}, which was not announced")
        for run in runs:
            self._block_of(peer, batch, run)

    def writes(self, peer: PeerId, key: int, run: tuple[int, int]) -> None:
        self._block_of(peer, self._announced[peer, key], run)

    def verified(self, peer: PeerId, key: int, runs: list[tuple[int, int]]) -> None:
        batch = self._announced.get((peer, key))
        if batch is not None and self.memory.where(runs[0]) is not None:
            self.leases[batch.transfer].verified[peer].update(self._block_of(peer, batch, run) for run in runs)

    def _block_of(self, peer: PeerId, batch: Batch, run: tuple[int, int]) -> tuple[int, int]:
        found = self.memory.where(run)
        lease = self.lent.get(found[:2]) if found is not None else None
        if found is None or lease is None or lease.transfer != batch.transfer:
            raise Violation(f"{self} writes for {batch.transfer} into a page that was not lent to it: {found}, {lease}")
        return lease.may_write(peer, batch, found)

    # -- how transfers end ---------------------------------------------------------------------------------------

    def hears(self, on_end: OnOutcome) -> OnOutcome:
        """``on_end``, with a violation that it finds kept: the drivers catch what callbacks raise."""

        def heard(outcome: Outcome) -> None:
            try:
                on_end(outcome)
            except Exception as error:  # noqa: BLE001 - raised again by the world
                self.world.broken = self.world.broken or error

        return heard

    def ended(self, outcome: Outcome, what: str) -> None:
        self._ends += 1
        if self.world.tracing:
            self.world.say(f"{self} {what}: {outcome.code or 'good'} {outcome.reason}")
        if not outcome.ok and (not outcome.reason or outcome.code not in {code.value for code in Code}):
            raise Violation(f"{self}: {outcome} does not say why")

    def check_delivered(self, transfer: str) -> None:
        """Prefill's pages are only given up as delivered if every decode worker really has them."""
        for (name, peer), grant in self.grants.items():
            target = self.world.worker(peer)
            if name == transfer and target is not None and (self.id, grant.generation) not in target.complete[name]:
                raise Violation(f"{self}: {transfer} is over as delivered, but {peer} has not verified it")

    def check_unread(self, gone: set[tuple[int, int]]) -> None:
        """Nothing that is offered lies in pages, by group, that go to somebody else now."""
        for link in self.links.values():
            for channel in link.channels:
                for offered in channel.offered.values():
                    found = {place[:2] for run in offered.runs if (place := self.memory.where(run)) is not None}
                    if found & gone:
                        raise Violation(f"{self} gives away pages {found & gone}, which {channel.peer} may still read")

    def check_pages(self, lease: Lease) -> None:
        """Every page of every group is what one producer computed for that prompt, up to the token that decode goes on
        from, and was verified here; and nothing that it attends to is missing."""
        for number, (group, lent) in enumerate(zip(self.memory.groups, lease.groups, strict=True)):
            parts = [(peer, *heads[number]) for peer, heads in lease.heads.items() if number in heads]
            if lent.pages and sum(hi - lo for _, lo, hi in parts) != group.heads:
                raise Violation(f"{self}: {lease.transfer} was granted heads {lease.heads} only")
            for block, page in zip(lent.blocks, lent.pages, strict=True):
                for peer, lo, hi in parts:
                    self._check_page(lease, peer, (number, block), group.page(page, lo, hi), lo)

    def _check_page(self, lease: Lease, peer: PeerId, where: tuple[int, int], cells: list[int], head_lo: int) -> None:
        number, block = where
        if where not in lease.verified[peer]:
            raise Violation(f"{self}: block {where} of {lease.transfer} is used but was never verified")
        size, made = self.world.plan.groups[number].block_size, self.world.computed[peer]
        for head, value in enumerate(cells, head_lo):
            found = read_cell(value)
            right = (found.prompt, found.group, found.block, found.head) == (lease.prompt, number, block, head)
            # Prefill may be through with the token that decode computes itself, and have it in the last block.
            if not right or found.tokens < min(size, lease.tokens - block * size) or value not in made:
                raise Violation(f"{self}: block {where} of {lease.transfer}, head {head} holds {value:x}: {found}")

    def give_back(self, lease: Lease) -> None:
        for number, lent in enumerate(lease.groups):
            for page in lent.pages:
                del self.lent[number, page]
                self.memory.groups[number].scribble(page)
                self.free[number].append(page)
        if self.leases.get(lease.transfer) is lease:
            del self.leases[lease.transfer]

    # -- checks --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """No page has two owners, none is lost, and bytes in flight, as the wire saw them, stay within the window."""
        pages = sum(group.geometry.num_blocks for group in self.memory.groups)
        if sum(map(len, self.free)) + len(self.lent) != pages:
            raise Violation(f"{self}: {self.free} are free, and {len(self.lent)} of {pages} pages are lent")
        limits = self.world.plan.limits
        for (transfer, peer, generation), seqs in self._in_flight.items():
            grant = self.grants.get((transfer, peer))
            if not seqs or grant is None or grant.generation != generation:
                continue
            sizes = [self._block_bytes(number, group) for number, group in enumerate(grant.groups) if group.blocks]
            batch = max(max(1, limits.batch_bytes // size) * size for size in sizes)
            if sum(seqs.values()) > max(batch, min(limits.window_bytes, grant.window_bytes)):
                raise Violation(f"{self}: {sum(seqs.values())} bytes of {transfer} in flight, window exceeded")

    def leftovers(self) -> list[str]:
        producer, consumer, peers = self.engine.producer, self.engine.consumer, self.engine._peers
        channels = [channel for link in self.links.values() for channel in link.channels]
        found = {
            **producer.live(),
            **consumer.live(),
            "outgoing transfers": len(producer._sources),
            "early claims": len(producer.sending._early_claims),
            "received transfers": consumer.receiving.live,
            "waiting for peers": len(peers._waiting),
            "measurements": sum(peer.answering is not None or peer.offered is not None for peer in peers),
            "agenda": self.engine.next_deadline() or 0,
            "offers": sum(len(channel.offered) for channel in channels),
            "placements": sum(len(channel.readings) + len(channel._fences) for channel in channels),
            "leases": len(self.leases),
            "pages": len(self.lent),
            "reports": len(self.owed),
        }
        return [f"{self}: {name} left: {count}" for name, count in found.items() if count]
