"""Messages between a client and the pool service: versioned, msgpack on the wire, no pickle.

A list of keys travels as one byte string of 32 bytes a key, and the numbers that belong to the keys as byte strings of
little-endian integers. The client numbers its *requests*; a chunk of a request is named by its key's place in it.

Each docstring begins with the sender.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgpack
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from pdtransport.kv.keys import KEY_BYTES
from pdtransport.protocol.messages import MAX_REASON, Message, WireError

POOL_VERSION = 2

MAX_KEYS = 4096  # keys in one message; clients split longer lists
MAX_FRAME_BYTES = 4 << 20  # length of one message
MAX_MANAGED = 512  # keys in one Manage message: handling it must not delay loads
MAX_PIN_S = 30 * 86400.0
MAX_SPACE = 16 << 10  # characters of one key space's JSON text

# Flags of a chunk in a Looked message: being filled, being written to a lower tier, used by a client, soft-pinned,
# hard-pinned, held unpacked in a lower tier.
COMING, WRITING, USED, SOFT_PIN, HARD_PIN, PLAIN = 1, 2, 4, 8, 16, 32

TENANT = r"^[A-Za-z0-9._\-]{0,64}$"
Tenant = Annotated[str, Field(pattern=TENANT)]

RequestId = Annotated[int, Field(ge=1, lt=1 << 63)]
Extent = Annotated[int, Field(ge=1, le=1 << 30)]
Keys = Annotated[bytes, Field(max_length=KEY_BYTES * MAX_KEYS)]
Words32 = Annotated[bytes, Field(max_length=4 * MAX_KEYS)]
Words64 = Annotated[bytes, Field(max_length=8 * MAX_KEYS)]


class PoolHello(Message):
    """Client: first message on a connection. The client holds byte ``lock`` of the lock file as long as it lives."""

    kind: Literal["hello"] = "hello"
    lock: Annotated[int, Field(ge=1, lt=1 << 62)]
    name: Annotated[str, Field(max_length=128)]
    tenant: Tenant = ""


class PoolWelcome(Message):
    """Service: accepts a client. ``memory`` is the path of the memory file that the client maps."""

    kind: Literal["welcome"] = "welcome"
    memory: Annotated[str, Field(max_length=4096)]
    nbytes: Annotated[int, Field(ge=1)]
    frame_bytes: Annotated[int, Field(ge=4096)]
    client_bytes: Annotated[int, Field(ge=1)]


class _Numbered(Message):
    request: RequestId


class _Keyed(_Numbered):
    keys: Keys

    @model_validator(mode="after")
    def _whole_keys(self) -> _Keyed:
        if len(self.keys) % KEY_BYTES:
            raise ValueError(f"keys are {KEY_BYTES} bytes each")
        return self

    @property
    def count(self) -> int:
        return len(self.keys) // KEY_BYTES


class _Sized(_Keyed):
    """A request for chunks of known length. ``sizes``: bytes of each chunk, uint32."""

    sizes: Words32

    @model_validator(mode="after")
    def _as_many(self) -> _Sized:
        if len(self.sizes) // 4 != self.count or len(self.sizes) % 4:
            raise ValueError("one size a key")
        return self


class Store(_Sized):
    """Client: requests frames to store chunks in. Answered by :class:`KeyAnswers`, until each key has a verdict.

    ``codec`` and ``grid`` (:class:`pdtransport.kernels.quant.Grid`): lossy packing that lower tiers may use; unset:
    none.
    """

    kind: Literal["store"] = "store"
    codec: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9._\-]{0,31})?$")] = ""
    grid: tuple[Literal["float32", "float16", "bfloat16"], Extent, Extent, Extent] | None = None


class Load(_Sized):
    """Client: requests to read chunks. Answered as :class:`Store`."""

    kind: Literal["load"] = "load"


class KeyAnswers(_Numbered):
    """Service: verdicts for some keys of a request, in any order.

    ``indices`` (places) are uint32, ``verdicts`` one byte each, ``checksums`` uint64. ``frames`` holds the uint32 ids
    of all WRITE and READ chunks' frames, concatenated in the order of ``indices``.
    """

    kind: Literal["answer"] = "answer"
    indices: Words32
    verdicts: Annotated[bytes, Field(max_length=MAX_KEYS)]
    checksums: Words64
    frames: Annotated[bytes, Field(max_length=MAX_FRAME_BYTES)]


class Publish(_Numbered):
    """Client: chunks of a store are complete in their frames and have these checksums. Answered by :class:`Done`."""

    kind: Literal["publish"] = "publish"
    indices: Words32
    checksums: Words64

    @model_validator(mode="after")
    def _as_many(self) -> Publish:
        if 2 * len(self.indices) != len(self.checksums) or len(self.indices) % 4:
            raise ValueError("one checksum an index")
        return self


class ReleaseChunks(_Numbered):
    """Client: no longer reads, or will not write, these chunks. Not answered."""

    kind: Literal["release"] = "release"
    indices: Words32


class ChunkDamaged(_Numbered):
    """Client: the copy of this chunk has a wrong checksum. Answered by :class:`Done`."""

    kind: Literal["damaged"] = "damaged"
    index: Annotated[int, Field(ge=0, lt=MAX_KEYS)]


class CancelRequest(_Numbered):
    """Client: ends a request; the client no longer reads or writes any of its frames. Not answered."""

    kind: Literal["cancel"] = "cancel"


class Lookup(_Keyed):
    """Client: asks how many leading keys are in the pool. Answered by :class:`LookupReply`."""

    kind: Literal["lookup"] = "lookup"


class LookupReply(_Numbered):
    """Service: the first ``there`` keys are in the pool, ``in_memory`` of them in memory."""

    kind: Literal["found"] = "found"
    there: int
    in_memory: int


class Manage(_Keyed):
    """Client: applies an action to chunks. Answered by :class:`Done`.

    See :meth:`pdtransport.pool.server.admin_requests.AdminRequests.manage`.
    """

    kind: Literal["manage"] = "manage"
    action: Literal["pin", "drop", "leave", "fetch", "hint", "write"]
    pin: Annotated[int, Field(ge=0, le=2)] = 0
    for_s: Annotated[float, Field(gt=0, le=MAX_PIN_S)] | None = None
    tier: Annotated[str, Field(max_length=64)] = ""
    again: bool = False

    @model_validator(mode="after")
    def _few(self) -> Manage:
        if self.count > MAX_MANAGED:
            raise ValueError(f"{self.count} keys, at most {MAX_MANAGED} are managed at a time")
        return self


class Look(_Keyed):
    """Client: asks about the chunks of these keys, or with ``sweep`` about all. Answered by :class:`Looked`.

    ``first``: index entry from which a sweep continues; ``tenant``: limits it to one tenant.
    """

    kind: Literal["look"] = "look"
    sweep: bool = False
    first: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    tenant: Tenant | None = None


class Looked(_Numbered):
    """Service: describes chunks, one row each.

    ``sizes``: uint32; ``tiers`` and ``flags``: bit masks of one byte each. ``next``: index entry from which the sweep
    continues, -1 at its end. ``backlog``: jobs queued for lower tiers.
    """

    kind: Literal["looked"] = "looked"
    keys: Keys
    sizes: Words32
    tiers: Annotated[bytes, Field(max_length=MAX_KEYS)]
    flags: Annotated[bytes, Field(max_length=MAX_KEYS)]
    next: int = -1
    backlog: int = 0


class WatchForgotten(_Numbered):
    """Client: subscribes to chunks that leave the pool. Answered by :class:`Gone` messages until the client ends."""

    kind: Literal["watch"] = "watch"


class Gone(_Numbered):
    """Service: these chunks are in no tier any more. The first one has no keys: the watch has begun."""

    kind: Literal["gone"] = "gone"
    keys: Keys


class Count(_Numbered):
    """Client: asks for chunks and bytes by tier and tenant, in one part of the index. Answered by :class:`Counted`.

    ``first``: the index entry at which that part begins.
    """

    kind: Literal["count"] = "count"
    first: Annotated[int, Field(ge=0, lt=1 << 32)] = 0


class Counted(_Numbered):
    """Service: counts for one part of the index.

    ``held``: JSON text, a list of ``[tier, tenant, chunks, bytes]``; ``next``: as in :class:`Looked`.
    """

    kind: Literal["counted"] = "counted"
    held: str
    next: int = -1


class Introduce(_Numbered):
    """Client: reports its engine's key space; ``space`` is JSON text. Answered by :class:`Done`."""

    kind: Literal["introduce"] = "introduce"
    space: Annotated[str, Field(max_length=MAX_SPACE)]


