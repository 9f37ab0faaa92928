"""Pages whose bytes say what they are, and who may write them.

The bytes of one head of one block are one integer, a *cell*: which prompt, block and head it is KV of, how many of the
block's tokens are in it, and in which computation it was made. Two computations of one block may differ, validly. Junk
is anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pdtransport.control.events import PeerId
from pdtransport.kv.geometry import KVGeometry, LayerPages
from tests.sim.plan import BLOCK_SIZE, HEAD_BYTES, SLOT_BYTES, TOTAL_HEADS

JUNK = 1 << 62
DAMAGE = 1 << 61
MASK = (1 << 20) - 1  # of the computation in a cell


class Violation(AssertionError):
    """A promise was broken."""


def cell(prompt: int, block: int, head: int, tokens: int, computation: int) -> int:
    return prompt << 40 | block << 28 | tokens << 25 | head << 20 | computation


def checksum(cells: Sequence[int]) -> bytes:
    return (hash(tuple(cells)) & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")


class Memory:
    """The pages of one worker, for heads ``head_lo .. head_hi``, at addresses that no other worker has."""

    def __init__(self, worker: int, head_lo: int, head_hi: int, pages: int) -> None:
        self.head_lo, self.heads = head_lo, head_hi - head_lo
        self.base = (worker + 1) << 48
        self.cells = [JUNK + i for i in range(pages * self.heads)]
        self.page_bytes = self.heads * HEAD_BYTES
        self.geometry = KVGeometry(
            layers=(LayerPages("layer0", self.base, self.page_bytes),),
            num_blocks=pages,
            block_size=BLOCK_SIZE,
            heads=self.heads,
            head_lo=head_lo,
            total_heads=TOTAL_HEADS,
            slot_bytes=SLOT_BYTES,
            heads_first=True,
        )
        self._scribbles = 0

    def at(self, address: int) -> int:
        return (address - self.base) // HEAD_BYTES

    def where(self, run: tuple[int, int]) -> tuple[int, int, int] | None:
        """Page and heads ``lo..hi`` of a run; None if it lies in other memory, which is that of a measurement."""
        first, count = self.at(run[0]), run[1] // HEAD_BYTES
        if not 0 <= first <= first + count <= len(self.cells):
            return None
        page, head = divmod(first, self.heads)
        return page, self.head_lo + head, self.head_lo + head + count

    def read(self, run: tuple[int, int]) -> list[int]:
        first = self.at(run[0])
        return self.cells[first : first + run[1] // HEAD_BYTES]

    def write(self, run: tuple[int, int], cells: Sequence[int]) -> None:
        first = self.at(run[0])
        self.cells[first : first + len(cells)] = cells

    def page(self, page: int, lo: int, hi: int) -> list[int]:
        first = page * self.heads - self.head_lo
        return self.cells[first + lo : first + hi]

    def compute(self, page: int, cells: Sequence[int]) -> None:
        self.cells[page * self.heads : (page + 1) * self.heads] = cells

    def scribble(self, page: int) -> None:
        """Somebody else uses the page now."""
        self._scribbles += 1
        self.compute(page, [JUNK + (self._scribbles << 8) + i for i in range(self.heads)])


@dataclass(eq=False)
class Lease:
    """Pages of a decode worker that are lent to one transfer, or given to the engine with it. Its owner, too."""

    transfer: str
    prompt: int
    tokens: int
    first_block: int
    pages: list[int]
    first_token: bool = False  # promised to go on from prefill's
    cached_tokens: int | None = None  # that prefill found
    heads: dict[PeerId, tuple[int, int]] = field(default_factory=dict)  # as granted
    generations: dict[PeerId, int] = field(default_factory=dict)
    verified: dict[PeerId, set[int]] = field(default_factory=dict)  # blocks
    ended: str = ""  # Ready or Failed, once said

    @property
    def blocks(self) -> set[int]:
        return set(range(self.first_block, self.first_block + len(self.pages)))

    def may_write(self, peer: PeerId, batch: Any, page: int, heads: tuple[int, int]) -> int:
        """The block that goes into ``page``; raises if this write is not one that was granted and is still welcome."""
        where = f"{peer} writes for {self.transfer} into page {page}"
        if self.ended:
            raise Violation(f"{where} after the pages were given back ({self.ended})")
        if self.generations.get(peer) != batch.generation:
            raise Violation(f"{where} under generation {batch.generation}, granted was {self.generations.get(peer)}")
        block = self.first_block + self.pages.index(page)
        if not batch.first_block <= block < batch.first_block + batch.blocks:
            raise Violation(f"{where}, of block {block}: the batch holds {batch.first_block}.. ({batch.blocks})")
        if self.heads.get(peer) != heads:
            raise Violation(f"{where}: heads {heads}, granted were {self.heads.get(peer)}")
        if block in self.verified[peer]:
            raise Violation(f"{where} after block {block} was verified")
        return block
