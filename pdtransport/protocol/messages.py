"""Messages between producers (prefill) and consumers (decode): versioned, msgpack on the wire, no pickle.

A *transfer* is the hand-off of one request; the router mints a new transfer id for each dispatch. A *generation*
identifies one grant of one consumer worker; a message with an old generation changes nothing. A *block* is numbered in
the request's own order within its cache group (block 0 holds its first ``block_size`` tokens); page ids never identify
anything. A *group* is the number of a cache group, the same on both sides.

Each docstring begins with the sender.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Literal, NamedTuple

import msgpack
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

PROTOCOL_VERSION = 7

MAX_BLOCKS = 1 << 20  # 16 M tokens at 16 tokens a block: beyond any model's context
MAX_SEQS = 1 << 16
MAX_GROUPS = 64  # cache groups of a model
MAX_REASON = 512
MAX_FACTS = 64  # in a fingerprint
MAX_MAPS = 3  # in one message: the message itself, the fingerprint, the links
PEEK_BYTES = 128  # enough for version and kind, which come first
MAX_TRANSFER_ID = 128
MAX_ATTEMPTS = 1000  # per batch; an engine that is preempted more often has worse problems

TransferId = Annotated[str, Field(min_length=1, max_length=MAX_TRANSFER_ID, pattern=r"^[A-Za-z0-9._:\-]+$")]
Generation = Annotated[int, Field(ge=1, lt=1 << 63)]
Seq = Annotated[int, Field(ge=0, lt=1 << 31)]
Attempt = Annotated[int, Field(ge=0, le=MAX_ATTEMPTS)]
BlockIndex = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
Group = Annotated[int, Field(ge=0, lt=MAX_GROUPS)]
Head = Annotated[int, Field(ge=0, le=1 << 16)]
Reason = Annotated[str, Field(max_length=MAX_REASON)]
Digest = Annotated[bytes, Field(min_length=16, max_length=32)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]


class Code(str, Enum):
    """Why a transfer ended without its pages."""

    CANCELLED = "cancelled"  # the request was aborted on this side
    PEER_CANCELLED = "peer_cancelled"  # the request was aborted on the other side
    REJECTED = "rejected"  # decode's server rejected the request before it reached the engine
    PEER_LOST = "peer_lost"  # the peer died, restarted or fell silent
    REFUSED = "refused"  # the peers are not compatible
    UNKNOWN = "unknown"  # decode knows no such grant, or the grant is over
    REUSED = "reused"  # the id was used before
    MISMATCH = "mismatch"  # prefill's request, batches or commit do not match decode's grant
    DAMAGED = "damaged"  # pages arrived damaged, again after resends
    TIMEOUT = "timeout"  # a deadline passed
    PREEMPTED = "preempted"  # prefill lost pages to preemption before they were delivered
    OVERLOADED = "overloaded"  # a bound on live transfers was reached
    LINK = "link"  # the link failed


# Ends in which nobody needs the pages any more: the transfer itself did not fail.
REQUEST_ENDED = frozenset({Code.CANCELLED, Code.PEER_CANCELLED, Code.REJECTED})


class WireError(ValueError):
    """A frame is not a valid message of this protocol; the text says why."""


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, ser_json_bytes="base64")
    kind: str


class _Scoped(Message):
    """A message about one transfer."""

    transfer: TransferId


class _Granted(_Scoped):
    """A message about one grant of one transfer."""

    generation: Generation


class Claim(_Scoped):
    """Consumer: I know this request and will grant once I have free pages; until then, hold yours."""

    kind: Literal["claim"] = "claim"


class GrantedGroup(NamedTuple):
    """What a grant wants of one cache group: blocks ``first_block .. first_block + blocks``, of the KV heads
    ``head_lo .. head_hi``, numbered over all ranks. Without blocks, nothing of this group comes from this producer."""

    first_block: BlockIndex
    blocks: Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
    head_lo: Head
    head_hi: Head


class Grant(_Granted):
    """Consumer: you may send me the blocks that ``groups`` name, ``window_bytes`` in flight at most.

    ``groups`` has one entry per cache group of the model. ``prompt_digest`` covers tokens, salt and adapter: prefill
    aborts the transfer if its own request's digest differs. ``consumers`` is the number of consumer workers that will
    grant to this producer worker. ``first_token`` is a promise: if the commit names the first token that prefill
    sampled, decode continues from it or fails the request, and never samples another one.
    """

    kind: Literal["grant"] = "grant"
    groups: Annotated[tuple[GrantedGroup, ...], Field(min_length=1, max_length=MAX_GROUPS)]
    tokens: Annotated[int, Field(ge=1, le=MAX_BLOCKS * 64)]
    prompt_digest: Digest
    consumers: Annotated[int, Field(ge=1, le=4096)] = 1
    window_bytes: Annotated[int, Field(ge=1)]
    first_token: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of all groups."""
        return sum(group.blocks for group in self.groups)


