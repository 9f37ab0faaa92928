"""What a model holds: which transfers and faults, and how often; small enough to explore whole."""

from __future__ import annotations

from dataclasses import dataclass

from pdtransport.protocol.actions import Limits
from pdtransport.protocol.messages import Message

HEADS = 2
HEAD_BYTES = 8  # of a block; in group 1 twice as many


class Broken(AssertionError):
    """A promise was broken."""


def block_bytes(group: int, head_lo: int, head_hi: int) -> int:
    if not 0 <= head_lo < head_hi <= HEADS:
        raise ValueError("heads that are not held here")
    return (head_hi - head_lo) * HEAD_BYTES * (group + 1)


@dataclass(frozen=True)
class Wanted:
    """A transfer: its blocks ``0 .. len(pages[group])`` of each cache group into ``pages`` of the consumer, a share of
    the heads from each of ``producers``. Granted up to ``times`` times, by whichever incarnation of the consumer."""

    name: str
    producers: tuple[str, ...]
    pages: tuple[tuple[int, ...], ...]
    times: int = 1

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(map(len, self.pages))

    @property
    def parts(self) -> list[tuple[int, int, int]]:
        """Group, block and page of each part of it."""
        return [(group, block, page) for group, ids in enumerate(self.pages) for block, page in enumerate(ids)]

    def heads(self, producer: str) -> tuple[int, int]:
        share = HEADS // len(self.producers)
        at = self.producers.index(producer) * share
        return at, at + share


@dataclass(frozen=True)
class Case:
    """Everything that bounds a model. Messages have no bound: each may be lost, copied, kept back and overtaken."""

    name: str
    wanted: tuple[Wanted, ...]
    producer_restarts: int = 0
    consumer_restarts: int = 0
    losses: int = 0  # times that a live peer is given up
    consumer_cancels: int = 0
    producer_cancels: int = 0
    preemptions: int = 0
    damages: int = 0  # of bytes on their way
    resends: int = 1
    batch_blocks: int = 1

    @property
    def producers(self) -> tuple[str, ...]:
        return tuple(sorted({name for each in self.wanted for name in each.producers}))

    def of(self, transfer: str) -> Wanted:
        return next(each for each in self.wanted if each.name == transfer)

    def limits(self, tombstones: int) -> Limits:
        one, groups = HEADS // len(self.wanted[0].producers), len(self.wanted[0].pages)
        largest = max(block_bytes(group, 0, one) for group in range(groups))
        return Limits(
            retry_s=1.0,
            **{
                f"{name}_s": 100.0 for name in ("answer", "arrival", "queue", "stall", "verify", "hold", "claim", "ack")
            },
            resends=self.resends,
            batch_bytes=self.batch_blocks * largest,
            window_bytes=self.batch_blocks * largest,
            tombstones=tombstones,
        )


@dataclass(frozen=True)
class Letter:
    """A message on its way between two processes, each named with its incarnation."""

    sender: str
    to: str
    message: Message

    @property
    def at(self) -> str:
        """Whoever has that name now: a connection may come back to a new process."""
        return name_of(self.to)

    def __str__(self) -> str:
        hidden = {"kind", "digest", "prompt_digest", "checksums", "offer", "reason", "code"}
        fields = {k: v for k, v in self.message.model_dump().items() if k not in hidden and v is not None}
        words = " ".join(f"{name}={value}" for name, value in fields.items())
        return f"{self.sender} -> {self.to} {type(self.message).__name__}({words})"


def name_of(process: str) -> str:
    return process.partition("#")[0]


def born(name: str, incarnation: int) -> str:
    return f"{name}#{incarnation}"
