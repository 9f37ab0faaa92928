"""What a client and the pool say to each other. Versioned, msgpack on the wire, no pickle.

Many keys travel as one byte string (32 bytes each), and so do the numbers that belong to them (little-endian).
A *request* is numbered by its client; the chunks it holds are named by their place among its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgpack
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from pdtransport.kv.keys import KEY_BYTES
from pdtransport.protocol.messages import MAX_REASON, Message, WireError

POOL_VERSION = 2

MAX_KEYS = 4096  # of one message; clients cut longer lists
MAX_FRAME_BYTES = 4 << 20  # of a message
MAX_MANAGED = 512  # keys of one Manage: what the pool does about them must not keep readers waiting
MAX_PIN_S = 30 * 86400.0
MAX_SPACE = 16 << 10  # characters of an engine's key spaces

TENANT = r"^[A-Za-z0-9._\-]{0,64}$"
Tenant = Annotated[str, Field(pattern=TENANT)]

RequestId = Annotated[int, Field(ge=1, lt=1 << 63)]
Extent = Annotated[int, Field(ge=1, le=1 << 30)]
Keys = Annotated[bytes, Field(max_length=KEY_BYTES * MAX_KEYS)]
Words32 = Annotated[bytes, Field(max_length=4 * MAX_KEYS)]
Words64 = Annotated[bytes, Field(max_length=8 * MAX_KEYS)]


class PoolHello(Message):
    """Client, first on a connection: I hold byte ``lock`` of the lock file as long as I live."""

    kind: Literal["hello"] = "hello"
    lock: Annotated[int, Field(ge=1, lt=1 << 62)]
    name: Annotated[str, Field(max_length=128)]
    tenant: Tenant = ""


class PoolWelcome(Message):
    """Service: map this file."""

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
    """``sizes``: bytes of each chunk, uint32."""

    sizes: Words32

    @model_validator(mode="after")
    def _as_many(self) -> _Sized:
        if len(self.sizes) // 4 != self.count or len(self.sizes) % 4:
            raise ValueError("one size a key")
        return self


class Store(_Sized):
    """Client: I want to store these. Answered by :class:`KeyAnswers` messages until each key has its verdict.
    ``codec`` and ``grid`` (:class:`pdtransport.kernels.quant.Grid`): how they may be packed with loss below memory;
    unset: not."""

    kind: Literal["store"] = "store"
    codec: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9._\-]{0,31})?$")] = ""
    grid: tuple[Literal["float32", "float16", "bfloat16"], Extent, Extent, Extent] | None = None


class Load(_Sized):
    """Client: I want to read these. Answered as :class:`Store`."""

    kind: Literal["load"] = "load"


class KeyAnswers(_Numbered):
    """Service: verdicts about some keys of a request, in no order. ``indices`` and ``frames`` are uint32, ``checksums``
    uint64, ``verdicts`` a byte each; ``frames`` has those of all WRITE and READ chunks one after the other."""

    kind: Literal["answer"] = "answer"
    indices: Words32
    verdicts: Annotated[bytes, Field(max_length=MAX_KEYS)]
    checksums: Words64
    frames: Annotated[bytes, Field(max_length=MAX_FRAME_BYTES)]


class Publish(_Numbered):
    """Client: these chunks of a store are complete in their frames, and these are their checksums."""

    kind: Literal["publish"] = "publish"
    indices: Words32
    checksums: Words64

    @model_validator(mode="after")
    def _as_many(self) -> Publish:
        if 2 * len(self.indices) != len(self.checksums) or len(self.indices) % 4:
            raise ValueError("one checksum an index")
        return self


class ReleaseChunks(_Numbered):
    """Client: I don't read (or will not write) these any more. Not answered."""

    kind: Literal["release"] = "release"
    indices: Words32


class ChunkDamaged(_Numbered):
    """Client: what I copied of this chunk does not have its checksum. Answered by :class:`Done`."""

    kind: Literal["damaged"] = "damaged"
    index: Annotated[int, Field(ge=0, lt=MAX_KEYS)]


class CancelRequest(_Numbered):
    """Client: I neither read nor write anything of this request any more. Not answered."""

    kind: Literal["cancel"] = "cancel"


