"""What stands before a chunk's bytes wherever they lie outside memory: enough to never take one chunk for another."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool.codecs import Codec
from pdtransport.pool.tiers import TierError

_MAGIC = b"pdtkv-1\0"
_FIELDS = struct.Struct(f"<8sB7xQQQ{KEY_BYTES}s")  # magic, codec, content bytes, payload bytes, checksum, key
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CRC.size

PLAIN = 0  # number of no codec


class Envelope(NamedTuple):
    """A chunk's header: ``nbytes`` of content with this ``checksum``, packed into ``payload`` bytes."""

    codec: int
    nbytes: int
    payload: int
    checksum: int
    key: bytes

    def packed(self) -> bytes:
        fields = _FIELDS.pack(_MAGIC, *self)
        return fields + _CRC.pack(zlib.crc32(fields))


def seal(key: bytes, parts: Sequence[memoryview], checksum: int, codec: Codec | None) -> list[bytes | memoryview]:
    """Header and payload of a chunk, in pieces."""
    nbytes = sum(len(part) for part in parts)
    payload = codec.encode(parts) if codec is not None else None
    if codec is None or payload is None:
        return [Envelope(PLAIN, nbytes, nbytes, checksum, key).packed(), *parts]
    return [Envelope(codec.number, nbytes, len(payload), checksum, key).packed(), payload]


def unseal(header: bytes, key: bytes, nbytes: int, codec: Codec | None) -> Envelope:
    """The header of the chunk ``key`` of ``nbytes``.

    Raises:
        TierError: damaged, another chunk, another length, or a codec that is not at hand.
    """
    short = key.hex()[:16]
    if len(header) != HEADER_BYTES or _CRC.unpack(header[_FIELDS.size :])[0] != zlib.crc32(header[: _FIELDS.size]):
        raise TierError(f"chunk {short} is damaged: its header is")
    magic, *fields = _FIELDS.unpack(header[: _FIELDS.size])
    found = Envelope(*fields)
    if magic != _MAGIC or found.key != key or found.nbytes != nbytes:
        raise TierError(f"chunk {short} is another one, or of another version")
    if found.codec != PLAIN and (codec is None or found.codec != codec.number):
        raise TierError(f"chunk {short} was packed with codec {found.codec}, which is not set for this tier")
    if found.codec == PLAIN and found.payload != nbytes:
        raise TierError(f"chunk {short} is damaged: {found.payload} bytes instead of {nbytes}")
    return found
