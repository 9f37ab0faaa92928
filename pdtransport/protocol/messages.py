"""What producers (prefill) and consumers (decode) say to each other. Versioned, msgpack on the wire, no pickle.

A *transfer* is one request's hand-off; its id is minted once per dispatch by the router. A *generation* is one
grant of one consumer worker: whatever cites an older generation changes nothing. A *block* is counted in the
request's own order (0 = its first ``block_size`` tokens); page ids never serve as identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Literal

import msgpack
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

PROTOCOL_VERSION = 6

MAX_BLOCKS = 1 << 20  # 16 M tokens at 16 tokens a block: beyond any model's context
MAX_SEQS = 1 << 16
MAX_REASON = 512
MAX_FACTS = 64  # of a fingerprint
MAX_MAPS = 3  # of one message: itself, the fingerprint, the links
PEEK_BYTES = 128  # hold version and kind, which come first
MAX_TRANSFER_ID = 128
MAX_DUE_US = 60_000_000  # no step takes a minute
MAX_ATTEMPTS = 1000  # of one batch; an engine that is preempted more often has worse problems

TransferId = Annotated[str, Field(min_length=1, max_length=MAX_TRANSFER_ID, pattern=r"^[A-Za-z0-9._:\-]+$")]
Generation = Annotated[int, Field(ge=1, lt=1 << 63)]
Seq = Annotated[int, Field(ge=0, lt=1 << 31)]
Attempt = Annotated[int, Field(ge=0, le=MAX_ATTEMPTS)]
BlockIndex = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
Reason = Annotated[str, Field(max_length=MAX_REASON)]
Digest = Annotated[bytes, Field(min_length=16, max_length=32)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]


class Code(str, Enum):
    """Why a transfer ended without its pages."""

    CANCELLED = "cancelled"  # its request was aborted here
    PEER_CANCELLED = "peer_cancelled"  # its request was aborted over there
    REJECTED = "rejected"  # decode's server turned its request away before the engine had it
    PEER_LOST = "peer_lost"  # the peer died, restarted or fell silent
    REFUSED = "refused"  # the peers are not compatible
    UNKNOWN = "unknown"  # prefill never heard of it
    REUSED = "reused"  # the id was used before
    MISMATCH = "mismatch"  # prefill computed another prompt than decode asked for
    DAMAGED = "damaged"  # pages arrived damaged, again after resends
    TIMEOUT = "timeout"  # a deadline passed
    PREEMPTED = "preempted"  # prefill lost pages before they were delivered
    OVERLOADED = "overloaded"  # a bound on live transfers was reached
    LINK = "link"  # the link failed


# Nobody waits for the pages any more: no fault of the transfer's.
REQUEST_ENDED = frozenset({Code.CANCELLED, Code.PEER_CANCELLED, Code.REJECTED})


class WireError(ValueError):
    """A frame is not a message of this protocol; the text says what is wrong with it."""


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
    """Consumer: "I know this request and will grant once I have room": prefill holds its pages for it."""

    kind: Literal["claim"] = "claim"


class Grant(_Granted):
    """Consumer: blocks ``first_block .. first_block + blocks`` may be sent to me.

    ``digest`` is the content key of the request (tokens, salt, adapters): prefill refuses a transfer whose own
    request differs. ``head_lo``/``head_hi`` name the KV heads wanted, counted over all ranks. ``consumers`` is how
    many consumer workers will grant from this producer worker. ``pages`` are the consumer's page ids (little-endian
    u32), for links on which the producer writes them itself. ``first_token`` is a promise: if the commit names the
    first token that prefill sampled, the request goes on from it or fails, and never samples another in its place.
    """

    kind: Literal["grant"] = "grant"
    first_block: BlockIndex
    blocks: Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
    tokens: Annotated[int, Field(ge=1, le=MAX_BLOCKS * 64)]
    digest: Digest
    head_lo: Annotated[int, Field(ge=0, le=1 << 16)]
    head_hi: Annotated[int, Field(ge=1, le=1 << 16)]
    consumers: Annotated[int, Field(ge=1, le=4096)] = 1
    window_bytes: Annotated[int, Field(ge=1)]
    pages: Annotated[bytes, Field(max_length=4 * MAX_BLOCKS)] = b""
    first_token: bool = False


class Accept(_Granted):
    """Producer: the grant is noted. ``known`` is false while its request has not arrived; ``tokens_done`` counts
    the prompt tokens computed so far."""

    kind: Literal["accept"] = "accept"
    known: bool
    tokens_done: Annotated[int, Field(ge=0)] = 0


class Batch(_Granted):
    """Producer: ``blocks`` blocks are ready for you under ``seq``.

    ``checksums`` holds one little-endian u64 a block (empty when checksums are off); ``offer`` is the link's own
    description of where the bytes are.
    """

    kind: Literal["batch"] = "batch"
    seq: Seq
    attempt: Attempt = 0
    first_block: BlockIndex
    blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    nbytes: Annotated[int, Field(ge=1)]
    checksums: Annotated[bytes, Field(max_length=8 * MAX_BLOCKS)] = b""
    offer: Annotated[bytes, Field(max_length=1 << 20)] = b""


class BatchHint(_Granted):
    """Producer: these blocks are expected to be computed in ``due_us`` microseconds; or, they will be a batch with this
    ``offer``. Advice, for who has time to prepare: no state depends on it, and nothing may be read before the batch
    itself is announced."""

    kind: Literal["hint"] = "hint"
    first_block: BlockIndex
    blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    offer: Annotated[bytes, Field(max_length=1 << 20)] = b""
    due_us: Annotated[int, Field(ge=0, le=MAX_DUE_US)] | None = None


class Received(_Granted):
    """Consumer: these batches are placed and verified; their sources may be reused and their bytes are credit again."""

    kind: Literal["received"] = "received"
    seqs: Annotated[tuple[Seq, ...], Field(max_length=MAX_SEQS)]


class Nack(_Granted):
    """Consumer: I want these ``(seq, attempt)``: the announcement never came (same attempt as announced, or 0), or
    the bytes came damaged (the next attempt)."""

    kind: Literal["nack"] = "nack"
    wants: Annotated[tuple[tuple[Seq, Attempt], ...], Field(min_length=1, max_length=MAX_SEQS)]
    reason: Reason = ""


class Commit(_Granted):
    """Producer: that was all: ``batches`` batches, ``tokens`` tokens; ``digest`` is over the prompt's key, the batches'
    places and the first token (:mod:`pdtransport.protocol.digest`). ``first_token`` is what prefill sampled, named only
    to those that promised to go on from it; None: sample it yourself. ``cached_tokens`` is how many of the prompt's
    tokens prefill did not have to compute, for the accounts; None: it does not know."""

    kind: Literal["commit"] = "commit"
    batches: Annotated[int, Field(ge=0, le=1 << 31)]
    tokens: Annotated[int, Field(ge=1)]
    digest: Digest
    first_token: Token | None = None
    cached_tokens: Annotated[int, Field(ge=0)] | None = None


class Ack(_Granted):
    """Consumer: everything is here and verified; free your pages."""

    kind: Literal["ack"] = "ack"


class Revoke(_Granted):
    """Consumer: the grant is void; stop, and say when nothing of yours can reach my pages any more. Under a generation
    that was never granted: there will be no grant, let go of the transfer."""

    kind: Literal["revoke"] = "revoke"
    code: Code
    reason: Reason = ""


class Revoked(_Granted):
    """Producer: nothing of mine can reach the pages of this generation any more."""

    kind: Literal["revoked"] = "revoked"


class Abort(_Granted):
    """Producer: this transfer will not be completed."""

    kind: Literal["abort"] = "abort"
    code: Code
    reason: Reason = ""


ConsumerMessage = Claim | Grant | Received | Nack | Ack | Revoke
ProducerMessage = Accept | Batch | Commit | Revoked | Abort


# -- between the control channels, whatever transfers there are -----------------------------------------------

FingerprintValue = str | int | bool


class Hello(Message):
    """First message on a connection, from the side that opened it."""

    kind: Literal["hello"] = "hello"
    protocol: int
    engine: Annotated[str, Field(min_length=1, max_length=256)]
    rank: Annotated[int, Field(ge=0, le=65535)]
    world: Annotated[int, Field(ge=1, le=65536)]
    incarnation: Annotated[int, Field(ge=1, lt=1 << 63)]
    fingerprint: Annotated[dict[str, FingerprintValue], Field(max_length=MAX_FACTS)]
    links: Annotated[dict[str, bytes], Field(max_length=16)]  # link name -> what a peer needs to reach us over it


class Welcome(Message):
    """Answer to Hello: we are compatible; the same facts about the answering side."""

    kind: Literal["welcome"] = "welcome"
    protocol: int
    engine: Annotated[str, Field(min_length=1, max_length=256)]
    rank: Annotated[int, Field(ge=0, le=65535)]
    world: Annotated[int, Field(ge=1, le=65536)]
    incarnation: Annotated[int, Field(ge=1, lt=1 << 63)]
    fingerprint: Annotated[dict[str, FingerprintValue], Field(max_length=MAX_FACTS)]
    links: Annotated[dict[str, bytes], Field(max_length=16)]


class Refused(Message):
    """Answer to Hello, or to a frame that is no message: ``field`` names what differs. About a ``name``: a warning that
    another live process has the same."""

    kind: Literal["refused"] = "refused"
    field: Annotated[str, Field(max_length=128)]
    ours: Annotated[str, Field(max_length=256)] = ""
    yours: Annotated[str, Field(max_length=256)] = ""
    reason: Reason = ""


class Ping(Message):
    """Are you still there?"""

    kind: Literal["ping"] = "ping"
    incarnation: Annotated[int, Field(ge=1, lt=1 << 63)]


class Pong(Message):
    """Yes, and still the same process."""

    kind: Literal["pong"] = "pong"
    incarnation: Annotated[int, Field(ge=1, lt=1 << 63)]


class LinkCall(Message):
    """A link's own words to its twin, for its set-up and its measurement."""

    kind: Literal["link"] = "link"
    link: Annotated[str, Field(max_length=32)]
    body: Annotated[bytes, Field(max_length=1 << 20)]


