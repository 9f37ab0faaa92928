"""Codecs that pack a chunk's bytes in tiers below memory.

A lossless codec (``zstd``) is chosen by a tier's settings. A lossy codec (``fp8``, ``int4``) is used only for chunks
whose client asks for it (:class:`Lossy`). Their keys name the codec (:attr:`pdtransport.kv.keys.KeySpace.codec`), so
clients that want exact bytes never find such a chunk.

Third parties add codecs by entry points, see :mod:`pdtransport.pool.tiers.registry`.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pdtransport.errors import SettingsError
from pdtransport.kernels import quant
from pdtransport.kernels.quant import DTYPES, Grid
from pdtransport.pool.tiers.base import TierError

ZSTD_LEVEL = 1  # only the exponents of KV values compress, mantissas are nearly random: higher levels gain little
FIRST_FOREIGN = 64  # codec numbers from here on belong to third parties
MAX_FORMS = 255  # distinct Lossy values that one pool remembers: the index has one byte for them

Part = memoryview


class Lossy(NamedTuple):
    """Lossy packing that a client allows for a chunk: the codec, and the grid of the chunk's elements."""

    codec: str
    grid: Grid


class Forms:
    """Numbers for the distinct :class:`Lossy` values of a pool's chunks; 0: lossless."""

    def __init__(self, counters: Counter[str]) -> None:
        self._forms: list[Lossy | None] = [None]
        self._counters = counters

    def __getitem__(self, number: int) -> Lossy | None:
        return self._forms[number]

    def number(self, lossy: Lossy | None) -> int:
        """The number of a value; 0 (lossless) also if there are more than ``MAX_FORMS``."""
        if lossy not in self._forms:
            if len(self._forms) > MAX_FORMS:
                self._counters["forms_refused"] += 1
                return 0
            self._forms.append(lossy)
        return self._forms.index(lossy)


class Codec(ABC):
    """Packs and unpacks chunks. Must be thread-safe.

    ``number`` is written to the header of packed chunks. Never reuse the number of another codec.
    """

    name: str
    number: int
    lossy: bool = False

    @abstractmethod
    def encode(self, parts: Sequence[Part], grid: Grid | None) -> bytes | None:
        """Pack a chunk.

        Args:
            grid: the grid of the chunk's elements, if it is known; lossy codecs always get it.

        Returns:
            The packed bytes; None if they would not be shorter, or the codec can't pack this content. Then the chunk is
            stored unpacked.
        """

    @abstractmethod
    def decode(self, payload: bytes | bytearray, parts: Sequence[Part]) -> None:
        """Unpack into ``parts``. Deterministic: every host and every version gives the same bytes.

        Raises:
            TierError: the payload is damaged, or unpacks to another length.
        """


class ShuffledZstd(Codec):
    """Byte shuffle (bytes at the same position in each element are grouped, exponents with exponents), then zstd.

    Raises:
        SettingsError: the zstandard package is missing.
    """

    name, number = "zstd", 1

    def __init__(self, item_bytes: int = 2) -> None:
        try:
            import zstandard
        except ImportError:
            raise SettingsError(
                "pool codec zstd needs the zstandard package: pip install 'pdtransport[pool]', or set the codec to none"
            ) from None
        self._zstd = zstandard
        self._item_bytes = item_bytes

    def encode(self, parts: Sequence[Part], grid: Grid | None) -> bytes | None:
        plain = np.frombuffer(b"".join(parts), dtype=np.uint8)
        shuffled = np.ascontiguousarray(plain.reshape(-1, self._item_bytes).T)
        packed = bytes([self._item_bytes]) + self._zstd.ZstdCompressor(level=ZSTD_LEVEL).compress(shuffled.data)
        return packed if len(packed) < plain.size else None

    def decode(self, payload: bytes | bytearray, parts: Sequence[Part]) -> None:
        total = sum(len(part) for part in parts)
        try:
            item_bytes, packed = payload[0], memoryview(payload)[1:]
            # Bounded by the expected length: a damaged length in the payload must not exhaust memory.
            if item_bytes not in (1, 2, 4, 8) or self._zstd.frame_content_size(packed) != total:
                raise TierError("the packed chunk is damaged: its length is not the chunk's")
            shuffled = self._zstd.ZstdDecompressor().decompress(packed, max_output_size=total)
        except (IndexError, self._zstd.ZstdError) as error:
            raise TierError(f"the packed chunk is damaged: {error}") from None
        _scatter(np.ascontiguousarray(np.frombuffer(shuffled, dtype=np.uint8).reshape(item_bytes, -1).T), parts)


class Quantised(Codec):
    """fp8 or int4 with one scale a head (see :mod:`pdtransport.kernels.quant`).

    A payload holds the grid of its elements, so that any pool can unpack it.
    """

    lossy = True
    _HEAD = struct.Struct("<B3xIII")  # element type, rows, groups, width

    def __init__(self, kind: quant.Kind, number: int) -> None:
        self.name, self.number = kind, number
        self._kind = kind

    def encode(self, parts: Sequence[Part], grid: Grid | None) -> bytes | None:
        content = np.frombuffer(b"".join(parts), dtype=np.uint8)
        if grid is None or not grid.outer(content.size):
            return None
        packed = quant.pack(self._kind, grid, content)
        if packed is None or self._HEAD.size + packed.size >= content.size:
            return None
        return self._HEAD.pack(DTYPES[grid.dtype], *grid[1:]) + packed.tobytes()

    def decode(self, payload: bytes | bytearray, parts: Sequence[Part]) -> None:
        content = np.empty(sum(len(part) for part in parts), dtype=np.uint8)
        try:
            number, *shape = self._HEAD.unpack_from(payload)
            grid = Grid(list(DTYPES)[number], *shape)
            quant.unpack(self._kind, grid, np.frombuffer(payload, dtype=np.uint8)[self._HEAD.size :], content)
        except (struct.error, IndexError, ValueError) as error:
            raise TierError(f"the packed chunk is damaged: {error}") from None
        _scatter(content, parts)


LOSSY = {"fp8": 2, "int4": 3}  # codec numbers by name


def _scatter(content: np.ndarray, parts: Sequence[Part]) -> None:
    plain, first = content.data.cast("B"), 0
    for part in parts:
        part[:] = plain[first : first + len(part)]
        first += len(part)
