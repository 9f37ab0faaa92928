"""Requests with a LoRA adapter, in a worker: which content their pages were computed with.

The scheduler's half knows an adapter by id, name and path; which content computes, this worker alone knows, and only
when it has loaded it. So commands that need a key wait until the adapter is loaded (at once, where its first use would
load it anyway), and get the key of the content that is held. From then on every block is known by the content that
wrote it, in whichever request that was: the engine's prefix cache goes by name and path, and may give a request blocks
that an older content under that name wrote. Pages go out, to decode or to the pool, only if all their blocks were
written with the content that their key names.

Decode's side of it: pages are taken under the key of what is held here, and when the request's first step is computed,
that still must be what is held. If an adapter was replaced in between, vLLM is told that the blocks are invalid, and
computes them, or fails the request, by ``kv_load_failure_policy``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pdtransport.kv.keys import adapted_key
from pdtransport.vllm.adapters import Adapters, AdapterUnknown, named
from pdtransport.vllm.metadata import Cancel, Command, Drop, Fetch, Keep, Open, Pages, Take, Wrote

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

Refuse = Callable[[Open | Take | Fetch, str], None]

_MIXED = ""  # no content's digest


class BlockOrigins:
    """By block of the scheduler's: digest of the adapter that its KV was computed with, since it was last written for a
    request with one. What other requests write there since is found by nobody who asks for an adapter's."""

    def __init__(self) -> None:
        self._of: dict[int, str] = {}

    def wrote(self, blocks: list[int], digest: str, anew: bool) -> None:
        """``anew``: the first of them was begun now, too; if not, something was in it before."""
        for i, block in enumerate(blocks):
            same = i or anew or self._of.get(block) == digest
            self._of[block] = digest if same else _MIXED

    def all_of(self, blocks: Iterable[int], digest: str) -> bool:
        return all(self._of.get(block) == digest for block in blocks)


@dataclass(frozen=True)
class _Taken:
    """Pages that came from elsewhere, until the first step that uses them."""

    adapter: LoRARequest
    digest: str
    blocks: list[int]


class Adapted:
    """One per worker, used by its own thread.

    Args:
        refuse: ends a request's transfer, or load, with a reason.
        block_size: tokens of a block of the scheduler's.
        wait_s: how long pages are not asked for while there is no room for their adapter.
    """

    def __init__(
        self,
        adapters: Adapters,
        refuse: Refuse,
        block_size: int,
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._adapters, self._refuse = adapters, refuse
        self._block_size = block_size
        self._wait_s, self._clock = wait_s, clock
        self._origins = BlockOrigins()
        # For their adapter to be loaded, and until when. Prefill's wait for as long as their request does.
        self._waiting: dict[str, tuple[Open | Take | Fetch, float]] = {}
        self._offered: dict[str, tuple[LoRARequest, str]] = {}
        self._taken: dict[str, _Taken] = {}
        self._invalid: set[int] = set()

    def ready(self, command: Command) -> Command | None:
        """``command`` as it can be done now; None: it is held back, or came to nothing."""
        if isinstance(command, (Open, Take, Fetch)) and command.adapter is not None:
            return self._complete(command)
        if isinstance(command, Cancel):
            self._taken.pop(command.req_id, None)
        if isinstance(command, (Cancel, Drop)):
            held_back, _ = self._waiting.pop(command.req_id, (None, 0.0))
            if held_back is not None:
                self._refuse(held_back, "the request was aborted")
        if isinstance(command, Drop):
            self._offered.pop(command.req_id, None)
        if isinstance(command, Wrote):
            self._note(command)
            return None
        if isinstance(command, Keep) and command.content is not None:
            return command if self._origins.all_of(command.pages, command.content) else replace(command, keys=[])
        return command

    def load(self, step: Sequence[Command] = ()) -> list[Open | Take | Fetch]:
        """Between two steps: load what is waited for, but not in the place of what the requests of ``step`` compute
        with. Returns commands that can be done now."""
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
                    self._end(command, "running requests' adapters leave no room for it (--max-cpu-loras)")
                continue
            complete = self._complete(command)
            if complete is not None:
                found.append(complete)
        return found

    def why_not(self, pages: Pages) -> str:
        """Why these pages of prefill's must not be handed over; empty if they may."""
        if pages.req_id not in self._offered:
            return ""
        adapter, digest = self._offered[pages.req_id]
        blocks = pages.pages[: -(-pages.tokens // self._block_size)]
        if self._origins.all_of(blocks, digest):
            return ""
        del self._offered[pages.req_id]
        return f"{named(adapter)} was replaced on prefill: some of the prompt's KV was computed with another content"

    def finished(self, req_id: str) -> None:
        self._offered.pop(req_id, None)

    def take_invalid(self) -> set[int]:
        """Blocks whose content is not what the request that begins with them needs, since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def _complete(self, command: Open | Take | Fetch) -> Open | Take | Fetch | None:
        assert command.adapter is not None
        try:
            digest = self._adapters.held(command.adapter.lora_int_id)
        except AdapterUnknown as error:
            self._end(command, str(error))
            return None
        if digest is None:
            self._waiting[command.req_id] = command, self._clock() + self._wait_s
            return None
        self._waiting.pop(command.req_id, None)
        if isinstance(command, Fetch):
            if command.content != digest:
                self._end(command, "it is not the content that the pool was asked for")
                return None
            self._take(command, digest)
            return command
        if isinstance(command, Open):
            self._offered[command.req_id] = command.adapter, digest
        elif command.pages:
            self._take(command, digest)
        return replace(command, key=adapted_key(command.key, digest))

    def _take(self, command: Take | Fetch, digest: str) -> None:
        assert command.adapter is not None
        self._origins.wrote(command.pages, digest, anew=True)
        self._taken[command.req_id] = _Taken(command.adapter, digest, list(command.pages))

    def _end(self, command: Open | Take | Fetch, why: str) -> None:
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
                "request %s: %s was replaced after its pages were taken: they are computed anew",
                wrote.req_id,
                named(taken.adapter),
            )
            self._invalid.update(taken.blocks)
        self._origins.wrote(wrote.blocks, digest, wrote.anew)

    def failed(self, req_id: str) -> None:
        """A take or a load came to nothing: what the request begins with is not from elsewhere."""
        self._taken.pop(req_id, None)