class SpacesAsked(_Numbered):
    """Client: asks for the key spaces that engines have reported. Answered by :class:`Spaces`."""

    kind: Literal["spaces?"] = "spaces?"


class Spaces(_Numbered):
    """Service: the key spaces that engines have reported, as JSON texts, the latest first."""

    kind: Literal["spaces"] = "spaces"
    spaces: tuple[str, ...]


class Done(_Numbered):
    """Service: the request was applied to ``count`` chunks."""

    kind: Literal["done"] = "done"
    count: int


class PoolStatusRequest(_Numbered):
    """Client: asks for the pool's status. Answered by :class:`Status`."""

    kind: Literal["status?"] = "status?"


class Status(_Numbered):
    """Service: its status, as JSON text."""

    kind: Literal["status"] = "status"
    status: str


class Bye(Message):
    """Client: is about to disconnect; no copy is in flight."""

    kind: Literal["bye"] = "bye"


class PoolRefused(Message):
    """Service: refuses a message or a client.

    ``request`` is 0 if no request is concerned. ``what`` is "hello" if the client must say Hello again.
    """

    kind: Literal["refused"] = "refused"
    request: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    what: Annotated[str, Field(max_length=64)]
    reason: Annotated[str, Field(max_length=MAX_REASON)]


FromClient = (
    PoolHello
    | Store
    | Load
    | Publish
    | ReleaseChunks
    | ChunkDamaged
    | CancelRequest
    | Lookup
    | Manage
    | Look
    | WatchForgotten
    | Count
    | Introduce
    | SpacesAsked
    | PoolStatusRequest
    | Bye
)
FromPool = PoolWelcome | KeyAnswers | LookupReply | Done | Looked | Gone | Counted | Spaces | Status | PoolRefused