class Accept(_Granted):
    """Producer: I have the grant. ``known`` is false until the request has arrived here; ``tokens_done`` counts the
    prompt tokens computed so far."""

    kind: Literal["accept"] = "accept"
    known: bool
    tokens_done: Annotated[int, Field(ge=0)] = 0


class Batch(_Granted):
    """Producer: batch ``seq`` is ready: ``blocks`` blocks of ``group`` from ``first_block`` on.

    ``checksums`` holds one little-endian u64 per block (empty if checksums are off); ``offer`` is the link's
    description of where the bytes are.
    """

    kind: Literal["batch"] = "batch"
    seq: Seq
    attempt: Attempt = 0
    group: Group = 0
    first_block: BlockIndex
    blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    nbytes: Annotated[int, Field(ge=1)]
    checksums: Annotated[bytes, Field(max_length=8 * MAX_BLOCKS)] = b""
    offer: Annotated[bytes, Field(max_length=1 << 20)] = b""


class BatchHint(_Granted):
    """Producer: a hint that lets the consumer prepare: these blocks will be announced as a batch with this ``offer``.
    No state depends on it, and nothing may be read before the Batch itself."""

    kind: Literal["hint"] = "hint"
    group: Group = 0
    first_block: BlockIndex
    blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    offer: Annotated[bytes, Field(max_length=1 << 20)]


class Received(_Granted):
    """Consumer: these batches are placed and verified: you may reuse their sources; their bytes are credit again."""

    kind: Literal["received"] = "received"
    seqs: Annotated[tuple[Seq, ...], Field(max_length=MAX_SEQS)]


class Nack(_Granted):
    """Consumer: send these ``(seq, attempt)`` again. Attempt 0 asks for a batch whose announcement never came, a higher
    attempt for a batch whose bytes arrived damaged."""

    kind: Literal["nack"] = "nack"
    wants: Annotated[tuple[tuple[Seq, Attempt], ...], Field(min_length=1, max_length=MAX_SEQS)]
    reason: Reason = ""


class Commit(_Granted):
    """Producer: everything is announced: ``batches`` batches, ``tokens`` prompt tokens. ``digest`` covers the prompt's
    digest, the places of the batches and the first token (:mod:`pdtransport.protocol.digest`). ``first_token`` is
    the one that prefill sampled, named only to a consumer that promised to continue from it; None: sample it yourself.
    ``cached_tokens`` counts the prompt tokens that prefill found in its caches, for usage reports; None: unknown."""

    kind: Literal["commit"] = "commit"
    batches: Annotated[int, Field(ge=0, le=1 << 31)]
    tokens: Annotated[int, Field(ge=1)]
    digest: Digest
    first_token: Token | None = None
    cached_tokens: Annotated[int, Field(ge=0)] | None = None


class Ack(_Granted):
    """Consumer: every page is here and verified: free yours."""

    kind: Literal["ack"] = "ack"


class Revoke(_Granted):
    """Consumer: the grant is void: stop. If this generation was never granted, there will be no grant: release the
    transfer."""

    kind: Literal["revoke"] = "revoke"
    code: Code
    reason: Reason = ""


class Abort(_Granted):
    """Producer: this transfer will not be completed."""

    kind: Literal["abort"] = "abort"
    code: Code
    reason: Reason = ""


