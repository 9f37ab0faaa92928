"""How a chunk's bytes are packed in a tier below memory. Lossless ones only: what comes out is what went in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from pdtransport.errors import SettingsError
from pdtransport.pool.tiers import TierError

ZSTD_LEVEL = 1  # KV is nearly random below its exponents: higher levels cost much and gain little


class Codec(ABC):
    """``number`` stands in the header of what was packed; never give one out twice."""

    number: int

    @abstractmethod
    def encode(self, parts: Sequence[memoryview]) -> bytes | None:
        """The packed bytes; None if they are not shorter, then the parts are stored as they are."""

    @abstractmethod
    def decode(self, payload: bytes, parts: Sequence[memoryview]) -> None:
        """Unpack into ``parts``.

        Raises:
            TierError: it is damaged, or of another length.
        """


class ShuffledZstd(Codec):
    """The bytes of all elements sorted by their place in the element (exponents with exponents), then zstd.

    Raises:
        SettingsError: the zstandard package is missing.
    """

    number = 1

    def __init__(self, item_bytes: int) -> None:
        try:
            import zstandard
        except ImportError:
            raise SettingsError(
                "pool codec zstd needs the zstandard package: pip install 'pdtransport[pool]', or set the codec to none"
            ) from None
        self._zstd = zstandard
        self._item_bytes = item_bytes

    def encode(self, parts: Sequence[memoryview]) -> bytes | None:
        plain = np.frombuffer(b"".join(parts), dtype=np.uint8)
        shuffled = np.ascontiguousarray(plain.reshape(-1, self._item_bytes).T)
        packed = bytes([self._item_bytes]) + self._zstd.ZstdCompressor(level=ZSTD_LEVEL).compress(shuffled.data)
        return packed if len(packed) < plain.size else None

    def decode(self, payload: bytes, parts: Sequence[memoryview]) -> None:
        total = sum(len(part) for part in parts)
        try:
            item_bytes = payload[0]
            # Bounded by what is expected: a damaged length in the payload must not take all memory.
            if item_bytes not in (1, 2, 4, 8) or self._zstd.frame_content_size(payload[1:]) != total:
                raise TierError("the packed chunk is damaged: its length is not the chunk's")
            shuffled = self._zstd.ZstdDecompressor().decompress(payload[1:], max_output_size=total)
        except (IndexError, self._zstd.ZstdError) as error:
            raise TierError(f"the packed chunk is damaged: {error}") from None
        plain = np.ascontiguousarray(np.frombuffer(shuffled, dtype=np.uint8).reshape(item_bytes, -1).T).data.cast("B")
        first = 0
        for part in parts:
            part[:] = plain[first : first + len(part)]
            first += len(part)


def make_codec(name: str, item_bytes: int) -> Codec | None:
    """The codec of this name; None for "none"."""
    return ShuffledZstd(item_bytes) if name == "zstd" else None
