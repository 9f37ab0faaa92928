"""Pages whose bytes say what they are, and who may write them.

The bytes of one head of one block are one integer: which prompt, block and head it is KV of, and in which computation
it was made. Two computations of one block may differ, validly. Junk is anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pdtransport.protocol.messages import Generation
from tests.sim.world import PeerId, Violation

JUNK = 1 << 62
DAMAGE = 1 << 61


def cell(prompt: int, block: int, head: int, computation: int) -> int:
    return prompt << 40 | block << 28 | head << 20 | computation


def checksum(cells: Sequence[int]) -> bytes:
    return (hash(tuple(cells)) & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")


class Memory:
    """The pages of one worker, for heads ``head_lo .. head_hi``."""

    def __init__(self, head_lo: int, head_hi: int, pages: int) -> None:
        self.head_lo, self.head_hi = head_lo, head_hi
        self.pages = [[JUNK + page] * (head_hi - head_lo) for page in range(pages)]
        self._scribbles = 0

    def read(self, page: int, lo: int, hi: int) -> list[int]:
        return self.pages[page][lo - self.head_lo : hi - self.head_lo]

    def write(self, page: int, lo: int, cells: Sequence[int]) -> None:
        first = lo - self.head_lo
        self.pages[page][first : first + len(cells)] = cells

    def scribble(self, page: int) -> None:
        """Somebody else uses the page now."""
        self._scribbles += 1
        self.pages[page] = [JUNK + (self._scribbles << 8) + i for i in range(self.head_hi - self.head_lo)]


@dataclass
class Lease:
    """Pages of a decode worker that are granted, or given to the engine, for one transfer."""

    transfer: str
    prompt: int
    first_block: int
    pages: list[int]
    heads: dict[PeerId, tuple[int, int]]
    generations: dict[PeerId, Generation] = field(default_factory=dict)
    verified: dict[PeerId, set[int]] = field(default_factory=dict)  # blocks
    first_token: bool = False  # promised to go on from prefill's
    cached_tokens: int | None = None  # that prefill found
    open: bool = True  # the peers may write
    ended: str = ""  # Ready or Failed, once said

    def may_write(self, peer: PeerId, generation: Generation, block: int, page: int, lo: int, hi: int) -> None:
        """Raise if this write is not one that was granted and is still welcome."""
        where = f"{peer} writes block {block} of {self.transfer} into page {page}"
        if not self.open:
            raise Violation(f"{where} after the pages were given back ({self.ended})")
        if self.generations.get(peer) != generation:
            raise Violation(f"{where} under generation {generation}, granted was {self.generations.get(peer)}")
        index = block - self.first_block
        if not 0 <= index < len(self.pages) or self.pages[index] != page:
            raise Violation(f"{where}, which was not granted for it")
        if self.heads.get(peer) != (lo, hi):
            raise Violation(f"{where}: heads {lo}..{hi}, granted were {self.heads.get(peer)}")
        if block in self.verified[peer]:
            raise Violation(f"{where} after it was verified")
