"""What one seed stands for: the machines, the links, the faults and the requests of a run."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from pdtransport.engine.block_tables import BlockTables
from pdtransport.protocol.actions import Limits

TOTAL_HEADS = 4
BLOCK_SIZE = 4  # tokens a block
SLOT_BYTES = 8  # of one head of one token
HEAD_BYTES = BLOCK_SIZE * SLOT_BYTES  # of one head of one block, all layers
BLOCK_BYTES = TOTAL_HEADS * HEAD_BYTES
FLOOR_BYTES_S, SLOW_BYTES_S = 1000.0, 500.0  # what may be asked of links, and what a slow one does
PAGES = 40  # of each worker, where they are not scarce

LINK_KINDS = ("direct", "slots")  # best first
# How a pair of instances reaches each other: "direct" by either; "slots" by that one only; "half": prefill finds that
# it can't use the other one; "slow": the other one is slower than what is asked for.

SIM_LIMITS = Limits(
    retry_s=0.25,
    answer_s=3.0,
    arrival_s=6.0,
    queue_s=20.0,
    stall_s=8.0,
    verify_s=5.0,
    hold_s=6.0,
    claim_s=12.0,
    ack_s=8.0,
    resends=2,
    batch_bytes=BLOCK_BYTES,
    window_bytes=4 * BLOCK_BYTES,
    max_transfers=64,
    tombstones=64,
)


FOR_GOOD = float("inf")


@dataclass(frozen=True)
class Net:
    """Faults of the control channel, as probabilities a message; delays in seconds."""

    latency: float = 0.002
    jitter: float = 0.0
    fifo: bool = True
    drop: float = 0.0
    setup_drop: float = 0.0  # of the words that set a link up
    duplicate: float = 0.0
    replay: float = 0.0  # the same frame once more, seconds later
    forge: float = 0.0  # the same frame once more, under a generation that is not the live one
    flip: float = 0.0


@dataclass(frozen=True)
class Bytes:
    """Behaviour and faults of the links; probabilities a block, delays in seconds."""

    copy_delay: float = 0.01
    corrupt: float = 0.0
    error: float = 0.0  # a batch
    fence_delay: float = 0.02
    slots: int = 2
    slot_bytes: int = 16 * BLOCK_BYTES


@dataclass(frozen=True)
class Fault:
    """A server that crashes or shuts down is back after ``seconds``, with new incarnations, unless these are
    ``FOR_GOOD``. One that reloads its weights takes its pages away from all transfers."""

    at: float
    kind: str  # crash | shutdown | stall | partition | reload
    who: str
    other: str = ""
    seconds: float = 1.0


@dataclass(frozen=True)
class Request:
    """One dispatch by the router. Times are seconds from the start; None: that never happens."""

    transfer: str
    prompt: int
    blocks: int
    producer: str
    consumer: str
    open_at: float | None
    begin_at: float | None
    held: int = 0  # leading blocks that decode has already
    producer_prompt: int | None = None  # another prompt than decode's
    step_s: float = 0.05
    step_tokens: int = 2 * BLOCK_SIZE
    foretold: bool = False  # prefill says what it is about to compute
    preempt_at: tuple[float, ...] = ()  # seconds after open
    resume_s: float = 0.2
    lazy_finish_s: float = 0.0
    producer_abort_at: float | None = None  # seconds after open
    consumer_abort_at: float | None = None  # seconds after begin
    gives_back_early: bool = False  # prefill gives back a block that decode still attends to, once it is computed
    let_go_at: float | None = None  # seconds after open: prefill ends the transfer if nobody has granted room for it
    open_twice: bool = False
    begin_twice: bool = False
    declines: bool = False  # decode rejects the request instead of beginning
    must_be_ready: bool = False
    within_s: float = 60.0  # of the later of open and begin, if it must be ready

    @property
    def tokens(self) -> int:
        return self.blocks * BLOCK_SIZE - (self.prompt % BLOCK_SIZE)

    @property
    def cached_tokens(self) -> int | None:
        """What prefill found in its caches, if it tells."""
        return None if self.prompt % 3 == 0 else self.prompt % self.tokens

    @property
    def first_token(self) -> bool:
        """Decode promises to go on from the token that prefill samples, if it receives anything."""
        return self.prompt % 2 == 1

    @property
    def held_tokens(self) -> int:
        return min(self.tokens, self.held * BLOCK_SIZE)


@dataclass(frozen=True)
class Group:
    """A cache group of the model. With ``heads`` fewer than ranks, each rank holds a whole copy."""

    block_size: int = BLOCK_SIZE
    heads: int = TOTAL_HEADS
    window: int | None = None  # tokens that one attends to, itself included

    @property
    def head_bytes(self) -> int:
        """Of one head of one block, all layers."""
        return self.block_size * SLOT_BYTES

    @property
    def block_bytes(self) -> int:
        return self.heads * self.head_bytes

    def first_live(self, tokens: int) -> int:
        """The first block that the token behind ``tokens`` tokens still attends to."""
        return 0 if self.window is None else max(0, tokens - self.window + 1) // self.block_size


@dataclass(frozen=True)
class Plan:
    seed: int
    producers: dict[str, int] = field(default_factory=lambda: {"p0": 1})  # instance -> tensor-parallel size
    consumers: dict[str, int] = field(default_factory=lambda: {"d0": 1})
    links: dict[tuple[str, str], str] = field(default_factory=dict)  # default: direct
    limits: Limits = SIM_LIMITS
    net: Net = Net()
    bytes: Bytes = Bytes()
    faults: tuple[Fault, ...] = ()
    requests: tuple[Request, ...] = ()
    pages: int = PAGES
    faults_end: float = 8.0  # from here on the network is whole and nobody stops
    drop_once: str = ""  # the first message of this kind is lost
    drop_nth: int = -1  # this message about a transfer is lost, whatever it is
    drop_call: int = -1  # this message about a link is lost
    probe_bytes: int = BLOCK_BYTES  # 0: links are not measured
    floor_bytes_s: float = 0.0  # links that are slower are not used
    groups: tuple[Group, ...] = (Group(),)

    @property
    def tables(self) -> BlockTables:
        windows = [group.window for group in self.groups if group.window is not None]
        return BlockTables(tuple(group.block_size for group in self.groups), min(windows, default=None))

    def pages_of(self, group: Group) -> int:
        """Each group has room for as many tokens."""
        return -(-self.pages * BLOCK_SIZE // group.block_size)

    @property
    def calm(self) -> bool:
        """Nothing goes wrong but what engines do."""
        return not (self.faults or self.net.drop or self.net.flip or self.bytes.corrupt or self.bytes.error)


def plan_of(seed: int) -> Plan:
    """The plan of a seed; a fifth of the seeds are calm, and in half of them the model has several cache groups."""
    plan = _of_one_group(seed)
    rng = random.Random(seed * 104_729 + 5)
    return with_groups(plan, _groups(rng), rng) if rng.random() < 0.5 else plan


def _groups(rng: random.Random) -> tuple[Group, ...]:
    """One group that is split over the ranks, so that each of them is asked, and others: with windows or without, in
    larger or smaller blocks, split or whole on each rank; in any order."""
    first = Group(rng.choice((2, 4, 8)), window=rng.choice((None, None, None, rng.randint(1, 20))))
    others = [
        Group(
            rng.choice((first.block_size, 2, 4, 8)),
            rng.choice((TOTAL_HEADS, TOTAL_HEADS, 2, 1)),
            rng.choice((None, rng.randint(1, 20), rng.randint(1, 20))),
        )
        for _ in range(rng.choice((1, 1, 2)))
    ]
    groups = [first, *others]
    rng.shuffle(groups)
    return tuple(groups)


def with_groups(plan: Plan, groups: tuple[Group, ...], rng: random.Random | None = None) -> Plan:
    """The same plan for a model of these groups; with ``rng`` some prefill gives back what decode attends to."""
    slot_bytes = max(plan.bytes.slot_bytes, *(group.block_bytes for group in groups))
    longer = sum(max(1.0, BLOCK_SIZE / group.block_size) for group in groups)  # by so many batches
    requests = tuple(replace(request, within_s=request.within_s * longer) for request in plan.requests)
    if rng is not None:
        early = [not request.must_be_ready and rng.random() < 0.15 for request in requests]
        requests = tuple(replace(r, gives_back_early=each) for r, each in zip(requests, early, strict=True))
    return replace(plan, groups=groups, bytes=replace(plan.bytes, slot_bytes=slot_bytes), requests=requests)


def _of_one_group(seed: int) -> Plan:
    rng = random.Random(seed * 7919 + 17)
    calm = rng.random() < 0.2
    checksums = rng.random() < 0.93
    # Without checksums the user trusts the link; one that reads pages after they were given back can't be trusted.
    copy_delay = rng.choice((0.002, 0.02, 0.15, 0.6))
    kinds = ("direct", "direct", "slots", "half", *(("slow",) if copy_delay < 0.1 else ())) if checksums else ("slots",)
    producers = {f"p{i}": rng.choice((1, 1, 2)) for i in range(rng.choice((1, 1, 2)))}
    consumers = {f"d{i}": rng.choice((1, 1, 2)) for i in range(rng.choice((1, 1, 2)))}
    links = {(p, d): rng.choice(kinds) for p in producers for d in consumers}
    slow = "slow" in links.values()
    limits = replace(
        SIM_LIMITS,
        batch_bytes=rng.choice((HEAD_BYTES, BLOCK_BYTES, 2 * BLOCK_BYTES, 4 * BLOCK_BYTES)),
        window_bytes=rng.choice((8, BLOCK_BYTES, 2 * BLOCK_BYTES, 16 * BLOCK_BYTES)),
        max_transfers=rng.choice((2, 64, 64)),
        tombstones=rng.choice((16, 64)),
        checksums=checksums,
    )
    net = _net(rng, calm)
    data = Bytes(
        copy_delay=copy_delay,
        corrupt=0.0 if calm or not checksums else rng.choice((0.0, 0.0, 0.02, 0.2)),
        error=0.0 if calm else rng.choice((0.0, 0.0, 0.0, 0.02)),
        fence_delay=rng.choice((0.0, 0.02, 0.3)),
        slots=64 if slow else rng.choice((1, 2, 4)),  # none free: not measured, so not used where a floor is asked for
        slot_bytes=rng.choice((BLOCK_BYTES, 16 * BLOCK_BYTES)),
    )
    scarce = rng.random() < 0.25
    names = [*producers, *consumers]
    requests = tuple(
        _request(rng, i, list(producers), list(consumers), calm and not scarce, limits)
        for i in range(rng.choice((1, 2, 3)))
    )
    faults = () if calm else tuple(_fault(rng, names) for _ in range(rng.choice((0, 0, 1, 1, 2))))
    # Where pages or places are scarce, others keep theirs until their holds have run out.
    late = scarce or limits.max_transfers < 4
    probe = _probe(rng, list(producers), list(consumers), at=70.0 if late else 16.0)
    pages = rng.randint(8, 12) if scarce else PAGES
    return Plan(
        seed,
        producers,
        consumers,
        links,
        limits,
        net,
        data,
        faults,
        (*requests, probe),
        pages,
        probe_bytes=BLOCK_BYTES if slow else rng.choice((0, BLOCK_BYTES)),
        floor_bytes_s=FLOOR_BYTES_S if slow else 0.0,
    )


def _net(rng: random.Random, calm: bool) -> Net:
    jitter = rng.choice((0.0, 0.01, 0.2))
    fifo = rng.random() < 0.5
    if calm:
        copies = rng.choice((0.0, 0.0, 0.2, 1.0))
        return Net(jitter=jitter, fifo=fifo, duplicate=copies, replay=rng.choice((0.0, 0.1)))
    return Net(
        jitter=rng.choice((jitter, 0.8)),
        fifo=fifo,
        drop=rng.choice((0.0, 0.05, 0.2, 0.4)),
        setup_drop=rng.choice((0.0, 0.0, 0.0, 0.1)),
        duplicate=rng.choice((0.0, 0.1, 0.4)),
        replay=rng.choice((0.0, 0.05, 0.2)),
        forge=rng.choice((0.0, 0.1)),
        flip=rng.choice((0.0, 0.0, 0.05)),
    )


def _fault(rng: random.Random, names: list[str]) -> Fault:
    kind = rng.choice(("crash", "crash", "stall", "partition", "shutdown", "reload"))
    who = rng.choice(names)
    other = rng.choice([n for n in names if n[0] != who[0]])
    return Fault(round(rng.uniform(0.0, 4.0), 3), kind, who, other, rng.choice((0.2, 1.0, 1.3, 3.0)))


def _request(
    rng: random.Random, i: int, producers: list[str], consumers: list[str], calm: bool, limits: Limits
) -> Request:
    blocks = rng.randint(1, 8)
    held = rng.choice((0, 0, 0, rng.randint(0, blocks), blocks))
    order = rng.choice(("both", "both", "p first", "d first"))
    start = rng.uniform(0.0, 1.5)
    open_at = start + (rng.uniform(0.0, 3.0) if order == "d first" else 0.0)
    begin_at = start + (rng.uniform(0.0, 3.0) if order == "p first" else 0.0)
    preempts = tuple(sorted(rng.uniform(0.02, 0.8) for _ in range(rng.choice((0, 0, 1, 2)))))
    request = Request(
        transfer=f"t{i}",
        prompt=100 * (i + 1) + rng.randint(0, 3),
        blocks=blocks,
        producer=rng.choice(producers),
        consumer=rng.choice(consumers),
        open_at=open_at,
        begin_at=begin_at,
        held=held,
        step_s=rng.choice((0.0, 0.03, 0.2)),
        step_tokens=rng.randint(1, 4 * BLOCK_SIZE),
        preempt_at=preempts,
        resume_s=rng.choice((0.05, 0.6)),
        lazy_finish_s=rng.choice((0.0, 0.0, 0.5)),
        foretold=rng.random() < 0.5,
    )
    if limits.max_transfers < 4:
        return request
    if calm and rng.random() < 0.8:
        # With a dispatch order that a router would choose and no abort, nothing may fail.
        return replace(request, must_be_ready=limits.checksums or not preempts)
    return _trouble(rng, request)


def _trouble(rng: random.Random, request: Request) -> Request:
    changes: dict[str, object] = {}
    if rng.random() < 0.25:
        changes["producer_abort_at"] = rng.uniform(0.0, 1.5)
    if rng.random() < 0.3:
        changes["consumer_abort_at"] = rng.uniform(0.0, 1.5)
    if rng.random() < 0.1:
        changes["let_go_at"] = rng.uniform(0.0, 3.0)
    kind = rng.random()
    if kind < 0.06:
        changes["open_at"] = None
    elif kind < 0.12:
        changes["begin_at"] = None
    elif kind < 0.2:
        changes["producer_prompt"] = request.prompt + 4
    elif kind < 0.28:
        changes["open_twice"] = True
    elif kind < 0.36:
        changes["begin_twice"] = True
    elif kind < 0.44:
        changes["declines"] = True
    return replace(request, **changes)  # type: ignore[arg-type]


def _probe(rng: random.Random, producers: list[str], consumers: list[str], at: float) -> Request:
    """Sent once all faults are over: it must arrive."""
    return Request(
        transfer="probe",
        prompt=9000,
        blocks=rng.randint(1, 5),
        producer=rng.choice(producers),
        consumer=rng.choice(consumers),
        open_at=at,
        begin_at=at + rng.uniform(-0.2, 0.2),
        must_be_ready=True,
        within_s=10.0,
    )
