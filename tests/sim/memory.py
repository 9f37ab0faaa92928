"""Pages whose bytes say what they are, and who may write them.

The bytes of one head of one block are one integer, a *cell*: which prompt, cache group, block and head it is KV of, how
many of the block's tokens are in it, and in which computation it was made. Two computations of one block may differ,
validly. Junk is anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pdtransport.control.events import PeerId
from pdtransport.kv.geometry import KVGeometry, LayerPages, head_range
from pdtransport.kv.groups import CacheGroups
from tests.sim.plan import SLOT_BYTES, Group, Plan

JUNK = 1 << 62
DAMAGE = 1 << 61
MASK = (1 << 20) - 1  # of the computation in a cell


class Violation(AssertionError):
    """A promise was broken."""


class Cell(NamedTuple):
    prompt: int
    group: int
    block: int
    tokens: int
    head: int


def cell(what: Cell, computation: int) -> int:
    return what.prompt << 42 | what.group << 39 | what.block << 30 | what.tokens << 25 | what.head << 20 | computation


def read_cell(value: int) -> Cell:
    return Cell(value >> 42, value >> 39 & 7, value >> 30 & 511, value >> 25 & 31, value >> 20 & 31)


def checksum(cells: Sequence[int]) -> bytes:
    return (hash(tuple(cells)) & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")


class GroupMemory:
    """The pages of one cache group of a worker."""

    def __init__(self, group: Group, base: int, rank: int, ranks: int, pages: int) -> None:
        self.group, self.base = group, base
        self.head_lo, self.head_hi = head_range(rank, ranks, group.heads)
        self.heads = self.head_hi - self.head_lo
        self.cells = [JUNK + i for i in range(pages * self.heads)]
        self.geometry = KVGeometry(
            layers=(LayerPages("layer0", base, self.heads * group.head_bytes),),
            num_blocks=pages,
            block_size=group.block_size,
            heads=self.heads,
            head_lo=self.head_lo,
            total_heads=group.heads,
            slot_bytes=SLOT_BYTES,
            heads_first=True,
        )
        self._scribbles = 0

    def at(self, address: int) -> int:
        return (address - self.base) // self.group.head_bytes

    def page(self, page: int, lo: int, hi: int) -> list[int]:
        first = page * self.heads - self.head_lo
        return self.cells[first + lo : first + hi]

    def compute(self, page: int, cells: Sequence[int]) -> None:
        self.cells[page * self.heads : (page + 1) * self.heads] = cells

    def scribble(self, page: int) -> None:
        """Somebody else uses the page now."""
        self._scribbles += 1
        self.compute(page, [JUNK + (self._scribbles << 8) + i for i in range(self.heads)])


class Place(NamedTuple):
    """What a run of bytes is."""

    group: int
    page: int
    head_lo: int
    head_hi: int


class Memory:
    """The pages of one worker, at addresses that no other worker has."""

    def __init__(self, worker: int, rank: int, ranks: int, plan: Plan) -> None:
        self.groups = [
            GroupMemory(group, (worker + 1) << 48 | number << 40, rank, ranks, plan.pages_of(group))
            for number, group in enumerate(plan.groups)
        ]
        self.geometry = CacheGroups(tuple(group.geometry for group in self.groups))

    def _of(self, address: int) -> tuple[int, GroupMemory] | None:
        for number, group in enumerate(self.groups):
            if 0 <= group.at(address) < len(group.cells):
                return number, group
        return None

    def where(self, run: tuple[int, int]) -> Place | None:
        """None if it lies in other memory, which is that of a measurement."""
        found = self._of(run[0])
        if found is None:
            return None
        number, group = found
        page, head = divmod(group.at(run[0]), group.heads)
        return Place(number, page, group.head_lo + head, group.head_lo + head + run[1] // group.group.head_bytes)

    def read(self, run: tuple[int, int]) -> list[int]:
        found = self._of(run[0])
        if found is None:
            return []
        _, group = found
        first = group.at(run[0])
        return group.cells[first : first + run[1] // group.group.head_bytes]

    def write(self, run: tuple[int, int], cells: Sequence[int]) -> None:
        found = self._of(run[0])
        assert found is not None
        _, group = found
        first = group.at(run[0])
        group.cells[first : first + len(cells)] = cells


class Lent(NamedTuple):
    """Pages of one cache group: ``pages[i]`` is for block ``first + i``."""

    first: int
    pages: list[int]

    @property
    def blocks(self) -> range:
        return range(self.first, self.first + len(self.pages))


@dataclass(eq=False)
class Lease:
    """Pages of a decode worker that are lent to one transfer, or given to the engine with it. Its owner, too."""

    transfer: str
    prompt: int
    tokens: int  # that are handed over
    groups: tuple[Lent, ...]
    first_token: bool = False  # promised to go on from prefill's
    cached_tokens: int | None = None  # that prefill found
    heads: dict[PeerId, dict[int, tuple[int, int]]] = field(default_factory=dict)  # as granted, by cache group
    generations: dict[PeerId, int] = field(default_factory=dict)
    verified: dict[PeerId, set[tuple[int, int]]] = field(default_factory=dict)  # groups and blocks
    ended: str = ""  # Ready or Failed, once said

    @property
    def anything(self) -> bool:
        return any(lent.pages for lent in self.groups)

    def asked(self, peer: PeerId) -> set[tuple[int, int]]:
        """The groups and blocks that were granted to ``peer``."""
        return {(group, block) for group in self.heads[peer] for block in self.groups[group].blocks}

    def may_write(self, peer: PeerId, batch: Any, place: Place) -> tuple[int, int]:
        """The group and block that go into ``place``; raises if this write is not one that was granted and is still
        welcome."""
        where = f"{peer} writes for {self.transfer} into {place}"
        if self.ended:
            raise Violation(f"{where} after the pages were given back ({self.ended})")
        if self.generations.get(peer) != batch.generation:
            raise Violation(f"{where} under generation {batch.generation}, granted was {self.generations.get(peer)}")
        lent = self.groups[place.group]
        block = lent.first + lent.pages.index(place.page)
        if batch.group != place.group or not batch.first_block <= block < batch.first_block + batch.blocks:
            raise Violation(f"{where}, of block {block}: the batch is {batch}")
        if self.heads[peer].get(place.group) != place[2:]:
            raise Violation(f"{where}, granted were heads {self.heads[peer]}")
        if (place.group, block) in self.verified[peer]:
            raise Violation(f"{where} after block {block} was verified")
        return place.group, block
