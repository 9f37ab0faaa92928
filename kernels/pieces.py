"""Cuts two run lists into pieces that are contiguous on both sides: the tables of the GPU kernels.

All pieces have one length, unless the tables would get too long: then a kernel finds a piece by division. Otherwise the
table also holds each piece's start, and a kernel searches for it.
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
TILE_BYTES = 4 * STRIPE_BYTES  # a warp works on one tile at a time
MAX_SPAN = 8  # tiles per turn of a warp: it looks up the places of their 32 stripes at once
MAX_BLOCKS = 1 << 17  # checksums per launch
EQUAL_PIECES = 1 << 17  # prefer up to this many pieces of equal length over fewer that must be searched


@dataclass(frozen=True)
class TilePart:
    """Tiles ``[first, end)`` of a stream and the pieces ``[low, high)`` that contain them.

    ``origin`` is the stream offset at which piece ``low`` starts.
    """

    first: int
    end: int
    low: int
    high: int
    origin: int


@dataclass(frozen=True)
class Pieces:
    """A stream cut into pieces; see the module's docstring.

    Attributes:
        src: source addresses, uint64, shape (n,).
        dst: destination addresses, likewise; None if nothing is written.
        starts: stream offset of each piece, uint64, shape (n,); None if all are ``piece`` bytes long.
        piece: length of each piece in bytes; 0 if lengths differ.
        total: length of the stream in bytes.
        block_bytes: length of a checksum block in bytes; the whole stream if no checksum is wanted.
        grain: the largest unit that no end of a piece cuts: whole stripes of the checksum, pairs of words, or single
            words. The first two also guarantee that addresses are multiples of 16.
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
        """Tiles per block; the last may be short."""
        return -(-self.block_bytes // TILE_BYTES)

    @property
    def tiles(self) -> int:
        """Tiles of the stream."""
        return self.block_tiles * (self.total // self.block_bytes) if self.total else 0

    def parts(self, most: int) -> Iterator[TilePart]:
        """Split the stream into parts of at most ``most`` pieces each (``most`` is at least 1,024)."""
        first, tiles = 0, self.tiles
        while first < tiles:
            low, limit = self._reach(self._offset(first), most)
            end = tiles if limit >= self.total else self._tile(limit)
            origin = low * self.piece if self.starts is None else int(self.starts[low])
            yield TilePart(first, end, low, self._after(self._offset(end)), origin)
            first = end

    def fill(self, part: TilePart, table: Words) -> None:
        """Write the kernel's table: source addresses, then destination addresses and starts if there are any."""
        at, count = 0, part.high - part.low
        for column in (self.src, self.dst, self.starts):
            if column is not None:
                table[at : at + count] = column[part.low : part.high]
                at += count

    def table_bytes(self, part: TilePart) -> int:
        """Length of what :meth:`fill` writes."""
        return 8 * (part.high - part.low) * (1 + (self.dst is not None) + (self.starts is not None))

    def arguments(self, part: TilePart, table: int, sums: int, warps: int) -> list[int]:
        """Arguments of a kernel that works on ``part`` with ``warps`` warps.

        Args:
            table: address of the part's table.
            sums: address of the sums of the stripes of block 0, 1, ... (uint64 each).
        """
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
        """Name of the kernel in ``csrc/pages.cu`` for this stream."""
        what = "sum" if self.dst is None else "copy_sum" if blocks else "copy"
        return f"pdt_{what}_{self.grain}"

    def _offset(self, tile: int) -> int:
        block, inside = divmod(tile, self.block_tiles)
        return block * self.block_bytes + inside * TILE_BYTES

    def _tile(self, offset: int) -> int:
        """The tile that contains ``offset``."""
        block, inside = divmod(offset, self.block_bytes)
        return block * self.block_tiles + inside // TILE_BYTES

    def _reach(self, offset: int, most: int) -> tuple[int, int]:
        """The piece at ``offset``, and the stream offset at which the ``most`` pieces from there on end."""
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
    """Tiles per turn for each of ``warps`` warps, such that the last turn is full too."""
    turns = -(-tiles // (warps * MAX_SPAN))
    return max(1, -(-tiles // (warps * turns))) if turns else 1


def cut(src: Runs, dst: Runs | None, blocks: int) -> Pieces:
    """Cut the stream ``src``, and ``dst`` if it is a copy, into pieces.

    Raises:
        ValueError: the streams differ in length, ``blocks`` does not fit or exceeds ``MAX_BLOCKS``, or an address or
            length is not a multiple of 8, or an address is 0.
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
    piece = math.gcd(*lengths) if all(lengths) else 0  # mostly: whole pages on one side, frames on the other
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
    """The length that all runs have, or 0 if they differ."""
    if not len(side):
        return 0
    length = int(side[0, 1])
    return length if int(side[:, 1].min()) == length == int(side[:, 1].max()) else 0


def _equal_pieces(addresses: Words, lengths: Words, each: int, piece: int) -> Words:
    """Addresses of the pieces of ``piece`` bytes; ``each`` is the length that all runs have, or 0."""
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