class StatusRequest(Message):
    """Anyone who may connect: what is going on? ``transfer`` narrows it to one transfer's timeline."""

    kind: Literal["status?"] = "status?"
    transfer: Annotated[str, Field(max_length=128)] = ""


class StatusReply(Message):
    """``status`` is JSON text (see :mod:`pdtransport.observe.status`)."""

    kind: Literal["status"] = "status"
    status: str


class Watch(Message):
    """Anyone who may connect: tell me how the transfers end that this worker takes, until I have not asked for a while.
    Asked again and again: that is the watcher's heartbeat."""

    kind: Literal["watch"] = "watch"


class Watching(Message):
    """Answer to Watch: an :class:`Ended` follows for each transfer that ends from now on. Says who the worker is;
    ``incarnation`` tells two runs of it apart, and is not what its Hello says."""

    kind: Literal["watching"] = "watching"
    engine: Annotated[str, Field(min_length=1, max_length=256)]
    rank: Annotated[int, Field(ge=0, le=65535)]
    world: Annotated[int, Field(ge=1, le=65536)]
    incarnation: Annotated[int, Field(ge=1, lt=1 << 63)]


class Ended(_Scoped):
    """Consumer, to its watchers: this transfer is over here. Without ``code`` it ended well: ``blocks`` were taken and
    verified, none if the consumer held them all. ``exposed_us``: from commit to the last verified page; ``taken_us``:
    from the first batch to it."""

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
    """Message to wire bytes: a msgpack map of its fields and the protocol version ``v``."""
    fields: dict[str, Any] = {"v": PROTOCOL_VERSION}
    for name in type(message).model_fields:
        value = getattr(message, name)
        fields[name] = value.value if isinstance(value, Enum) else value
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    return packed


def peek(beginning: bytes) -> tuple[Any, str]:
    """Protocol version and kind of a frame by its first :data:`PEEK_BYTES`: all that is looked at of a frame from
    whoever did not say Hello yet, unless it may be one of the few messages that such may send.

    Raises:
        WireError: it does not begin as :func:`encode` writes it.
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
    """Wire bytes to message. ``flat``: from a stranger; nothing is built that no such message has (lists, maps within
    maps), however long the frame is.

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
        shown = version if isinstance(version, int) else type(version).__name__  # its repr may nest for ever
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
    """What msgpack calls with each map that it has read, innermost first; raises at one too many."""
    left = [MAX_MAPS]

    def made(pairs: Any) -> dict[Any, Any]:
        left[0] -= 1
        if left[0] < 0:
            raise WireError(f"more than {MAX_MAPS} maps")
        return dict(pairs)

    return made
