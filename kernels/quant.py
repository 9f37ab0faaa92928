"""Lossy codecs for KV in host memory: fp8 (e4m3) and int4, with one scale per group of elements.

A :class:`Grid` describes the layout of the elements and which share a scale. The output is the groups' scales, then the
codes (one byte or half a byte per element) in the elements' order:

* ``fp8``: the scale is an exponent (int8): the power of two that brings the group's largest element just within e4m3's
  range. Decoding does not round, so encoding decoded values again gives the same codes.
* ``int4``: 16 equal steps from the group's smallest to its largest element; the scale is two float32, step and
  smallest. The first half of a row is in the low nibbles, the second half in the high nibbles.

``csrc/quant.c`` does this without the GIL. The numpy code below defines it, equal bit for bit, and is the fallback
without a C compiler.
"""

from __future__ import annotations

import ctypes
import errno
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pdtransport.kernels.pages import _C

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Kind = Literal["fp8", "int4"]
DType = Literal["float32", "float16", "bfloat16"]

KINDS: dict[Kind, int] = {"fp8": 0, "int4": 1}
DTYPES: dict[DType, int] = {"float32": 0, "float16": 1, "bfloat16": 2}
SCALE_BYTES: dict[Kind, int] = {"fp8": 1, "int4": 8}

E4M3_MAX = np.float32(448.0)
MAX_EXPONENT = 120
TINY_SCALE = np.float32(1e-30)
LARGEST: dict[DType, np.float32] = {
    "float32": np.float32(3.40282347e38),
    "float16": np.float32(65504.0),
    "bfloat16": np.float32(3.38953139e38),
}


class Grid(NamedTuple):
    """Layout of elements: ``[outer, rows, groups, width]``, C-contiguous.

    The ``rows * width`` elements of one (outer, group) share a scale. ``width`` is even.
    """

    dtype: DType
    rows: int
    groups: int
    width: int

    @property
    def item_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def outer(self, nbytes: int) -> int:
        """How many times the grid fits into ``nbytes``; 0 if not a whole number of times."""
        each = self.rows * self.groups * self.width * self.item_bytes
        return 0 if each <= 0 or self.width % 2 or nbytes % each else nbytes // each


def packed_bytes(kind: Kind, grid: Grid, nbytes: int) -> tuple[int, int]:
    """Bytes of the scales and bytes of the codes for ``nbytes`` of elements."""
    elements = nbytes // grid.item_bytes
    return grid.outer(nbytes) * grid.groups * SCALE_BYTES[kind], elements if kind == "fp8" else elements // 2


def pack(kind: Kind, grid: Grid, content: Bytes) -> Bytes | None:
    """Encode ``content`` as scales followed by codes.

    Returns None if an element is not finite, or if the range of a group exceeds float32.

    Raises:
        ValueError: the grid does not fit the content.
    """
    outer = _fitting(grid, content.size)
    scale_bytes, code_bytes = packed_bytes(kind, grid, content.size)
    packed = np.empty(scale_bytes + code_bytes, dtype=np.uint8)
    if _C is None:
        made = (_pack_fp8 if kind == "fp8" else _pack_int4)(grid, content)
        if made is None:
            return None
        packed[:scale_bytes], packed[scale_bytes:] = made
        return packed
    content = np.ascontiguousarray(content)
    code = _C.pdt_pack(
        content.ctypes.data,
        *_numbers(kind, grid, outer),
        packed.ctypes.data,
        packed.ctypes.data + scale_bytes,
    )
    return packed if code == 0 else None


def unpack(kind: Kind, grid: Grid, packed: Bytes, content: Bytes) -> None:
    """Decode into ``content``, which is contiguous.

    Raises:
        ValueError: ``packed`` has another length, or its scales are invalid.
    """
    outer = _fitting(grid, content.size)
    scale_bytes, code_bytes = packed_bytes(kind, grid, content.size)
    if packed.size != scale_bytes + code_bytes:
        raise ValueError(f"{packed.size} packed bytes instead of {scale_bytes + code_bytes}")
    packed = np.ascontiguousarray(packed)
    if _C is None:
        found = (_unpack_fp8 if kind == "fp8" else _unpack_int4)(grid, packed[:scale_bytes], packed[scale_bytes:])
        if found is None:
            raise ValueError("a scale is out of bounds")
        content[:] = to_bytes(found, grid.dtype)
        return
    code = _C.pdt_unpack(
        content.ctypes.data,
        *_numbers(kind, grid, outer),
        packed.ctypes.data,
        packed.ctypes.data + scale_bytes,
    )
    if code == -errno.EDOM:
        raise ValueError("a scale is out of bounds")


def choose(level: int) -> int:
    """Select the widest instruction set of this processor, at most ``level`` (0: portable, 1: AVX2); for tests."""
    return int(_C.pdt_choose_quant(level)) if _C is not None else 0


def _fitting(grid: Grid, nbytes: int) -> int:
    outer = grid.outer(nbytes)
    if not outer or grid.dtype not in DTYPES:
        raise ValueError(f"{nbytes} bytes do not fit the grid {grid}")
    return outer


def _numbers(kind: Kind, grid: Grid, outer: int) -> tuple[int, ...]:
    return KINDS[kind], DTYPES[grid.dtype], outer, grid.rows, grid.groups, grid.width


