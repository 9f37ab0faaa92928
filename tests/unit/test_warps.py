"""The GPU kernels' source, run on a CPU a warp at a time (warps.h), against the numpy reference."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdtransport.kernels import pages, pieces, reference
from pdtransport.kernels.reference import Checksums
from pdtransport.kernels.runs import Runs, layout_runs, run, stream_bytes
from tests.unit.run_layouts import Bytes, Layout, laid_out, layouts, outside, placed, stream
from tests.unit.test_kernels import GOLDEN

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "kernels" / "csrc" / "pages.cu"
WARPS = 8  # of a block
Kernels = Callable[..., Checksums]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """``kernels(src, dst or None, blocks, most=..., grid=...)``: what gpu.py does, with at most ``most`` pieces a part
    and ``grid`` blocks of threads."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("warps") / "pages.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-x", "c++"]
    subprocess.run([compiler, *flags, "-include", HERE / "warps.h", SOURCE, "-o", library], check=True, timeout=120)
    loaded = ctypes.CDLL(str(library))

    def launch(src: Runs, dst: Runs | None, blocks: int, most: int = 1 << 17, grid: int = 2) -> Checksums:
        plan = pieces.cut(src, dst, blocks)
        sums = np.zeros(blocks, dtype=np.uint64)
        for part in plan.parts(most):
            assert part.high - part.low <= most
            table = np.empty(plan.table_bytes(part) // 8, dtype=np.uint64)
            plan.fill(part, table)
            arguments = plan.arguments(part, table.ctypes.data, sums.ctypes.data, WARPS * grid)
            function = getattr(loaded, plan.kernel(blocks))
            loaded.run_kernel(function, grid, 32 * WARPS, (ctypes.c_uint64 * len(arguments))(*arguments))
        return reference.finish(sums, plan.block_bytes)

    return launch


def filled(nbytes: int, seed: int = 7) -> Bytes:
    """Random bytes at a multiple of 4096."""
    raw = np.zeros(nbytes + 4096, dtype=np.uint8)
    start = -raw.ctypes.data % 4096
    raw[start : start + nbytes] = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    return raw[start : start + nbytes]


def check(kernels: Kernels, layout: Layout, **how: int) -> None:
    source, target = filled(layout.src_bytes), filled(layout.dst_bytes, 8)
    src, dst = placed(layout.src, source.ctypes.data), placed(layout.dst, target.ctypes.data)
    beside = outside(target, layout.dst).copy()
    expected = reference.checksum(src, layout.blocks).tolist()
    for blocks in (0, layout.blocks):
        for at, nbytes in layout.dst.tolist():
            target[at : at + nbytes] = 0
        assert kernels(src, dst, blocks, **how).tolist() == (expected if blocks else [])
        assert stream(target, layout.dst) == stream(source, layout.src)
        assert (outside(target, layout.dst) == beside).all()
    assert kernels(dst, None, layout.blocks, **how).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), grid=st.integers(1, 3))
def test_any_layout_is_copied_and_summed(kernels: Kernels, layout: Layout, grid: int) -> None:
    """Any fragmentation and alignment to words: the bytes arrive, none beside the runs changes, and the checksums are
    the reference's, fused and alone."""
    check(kernels, layout, grid=grid)


@settings(max_examples=15, deadline=None)
@given(layout=layouts(), monkey=st.sampled_from([0, pieces.EQUAL_PIECES]))
def test_long_tables_go_in_parts(kernels: Kernels, layout: Layout, monkey: int) -> None:
    """A table that does not fit the launch's share of the ring is worked off in parts, without a seam."""
    before, pieces.EQUAL_PIECES = pieces.EQUAL_PIECES, monkey
    try:
        check(kernels, layout, most=1024)
    finally:
        pieces.EQUAL_PIECES = before


def test_each_kernel_runs(kernels: Kernels) -> None:
    """Pages, head slices and odd cuts each take the kernel made for them, and do so in several parts, too."""
    rng = np.random.default_rng(3)
    shuffled: list[int] = rng.permutation(24).tolist()
    seen = set()
    for length, gap, blocks in ((4096, 0, 3), (16384, 64, 24), (256, 512, 2), (24, 8, 1), (5120, 0, 4), (1024, 0, 8)):
        src, src_bytes = laid_out([length] * 24, shuffled, gap, 0)
        dst, dst_bytes = laid_out([length] * 24, list(range(24)), 0, 16)
        layout = Layout(src, dst, src_bytes, dst_bytes, blocks)
        seen.add(pieces.cut(placed(src, 4096), placed(dst, 4096), blocks).grain)
        check(kernels, layout)
    assert seen == {"stripes", "pairs", "singles"}
    for length, count in ((1024, 2500), (16, 5000), (8, 5000)):  # several parts of at most 1,024 pieces
        src, src_bytes = laid_out([length] * count, rng.permutation(count).tolist(), 16 if length > 8 else 8, 0)
        dst, dst_bytes = laid_out([length * count], [0], 0, 16)
        check(kernels, Layout(src, dst, src_bytes, dst_bytes, 5), most=1024)


