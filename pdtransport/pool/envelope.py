"""What stands before a chunk's bytes wherever they lie outside memory: enough to never take one chunk for another."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pdtransport.kernels import pages
from pdtransport.kernels.quant import Grid
from pdtransport.kernels.runs import run
from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool.codecs import Codec
from pdtransport.pool.plugins import decoder
from pdtransport.pool.tiers import HEADER_BYTES, TierError

_MAGIC = b"pdtkv-1\0"
_FIELDS = struct.Struct(f"<8sB7xQQQ{KEY_BYTES}s")  # magic, codec, content bytes, payload bytes, checksum, key
_CRC = struct.Struct("<I")
assert _FIELDS.size + _CRC.size == HEADER_BYTES

PLAIN = 0  # number of no codec


class Envelope(NamedTuple):
    """A chunk's header: ``nbytes`` of content with this ``checksum``, packed into ``payload`` bytes. The checksum is
    that of what comes out of the payload, which for a lossy codec is not what went in."""

    codec: int
    nbytes: int
    payload: int
    checksum: int
    key: bytes

    def packed(self) -> bytes:
        fields = _FIELDS.pack(_MAGIC, *self)
        return fields + _CRC.pack(zlib.crc32(fields))


def seal(
    key: bytes, parts: Sequence[memoryview], checksum: int, codec: Codec | None, grid: Grid | None = None
) -> list[bytes | memoryview]:
    """Header and payload of a chunk, in pieces."""
    nbytes = sum(len(part) for part in parts)
    payload = codec.encode(parts, grid) if codec is not None else None
    if codec is None or payload is None:
        return [Envelope(PLAIN, nbytes, nbytes, checksum, key).packed(), *parts]
    if codec.lossy:
        content = np.empty(nbytes, dtype=np.uint8)
        codec.decode(payload, [content.data])
        checksum = int(pages.checksum(run(content.ctypes.data, nbytes), 1)[0])
    return [Envelope(codec.number, nbytes, len(payload), checksum, key).packed(), payload]


class Opening:
    """A chunk on its way out of a tier into ``parts``."""

    def __init__(self, key: bytes, parts: Sequence[memoryview]) -> None:
        self._key, self._parts = key, parts
        self._header: Envelope | None = None
        self._payload = bytearray()

    def place(self, header: bytes) -> list[memoryview]:
        """Where what follows this header goes.

        Raises:
            TierError: damaged, another chunk, another length.
        """
        self._header = found = _unsealed(header, self._key, sum(len(part) for part in self._parts))
        if found.codec == PLAIN:
            return list(self._parts)
        decoder(found.codec)  # is it at hand?
        self._payload = bytearray(found.payload)
        return [memoryview(self._payload)]

    @property
    def plain(self) -> bool:
        """Whether the payload is the chunk as it is."""
        return self._header is not None and self._header.codec == PLAIN

    def finish(self) -> int:
        """Unpack what was filled; returns the checksum that it must have, which is for the caller to verify.

        Raises:
            TierError: it is damaged.
        """
        if self._header is None:
            raise TierError("the tier read nothing")
        if self._header.codec != PLAIN:
            decoder(self._header.codec).decode(self._payload, self._parts)
        return self._header.checksum


def _unsealed(header: bytes, key: bytes, nbytes: int) -> Envelope:
    short = key.hex()[:16]
    if len(header) != HEADER_BYTES or _CRC.unpack(header[_FIELDS.size :])[0] != zlib.crc32(header[: _FIELDS.size]):
        raise TierError(f"chunk {short} is damaged: its header is")
    magic, *fields = _FIELDS.unpack(header[: _FIELDS.size])
    found = Envelope(*fields)
    if magic != _MAGIC or found.key != key or found.nbytes != nbytes:
        raise TierError(f"chunk {short} is another one, or of another version")
    if found.payload > nbytes or (found.codec == PLAIN and found.payload != nbytes):
        raise TierError(f"chunk {short} is damaged: {found.payload} bytes instead of {nbytes}")
    return found
