"""How a chunk's bytes are packed in a tier below memory.

Lossless codecs (``zstd``) are a tier's own choice: what comes out is what went in. Lossy ones (``fp8``, ``int4``) are
used for a chunk only where whoever stores it asks for it (:class:`Lossy`), and asks under keys that say so
(:attr:`pdtransport.kv.keys.KeySpace.codec`): who wants exact bytes never finds such a chunk.

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

ZSTD_LEVEL = 1  # KV is nearly random below its exponents: higher levels cost much and gain little
FIRST_FOREIGN = 64  # numbers from here on are third parties'
MAX_FORMS = 255  # ways to pack chunks that one pool remembers

Part = memoryview


class Lossy(NamedTuple):
    """How a chunk may be packed with loss: by which codec, and how its elements lie."""

    codec: str
    grid: Grid


class Forms:
    """Ways to pack chunks below memory, by their numbers; 0: exactly."""

    def __init__(self, counters: Counter[str]) -> None:
        self._forms: list[Lossy | None] = [None]
        self._counters = counters

    def __getitem__(self, number: int) -> Lossy | None:
        return self._forms[number]

    def number(self, lossy: Lossy | None) -> int:
        """0 also where there are too many."""
        if lossy not in self._forms:
            if len(self._forms) > MAX_FORMS:
                self._counters["forms_refused"] += 1
                return 0
            self._forms.append(lossy)
        return self._forms.index(lossy)


class Codec(ABC):
    """Packs chunks; called by several threads at once. ``number`` stands in the header of what was packed; never give
    one out twice."""

    name: str
    number: int
    lossy: bool = False

    @abstractmethod
    def encode(self, parts: Sequence[Part], grid: Grid | None) -> bytes | None:
        """The packed bytes; None if they are not shorter, or the content is none for this codec (then the chunk is
        stored as it is). ``grid``: how elements lie, where that is known; lossy codecs always get it."""

    @abstractmethod
    def decode(self, payload: bytes | bytearray, parts: Sequence[Part]) -> None:
        """Unpack into ``parts``: the same bytes whenever and wherever it is done.

        Raises:
            TierError: it is damaged, or of another length.
        """


class ShuffledZstd(Codec):
    """The bytes of all elements sorted by their place in the element (exponents with exponents), then zstd.

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
            # Bounded by what is expected: a damaged length in the payload must not take all memory.
            if item_bytes not in (1, 2, 4, 8) or self._zstd.frame_content_size(packed) != total:
                raise TierError("the packed chunk is damaged: its length is not the chunk's")
            shuffled = self._zstd.ZstdDecompressor().decompress(packed, max_output_size=total)
        except (IndexError, self._zstd.ZstdError) as error:
            raise TierError(f"the packed chunk is damaged: {error}") from None
        _scatter(np.ascontiguousarray(np.frombuffer(shuffled, dtype=np.uint8).reshape(item_bytes, -1).T), parts)


class Quantised(Codec):
    """fp8 or int4 with a scale for each head (see :mod:`pdtransport.kernels.quant`). A payload says how its elements
    lie, so that any pool can read it."""

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


LOSSY = {"fp8": 2, "int4": 3}  # names and numbers


def _scatter(content: np.ndarray, parts: Sequence[Part]) -> None:
    plain, first = content.data.cast("B"), 0
    for part in parts:
        part[:] = plain[first : first + len(part)]
        first += len(part)
