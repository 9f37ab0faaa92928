"""Two lists of runs, cut into pieces that are contiguous on both sides: the tables that the GPU kernels work from.

Pieces of one length, wherever the tables do not grow too long for it: then a piece is found by a division. Otherwise
each piece's start is in the table, and is searched for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pdtransport.kernels.runs import Runs, as_runs, merge_runs, stream_bytes

Words = npt.NDArray[np.uint64]
Grain = Literal["stripes", "pairs", "singles"]

STRIPE_BYTES = 1024
TILE_BYTES = 4 * STRIPE_BYTES  # what a warp works on at a time
MAX_SPAN = 8  # tiles that a warp takes in one turn: it finds the places of their 32 stripes at once
MAX_BLOCKS = 1 << 17  # checksums of one launch
EQUAL_PIECES = 1 << 17  # up to so many pieces of one length rather than few that must be searched for


@dataclass(frozen=True)
class TilePart:
    """Tiles ``[first, end)`` of a stream, and the pieces ``[low, high)`` that they lie in. ``origin`` is the place in
    the stream where piece ``low`` starts."""

    first: int
    end: int
    low: int
    high: int
    origin: int


@dataclass(frozen=True)
class Pieces:
    """See the module's docstring.

    Attributes:
        src: addresses, uint64, shape (n,).
        dst: likewise; None where nothing is written.
        starts: where in the stream each piece starts, uint64, shape (n,); None where all are ``piece`` bytes long.
        piece: bytes of each; 0 where lengths differ.
        total: bytes of the stream.
        block_bytes: the stream is cut into blocks of so many bytes; all of it where no checksum is asked for.
        grain: what no piece's end cuts through: whole stripes of the checksum, pairs of words, single words. The first
            two also promise addresses that are multiples of 16.
    """

    src: Words
    dst: Words | None
    starts: Words | None
    piece: int
    total: int
    block_bytes: int
    grain: Grain

    @property
    def block_tiles(self) -> int:
        """Tiles of one block; its last may be short."""
        return -(-self.block_bytes // TILE_BYTES)

    @property
    def tiles(self) -> int:
        """Tiles of the stream."""
        return self.block_tiles * (self.total // self.block_bytes) if self.total else 0

    def parts(self, most: int) -> Iterator[TilePart]:
        """The stream in parts of at most ``most`` pieces each (1,024 or more)."""
        first, tiles = 0, self.tiles
        while first < tiles:
            low, limit = self._reach(self._offset(first), most)
            end = tiles if limit >= self.total else self._tile(limit)
            origin = low * self.piece if self.starts is None else int(self.starts[low])
            yield TilePart(first, end, low, self._after(self._offset(end)), origin)
            first = end

    def fill(self, part: TilePart, table: Words) -> None:
        """Writes what the kernels look places up in: addresses of the source, of the destination, and starts, those
        that there are, one after the other."""
        at, count = 0, part.high - part.low
        for column in (self.src, self.dst, self.starts):
            if column is not None:
                table[at : at + count] = column[part.low : part.high]
                at += count

    def table_bytes(self, part: TilePart) -> int:
        """The length of what :meth:`fill` writes."""
        return 8 * (part.high - part.low) * (1 + (self.dst is not None) + (self.starts is not None))

    def arguments(self, part: TilePart, table: int, sums: int, warps: int) -> list[int]:
        """The arguments of a kernel that works on ``part`` with ``warps`` warps, given where its table lies and
        where the sums of the stripes of block 0, 1, ... go (uint64 each)."""
        count = part.high - part.low
        dst = table + 8 * count
        starts = dst + (8 * count if self.dst is not None else 0)
        return [
            table,
            dst if self.dst is not None else 0,
            starts if self.starts is not None else 0,
            count,
            self.piece,
            part.origin,
            self.block_bytes,
            part.first,
            part.end,
            span(part.end - part.first, warps),
            sums,
        ]

    def kernel(self, blocks: int) -> str:
        """The name of the kernel in ``csrc/pages.cu`` for this."""
        what = "sum" if self.dst is None else "copy_sum" if blocks else "copy"
        return f"pdt_{what}_{self.grain}"

    def _offset(self, tile: int) -> int:
        block, inside = divmod(tile, self.block_tiles)
        return block * self.block_bytes + inside * TILE_BYTES

    def _tile(self, offset: int) -> int:
        """The tile that ``offset`` lies in."""
        block, inside = divmod(offset, self.block_bytes)
        return block * self.block_tiles + inside // TILE_BYTES

    def _reach(self, offset: int, most: int) -> tuple[int, int]:
        """The piece at ``offset``, and where in the stream the ``most`` pieces from there on end."""
        if self.starts is None:
            low = offset // self.piece
            return low, (low + most) * self.piece
        low = int(np.searchsorted(self.starts, np.uint64(offset), side="right")) - 1
        return low, int(self.starts[low + most]) if low + most < len(self.starts) else self.total

    def _after(self, offset: int) -> int:
        """The first piece that starts at ``offset`` or later."""
        if self.starts is None:
            return -(-offset // self.piece)
        return int(np.searchsorted(self.starts, np.uint64(offset), side="left"))


def span(tiles: int, warps: int) -> int:
    """Tiles that each of ``warps`` warps takes in a turn, so that the last turn is a full one too."""
    turns = -(-tiles // (warps * MAX_SPAN))
    return max(1, -(-tiles // (warps * turns))) if turns else 1


def cut(src: Runs, dst: Runs | None, blocks: int) -> Pieces:
    """The pieces of stream ``src``, and of ``dst`` where it is to be copied there.

    Raises:
        ValueError: streams of different lengths, ``blocks`` does not fit or is more than ``MAX_BLOCKS``, or addresses
            and lengths that are not multiples of 8 (or are 0).
    """
    sides = [as_runs(side) for side in (src, dst) if side is not None]
    lengths = [_same_length(side) for side in sides]
    totals = [len(side) * each if each else stream_bytes(side) for side, each in zip(sides, lengths, strict=True)]
    if totals[0] != totals[-1]:
        raise ValueError(f"the source is {totals[0]} bytes long, the destination {totals[-1]}")
    total = totals[0]
    if not 0 <= blocks <= MAX_BLOCKS:
        raise ValueError(f"{blocks} blocks in one launch; 0 to {MAX_BLOCKS} are allowed")
    if blocks and (total % blocks or total // blocks % 8):
        raise ValueError(f"a stream of {total} bytes does not hold {blocks} equally long blocks of whole words")
    block_bytes = total // blocks if blocks else total
    if not total:
        nothing = np.empty(0, dtype=np.uint64)
        return Pieces(nothing, nothing if dst is not None else None, None, 8, 0, 0, "singles")
    piece = math.gcd(*lengths) if all(lengths) else 0  # of pages in one length, frames in another, mostly
    if not piece or piece % STRIPE_BYTES:
        sides, lengths = [merge_runs(side) for side in sides], [0] * len(sides)
        piece = int(np.gcd.reduce([np.gcd.reduce(side[:, 1]) for side in sides]))
    columns = [np.ascontiguousarray(side[:, 0]) for side in sides]
    bits = 0
    for column in columns:
        bits |= int(np.bitwise_or.reduce(column))
    if (piece | bits) % 8 or not all(column.min() for column in columns):
        raise ValueError("addresses and lengths of GPU runs must be multiples of 8, and no address 0")
    aligned = (piece | bits | block_bytes) % 16 == 0
    if total // piece <= max(4 * sum(map(len, sides)), EQUAL_PIECES):
        triples = zip(columns, sides, lengths, strict=True)
        starts, tables = None, [_equal_pieces(column, side[:, 1], each, piece) for column, side, each in triples]
    else:
        starts, tables = _common_pieces(sides)
    whole = aligned and starts is None and piece % STRIPE_BYTES == 0 and block_bytes % STRIPE_BYTES == 0
    return Pieces(
        src=tables[0],
        dst=tables[1] if dst is not None else None,
        starts=starts,
        piece=piece if starts is None else 0,
        total=total,
        block_bytes=block_bytes,
        grain="stripes" if whole else "pairs" if aligned else "singles",
    )


def _same_length(side: Runs) -> int:
    """The length that all runs have, or 0."""
    if not len(side):
        return 0
    length = int(side[0, 1])
    return length if int(side[:, 1].min()) == length == int(side[:, 1].max()) else 0


def _equal_pieces(addresses: Words, lengths: Words, each: int, piece: int) -> Words:
    """``each``: the length that all runs have, or 0."""
    if each == piece:
        return addresses
    if each:
        return (addresses[:, None] + np.arange(0, each, piece, dtype=np.uint64)).ravel()
    if int(lengths[0]) == piece and int(lengths.max()) == piece:
        return addresses
    counts = (lengths // np.uint64(piece)).astype(np.int64)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    inside = (np.arange(len(before)) - before).astype(np.uint64) * np.uint64(piece)
    pieces: Words = np.repeat(addresses, counts) + inside
    return pieces


def _common_pieces(sides: list[Runs]) -> tuple[Words, list[Words]]:
    ends = [np.cumsum(side[:, 1], dtype=np.uint64) for side in sides]
    starts = np.unique(np.concatenate([np.zeros(1, dtype=np.uint64), *ends]))[:-1]
    tables = []
    for side, stops in zip(sides, ends, strict=True):
        at = np.searchsorted(stops, starts, side="right")
        tables.append(side[at, 0] + (starts - (stops[at] - side[at, 1])))
    return starts, tables