@pytest.mark.parametrize(("tokens", "heads", "row"), [(16, 8, 256), (32, 3, 72), (1, 4, 64)])
def test_orders_are_converted(kernels: Kernels, tokens: int, heads: int, row: int) -> None:
    """Pages go from vLLM's NHC order to HNC and back, all heads or a slice; the checksum is the same for both."""
    page = tokens * heads * row
    source = filled(6 * page)
    nhc = source.ctypes.data + page * np.array([4, 0, 3, 5])
    for first, count in ((0, heads), (1, 2)) if heads > 1 else ():
        target, back = np.zeros(4 * page, dtype=np.uint8), np.zeros_like(source)
        hnc = target.ctypes.data + page * np.arange(4)
        src, dst = (
            layout_runs(nhc, "NHC", tokens, heads, row, first=first, count=count),
            layout_runs(hnc, "HNC", tokens, heads, row, first=first, count=count),
        )
        sums = kernels(src, dst, 4)
        shaped = source.reshape(6, tokens, heads, row)[[4, 0, 3, 5], :, first : first + count]
        found = target.reshape(4, heads, tokens, row)
        assert (found[:, first : first + count] == shaped.transpose(0, 2, 1, 3)).all()
        assert not np.delete(found, slice(first, first + count), axis=1).any()
        assert kernels(dst, None, 4).tolist() == sums.tolist() == reference.checksum(src, 4).tolist()
        moved = src + np.array([back.ctypes.data, 0], dtype=np.uint64)
        kernels(dst, moved - np.array([source.ctypes.data, 0], dtype=np.uint64), 0)
        assert (back.reshape(6, tokens, heads, row)[[4, 0, 3, 5], :, first : first + count] == shaped).all()
    with pytest.raises(ValueError, match="heads"):
        layout_runs(nhc, "NHC", tokens, heads, row, first=1, count=heads)


def test_few_runs_of_odd_lengths_need_no_long_table() -> None:
    """One word off must not turn a gigabyte into a table as long: the pieces are searched for instead."""
    src = np.array([[1 << 40, (1 << 30) + 8], [1 << 42, (1 << 30) - 8]], dtype=np.uint64)
    plan = pieces.cut(src, run(1 << 44, 2 << 30), 2)
    assert plan.starts is not None
    assert plan.starts.tolist() == [0, (1 << 30) + 8]
    assert plan.dst is not None
    assert plan.dst.tolist() == [1 << 44, (1 << 44) + (1 << 30) + 8]


@pytest.mark.parametrize("length", [length for length in GOLDEN if length])
def test_checksum_is_the_documented_function(kernels: Kernels, length: int) -> None:
    """The GPU's checksum is the wire protocol's."""
    data = filled(length)
    data[:] = np.arange(length) % 251
    assert int(kernels(run(data.ctypes.data, length), None, 1)[0]) == GOLDEN[length]


def test_the_bell_is_rung_without_python() -> None:
    """What CUDA calls when a launch ended adds one to the eventfd; no Python and no GIL."""
    eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        assert pages._C is not None
        for _ in range(3):
            pages._C.pdt_ring(ctypes.c_void_p(eventfd))
        assert os.eventfd_read(eventfd) == 3
    finally:
        os.close(eventfd)


def test_turns_leave_no_warp_idle_at_the_end() -> None:
    """Tiles a turn: at most eight, at least one, and as many turns for each warp as for the others."""
    for tiles in (0, 1, 7, 4224, 4225, 16384, 524288):
        each = pieces.span(tiles, 4224)
        assert 1 <= each <= pieces.MAX_SPAN
        assert -(-tiles // (4224 * each)) * (each - 1) * 4224 < max(tiles, 1)


def test_what_does_not_fit_is_refused() -> None:
    """The kernels move words of 8 bytes; they never see what they can't move."""
    page = run(1 << 20, 4096)
    for wrong in (run((1 << 20) + 4, 4096), run(0, 4096), np.array([[1 << 20, 4092], [1 << 21, 4]], dtype=np.uint64)):
        with pytest.raises(ValueError, match="multiples of 8"):
            pieces.cut(page, wrong, 0)
    with pytest.raises(ValueError, match="4096 bytes long"):
        pieces.cut(page, run(1 << 21, 4088), 0)
    for blocks in (3, 1024, -1, pieces.MAX_BLOCKS + 1):
        with pytest.raises(ValueError, match="blocks"):
            pieces.cut(page, None, blocks)
    nothing = np.empty((0, 2), dtype=np.uint64)
    assert list(pieces.cut(nothing, nothing, 2).parts(1024)) == []
    assert stream_bytes(nothing) == 0
