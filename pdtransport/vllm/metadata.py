"""What the scheduler's half of the connector tells the workers each step: commands, in order.

Commands name requests by vLLM's own id: two requests may come with one transfer id, and only the first may have it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from pdtransport.protocol.messages import Code

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


@dataclass(frozen=True)
class Open:
    """Prefill: this request's pages will be handed over as ``transfer``. ``key``: of the prompt; a worker completes it
    by the content of ``adapter`` (:mod:`pdtransport.vllm.adapted`)."""

    req_id: str
    transfer: str
    key: bytes
    tokens: int
    adapter: LoRARequest | None = None


@dataclass(frozen=True)
class Wrote:
    """In this step a request with an adapter writes KV into ``blocks``. ``anew``: of the first of them there was
    nothing before. ``number``: the adapter's id."""

    req_id: str
    number: int
    blocks: list[int]
    anew: bool


@dataclass(frozen=True)
class Pages:
    """Prefill: after this step, the first ``tokens`` prompt tokens are in ``pages``; ``before`` it, so many were.
    ``cached``: how many of the prompt's tokens the engine's caches held; told with a request's first step."""

    req_id: str
    pages: list[int]
    tokens: int
    before: int = 0
    cached: int | None = None


@dataclass(frozen=True)
class Rewind:
    """The engine took this request's pages back; they are overwritten in this very step."""

    req_id: str


@dataclass(frozen=True)
class Finish:
    """Prefill: the request is through; report ``finished_sending`` once its pages are free. ``first_token``: what
    decode promised to go on from."""

    req_id: str
    first_token: int | None = None


@dataclass(frozen=True)
class Drop:
    """Prefill: the request was aborted; report ``finished_sending`` once its pages are free. Not with ``report``
    false: its pages are still loaded from the pool, and the end of that is reported."""

    req_id: str
    report: bool = True
    reason: str = "the request was aborted on prefill"


@dataclass(frozen=True)
class Claim:
    """Decode: this request is known here, but has no pages yet."""

    transfer: str
    host: str
    port: int
    ranks: int


@dataclass(frozen=True)
class Take:
    """Decode: take blocks ``first_block ..`` into ``pages``, by a ``key`` that is completed as prefill's. Without
    pages nothing is reported to the scheduler: decode holds the prefix already, or the request is gone, and prefill
    learns that it may free its pages. ``first_token``: promise to go on from the first token that prefill names."""

    req_id: str
    transfer: str
    key: bytes
    tokens: int
    first_block: int
    pages: list[int]
    host: str
    port: int
    ranks: int
    first_token: bool = False
    adapter: LoRARequest | None = None


@dataclass(frozen=True)
class Decline:
    """Decode: this transfer is not taken at all; who watches hears why, and prefill, whose address ``host`` is, may let
    go."""

    transfer: str
    code: Code
    reason: str
    host: str = ""
    port: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class Cancel:
    """The request was aborted while its pages were on their way, from prefill or from the pool."""

    req_id: str


@dataclass(frozen=True)
class Fetch:
    """Load chunks from the pool into ``pages``, of which the first ``held`` blocks of the first chunk are left out: the
    engine holds them. ``keys``: by rank, one for each of its parts of each chunk, chunk by chunk. ``content``: the
    digest of ``adapter`` that these keys go by."""

    req_id: str
    keys: list[list[bytes]]
    held: int
    pages: list[int]
    adapter: LoRARequest | None = None
    content: str | None = None


@dataclass(frozen=True)
class Keep:
    """After this step, ``pages`` hold whole chunks: store them in the pool. ``keys`` and ``content`` as in
    :class:`Fetch`; without keys, there is nothing to store, and that is reported."""

    req_id: str
    keys: list[list[bytes]]
    pages: list[int]
    content: str | None = None


@dataclass(frozen=True)
class Settle:
    """The request is through; report ``finished_sending`` once its stores no longer read its pages."""

    req_id: str


@dataclass(frozen=True)
class Yield:
    """Prefill: let go of the finished request's pages unless decode is taking them. ``reason``: for logs and decode."""

    req_id: str
    reason: str = "the pool has its pages"


Command = (
    Open | Pages | Wrote | Rewind | Finish | Drop | Claim | Take | Decline | Cancel | Fetch | Keep | Settle | Yield
)


@dataclass
class Commands(KVConnectorMetadata):
    """``before``: to be done before the step's forward pass may touch a page; ``after``: once it is computed.
    ``bell``: name of the scheduler's :class:`pdtransport.vllm.bell.Bell`. ``hold``: whose pages must be there before
    the forward pass (:mod:`pdtransport.vllm.early`); ``ahead``: what it launches was launched before, for another
    request."""

    before: list[Command] = field(default_factory=list)
    after: list[Command] = field(default_factory=list)
    bell: str = ""
    hold: list[str] = field(default_factory=list)
    ahead: bool = False


@dataclass
class News(KVConnectorWorkerMetadata):
    """What the workers tell the scheduler's half. ``promised``: requests of prefill's whose decode goes on from their
    first token; ``first_tokens``: requests of decode's, and what they go on from; ``cached``: how many tokens of a
    request's prompt prefill found in its caches; ``kept``: how many :class:`Keep` of a request no longer read its
    pages; ``in_pool``: how many workers have their parts of a chunk in the pool, by the key of its first part (where KV
    events are on); ``held``: seconds for which a step was held for its pages, or by which, negative, they were there
    before it (of several workers, by the one that had the least time); ``void``: whose step was computed before its
    pages came, whatever became of them; ``adapters``: digests of adapters that were loaded, by id (empty where workers
    hold different ones)."""

    promised: set[str] = field(default_factory=set)
    first_tokens: dict[str, int] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    kept: Counter[str] = field(default_factory=Counter)
    in_pool: Counter[bytes] = field(default_factory=Counter)
    held: dict[str, float] = field(default_factory=dict)
    void: set[str] = field(default_factory=set)
    adapters: dict[int, str] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> News:
        assert isinstance(other, News)
        return News(
            self.promised | other.promised,
            {**self.first_tokens, **other.first_tokens},
            {**self.cached, **other.cached},
            self.kept + other.kept,
            self.in_pool + other.in_pool,
            {**self.held, **{name: min(value, self.held.get(name, value)) for name, value in other.held.items()}},
            self.void | other.void,
            _agreed(self.adapters, other.adapters),
        )


def _agreed(mine: dict[int, str], theirs: dict[int, str]) -> dict[int, str]:
    differ = {number for number in mine.keys() & theirs.keys() if mine[number] != theirs[number]}
    return {**mine, **theirs, **dict.fromkeys(differ, "")}