class Lookup(_Keyed):
    """Client: how many of these are there, counted from the first? Answered by :class:`LookupReply`."""

    kind: Literal["lookup"] = "lookup"


class LookupReply(_Numbered):
    """Service: the first ``there`` keys are, ``in_memory`` of them in memory."""

    kind: Literal["found"] = "found"
    there: int
    in_memory: int


class Manage(_Keyed):
    """Client: do this to these chunks (:mod:`pdtransport.pool.server.admin_requests`). Answered by :class:`Done`."""

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
    """Client: what do you hold of these, or (``sweep``) of all, from place ``first`` on? Answered by
    :class:`Looked`."""

    kind: Literal["look"] = "look"
    sweep: bool = False
    first: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    tenant: Tenant | None = None


class Looked(_Numbered):
    """Service: a row for each chunk. ``sizes``: uint32; ``tiers`` and ``flags``: bits, a byte each. ``next``: where
    a sweep goes on, -1 at its end. ``backlog``: jobs that wait for tiers."""

    kind: Literal["looked"] = "looked"
    keys: Keys
    sizes: Words32
    tiers: Annotated[bytes, Field(max_length=MAX_KEYS)]
    flags: Annotated[bytes, Field(max_length=MAX_KEYS)]
    next: int = -1
    backlog: int = 0


class WatchForgotten(_Numbered):
    """Client: tell me of every chunk that you forget from now on. Answered by :class:`Gone`, again and again."""

    kind: Literal["watch"] = "watch"


class Gone(_Numbered):
    """Service: these are in no tier any more. The first one, with no keys, says that the watch began."""

    kind: Literal["gone"] = "gone"
    keys: Keys


class Count(_Numbered):
    """Client: how much do you hold, from place ``first`` of the index on? Answered by :class:`Counted`."""

    kind: Literal["count"] = "count"
    first: Annotated[int, Field(ge=0, lt=1 << 32)] = 0


class Counted(_Numbered):
    """Service: ``held`` is JSON text, a list of ``[tier, tenant, chunks, bytes]`` for one part of the index; ``next``
    as in :class:`Looked`."""

    kind: Literal["counted"] = "counted"
    held: str
    next: int = -1


class Introduce(_Numbered):
    """Client: chunks of this engine have keys of this kind; ``space`` is JSON text. Answered by :class:`Done`."""

    kind: Literal["introduce"] = "introduce"
    space: Annotated[str, Field(max_length=MAX_SPACE)]


class SpacesAsked(_Numbered):
    """Client: what were you introduced to? Answered by :class:`Spaces`."""

    kind: Literal["spaces?"] = "spaces?"


class Spaces(_Numbered):
    """Service: ``spaces`` is what engines said, the last one first."""

    kind: Literal["spaces"] = "spaces"
    spaces: tuple[str, ...]


class Done(_Numbered):
    """Service: it was done to so many chunks."""

    kind: Literal["done"] = "done"
    count: int


class PoolStatusRequest(_Numbered):
    """Client: how are you? Answered by :class:`Status`."""

    kind: Literal["status?"] = "status?"


class Status(_Numbered):
    """Service: ``status`` is JSON text."""

    kind: Literal["status"] = "status"
    status: str


class Bye(Message):
    """Client: I copy nothing any more and am about to go."""

    kind: Literal["bye"] = "bye"


class PoolRefused(Message):
    """Service: not understood, or not welcome; ``what`` is "hello" where a new Hello mends it. ``request`` is 0 where
    it is about none."""

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
    """Message to wire bytes: a msgpack map of its fields and the version ``v``."""
    fields: dict[str, Any] = {"v": POOL_VERSION}
    for name in type(message).model_fields:
        fields[name] = getattr(message, name)
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    return packed


def from_client(frame: bytes) -> FromClient:
    """What a client said.

    Raises:
        WireError: not msgpack, not a message, another version, or a field out of bounds.
    """
    return parsed(frame, _FROM_CLIENT)


def from_pool(frame: bytes) -> FromPool:
    """What the service said.

    Raises:
        WireError: as :func:`from_client`.
    """
    return parsed(frame, _FROM_POOL)


def parsed(frame: bytes, kinds: TypeAdapter[Any]) -> Any:
    """A message of these kinds.

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
