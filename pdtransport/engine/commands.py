"""Messages between an engine's scheduler and its workers: ordered commands each step, and the workers' report.

Commands name requests by the engine's request id, not by transfer id: two requests may arrive with the same transfer
id, and only the first one gets it. Both messages are plain data and can be pickled.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from pdtransport.engine.block_tables import Blocks
from pdtransport.observe.status import PatchStatus
from pdtransport.protocol.messages import Code


class Adapter(Protocol):
    """The engine's own handle of a LoRA adapter."""

    @property
    def name(self) -> str: ...

    @property
    def adapter_id(self) -> int: ...


@dataclass(frozen=True)
class Open:
    """Prefill: offer this request's pages as ``transfer``.

    A worker adds the content of ``adapter`` to ``prompt_digest`` (:mod:`pdtransport.engine.adapted`).
    """

    req_id: str
    transfer: str
    prompt_digest: bytes
    tokens: int
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Wrote:
    """In this step a request with a LoRA adapter writes KV into ``blocks``.

    ``number``: the adapter's id. ``anew``: the step writes the first block from its first token on; otherwise that
    block already held KV.
    """

    req_id: str
    number: int
    blocks: list[int]
    anew: bool


@dataclass(frozen=True)
class Pages:
    """Prefill: after this step, the KV of the first ``tokens`` prompt tokens is in ``pages``, by block table.

    ``cached``: prompt tokens found in the engine's caches; set in the request's first step only.
    """

    req_id: str
    pages: Blocks
    tokens: int
    cached: int | None = None


@dataclass(frozen=True)
class Rewind:
    """The engine preempted this request: its pages are overwritten in this very step."""

    req_id: str


@dataclass(frozen=True)
class Finish:
    """Prefill: the request finished; report ``finished_sending`` once nothing uses its pages.

    ``first_token``: the sampled token, if decode promised to continue from it.
    """

    req_id: str
    first_token: int | None = None


@dataclass(frozen=True)
class Drop:
    """Prefill: stop handing over this request; report ``finished_sending`` once nothing uses its pages.

    With ``report`` false nothing is reported here: a load from the pool still uses the pages and reports its own end,
    or the request goes on.
    """

    req_id: str
    report: bool = True
    reason: str = "the request was aborted on prefill"


@dataclass(frozen=True)
class SendClaim:
    """Decode: ask prefill to keep the pages of this transfer; decode's own request has no blocks yet."""

    transfer: str
    host: str
    port: int
    ranks: int


@dataclass(frozen=True)
class StartReceive:
    """Decode: receive blocks ``first_block ..`` of the prompt into ``pages``, both by block table.

    A worker adds the adapter's content to ``prompt_digest``, as on prefill. ``first_token``: promise to continue from
    the first token that prefill returns. If ``pages`` is empty (decode already has the prompt's blocks), the worker
    tells prefill that it may free its pages, and reports nothing to the scheduler.
    """

    req_id: str
    transfer: str
    prompt_digest: bytes
    tokens: int
    first_block: tuple[int, ...]
    pages: Blocks
    host: str
    port: int
    ranks: int
    first_token: bool = False
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Decline:
    """Decode: this transfer will not be received.

    Tells the transfer's watchers why, and tells prefill at ``host`` (if not empty) that it may free its pages.
    """

    transfer: str
    code: Code
    reason: str
    host: str = ""
    port: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class CancelLoad:
    """The request was aborted while its pages were being received from prefill or loaded from the pool."""

    req_id: str


@dataclass(frozen=True)
class LoadChunks:
    """Load chunks from the pool into ``pages``.

    ``keys[rank]``: one key per part of each chunk that this rank holds, chunk by chunk. ``held``: blocks of the first
    chunk that the engine already has; ``pages`` leaves them out. ``content``: the adapter digest that the keys were
    computed with.
    """

    req_id: str
    keys: list[list[bytes]]
    held: int
    pages: list[int]
    adapter: Adapter | None = None
    content: str | None = None


@dataclass(frozen=True)
class StoreChunks:
    """Store ``pages`` in the pool; after this step they hold whole chunks.

    ``keys`` and ``content`` as in :class:`LoadChunks`. With empty ``keys`` nothing is stored, and the store is reported
    as done.
    """

    req_id: str
    keys: list[list[bytes]]
    pages: list[int]
    content: str | None = None


@dataclass(frozen=True)
class FinishStores:
    """The request finished; report ``finished_sending`` once no store reads its pages."""

    req_id: str


@dataclass(frozen=True)
class ReleaseIfPooled:
    """Prefill: release a finished request's pages, unless decode has already granted blocks for them.

    ``reason`` is logged and sent to decode.
    """

    req_id: str
    reason: str = "the pool has its pages"


Command = (
    Open
    | Pages
    | Wrote
    | Rewind
    | Finish
    | Drop
    | SendClaim
    | StartReceive
    | Decline
    | CancelLoad
    | LoadChunks
    | StoreChunks
    | FinishStores
    | ReleaseIfPooled
)


@dataclass
class Commands:
    """The commands of one step.

    Attributes:
        before: run before the step's forward pass may touch a page.
        after: run once the forward pass is launched; they take effect when the pass is computed.
        bell: name of the scheduler's :class:`~pdtransport.engine.wakeups.WakeupReceiver`.
        patches: new states of the hooks into the engine's code in the scheduler's process, for the status.
    """

    before: list[Command] = field(default_factory=list)
    after: list[Command] = field(default_factory=list)
    bell: str = ""
    patches: list[PatchStatus] = field(default_factory=list)


@dataclass
class WorkerReport:
    """What the workers report to the scheduler's half, merged over all ranks.

    Attributes:
        promised: on prefill, requests from whose first token decode promised to continue.
        first_tokens: on decode, the token that each request continues from.
        never_granted: on decode, the number of workers that sent no grant for a request whose transfer failed; the
            promise of such a worker does not bind.
        cached: on decode, the number of prompt tokens that prefill found in its caches, by request.
        kept: number of :class:`StoreChunks` of each request that no longer read its pages.
        in_pool: number of workers whose parts of a chunk are in the pool, by the key of the chunk's first part; only
            with KV events on.
        adapters: digest of each newly loaded adapter, by id; empty if workers report different digests.
    """

    promised: set[str] = field(default_factory=set)
    first_tokens: dict[str, int] = field(default_factory=dict)
    never_granted: Counter[str] = field(default_factory=Counter)
    cached: dict[str, int] = field(default_factory=dict)
    kept: Counter[str] = field(default_factory=Counter)
    in_pool: Counter[bytes] = field(default_factory=Counter)
    adapters: dict[int, str] = field(default_factory=dict)

    def aggregate(self, other: WorkerReport) -> WorkerReport:
        return WorkerReport(
            self.promised | other.promised,
            {**self.first_tokens, **other.first_tokens},
            self.never_granted + other.never_granted,
            {**self.cached, **other.cached},
            self.kept + other.kept,
            self.in_pool + other.in_pool,
            _agreed(self.adapters, other.adapters),
        )


def _agreed(mine: dict[int, str], theirs: dict[int, str]) -> dict[int, str]:
    differ = {number for number in mine.keys() & theirs.keys() if mine[number] != theirs[number]}
    return {**mine, **theirs, **dict.fromkeys(differ, "")}
