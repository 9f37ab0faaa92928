"""Wire formats of the ucx link: offers (over the control channel) and short control frames (over UCX)."""

from __future__ import annotations

import enum
import hashlib
import struct
from typing import NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt

from pdtransport.errors import LinkError

MAX_ADDRESS_BYTES = 1000  # a worker's address has 80 (tcp) to 300 bytes
SEAL_BYTES = 16


class Opcode(enum.IntEnum):
    ASK = 1  # send me batch `key` of `nbytes` bytes to `tag`
    REFUSED = 2  # I have no such batch; no part of it will be sent to `tag`
    END = 3  # refusal received; end the receive on `tag` with a message shorter than any batch


class ControlFrame(NamedTuple):
    """A message to a channel's inbox; ``address`` is the sealed address of the sending channel."""

    say: int
    key: int
    tag: int
    nbytes: int
    address: bytes


_WORD = struct.Struct(f"<BQQQH{MAX_ADDRESS_BYTES + SEAL_BYTES}s")
WORD_BYTES = _WORD.size


def packed(word: ControlFrame) -> npt.NDArray[np.uint8]:
    *numbers, address = word
    return np.frombuffer(_WORD.pack(*numbers, len(address), address), dtype=np.uint8)


def parsed(message: npt.NDArray[np.uint8]) -> ControlFrame:
    """Never fails; the reader ignores invalid frames."""
    say, key, tag, nbytes, length, address = _WORD.unpack(message.tobytes())
    return ControlFrame(say, key, tag, nbytes, address[:length])


def packed_offer(nbytes: int, address: bytes) -> bytes:
    offer: bytes = msgpack.packb((nbytes, address))
    return offer


def parsed_offer(offer: bytes) -> tuple[int, bytes]:
    """Returns the batch's length and the sealed address of the channel that offers it.

    Raises:
        LinkError: not an offer of the ucx link.
    """
    try:
        nbytes, address = msgpack.unpackb(offer, raw=False)
        if not isinstance(nbytes, int) or not isinstance(address, bytes):
            raise ValueError("a number and an address are expected")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise LinkError(f"not an offer of the ucx link: {error}") from None
    return nbytes, address


def sealed(address: bytes) -> bytes:
    """Prefix a worker address with its digest.

    UCX does not validate addresses, and a damaged one would crash the process.

    Raises:
        LinkError: the address is longer than ``MAX_ADDRESS_BYTES``.
    """
    if len(address) > MAX_ADDRESS_BYTES:
        raise LinkError(f"UCX' address of {len(address)} bytes is too long: name fewer devices in UCX_NET_DEVICES")
    return hashlib.blake2b(address, digest_size=SEAL_BYTES, person=b"pdt-ucx-address").digest() + address


def unsealed(sealed_address: bytes) -> bytes:
    """The worker address without its digest.

    Raises:
        ValueError: the address is damaged.
    """
    address = sealed_address[SEAL_BYTES:]
    if not 0 < len(address) <= MAX_ADDRESS_BYTES or sealed(address) != sealed_address:
        raise ValueError("not a UCX address")
    return address
