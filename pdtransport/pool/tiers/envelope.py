"""Sealing and unsealing of chunks outside memory. The header ensures that no chunk is taken for another."""

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
from pdtransport.pool.tiers.base import DIGEST_BYTES, HEADER_BYTES, TierError
from pdtransport.pool.tiers.codecs import Codec
from pdtransport.pool.tiers.keyed_digest import ID_BYTES, UNSIGNED, Signer
from pdtransport.pool.tiers.registry import decoder

_MAGIC = b"pdtkv-1\0"
# Magic, codec, id of the digest's key (zeros: no digest), content bytes, payload bytes, checksum, chunk key.
_FIELDS = struct.Struct(f"<8sB{ID_BYTES}sQQQ{KEY_BYTES}s")
_CRC = struct.Struct("<I")
assert _FIELDS.size + _CRC.size == HEADER_BYTES

PLAIN = 0  # codec number of an unpacked payload


class Envelope(NamedTuple):
    """The header of a sealed chunk: ``nbytes`` of content, packed into ``payload`` bytes.

    Attributes:
        signer: id of the key that made the digest after the payload; zeros: there is no digest.
        checksum: of the content as it is unpacked, which differs from the original after a lossy codec.
    """

    codec: int
    signer: bytes
    nbytes: int
    payload: int
    checksum: int
    key: bytes

    def packed(self) -> bytes:
        fields = _FIELDS.pack(_MAGIC, *self)
        return fields + _CRC.pack(zlib.crc32(fields))


def seal(
    key: bytes,
    parts: Sequence[memoryview],
    checksum: int,
    codec: Codec | None,
    grid: Grid | None = None,
    signer: Signer | None = None,
) -> list[bytes | memoryview]:
    """Seal a chunk: returns its header, its payload (one or more pieces), and its digest if there is a ``signer``.

    The content is packed with ``codec`` if there is one and it makes the content shorter.
    """
    nbytes = sum(len(part) for part in parts)
    key_id = signer.id if signer is not None else UNSIGNED
    payload = codec.encode(parts, grid) if codec is not None else None
    pieces: list[bytes | memoryview]
    if codec is None or payload is None:
        pieces = [Envelope(PLAIN, key_id, nbytes, nbytes, checksum, key).packed(), *parts]
    else:
        if codec.lossy:
            content = np.empty(nbytes, dtype=np.uint8)
            codec.decode(payload, [content.data])
            checksum = int(pages.checksum(run(content.ctypes.data, nbytes), 1)[0])
        pieces = [Envelope(codec.number, key_id, nbytes, len(payload), checksum, key).packed(), payload]
    return pieces if signer is None else [*pieces, signer.sign(pieces[0], pieces[1:])]


class Opening:
    """Unseals a chunk that is read from a tier into ``parts``.

    With a ``signer``, the chunk must carry a digest made with one of the signer's keys.
    """

    def __init__(self, key: bytes, parts: Sequence[memoryview], signer: Signer | None = None) -> None:
        self._key, self._parts, self._signer = key, parts, signer
        self._header: Envelope | None = None
        self._packed = b""
        self._payload = bytearray()
        self._digest = bytearray()

    def place(self, header: bytes) -> list[memoryview]:
        """Check a header; returns the buffers for the bytes that follow it.

        Raises:
            TierError: the header is damaged, or of another chunk or length, or its codec is not installed.
            Forged: the chunk has no digest, or one made with a key that the signer lacks.
        """
        self._header = found = _unsealed(header, self._key, sum(len(part) for part in self._parts))
        if self._signer is not None:
            self._signer.check_key(found.signer)
        self._packed = header
        self._digest = bytearray(DIGEST_BYTES if found.signer != UNSIGNED else 0)
        behind = [memoryview(self._digest)] if self._digest else []
        if found.codec == PLAIN:
            return [*self._parts, *behind]
        decoder(found.codec)  # raises if the codec is not installed
        self._payload = bytearray(found.payload)
        return [memoryview(self._payload), *behind]

    @property
    def plain(self) -> bool:
        """Whether the payload is the unpacked content, with no digest after it."""
        return self._header is not None and self._header.codec == PLAIN and not self._digest

    def finish(self) -> int:
        """Verify the digest and unpack the payload, once all buffers are filled.

        Returns:
            The checksum that the content must have. The caller verifies it.

        Raises:
            TierError: the payload is damaged.
            Forged: the digest is wrong.
        """
        if self._header is None:
            raise TierError("the tier read nothing")
        packed = self._header.codec != PLAIN
        if self._signer is not None:  # verified before a decoder parses the bytes
            filled = [memoryview(self._payload)] if packed else self._parts
            self._signer.verify(self._header.signer, self._packed, filled, self._digest)
        if packed:
            decoder(self._header.codec).decode(self._payload, self._parts)
        return self._header.checksum


def _unsealed(header: bytes, key: bytes, nbytes: int) -> Envelope:
    short = key.hex()[:16]
    if len(header) != HEADER_BYTES or _CRC.unpack(header[_FIELDS.size :])[0] != zlib.crc32(header[: _FIELDS.size]):
        raise TierError(f"chunk {short} is damaged: its header is invalid")
    magic, *fields = _FIELDS.unpack(header[: _FIELDS.size])
    found = Envelope(*fields)
    if magic != _MAGIC or found.key != key or found.nbytes != nbytes:
        raise TierError(f"the header is not that of chunk {short}, or has another version")
    if found.payload > nbytes or (found.codec == PLAIN and found.payload != nbytes):
        raise TierError(f"chunk {short} is damaged: {found.payload} bytes instead of {nbytes}")
    return found