_FROM_CLIENT: TypeAdapter[FromClient] = TypeAdapter(Annotated[FromClient, Field(discriminator="kind")])
_FROM_POOL: TypeAdapter[FromPool] = TypeAdapter(Annotated[FromPool, Field(discriminator="kind")])


def encode(message: Message) -> bytes:
    """Encode a message as a msgpack map of its fields and the version ``v``."""
    fields: dict[str, Any] = {"v": POOL_VERSION}
    for name in type(message).model_fields:
        fields[name] = getattr(message, name)
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    return packed


def from_client(frame: bytes) -> FromClient:
    """Decode a client's message.

    Raises:
        WireError: not msgpack, not a message, another version, or a field out of bounds.
    """
    return parsed(frame, _FROM_CLIENT)


def from_pool(frame: bytes) -> FromPool:
    """Decode a message from the service.

    Raises:
        WireError: as :func:`from_client`.
    """
    return parsed(frame, _FROM_POOL)


def parsed(frame: bytes, kinds: TypeAdapter[Any]) -> Any:
    """Decode a message of one of these kinds.

    Raises:
        WireError: as :func:`from_client`.
    """
    try:
        raw = msgpack.unpackb(frame, raw=False, strict_map_key=True, use_list=False)
    except Exception as error:  # noqa: BLE001 - msgpack raises half a dozen types on garbage
        raise WireError(f"not a msgpack frame: {type(error).__name__}") from None
    if not isinstance(raw, Mapping):
        raise WireError("not a message: no map")
    version = raw.get("v")
    if version != POOL_VERSION:
        shown = version if isinstance(version, int) else type(version).__name__
        raise WireError(f"pool version {shown}, this side speaks {POOL_VERSION}; run the same pdtransport on both")
    try:
        return kinds.validate_python({key: value for key, value in raw.items() if key != "v"})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WireError(f"{where}: {first['msg']}"[:MAX_REASON]) from None
