"""Where KV lives in one worker: pages, heads, and the byte runs of any slice of them.

The byte stream of a slice is ordered by block, then layer, then the page's own order (heads outermost in ``HNC`` pages,
tokens outermost in ``NHC`` pages). Invariant: two workers with matching fingerprints produce the same stream for the
same heads, whatever their tensor-parallel sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pdtransport.errors import InvalidCall
from pdtransport.kv.arrays import HOST as HOST
from pdtransport.kv.arrays import dense_strides, layout_of


@dataclass(frozen=True)
class Region:
    """Memory that links may read or write: ``nbytes`` bytes at ``address``.

    ``device`` is the GPU's number, -1 for host memory; ``owner`` keeps the memory alive.
    """

    address: int
    nbytes: int
    owner: Any = field(default=None, repr=False, compare=False)
    device: int = HOST


@dataclass(frozen=True)
class LayerPages:
    """One layer's pages: page ``b`` starts at ``address + b * block_stride`` (bytes)."""

    name: str
    address: int
    block_stride: int


@dataclass(frozen=True)
class KVGeometry:
    """The KV cache of one worker.

    Args:
        layers: in model order, which determines the stream order.
        num_blocks: pages per layer.
        block_size: tokens per page.
        heads: number of KV heads on this rank; ``head_lo`` is the first one's number over all ranks, ``total_heads``
            the number of heads over all ranks.
        slot_bytes: bytes of one head of one token (key and value together).
        heads_first: a page is ``[heads, tokens, slot]`` (True) or ``[tokens, heads, slot]`` (False).
        device: number of the GPU that holds the cache; -1: host memory.
        owner: keeps the memory alive; referenced by the geometry and by a transport that was given it.

    Raises:
        InvalidCall: these values describe no KV cache.
    """

    layers: tuple[LayerPages, ...]
    num_blocks: int
    block_size: int
    heads: int
    head_lo: int
    total_heads: int
    slot_bytes: int
    heads_first: bool
    device: int = HOST
    owner: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.layers or min(self.num_blocks, self.block_size, self.heads, self.slot_bytes) < 1:
            raise InvalidCall("a KV geometry needs layers, blocks, heads and bytes")
        if not 0 <= self.head_lo <= self.head_hi <= self.total_heads:
            raise InvalidCall(f"heads {self.head_lo}..{self.head_hi} are not within 0..{self.total_heads}")
        if self.slot_bytes % 8:
            raise InvalidCall(f"a head's slot of {self.slot_bytes} bytes is not a multiple of 8")

    @property
    def head_hi(self) -> int:
        return self.head_lo + self.heads

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer, all heads of this rank."""
        return self.heads * self.block_size * self.slot_bytes

    def block_bytes(self, head_lo: int, head_hi: int) -> int:
        """Bytes of one block over all layers, for heads ``head_lo..head_hi``."""
        return len(self.layers) * (head_hi - head_lo) * self.block_size * self.slot_bytes

    @classmethod
    def of_array(cls, array: Any, *, head_lo: int = 0, total_heads: int | None = None) -> KVGeometry:
        """Geometry of a C-contiguous array of shape ``[layers, blocks, heads, tokens, slot]`` (``HNC`` pages).

        Any dtype, in host or GPU memory; an array of numpy, torch, cupy or anything with DLPack. The geometry keeps
        the array alive.

        Raises:
            InvalidCall: not such an array, of another shape, not C-contiguous, or read-only.
        """
        found = layout_of(array)
        if len(found.shape) != 5:
            raise InvalidCall(
                f"expected an array of shape [layers, blocks, heads, tokens, slot], not {list(found.shape)}"
            )
        if not found.dense:
            raise InvalidCall(f"expected a C-contiguous array; this one of shape {list(found.shape)} is a strided view")
        address, strides = found.address, dense_strides(found.shape, found.item_bytes)
        layers, blocks, heads, tokens, _ = found.shape
        return cls(
            layers=tuple(LayerPages(f"layer{i}", address + i * strides[0], strides[1]) for i in range(layers)),
            num_blocks=blocks,
            block_size=tokens,
            heads=heads,
            head_lo=head_lo,
            total_heads=total_heads if total_heads is not None else heads,
            slot_bytes=strides[3],
            heads_first=True,
            device=found.device,
            owner=found.owner,
        )

    def regions(self) -> list[Region]:
        """The memory that the pages span, one region per layer."""
        last = self.num_blocks - 1
        return [
            Region(layer.address, last * layer.block_stride + self.page_bytes, self.owner, self.device)
            for layer in sorted(self.layers, key=lambda layer: layer.address)
        ]

    def checked_block_bytes(self, head_lo: int, head_hi: int) -> int:
        """:meth:`block_bytes` for heads that a peer named.

        Raises:
            ValueError: this worker does not hold these heads.
        """
        if not self.head_lo <= head_lo < head_hi <= self.head_hi:
            raise ValueError(f"heads {head_lo}..{head_hi} are not held here ({self.head_lo}..{self.head_hi})")
        return self.block_bytes(head_lo, head_hi)

    def runs(self, pages: Sequence[int], head_lo: int, head_hi: int) -> npt.NDArray[np.uint64]:
        """Byte runs of ``pages`` for heads ``head_lo..head_hi``: shape (n, 2), uint64, rows ``[address, nbytes]``.

        ``pages``: page ids in the request's order. Contiguous bytes within a page are one run; no run spans two pages.

        Raises:
            ValueError: this worker does not hold such a page or head.
        """
        self.checked_block_bytes(head_lo, head_hi)
        ids = np.asarray(pages, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_blocks):
            raise ValueError(f"page id out of 0..{self.num_blocks - 1}")
        offsets, length = self._page_slice(head_lo, head_hi)
        bases = np.array([layer.address for layer in self.layers], dtype=np.uint64)
        strides = np.array([layer.block_stride for layer in self.layers], dtype=np.uint64)
        starts = bases[None, :] + ids.astype(np.uint64)[:, None] * strides[None, :]  # (block, layer)
        if offsets.size == 1:  # whole pages, or heads that are contiguous in the page
            addresses = (starts + offsets[0]).reshape(-1)
        else:
            addresses = (starts[:, :, None] + offsets[None, None, :]).reshape(-1)
        runs = np.empty((addresses.size, 2), dtype=np.uint64)
        runs[:, 0] = addresses
        runs[:, 1] = length
        return runs

    def _page_slice(self, head_lo: int, head_hi: int) -> tuple[npt.NDArray[np.uint64], int]:
        """Offsets of the runs within one page, and their common length (bytes)."""
        first, count = head_lo - self.head_lo, head_hi - head_lo
        if count == self.heads:
            return np.zeros(1, dtype=np.uint64), self.page_bytes
        if self.heads_first:
            head_bytes = self.block_size * self.slot_bytes
            return np.array([first * head_bytes], dtype=np.uint64), count * head_bytes
        row = self.heads * self.slot_bytes
        tokens = np.arange(self.block_size, dtype=np.uint64)
        return tokens * np.uint64(row) + np.uint64(first * self.slot_bytes), count * self.slot_bytes


@dataclass(frozen=True)
class HeadSource:
    """One producer rank, and the heads that a consumer reads from it."""

    rank: int
    head_lo: int
    head_hi: int


def head_range(rank: int, ranks: int, total_heads: int) -> tuple[int, int]:
    """KV heads of ``rank``: an even split, or one replicated head if there are more ranks than heads."""
    if ranks <= total_heads:
        per = total_heads // ranks
        return rank * per, (rank + 1) * per
    head = rank * total_heads // ranks
    return head, head + 1


def head_sources(head_lo: int, head_hi: int, producer_ranks: int, total_heads: int, me: int = 0) -> list[HeadSource]:
    """Producer ranks that together hold heads ``head_lo..head_hi``, each head once.

    If several ranks hold replicas of a head, ``me`` (the consumer's rank) spreads the load over them.
    """
    if producer_ranks <= total_heads:
        sources = []
        for rank in range(producer_ranks):
            lo, hi = head_range(rank, producer_ranks, total_heads)
            lo, hi = max(lo, head_lo), min(hi, head_hi)
            if lo < hi:
                sources.append(HeadSource(rank, lo, hi))
        return sources
    sources = []
    for head in range(head_lo, head_hi):
        first, end = -(-head * producer_ranks // total_heads), -(-(head + 1) * producer_ranks // total_heads)
        sources.append(HeadSource(first + me % (end - first), head, head + 1))
    return sources


def consumers_of(rank: int, ranks: int, consumer_ranks: int, total_heads: int) -> list[int]:
    """Consumer ranks that read pages from producer ``rank``: the inverse of :func:`head_sources`."""
    takers = []
    for consumer in range(consumer_ranks):
        lo, hi = head_range(consumer, consumer_ranks, total_heads)
        if any(source.rank == rank for source in head_sources(lo, hi, ranks, total_heads, consumer)):
            takers.append(consumer)
    return takers
