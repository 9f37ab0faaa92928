"""vLLM KV events for the shared pool, so that routers can place prompts by the blocks it holds.

Blocks are named by vLLM's own hashes. An engine publishes ``BlockStored`` for chunks that it stored or found in the
pool, and ``BlockRemoved`` once the pool reports them gone. If the engine is not sure that a chunk is still there, it
publishes nothing, or ``BlockRemoved`` if it has published the chunk before.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdtransport.errors import PoolUnavailable

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from pdtransport.pool.client.pool_client import PoolClient

OWNER = "pdpool"  # `ownership` of the blocks in an event
MAX_KNOWN = 1 << 18  # published chunks; beyond it the oldest are published as removed
MAX_STORING = 1 << 14  # chunks being stored
MAX_GONE = 1 << 16  # remembered keys that the pool dropped lately
WATCH_S = 1.0  # between two attempts to watch a pool that is not reachable
REMOVED_AT_ONCE = 1024  # blocks in one BlockRemoved event


@dataclass
class _Chunk:
    """A chunk to publish.

    ``hashes``: hashes of its blocks. ``keys``: keys of all its parts. ``since``: value of ``PoolEvents.now`` when the
    chunk was known to be in the pool, or when its store began; earlier removals don't matter.
    """

    hashes: list[Any]
    keys: tuple[bytes, ...]
    stored: Any  # its BlockStored event
    since: int
    reports: int = 0  # workers that stored all their parts


class PoolEvents:
    """Collects the pool's KV events, one per engine. Used by the scheduler's thread."""

    def __init__(self, *, block_size: int, chunk_blocks: int, ranks: int, clock: Callable[[], float]) -> None:
        self._block_size, self._per, self._ranks, self._clock = block_size, chunk_blocks, ranks, clock
        self._known: OrderedDict[bytes, _Chunk] = OrderedDict()  # by the first part's key
        self._of: dict[bytes, _Chunk] = {}  # by any part's key
        self._storing: OrderedDict[bytes, _Chunk] = OrderedDict()
        self._heard: deque[Sequence[bytes] | None] = deque()  # removed keys; None: all may be gone
        self._gone: OrderedDict[bytes, int] = OrderedDict()  # removed key -> value of `now`
        self._events: list[Any] = []
        self._watching = False
        self._watch_at = 0.0
        self.now = 0  # logical clock, incremented by each removal

    def watch(self, client: PoolClient) -> None:
        """Subscribe to the pool's removals, unless already subscribed."""
        self._drain()
        if self._watching or self._clock() < self._watch_at:
            return
        self._watch_at = self._clock() + WATCH_S
        self._watching = True
        try:
            client.watch(self._heard.append)
        except PoolUnavailable:
            self._watching = False

    # -- what the engine sees ----------------------------------------------------------------------------------------

    def found(self, request: Request, chunks: Sequence[tuple[bytes, ...]], since: int) -> None:
        """Publish the request's first chunks: the pool held them at ``since``.

        They are published again each time they are found: a subscriber may have joined later, or this engine may have
        published that all its blocks were cleared.

        Args:
            chunks: for each chunk, the keys of all its parts.
        """
        self._drain()
        for number, keys in enumerate(chunks):
            chunk = self._describe(request, number, keys, since)
            if chunk is not None:
                self._tell(chunk)

    def storing(self, request: Request, first: int, chunks: Sequence[tuple[bytes, ...]]) -> None:
        """Remember chunks ``first..``, which workers are about to store."""
        for number, keys in enumerate(chunks, first):
            chunk = self._describe(request, number, keys, self.now)
            if chunk is not None:
                self._storing[keys[0]] = chunk
        while len(self._storing) > MAX_STORING:
            self._storing.popitem(last=False)

    def stored(self, reports: Mapping[bytes, int]) -> None:
        """Record how many more workers stored their parts of a chunk, by the key of the chunk's first part.

        A chunk is published once all workers have stored their parts.
        """
        self._drain()
        for key, count in reports.items():
            chunk = self._storing.get(key)
            if chunk is None:
                continue
            chunk.reports += count
            if chunk.reports >= self._ranks:
                del self._storing[key]
                self._tell(chunk)

    def take(self) -> list[Any]:
        """KV events since the last call."""
        self._drain()
        events, self._events = self._events, []
        return _joined(events)

    # -- internals -----------------------------------------------------------------------------------------------------

    def _describe(self, request: Request, number: int, keys: tuple[bytes, ...], since: int) -> _Chunk | None:
        from vllm.distributed.kv_events import MEDIUM_CPU, BlockStored
        from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, maybe_convert_block_hash

        first, end, size = number * self._per, (number + 1) * self._per, self._block_size
        if len(request.block_hashes) < end:  # prefix caching is off: vLLM has no hashes
            return None
        hashes = [maybe_convert_block_hash(each) for each in request.block_hashes[first:end]]
        extra = [
            generate_block_hash_extra_keys(request, block * size, (block + 1) * size, 0)[0]
            for block in range(first, end)
        ]
        adapter = request.lora_request
        event = BlockStored(
            block_hashes=list(hashes),  # a copy, since _joined() extends it
            parent_block_hash=maybe_convert_block_hash(request.block_hashes[first - 1]) if first else None,
            token_ids=list(request.all_token_ids[first * size : end * size]),
            block_size=size,
            lora_id=adapter.lora_int_id if adapter is not None else None,
            medium=MEDIUM_CPU,
            lora_name=adapter.lora_name if adapter is not None else None,
            extra_keys=_published(extra),
            group_idx=0,
            locality="LOCAL",
            ownership=OWNER,
        )
        return _Chunk(hashes, keys, event, since)

    def _tell(self, chunk: _Chunk) -> None:
        if not self._watching:
            return
        if any(self._gone.get(key, -1) > chunk.since for key in chunk.keys):
            return
        self._known.setdefault(chunk.keys[0], chunk)
        self._known.move_to_end(chunk.keys[0])
        self._of.update(dict.fromkeys(chunk.keys, chunk))
        self._events.append(chunk.stored)
        chunk.stored = None
        if len(self._known) > MAX_KNOWN:
            self._forget([next(iter(self._known.values()))])

    def _drain(self) -> None:
        """Process the removals that the pool reported."""
        while self._heard:
            keys = self._heard.popleft()
            self.now += 1
            if keys is None:
                self._watching = False
                self._storing.clear()
                self._forget(list(self._known.values()))
                continue
            for key in keys:
                self._gone[key] = self.now
                self._gone.move_to_end(key)
            while len(self._gone) > MAX_GONE:
                self._gone.popitem(last=False)
            self._forget([self._of[key] for key in keys if key in self._of])

    def _forget(self, chunks: list[_Chunk]) -> None:
        from vllm.distributed.kv_events import MEDIUM_CPU, BlockRemoved

        hashes: list[Any] = []
        for chunk in chunks:
            if self._known.pop(chunk.keys[0], None) is not None:
                hashes += chunk.hashes
                for key in chunk.keys:
                    self._of.pop(key, None)
        for first in range(0, len(hashes), REMOVED_AT_ONCE):
            self._events.append(
                BlockRemoved(
                    block_hashes=hashes[first : first + REMOVED_AT_ONCE],
                    medium=MEDIUM_CPU,
                    group_idx=0,
                    locality="LOCAL",
                    ownership=OWNER,
                )
            )


def _joined(events: list[Any]) -> list[Any]:
    """Merge the events of consecutive chunks of a prompt into one event."""
    from vllm.distributed.kv_events import BlockStored

    found: list[Any] = []
    for event in events:
        last = found[-1] if found else None
        if (
            isinstance(event, BlockStored)
            and isinstance(last, BlockStored)
            and event.parent_block_hash == last.block_hashes[-1]
        ):
            last.block_hashes += event.block_hashes
            last.token_ids += event.token_ids
            last.extra_keys = [*(last.extra_keys or ()), *(event.extra_keys or ())]
        else:
            found.append(event)
    return found


def _published(keys: list[Any]) -> list[Any] | None:
    """What events say of blocks' extra keys."""
    try:
        from vllm.v1.core.kv_cache_utils import to_event_extra_keys
    except ImportError:  # vLLM 0.30 publishes them as it hashes them
        return keys
    return to_event_extra_keys(keys)
