"""The engine's block tables: how many blocks a prompt has in each, and which of them have to be handed over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdtransport.kv.groups import GONE

Blocks = Sequence[list[int]]  # of a request: block ids by block table, in order; GONE is one that was given back


@dataclass(frozen=True)
class BlockTables:
    """The block tables of one engine; a model with several cache groups has several.

    Args:
        block_sizes: tokens per block, by table.
        window: tokens of the smallest sliding window or attention chunk; None: every token attends to all before it.
    """

    block_sizes: tuple[int, ...]
    window: int | None = None

    def __len__(self) -> int:
        return len(self.block_sizes)

    def handed(self, tokens: int) -> int:
        """How many tokens of a prompt of ``tokens`` are handed over.

        Behind a window all but the last one, which decode computes itself: the blocks that this computation attends to
        are those that the engine keeps for so many tokens. With all tokens received, it would already have given back
        one of them.
        """
        return max(1, tokens - 1) if self.window is not None else tokens

    def counts(self, tokens: int) -> tuple[int, ...]:
        """By table, how many blocks hold ``tokens`` tokens."""
        return tuple(-(-tokens // size) for size in self.block_sizes)

    def missing(self, blocks: Blocks, held: int, tokens: int) -> tuple[tuple[int, ...], tuple[list[int], ...]]:
        """What a request that has the KV of ``held`` tokens needs to have that of ``tokens``.

        Returns:
            By table, the number of the first block, and the blocks from there on. Blocks that no token will attend to
            any more are left out.
        """
        firsts, found = [], []
        for size, ids, end in zip(self.block_sizes, blocks, self.counts(tokens), strict=True):
            end = min(end, len(ids))
            first = min(held // size, end)
            while first < end and ids[first] == GONE:
                first += 1
            firsts.append(first)
            found.append(ids[first:end])
        return tuple(firsts), tuple(found)