ConsumerMessage = Claim | Grant | Received | Nack | Ack | Revoke
ProducerMessage = Accept | Batch | Commit | Abort


# -- between control channels, apart from any transfer --------------------------------------------------------

FingerprintValue = str | int | bool


class Hello(Message):
    """Either side: first message on a connection, from the side that opened it."""

    kind: Literal["hello"] = "hello"
    protocol: int
    engine: Annotated[str, Field(min_length=1, max_length=256)]
    rank: Annotated[int, Field(ge=0, le=65535)]
    world: Annotated[int, Field(ge=1, le=65536)]
    incarnation: Annotated[int, Field(ge=1, lt=1 << 63)]
    fingerprint: Annotated[dict[str, FingerprintValue], Field(max_length=MAX_FACTS)]
    links: Annotated[dict[str, bytes], Field(max_length=16)]  # link name -> what a peer needs to connect over it


class Welcome(Message):
    """Either side: answer to Hello: we are compatible. The same facts about the answering side."""

    kind: Literal["welcome"] = "welcome"
    protocol: int
    engine: Annotated[str, Field(min_length=1, max_length=256)]
    rank: Annotated[int, Field(ge=0, le=65535)]
    world: Annotated[int, Field(ge=1, le=65536)]
    incarnation: Annotated[int, Field(ge=1, lt=1 << 63)]
    fingerprint: Annotated[dict[str, FingerprintValue], Field(max_length=MAX_FACTS)]
    links: Annotated[dict[str, bytes], Field(max_length=16)]


class Refused(Message):
    """Either side: refuses a Hello, or a frame that can't be handled: ``field`` names what differs or is wrong.
    ``hello`` asks for a new Hello; ``name`` is only a warning that another live process uses the receiver's name."""

    kind: Literal["refused"] = "refused"
    field: Annotated[str, Field(max_length=128)]
    ours: Annotated[str, Field(max_length=256)] = ""
    yours: Annotated[str, Field(max_length=256)] = ""
    reason: Reason = ""


class Ping(Message):
    """Either side: heartbeat: are you still there?"""

    kind: Literal["ping"] = "ping"
    incarnation: Annotated[int, Field(ge=1, lt=1 << 63)]


class Pong(Message):
    """Either side: answer to Ping: yes, and still the same process."""

    kind: Literal["pong"] = "pong"
    incarnation: Annotated[int, Field(ge=1, lt=1 << 63)]


class LinkCall(Message):
    """Either side: link-specific setup message: choosing a link for a pair of workers, and measuring it."""

    kind: Literal["link"] = "link"
    link: Annotated[str, Field(max_length=32)]
    body: Annotated[bytes, Field(max_length=1 << 20)]


class StatusRequest(Message):
    """Client: what is your status? ``transfer`` limits the timelines to one transfer. Any client that can connect may
    ask."""

    kind: Literal["status?"] = "status?"
    transfer: Annotated[str, Field(max_length=128)] = ""


class StatusReply(Message):
    """Worker: answer to StatusRequest: ``status`` is JSON text (see :mod:`pdtransport.observe.status`)."""

    kind: Literal["status"] = "status"
    status: str


class Watch(Message):
    """Client: report to me the end of each transfer that this worker receives. Any client that can connect
    may ask. The subscription lapses unless the client repeats this message, which is also its heartbeat."""

    kind: Literal["watch"] = "watch"


class Watching(Message):
    """Worker: answer to Watch: an :class:`Ended` follows for each transfer that ends from now on. Names the worker;
    ``incarnation`` tells two runs of the worker apart, but is not the secret incarnation in its Hello."""

    kind: Literal["watching"] = "watching"
    engine: Annotated[str, Field(min_length=1, max_length=256)]
    rank: Annotated[int, Field(ge=0, le=65535)]
    world: Annotated[int, Field(ge=1, le=65536)]
    incarnation: Annotated[int, Field(ge=1, lt=1 << 63)]


