"""Tracks in a worker which LoRA adapter content each block's KV was computed with.

The scheduler half knows only an adapter's id, name and path. The worker knows its content, once the adapter is loaded.
Commands whose key covers that content therefore wait until the adapter is loaded. The worker loads it right away, since
the request's first step would load it anyway.

From then on the worker records, across requests, which content each block's KV was computed with. The engine's prefix
cache identifies an adapter by name and path, so a request may get blocks computed with older content of the same name.
Pages are sent to decode or stored in the pool only if all their blocks were computed with the content in their key.

On decode, pages are received under the key of the content loaded here, and the same content must still be loaded when
the request's first step is computed. If the adapter was replaced in between, the blocks are reported to the engine as
invalid, which recomputes them or fails the request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pdtransport.engine.commands import (
    Adapter,
    CancelLoad,
    Command,
    Drop,
    LoadChunks,
    Open,
    Pages,
    StartReceive,
    StoreChunks,
    Wrote,
)
from pdtransport.kv.keys import with_adapter

logger = logging.getLogger(__name__)

Refuse = Callable[[Open | StartReceive | LoadChunks, str], None]


class AdapterUnknown(Exception):
    """The adapter content that a worker has loaded under an id can't be identified; the message says why."""


class LoadedAdapters(Protocol):
    """The adapters that a worker has loaded, as its engine knows them. Used by the worker's thread."""

    def held(self, number: int) -> str | None:
        """Digest of the adapter loaded under an id; None if none is.

        Raises:
            AdapterUnknown: its content can't be identified.
        """

    def load(self, adapter: Adapter, used: Collection[int] = ()) -> str | None:
        """Load an adapter between two steps, without evicting those whose ids are in ``used``.

        Returns:
            Its digest; None if there is no room for it now.

        Raises:
            AdapterUnknown: it can't be loaded or identified.
        """

    def take_news(self) -> dict[int, str]:
        """Digests by id of the adapters loaded since the last call."""


def named(adapter: Adapter) -> str:
    """An adapter's name for logs and error messages."""
    return f"LoRA adapter {adapter.name!r}"


_MIXED = ""  # in place of a digest: several contents, or an unknown one


class BlockOrigins:
    """For each scheduler block, the digest of the adapter content that its KV was computed with.

    Only writes of requests with an adapter are recorded. If a request without one reuses a block, its old entry does no
    harm: the prefix cache never gives that block to a request with an adapter.
    """

    def __init__(self) -> None:
        self._of: dict[int, str] = {}

    def wrote(self, blocks: list[int], digest: str, anew: bool) -> None:
        """Record a write.

        Args:
            anew: the first block was written from its first token on; otherwise it already held KV.
        """
        for i, block in enumerate(blocks):
            same = i or anew or self._of.get(block) == digest
            self._of[block] = digest if same else _MIXED

    def all_of(self, blocks: Iterable[int], digest: str) -> bool:
        return all(self._of.get(block) == digest for block in blocks)


@dataclass(frozen=True)
class _Taken:
    """Pages received or loaded with an adapter, kept until the first step that uses them."""

    adapter: Adapter
    digest: str
    blocks: list[int]


