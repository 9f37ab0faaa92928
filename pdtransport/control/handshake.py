"""The handshake, Hello and Welcome: builds ours, and checks the peer's against it. Pure: no sockets, no clock."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import msgpack
from pydantic import ValidationError

from pdtransport.control.events import Identity, PeerId
from pdtransport.control.limits import MAX_STRANGER_FRAME
from pdtransport.errors import SettingsError
from pdtransport.kv.fingerprint import compare, plain
from pdtransport.protocol.messages import MAX_REASON, PROTOCOL_VERSION, Hello, Refused, Welcome, encode

# Sent among the links of a Hello: how often the sender has given up the receiver. If it grew, the sender has lost the
# state of the old connection (link channels above all), and both sides must start afresh.
_BREAKS = "control.breaks"

Facts = TypeVar("Facts", Hello, Welcome)


def checked_identity(me: Identity) -> Identity:
    """Return ``me`` if a Hello can carry it.

    Raises:
        SettingsError: a name, number or link export is out of bounds.
    """
    try:
        size = len(encode(facts(Hello, me, 0)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"identity of this worker: {where}: {first['msg']}") from None
    if me.rank >= me.world:
        raise SettingsError(f"identity of this worker: rank {me.rank} of {me.world} workers; ranks start at 0")
    if size > MAX_STRANGER_FRAME:
        raise SettingsError(f"a Hello of {size} bytes is longer than {MAX_STRANGER_FRAME}: the links export too much")
    return me


def facts(kind: type[Facts], me: Identity, breaks: int) -> Facts:
    """The Hello or Welcome of ``me`` for a peer that we have given up ``breaks`` times."""
    links = dict(me.links)
    if breaks:
        links[_BREAKS] = breaks.to_bytes(8, "little")
    return kind(
        protocol=PROTOCOL_VERSION,
        engine=me.engine,
        rank=me.rank,
        world=me.world,
        incarnation=me.incarnation,
        fingerprint=dict(me.fingerprint),
        links=links,
    )


def breaks_of(theirs: Hello | Welcome) -> int:
    """How often the peer has given us up."""
    return int.from_bytes(theirs.links.get(_BREAKS, b"")[:8], "little")


def without_breaks(theirs: Hello | Welcome) -> Hello | Welcome:
    """The message without the count of breaks, as the rest of the package expects it."""
    links = {name: export for name, export in theirs.links.items() if name != _BREAKS}
    return theirs.model_copy(update={"links": links})


def peer_of(theirs: Hello | Welcome) -> PeerId:
    return PeerId(theirs.engine, theirs.rank, theirs.incarnation)


def check(me: Identity, theirs: Hello | Welcome) -> Refused | None:
    """The refusal of an incompatible peer, with the field that differs; None if it is compatible."""
    us, them = shown(me.engine, me.rank), shown(theirs.engine, theirs.rank)
    if theirs.protocol != PROTOCOL_VERSION:
        return version_refusal(theirs.protocol, us, them)
    if (theirs.engine, theirs.rank) == (me.engine, me.rank):
        myself = theirs.incarnation == me.incarnation
        text = (
            f"{us} connected to itself: prefill and decode of a request must be two instances, check remote_host "
            "and remote_port"
            if myself
            else f"both ends are named {us}: give each instance its own engine_id"
        )
        return refusal("engine", us, them, text)
    if theirs.rank >= theirs.world:
        return refusal("rank", str(me.rank), str(theirs.rank), f"{them} reports {theirs.world} ranks")
    mismatch = compare(me.fingerprint, theirs.fingerprint)
    if mismatch is not None:
        return refusal(mismatch.field, mismatch.ours, mismatch.yours, mismatch.text(us, them))
    return None


def told_incarnation(incarnation: int) -> int:
    """A one-way hash of an incarnation, for status and watchers.

    It tells two runs apart, but no Hello can be forged from it: the incarnation itself is known to peers only.
    """
    digest = hashlib.blake2b(incarnation.to_bytes(8, "little"), digest_size=8, person=b"incarnation").digest()
    return int.from_bytes(digest, "little") >> 2 | 1


def refusal(field: str, ours: str = "", yours: str = "", reason: str = "") -> Refused:
    return Refused(
        field=plain(field, 128), ours=plain(ours, 256), yours=plain(yours, 256), reason=plain(reason, MAX_REASON)
    )


def version_refusal(version: int, us: str = "this side", them: str = "the peer") -> Refused:
    text = (
        f"protocol_version differs: {us} uses {PROTOCOL_VERSION}, {them} {version}; run the same pdtransport version "
        "on both"
    )
    return refusal("protocol_version", str(PROTOCOL_VERSION), str(version), text)


def shown(engine: str, rank: int) -> str:
    """A worker's name, for messages."""
    return f"{plain(engine, 80)} rank {rank}"


def foreign_version(frame: bytes) -> int | None:
    """The protocol version of a frame that has another version than ours; None for any other frame."""
    try:
        raw = msgpack.unpackb(frame, raw=False, strict_map_key=True, use_list=False)
    except Exception:  # noqa: BLE001 - msgpack raises half a dozen types on garbage
        return None
    version = raw.get("v") if isinstance(raw, Mapping) else None
    if isinstance(version, int) and not isinstance(version, bool) and version != PROTOCOL_VERSION:
        return version
    return None
