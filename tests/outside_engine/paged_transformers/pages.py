"""A paged KV cache for transformers' models: one tensor, and who uses which of its blocks."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from pdtransport import KVGeometry, LayerPages


class Pages:
    """Blocks of ``block_size`` tokens. Prefixes of whole blocks that were computed are found by later prompts.

    Attributes:
        kv: ``[layers, 2, blocks, block_size, heads, head_dim]``; keys, then values.
    """

    def __init__(self, config: Any, blocks: int, block_size: int, dtype: torch.dtype) -> None:
        heads, dim = config.num_key_value_heads, config.head_dim
        self.kv = torch.zeros(config.num_hidden_layers, 2, blocks, block_size, heads, dim, dtype=dtype)
        self.block_size = block_size
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))  # what was used last is at the end
        self._users: Counter[int] = Counter()
        self._known: dict[tuple[int, ...], int] = {}  # a prefix -> the block that ends it
        self._holds: dict[int, tuple[int, ...]] = {}  # the other way round

    def geometry(self) -> KVGeometry:
        layers, _, blocks, tokens, heads, dim = self.kv.shape
        slot = dim * self.kv.element_size()
        page = tokens * heads * slot
        halves = [(f"{layer}.{half}", self.kv[layer, half].data_ptr()) for layer in range(layers) for half in (0, 1)]
        return KVGeometry(
            layers=tuple(LayerPages(name, address, page) for name, address in halves),
            num_blocks=blocks,
            block_size=tokens,
            heads=heads,
            head_lo=0,
            total_heads=heads,
            slot_bytes=slot,
            heads_first=False,  # a page is [tokens, heads, slot]
            owner=self.kv,
        )

    def found(self, prompt: list[int]) -> list[int]:
        """Blocks that hold the beginning of this prompt; never all of it, since its last token must be computed."""
        blocks: list[int] = []
        for end in range(self.block_size, len(prompt), self.block_size):
            if (block := self._known.get(tuple(prompt[:end]))) is None:
                break
            blocks.append(block)
        return blocks

    def take(self, found: list[int], tokens: int) -> list[int] | None:
        """Blocks for so many tokens, beginning with those that were found; None: there is no room."""
        count = -(-tokens // self.block_size) - len(found)
        fresh = [block for block in self.free if block not in found][:count]
        if len(fresh) < count:
            return None
        for block in fresh:
            self._known.pop(self._holds.pop(block, ()), None)
        for block in found + fresh:
            self.free.pop(block, None)
            self._users[block] += 1
        return found + fresh

    def computed(self, tokens: list[int], blocks: list[int]) -> None:
        """The blocks hold these tokens: others may find them."""
        for end, block in zip(range(self.block_size, len(tokens) + 1, self.block_size), blocks, strict=False):
            if self._known.setdefault(tuple(tokens[:end]), block) == block:
                self._holds[block] = tuple(tokens[:end])

    def give_back(self, blocks: list[int]) -> None:
        self._users.subtract(blocks)
        self.free.update(dict.fromkeys(block for block in blocks if not self._users[block]))

    def cache(self, blocks: list[int], computed: int) -> Cache:
        """What a forward pass of one request reads and writes, of which ``computed`` tokens are there."""
        return Cache(layers=[PagedLayer(layer, torch.tensor(blocks), computed) for layer in self.kv])


class PagedLayer(CacheLayerMixin):
    """One layer of one request: the pages in its block table."""

    def __init__(self, kv: torch.Tensor, table: torch.Tensor, computed: int) -> None:
        super().__init__()
        self._kv, self._table, self._computed = kv, table, computed

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
        size, end = self._kv.shape[2], self._computed + key_states.shape[2]
        places = torch.arange(self._computed, end)
        self._computed, whole = end, []
        for pages, new in zip(self._kv, (key_states, value_states), strict=True):  # new: [1, heads, tokens, head_dim]
            pages[self._table[places // size], places % size] = new[0].transpose(0, 1)
            whole.append(pages[self._table[: -(-end // size)]].flatten(0, 1)[:end].transpose(0, 1)[None])
        return tuple(whole)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._computed + query_length, 0

    def get_seq_length(self) -> int:
        return self._computed

    def get_max_length(self) -> int:
        return -1