if _C is not None:
    for _name in ("pdt_pack", "pdt_unpack"):
        _function = getattr(_C, _name)
        _count = ctypes.c_uint64
        _function.argtypes = (
            ctypes.c_void_p,
            *2 * (ctypes.c_int,),
            *4 * (_count,),
            *2 * (ctypes.c_void_p,),
        )
        _function.restype = ctypes.c_int
    _C.pdt_choose_quant.argtypes = (ctypes.c_int,)


# -- the definition in numpy ---------------------------------------------------------------------------------------


def to_floats(content: Bytes, dtype: DType) -> Floats:
    """Elements converted to float32."""
    if dtype == "bfloat16":
        return (content.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return content.view("<f2" if dtype == "float16" else "<f4").astype(np.float32)


def to_bytes(values: Floats, dtype: DType) -> Bytes:
    """float32 converted to elements: round to nearest, ties to even; saturates at the largest finite number."""
    values = np.clip(values, -LARGEST[dtype], LARGEST[dtype])
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2").reshape(-1).view(np.uint8)
    return values.astype("<f2" if dtype == "float16" else "<f4").reshape(-1).view(np.uint8)


def _grid(grid: Grid, content: Bytes) -> Floats:
    return to_floats(content, grid.dtype).reshape(-1, grid.rows, grid.groups, grid.width)


def _e4m3(values: Floats) -> Bytes:
    """e4m3 codes of values within its range: round to nearest, ties to even."""
    bits = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    magnitude = bits.view(np.float32)
    small = (magnitude + np.float32(16384.0)).view(np.uint32) & 0xF  # the last bit of 2**14 is e4m3's smallest step
    normal = ((bits + np.uint32(0x7FFFF) + ((bits >> 20) & 1)) >> 20) - np.uint32(120 << 3)
    codes = np.where(magnitude < 2**-6, small, normal) | ((values.view(np.uint32) >> 24) & 0x80)
    return codes.astype(np.uint8)


def _e4m3_table() -> Floats:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, (code & 7) / 8.0
    magnitude = np.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


_E4M3 = _e4m3_table()


def _powers(exponents: npt.NDArray[np.int8]) -> Floats:
    return np.ldexp(np.float32(1), exponents.astype(np.int32)).astype(np.float32)[:, None, :, None]


def _pack_fp8(grid: Grid, content: Bytes) -> tuple[Bytes, Bytes] | None:
    values = _grid(grid, content)
    largest = np.abs(values).max(axis=(1, 3))
    if not np.isfinite(largest).all():
        return None
    mantissa, exponent = np.frexp(largest)  # largest = mantissa * 2**exponent, mantissa in [0.5, 1)
    exponents = np.where(mantissa > 0.875, 8 - exponent, 9 - exponent)
    exponents = np.where(largest == 0, 0, np.clip(exponents, -MAX_EXPONENT, MAX_EXPONENT)).astype(np.int8)
    codes = _e4m3(values * _powers(exponents))
    return exponents.reshape(-1).view(np.uint8), codes.reshape(-1)


def _unpack_fp8(grid: Grid, scales: Bytes, codes: Bytes) -> Floats | None:
    exponents = scales.view(np.int8).reshape(-1, grid.groups)
    if (np.abs(exponents.astype(np.int16)) > MAX_EXPONENT).any():
        return None
    with np.errstate(over="ignore"):
        values: Floats = _E4M3[codes].reshape(-1, grid.rows, grid.groups, grid.width) * _powers(-exponents)
    return values


def _pack_int4(grid: Grid, content: Bytes) -> tuple[Bytes, Bytes] | None:
    values = _grid(grid, content)
    bits = values.view(np.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers that order like the floats, -0 below 0
    least, most = order.min(axis=(1, 3)), order.max(axis=(1, 3))
    low, high = ((each ^ ((each >> 31) & 0x7FFFFFFF)).view(np.float32) for each in (least, most))
    with np.errstate(all="ignore"):
        scale = (high - low) / np.float32(15)
        if not (np.isfinite(low).all() and np.isfinite(high).all() and np.isfinite(scale).all()):
            return None
        scale = np.where(scale >= TINY_SCALE, scale, np.float32(0))
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    steps = (values - low[:, None, :, None]) * inverse[:, None, :, None]
    codes = np.rint(steps).astype(np.uint8)
    half = grid.width // 2
    scales = np.stack([scale, low], axis=-1).astype("<f4")
    return scales.reshape(-1).view(np.uint8), (codes[..., :half] | codes[..., half:] << 4).reshape(-1)


def _unpack_int4(grid: Grid, scales: Bytes, codes: Bytes) -> Floats | None:
    pairs = scales.view("<f4").reshape(-1, grid.groups, 2)
    scale, low = (pairs[:, None, :, None, i] for i in (0, 1))
    if not np.isfinite(pairs).all() or (scale.view(np.int32) < 0).any():
        return None
    both = codes.reshape(-1, grid.rows, grid.groups, grid.width // 2)
    with np.errstate(over="ignore"):
        return low + np.concatenate([both & 0xF, both >> 4], axis=-1).astype(np.float32) * scale