class Ended(_Scoped):
    """Worker: tells its watchers that this transfer has ended here. Without ``code`` it succeeded: ``blocks`` blocks
    were received and verified (0 if the consumer already held all of them). ``exposed_us`` and ``taken_us``: time until
    the last page was verified, in microseconds, since the commit and since the first batch."""

    kind: Literal["ended"] = "ended"
    code: Code | None = None
    reason: Reason = ""
    blocks: Annotated[int, Field(ge=0, le=MAX_BLOCKS)] = 0
    nbytes: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    link: Annotated[str, Field(max_length=32)] = ""
    exposed_us: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    taken_us: Annotated[int, Field(ge=0, lt=1 << 63)] = 0


TransferMessage = ConsumerMessage | ProducerMessage | BatchHint
ControlMessage = (
    Hello | Welcome | Refused | Ping | Pong | LinkCall | StatusRequest | StatusReply | Watch | Watching | Ended
)
AnyMessage = Annotated[TransferMessage | ControlMessage, Field(discriminator="kind")]

_ADAPTER: TypeAdapter[Any] = TypeAdapter(AnyMessage)


def encode(message: Message) -> bytes:
    """Encode a message: a msgpack map of the protocol version ``v`` and the message's fields, in this order."""
    fields: dict[str, Any] = {"v": PROTOCOL_VERSION}
    for name in type(message).model_fields:
        value = getattr(message, name)
        fields[name] = value.value if isinstance(value, Enum) else value
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    return packed


def peek(beginning: bytes) -> tuple[Any, str]:
    """Protocol version and kind of a frame, read from its first :data:`PEEK_BYTES` bytes.

    Before Hello, a frame is decoded further only if its kind is one that a stranger may send.

    Raises:
        WireError: the frame does not begin as :func:`encode` writes it.
    """
    unpacker = msgpack.Unpacker(raw=False, use_list=False)
    try:
        unpacker.feed(beginning)
        unpacker.read_map_header()
        found = [unpacker.unpack() for _ in range(4)]
    except Exception as error:  # noqa: BLE001 - msgpack raises half a dozen types on garbage
        raise WireError(f"not a message: {type(error).__name__}") from None
    if found[0] != "v" or found[2] != "kind" or not isinstance(found[3], str):
        raise WireError("not a message: it does not begin with version and kind")
    return found[1], found[3]


def decode(frame: bytes, *, flat: bool = False) -> Message:
    """Decode a frame.

    Args:
        flat: the sender is a stranger: refuse what no stranger's message contains (lists, more than ``MAX_MAPS``
            maps) before building it, however long the frame is.

    Raises:
        WireError: not msgpack, not a message, another protocol version, or a field out of bounds.
    """
    bounds = {"max_array_len": 0, "max_ext_len": 0, "max_map_len": MAX_FACTS, "object_pairs_hook": _few_maps()}
    try:
        raw = msgpack.unpackb(frame, raw=False, strict_map_key=True, use_list=False, **(bounds if flat else {}))
    except Exception as error:  # noqa: BLE001 - msgpack raises half a dozen types on garbage
        raise WireError(f"not a msgpack frame: {type(error).__name__}") from None
    if not isinstance(raw, Mapping) or not isinstance(raw.get("kind"), str):
        raise WireError("not a message: no kind")
    version = raw.get("v")
    if version != PROTOCOL_VERSION:
        shown = version if isinstance(version, int) else type(version).__name__  # no repr: it may nest too deep
        raise WireError(f"protocol version {shown}, this side speaks {PROTOCOL_VERSION}")
    fields = {key: value for key, value in raw.items() if key != "v"}
    if fields.get("code") is not None:
        try:
            fields["code"] = Code(fields["code"])
        except (ValueError, RecursionError):
            raise WireError(f"{fields['kind']}: unknown code") from None
    try:
        message: Message = _ADAPTER.validate_python(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WireError(f"{where}: {first['msg']}"[:MAX_REASON]) from None
    return message


def _few_maps() -> Any:
    """An ``object_pairs_hook`` for msgpack, called for each map, innermost first; raises after ``MAX_MAPS`` maps."""
    left = [MAX_MAPS]

    def made(pairs: Any) -> dict[Any, Any]:
        left[0] -= 1
        if left[0] < 0:
            raise WireError(f"more than {MAX_MAPS} maps")
        return dict(pairs)

    return made