class Adapted:
    """Completes and checks the commands of requests with an adapter. One per worker, used by its own thread.

    Args:
        refuse: ends a request's transfer or load with a reason.
        block_size: tokens per scheduler block.
        wait_s: how long a receive or load waits for room for its adapter before it is refused.
    """

    def __init__(
        self,
        adapters: LoadedAdapters,
        refuse: Refuse,
        block_size: int,
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._adapters, self._refuse = adapters, refuse
        self._block_size = block_size
        self._wait_s, self._clock = wait_s, clock
        self._origins = BlockOrigins()
        # Commands that wait for their adapter, each with a deadline. Open ignores the deadline: it waits until its
        # request ends.
        self._waiting: dict[str, tuple[Open | StartReceive | LoadChunks, float]] = {}
        self._offered: dict[str, tuple[Adapter, str]] = {}
        self._taken: dict[str, _Taken] = {}
        self._invalid: set[int] = set()

    def ready(self, command: Command) -> Command | None:
        """The command to run now, with its key completed; None if it is deferred, refused or handled here."""
        if isinstance(command, (Open, StartReceive, LoadChunks)) and command.adapter is not None:
            return self._complete(command)
        if isinstance(command, CancelLoad):
            self._taken.pop(command.req_id, None)
        if isinstance(command, (CancelLoad, Drop)):
            held_back, _ = self._waiting.pop(command.req_id, (None, 0.0))
            if held_back is not None:
                self._refuse(held_back, "the request was aborted")
        if isinstance(command, Drop):
            self._offered.pop(command.req_id, None)
        if isinstance(command, Wrote):
            self._note(command)
            return None
        if isinstance(command, StoreChunks) and command.content is not None:
            return command if self._origins.all_of(command.pages, command.content) else replace(command, keys=[])
        return command

    def load(self, step: Sequence[Command] = ()) -> list[Open | StartReceive | LoadChunks]:
        """Load the adapters that commands wait for; call between two steps.

        Never evicts an adapter that a request of ``step`` uses.

        Returns:
            Commands that can run now.
        """
        used = {command.number for command in step if isinstance(command, Wrote)}
        found = []
        for command, until in list(self._waiting.values()):
            assert command.adapter is not None
            try:
                loaded = self._adapters.load(command.adapter, used)
            except AdapterUnknown as error:
                self._end(command, str(error))
                continue
            if loaded is None:
                if self._clock() >= until and not isinstance(command, Open):
                    self._end(command, "adapters of running requests leave no room for it: raise --max-cpu-loras")
                continue
            complete = self._complete(command)
            if complete is not None:
                found.append(complete)
        return found

    def why_not(self, pages: Pages) -> str:
        """Prefill: why these pages must not be handed over; empty if they may."""
        if pages.req_id not in self._offered:
            return ""
        adapter, digest = self._offered[pages.req_id]
        (ids,) = pages.pages  # requests with an adapter are handed over by engines with one block table only
        blocks = ids[: -(-pages.tokens // self._block_size)]
        if self._origins.all_of(blocks, digest):
            return ""
        del self._offered[pages.req_id]
        return f"{named(adapter)} was replaced on prefill: some of the prompt's KV was computed with other content"

    def finished(self, req_id: str) -> None:
        self._offered.pop(req_id, None)

    def take_invalid(self) -> set[int]:
        """Blocks found invalid since the last call: received or loaded, but their adapter was replaced before their
        request's first step."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def _complete(self, command: Open | StartReceive | LoadChunks) -> Open | StartReceive | LoadChunks | None:
        assert command.adapter is not None
        try:
            digest = self._adapters.held(command.adapter.adapter_id)
        except AdapterUnknown as error:
            self._end(command, str(error))
            return None
        if digest is None:
            self._waiting[command.req_id] = command, self._clock() + self._wait_s
            return None
        self._waiting.pop(command.req_id, None)
        if isinstance(command, LoadChunks):
            if command.content != digest:
                self._end(command, "its content changed after the lookup in the pool")
                return None
            self._take(command, digest)
            return command
        if isinstance(command, Open):
            self._offered[command.req_id] = command.adapter, digest
        elif any(command.pages):
            self._take(command, digest)
        return replace(command, prompt_digest=with_adapter(command.prompt_digest, digest))

    def _take(self, command: StartReceive | LoadChunks, digest: str) -> None:
        assert command.adapter is not None
        (blocks,) = [command.pages] if isinstance(command, LoadChunks) else command.pages
        self._origins.wrote(blocks, digest, anew=True)
        self._taken[command.req_id] = _Taken(command.adapter, digest, list(blocks))

    def _end(self, command: Open | StartReceive | LoadChunks, why: str) -> None:
        assert command.adapter is not None
        self._waiting.pop(command.req_id, None)
        self._refuse(command, f"{named(command.adapter)}: {why}")

    def _note(self, wrote: Wrote) -> None:
        try:
            digest = self._adapters.held(wrote.number) or _MIXED
        except AdapterUnknown:
            digest = _MIXED
        taken = self._taken.pop(wrote.req_id, None)
        if taken is not None and taken.digest != digest:
            logger.warning(
                "request %s: %s was replaced after the request's pages were received: they are recomputed",
                wrote.req_id,
                named(taken.adapter),
            )
            self._invalid.update(taken.blocks)
        self._origins.wrote(wrote.blocks, digest, wrote.anew)

    def failed(self, req_id: str) -> None:
        """A receive or load failed: the request does not start from those pages."""
        self._taken.pop(req_id, None)
