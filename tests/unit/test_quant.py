"""The lossy codecs: what they cost is bounded, and C and numpy agree to the last bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pdtransport.kernels import quant
from pdtransport.kernels.quant import DTYPES, KINDS, Bytes, DType, Grid, Kind, pack, to_bytes, to_floats, unpack

EDGES = [0.0, -0.0, 1e-40, -1e-45, 6e-8, 5.9e-5, 0.875, 447.9, 448.0, 463.9, -65504.0, 3e38, 1.0, -1.0, 1 / 3, 2**-126]
requires_c = pytest.mark.skipif(quant._C is None, reason="built without a C compiler")


def content(dtype: DType, elements: int, seed: int = 0) -> Bytes:
    """Elements of very different sizes, edges among them."""
    chance = np.random.default_rng(seed)
    values = (chance.standard_normal(elements) * np.exp(chance.normal(0, 4, elements))).astype(np.float32)
    values[chance.integers(0, elements, len(EDGES))] = np.clip(EDGES, -quant.LARGEST[dtype], quant.LARGEST[dtype])
    values[-512:] = 0.0
    return to_bytes(values, dtype)


def through(kind: Kind, grid: Grid, plain: Bytes) -> Bytes:
    packed, back = pack(kind, grid, plain), np.empty_like(plain)
    assert packed is not None
    unpack(kind, grid, packed, back)
    return back


@pytest.fixture(params=[0, 1])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    found = quant.choose(request.param)
    if found != request.param:
        pytest.skip("this processor does not have it")
    yield found
    quant.choose(1)


@requires_c
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 256), (16, 2, 34), (3, 5, 6), (1, 1, 2)])
def test_c_and_numpy_agree_bit_for_bit(
    kind: Kind, dtype: DType, shape: tuple[int, int, int], level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pool reads what another one packed, with a C compiler or without: codes, scales, decoded bytes are equal."""
    grid = Grid(dtype, *shape)
    each = np.prod(shape)
    plain = content(dtype, int(each * max(2, 4096 // each)))
    packed, back = pack(kind, grid, plain), through(kind, grid, plain)
    monkeypatch.setattr(quant, "_C", None)
    assert packed is not None
    assert np.array_equal(packed, pack(kind, grid, plain))
    assert np.array_equal(back, through(kind, grid, plain))


def test_e4m3_takes_the_nearest_of_all_codes() -> None:
    """fp8 is e4m3 as everybody's: each finite code stands for itself, and others go to the nearest, ties to even."""
    table = quant._E4M3[:127]
    assert table[1] == 2**-9
    assert table[126] == 448.0
    values = np.concatenate([table, (table[1:] + table[:-1]) / 2, np.linspace(0, 448, 10007, dtype=np.float32)])
    codes = quant._e4m3(values.astype(np.float32))
    distance = np.abs(values[:, None] - table)
    nearest = distance.min(axis=1)
    assert np.array_equal(distance[np.arange(len(values)), codes], nearest)
    tied = (distance == nearest[:, None]).sum(axis=1) > 1
    assert not (codes[tied] & 1).any()
    assert np.array_equal(quant._e4m3(-values), codes | 0x80)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_costs_a_sixteenth_at_most_and_only_once(dtype: DType) -> None:
    """Each element within 1/16 of itself or 2**-17 of its group's largest (float16's own steps aside); what was decoded
    encodes to the same again: KV that goes up and down does not wear out."""
    grid = Grid(dtype, 1, 1, 256)
    plain = content(dtype, 1 << 14)
    back = through("fp8", grid, plain)
    before, after = (to_floats(each, dtype).reshape(-1, 256).astype(np.float64) for each in (plain, back))
    step = 2.0**-24 if dtype == "float16" else 2.0**-127
    bound = np.maximum(np.abs(before) / 16, np.abs(before).max(axis=1, keepdims=True) * 2.0**-17) + step
    assert (np.abs(before - after) <= bound).all()
    assert np.array_equal(through("fp8", grid, back), back)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_costs_half_a_step_of_its_group(dtype: DType) -> None:
    """Each element within half of 1/15 of its group's span, and rounding of the element type."""
    grid = Grid(dtype, 4, 2, 32)
    plain = content(dtype, 1 << 14)
    before, after = (
        to_floats(each, dtype).astype(np.float64).reshape(-1, 4, 2, 32)
        for each in (plain, through("int4", grid, plain))
    )
    span = before.max(axis=(1, 3), keepdims=True) - before.min(axis=(1, 3), keepdims=True)
    largest = np.abs(before).max(axis=(1, 3), keepdims=True)
    assert (np.abs(before - after) <= span / 30 + largest * 2.0**-8 + 1e-29).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_not_packed(kind: Kind) -> None:
    """A chunk with an infinity or a not-a-number in it is left as it is; so is a span that a float can't say."""
    for bad in (np.inf, -np.inf, np.nan):
        for dtype in DTYPES:
            values = np.ones(64, dtype=np.float32)
            raw = to_bytes(values, dtype)
            width = 4 if dtype == "float32" else 2
            special = np.float32(bad).view(np.uint32)
            bits = special if dtype == "float32" else special >> 16
            if dtype == "float16":
                bits = np.float16(bad).view(np.uint16)
            raw[8 * width : 9 * width] = np.frombuffer(int(bits).to_bytes(width, "little"), dtype=np.uint8)
            assert pack(kind, Grid(dtype, 1, 1, 32), raw) is None
    wide = np.array([3e38, -3e38], dtype=np.float32).view(np.uint8)
    assert pack("int4", Grid("float32", 1, 1, 2), wide) is None


def test_sizes_that_do_not_fit_are_refused() -> None:
    """No grid reaches beyond the content, and no packed bytes beyond what was packed."""
    plain = np.zeros(1024, dtype=np.uint8)
    for grid in (
        Grid("float32", 1, 1, 3),
        Grid("float32", 3, 1, 2),
        Grid("float32", 1, 1, 512),
        Grid("bfloat16", 1, 0, 2),
    ):
        with pytest.raises(ValueError, match="do not fit the grid"):
            pack("fp8", grid, plain)
    grid = Grid("float32", 1, 1, 64)
    for nbytes in (0, 259, 261):
        with pytest.raises(ValueError, match="packed bytes"):
            unpack("fp8", grid, np.zeros(nbytes, dtype=np.uint8), plain)
    damaged = np.zeros(260, dtype=np.uint8)
    damaged[0] = 127  # an exponent that no encoder writes
    with pytest.raises(ValueError, match="scale"):
        unpack("fp8", grid, damaged, plain)
