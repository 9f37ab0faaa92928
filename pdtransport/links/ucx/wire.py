"""What two channels of the ucx link say to each other: offers, over the control channel, and short messages of UCX."""

from __future__ import annotations

import enum
import hashlib
import struct
from typing import NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt

from pdtransport.errors import LinkError

MAX_ADDRESS_BYTES = 1000  # a worker has 80 (tcp) to 300 bytes
SEAL_BYTES = 16


class Opcode(enum.IntEnum):
    ASK = 1  # send me batch `key`, `nbytes` long, to `tag`
    REFUSED = 2  # I have no such batch; nothing of it will come to `tag`
    END = 3  # I heard; end the receive on `tag`, with a message shorter than any batch


class ControlFrame(NamedTuple):
    """A message to a channel's inbox; ``address`` is its sender's, sealed."""

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
    """Never fails: what is in it means something to the reader or not."""
    say, key, tag, nbytes, length, address = _WORD.unpack(message.tobytes())
    return ControlFrame(say, key, tag, nbytes, address[:length])


def packed_offer(nbytes: int, address: bytes) -> bytes:
    offer: bytes = msgpack.packb((nbytes, address))
    return offer


def parsed_offer(offer: bytes) -> tuple[int, bytes]:
    """The batch's length and the sealed address of the channel that offers it.

    Raises:
        LinkError: it is something else.
    """
    try:
        nbytes, address = msgpack.unpackb(offer, raw=False)
        if not isinstance(nbytes, int) or not isinstance(address, bytes):
            raise ValueError("a number and an address are expected")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise LinkError(f"not an offer of the ucx link: {error}") from None
    return nbytes, address


def sealed(address: bytes) -> bytes:
    """A worker address behind its digest: UCX trusts addresses blindly, a damaged one would crash the process."""
    if len(address) > MAX_ADDRESS_BYTES:
        raise LinkError(f"UCX' address of {len(address)} bytes is too long: name fewer devices in UCX_NET_DEVICES")
    return hashlib.blake2b(address, digest_size=SEAL_BYTES, person=b"pdt-ucx-address").digest() + address


def unsealed(sealed_address: bytes) -> bytes:
    """The worker address.

    Raises:
        ValueError: it was damaged.
    """
    address = sealed_address[SEAL_BYTES:]
    if not 0 < len(address) <= MAX_ADDRESS_BYTES or sealed(address) != sealed_address:
        raise ValueError("not a UCX address")
    return address
