"""The KV cache of one worker as a list of cache groups, in the order that both sides of a transfer agree on.

A cache group is a set of layers that share one block table, as in vLLM: full attention, sliding window, and so on. Each
has a geometry of its own, with its own block size, and page ids of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdtransport.errors import InvalidCall
from pdtransport.kv.geometry import KVGeometry, Region

GONE = -1  # in a request's pages: this block was given back, since no later token attends to it


@dataclass(frozen=True)
class CacheGroups:
    """The cache groups of one worker.

    Raises:
        InvalidCall: there is none, or they are not in the memory of one device.
    """

    groups: tuple[KVGeometry, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise InvalidCall("geometry: a worker has at least one cache group")
        if len({group.device for group in self.groups}) > 1:
            raise InvalidCall("geometry: all cache groups of a worker must be on one device")

    @classmethod
    def of(cls, geometry: KVGeometry | Sequence[KVGeometry]) -> CacheGroups:
        """
        Raises:
            InvalidCall: ``geometry`` is neither a geometry nor a sequence of them.
        """
        groups = (geometry,) if isinstance(geometry, KVGeometry) else geometry
        if not isinstance(groups, Sequence) or not all(isinstance(each, KVGeometry) for each in groups):
            given = type(geometry).__name__
            raise InvalidCall(
                f"geometry: expected a KVGeometry, such as KVGeometry.of_array(kv), or one per cache group, not {given}"
            )
        return cls(tuple(groups))

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[KVGeometry]:
        return iter(self.groups)

    def __getitem__(self, group: int) -> KVGeometry:
        return self.groups[group]

    @property
    def device(self) -> int:
        return self.groups[0].device

    def regions(self) -> list[Region]:
        """The memory that the pages span, one region per layer."""
        return [region for group in self.groups for region in group.regions()]

    def blocks(self, tokens: int) -> tuple[int, ...]:
        """By group, how many blocks hold ``tokens`` tokens."""
        return tuple(-(-tokens // group.block_size) for group in self.groups)

    def final_blocks(self, tokens: int, prompt_tokens: int) -> tuple[int, ...]:
        """By group, how many leading blocks are final once ``tokens`` tokens of the prompt are computed: whole blocks,
        and the prompt's last one once the whole prompt is."""
        if tokens >= prompt_tokens:
            return self.blocks(prompt_tokens)
        return tuple(tokens // group.block_size for group in self.groups)

    def checked_block_bytes(self, group: int, head_lo: int, head_hi: int) -> int:
        """As :meth:`KVGeometry.checked_block_bytes`, of one group."""
        return self.groups[group].checked_block_bytes(head_lo, head_hi)
