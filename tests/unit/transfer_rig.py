"""Two workers in one process: the real halves of an exchange, their real peers and a real link, and a control channel
whose messages the test carries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pdtransport.control.events import Identity, PeerId, PeerUp
from pdtransport.control.handshake import facts
from pdtransport.kernels.runs import Runs
from pdtransport.kv.geometry import KVGeometry, head_range
from pdtransport.kv.groups import CacheGroups
from pdtransport.links.base import Link, Prepared
from pdtransport.links.cma import CmaLink
from pdtransport.links.memory import Regions
from pdtransport.links.reading import PullChannel
from pdtransport.protocol.actions import Limits
from pdtransport.protocol.messages import BatchHint, Ended, Grant, Hello, LinkCall, Message
from pdtransport.settings import LinkSettings
from pdtransport.transfer.consumer import ConsumerDriver, ReceiveRequest, WantedBlocks
from pdtransport.transfer.link_setup import Scratch
from pdtransport.transfer.outcome import Outcome
from pdtransport.transfer.peers import Peers, TransferPeer
from pdtransport.transfer.producer import ProducerDriver
from pdtransport.transfer.timeline import Timeline

LAYERS, PAGES, HEADS, TOKENS, SLOT = 2, 40, 2, 16, 64  # tokens of a page, bytes of a head's slot
BLOCK_BYTES = LAYERS * HEADS * TOKENS * SLOT
LIMITS = Limits(batch_bytes=BLOCK_BYTES)
TRANSFER, DIGEST = "t", bytes(32)
MAX_TURNS = 10_000
_CONSUMER = ("claim", "grant", "received", "nack", "ack", "revoke")
_PRODUCER = ("accept", "batch", "commit", "abort")


class Mail:
    """Stands for the control channel: keeps what is said until the test carries it."""

    def __init__(self) -> None:
        self.letters: list[tuple[PeerId, Message]] = []
        self.wanted: list[tuple[str, int]] = []
        self.watched = True
        self.ended: list[Ended] = []

    def send(self, peer: PeerId, message: Message) -> bool:
        self.letters.append((peer, message))
        return True

    def connect(self, host: str, port: int) -> None:
        self.wanted.append((host, port))

    def publish(self, report: Ended) -> None:
        self.ended.append(report)


class Worker:
    """One worker, in both roles."""

    def __init__(
        self,
        engine: str,
        *,
        rank: int = 0,
        world: int = 1,
        port: int = 1,
        limits: Limits = LIMITS,
        link: Callable[[Regions], Link] = CmaLink,
        links: LinkSettings | None = None,
        scratch: int = 0,
    ) -> None:
        low, high = head_range(rank, world, HEADS)
        self.kv = np.zeros((LAYERS, PAGES, high - low, TOKENS, SLOT), dtype=np.uint8)
        geometry = KVGeometry.of_array(self.kv, head_lo=low, total_heads=HEADS)
        probe = Scratch(scratch)
        self.link = link(Regions([*geometry.regions(), *probe.regions]))
        self.me = Identity(engine, rank, world, 1, links={"cma": self.link.export()})
        self.id = PeerId(engine, rank, 1)
        self.endpoint = ("127.0.0.1", port)
        self.mail: Any = Mail()
        self.now = 0.0  # of the peers
        self.counters: Counter[str] = Counter()
        self.peers = Peers(self.mail, {"cma": self.link}, {}, links or LinkSettings(order=("cma",)), probe, self.clock)
        groups = CacheGroups.of(geometry)
        common = (self.mail, self.peers, Timeline(64), self.counters, None)
        self.producer = ProducerDriver(limits, groups, *common)
        self.consumer = ConsumerDriver(limits, groups, self.me, *common)
        self.outcomes: list[Outcome] = []

    def clock(self) -> float:
        return self.now

    def meet(self, other: Worker, *, dialled: bool) -> None:
        """``other`` is up; ``dialled``: because we connected to it."""
        endpoint = other.endpoint if dialled else None
        self.peers.up(PeerUp(other.id, "127.0.0.1", facts(Hello, other.me, 0), endpoint))

    def hear(self, sender: PeerId, message: Message) -> None:
        if message.kind in _CONSUMER:
            self.producer.on_message(sender, message, 0.0)  # type: ignore[arg-type]
        elif message.kind in _PRODUCER:
            self.consumer.on_message(sender, message, 0.0)  # type: ignore[arg-type]
        elif isinstance(message, BatchHint):
            self.consumer.coming(sender, message)
        elif isinstance(message, LinkCall):
            self.peers.link_call(sender, message)

    def peer(self, other: Worker) -> TransferPeer:
        found = self.peers.get(other.id)
        assert found is not None
        return found

    def open(self, tokens: int, transfer: str = TRANSFER) -> None:
        self.producer.open(self, transfer, DIGEST, tokens, self.outcomes.append)

    def fetch(self, tokens: int, pages: Sequence[int], *, port: int = 1, transfer: str = TRANSFER, **more: Any) -> None:
        blocks = WantedBlocks(more.pop("first_block", 0), list(pages))
        facts = {"ranks": 1, **more}
        wanted = ReceiveRequest(
            transfer, "127.0.0.1", port, prompt_digest=DIGEST, tokens=tokens, groups=(blocks,), **facts
        )
        self.consumer.fetch(self, wanted, self.outcomes.append)

    def ready(self, pages: Sequence[int], tokens: int, transfer: str = TRANSFER) -> None:
        self.producer.pages_ready(self, transfer, (list(pages),), tokens)

    def close(self) -> None:
        self.peers.close()
        self.link.close()


def carry(*workers: Worker) -> list[Message]:
    """Deliver all letters, and let the links move what they have to, until nothing is left. What was said, in order."""
    by_id, said, turns = {worker.id: worker for worker in workers}, [], 0
    while any(w.mail.letters or not w.link.arm() or w.producer.live()["queued_pushes"] for w in workers):
        turns += 1
        assert turns < MAX_TURNS, "it goes on for ever"
        for worker in workers:
            letters, worker.mail.letters = worker.mail.letters, []
            for peer, message in letters:
                said.append(message)
                by_id[peer].hear(worker.id, message)
            worker.producer.push_some()
            while worker.link.progress():
                pass
    return said


@contextmanager
def pair(prefill: Worker | None = None, decode: Worker | None = None) -> Iterator[tuple[Worker, Worker]]:
    """Prefill and decode, up and with a link between them."""
    p, d = prefill or Worker("p"), decode or Worker("d", port=2)
    try:
        meet(p, d)
        yield p, d
    finally:
        p.close()
        d.close()


def meet(p: Worker, d: Worker, *others: Worker) -> None:
    """Decode connects to prefill, and they agree on a link; letters to ``others`` are delivered, too."""
    d.meet(p, dialled=True)
    p.meet(d, dialled=False)
    carry(p, d, *others)


class PreparingChannel(PullChannel):
    """Host memory needs no preparation; this channel has one, as that of GPU memory does, and notes what becomes of it
    and what it is told of."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.used: list[Prepared | None] = []
        self.foreseen: list[tuple[list[list[int]], int]] = []

    def prepare(self, runs: Runs, checksum_blocks: int, event_handle: int) -> Prepared:
        return Prepared(runs.tobytes())

    def send(self, key: int, runs: Runs, blocks: int, prepared: Prepared | None = None) -> Any:
        assert prepared is None or prepared.offer == runs.tobytes(), "prepared for other memory"
        self.used.append(prepared)
        return super().send(key, runs, blocks)

    def prepare_read(self, offer: bytes, runs: Runs, blocks: int) -> None:
        self.foreseen.append((runs.tolist(), blocks))


class PreparingLink(CmaLink):
    def connect(self, peer_export: bytes, peer_host: str) -> PullChannel:
        channel = super().connect(peer_export, peer_host)
        channel.__class__ = PreparingChannel
        channel.used, channel.foreseen = [], []  # type: ignore[attr-defined]
        return channel


def grants(said: Sequence[Message]) -> list[Grant]:
    return [message for message in said if isinstance(message, Grant)]
