"""The page kernels: C against the numpy reference, and the damage that a checksum must find."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdtransport.kernels import pages, reference
from pdtransport.kernels.runs import Runs, cut_runs, merge_runs, run, stream_bytes

Bytes = npt.NDArray[np.uint8]

# kernels/README.md: bytes 0, 1, 2, ... modulo 251
GOLDEN = {
    0: 0x48218226FF3CD4BF,
    8: 0xF37251AE06AEA971,
    1016: 0xB54A960A9A0D31D9,
    1024: 0xAE4188DA78F04249,
    1032: 0x5716F85121155A7E,
    4096: 0x3537A50F42C6DFA0,
    65560: 0x1EBC544830A122DE,
}
BOTH = [pytest.param(pages, id="c"), pytest.param(reference, id="numpy")]
GUARD = 64


def test_c_kernels_are_built() -> None:
    """Comparing C with numpy below would mean nothing if both were numpy."""
    assert pages.BACKEND == "c"


@pytest.fixture(params=[0, 1, 2], ids=["portable", "avx2", "avx512"])
def vectors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each way in which the C checksum is compiled, as far as this processor goes."""
    assert pages._C is not None
    if pages._C.pdt_choose(request.param) != request.param:
        pages._C.pdt_choose(2)
        pytest.skip("this processor has no such instructions")
    yield
    pages._C.pdt_choose(2)


@pytest.mark.usefixtures("vectors")
def test_every_instruction_set_gives_the_same_checksum() -> None:
    """A peer with another processor computes the same; at any alignment."""
    data = np.random.default_rng(5).integers(0, 256, 70_000, dtype=np.uint8)
    for start, length in ((0, 65536), (1, 65528), (7, 1024), (64, 8), (3, 2040)):
        runs = run(data.ctypes.data + start, length)
        assert pages.checksum(runs, 1).tolist() == reference.checksum(runs, 1).tolist()


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("length", GOLDEN)
def test_checksum_is_the_documented_function(kernels: ModuleType, length: int) -> None:
    """The definition is part of the wire protocol: these values never change."""
    data = (np.arange(max(length, 8)) % 251).astype(np.uint8)
    assert int(kernels.checksum(run(data.ctypes.data, length), 1)[0]) == GOLDEN[length]


def fragment(buffer: Bytes, lengths: list[int], order: list[int], gap: int, first: int) -> Runs:
    """Runs of ``lengths`` in ``buffer``, laid out in memory in ``order`` with ``gap`` bytes between, from ``first``."""
    offsets, at = {}, first
    for index in order:
        offsets[index] = at
        at += lengths[index] + gap
    assert at <= buffer.size
    base = buffer.ctypes.data
    return np.array([[base + offsets[i], lengths[i]] for i in range(len(lengths))], dtype=np.uint64).reshape(-1, 2)


def cuts(total: int, points: list[int]) -> list[int]:
    """Lengths of the pieces of ``total`` bytes cut at ``points`` (words, taken modulo)."""
    places = sorted({8 * (p % (total // 8 + 1)) for p in points} | {0, total})
    return [b - a for a, b in pairwise(places)]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Bytes, Bytes, Runs, Runs, int]:
    """A filled source, an empty destination, runs of each with equal totals, and a number of blocks."""
    blocks = draw(st.integers(1, 5))
    words = draw(st.one_of(st.integers(1, 300), st.integers(300, 6000)))
    total = 8 * words * blocks
    sides = []
    for _ in range(2):
        lengths = cuts(total, draw(st.lists(st.integers(0, 1 << 20), max_size=30)))
        order = draw(st.permutations(range(len(lengths))))
        gap, first = draw(st.integers(0, 9)), draw(st.integers(GUARD, GUARD + 65))
        buffer = np.zeros(total + len(lengths) * gap + first + GUARD, dtype=np.uint8)
        sides.append((buffer, fragment(buffer, lengths, list(order), gap, first)))
    (source, src), (target, dst) = sides
    source[:] = np.random.default_rng(draw(st.integers(0, 1 << 30))).integers(0, 256, source.size, dtype=np.uint8)
    return source, target, src, dst, blocks


def stream(runs: Runs) -> bytes:
    return b"".join(bytes(reference.memory(int(a), int(n))) for a, n in runs if n)


def mask(buffer: Bytes, runs: Runs) -> npt.NDArray[np.bool_]:
    inside = np.zeros(buffer.size, dtype=bool)
    for address, nbytes in runs.tolist():
        inside[address - buffer.ctypes.data :][:nbytes] = True
    return inside


Move = Callable[[ModuleType, Runs, Runs, int], npt.NDArray[np.uint64]]
MOVES: dict[str, Move] = {
    "copy": lambda kernels, src, dst, blocks: kernels.copy_runs(src, dst, blocks),
    "remote": lambda kernels, src, dst, blocks: kernels.read_remote(os.getpid(), src, dst, blocks),
    "mapped": lambda kernels, src, dst, blocks: kernels.read_mapped(src, dst, blocks),
}


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("move", MOVES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layout=layouts(), fused=st.booleans())
def test_moves_place_the_stream_and_touch_nothing_else(
    kernels: ModuleType, move: str, layout: tuple[Bytes, Bytes, Runs, Runs, int], fused: bool
) -> None:
    """Any fragmentation, alignment and length: the bytes arrive, none beside the runs changes, and checksums (C and
    numpy, fused and not) agree on both sides."""
    _, target, src, dst, blocks = layout
    target[:] = 0xA5
    before = stream(src)
    sums = MOVES[move](kernels, src, dst, blocks if fused else 0)
    assert stream(dst) == before == stream(src)
    assert (target[~mask(target, dst)] == 0xA5).all()
    expected = reference.checksum(src, blocks)
    assert sums.tolist() == (expected.tolist() if fused else [])
    assert pages.checksum(dst, blocks).tolist() == expected.tolist()


@pytest.mark.parametrize("kernels", BOTH)
@settings(max_examples=30, deadline=None)
@given(layout=layouts())
def test_gather_and_scatter_are_inverse(kernels: ModuleType, layout: tuple[Bytes, Bytes, Runs, Runs, int]) -> None:
    _, _, src, dst, blocks = layout
    staging = np.zeros(stream_bytes(src), dtype=np.uint8)
    sent = kernels.gather(src, staging.ctypes.data, blocks)
    assert bytes(staging) == stream(src)
    placed = kernels.scatter(staging.ctypes.data, dst, blocks)
    assert stream(dst) == stream(src)
    assert sent.tolist() == placed.tolist() == reference.checksum(src, blocks).tolist()


def test_long_lists_cross_the_iovec_limit() -> None:
    """More than IOV_MAX runs on both sides, cut differently, and more bytes than one chunk."""
    source = np.random.default_rng(1).integers(0, 256, 6 << 20, dtype=np.uint8)
    target = np.zeros_like(source)
    order = np.random.default_rng(2).permutation(3000)
    src = fragment(source, [1536] * 3000, order.tolist(), 8, 0)
    dst = fragment(target, [2048] * 2250, list(range(2250)), 16, 3)
    for blocks in (0, 10):
        target[:] = 0
        sums = pages.read_remote(os.getpid(), src, dst, blocks)
        assert stream(dst) == stream(src)
        assert sums.tolist() == reference.checksum(src, blocks).tolist()


@pytest.mark.parametrize("threads", [2, 3, 8, 99])
def test_threads_divide_a_stream_without_a_seam(threads: int) -> None:
    """Whatever the number of threads, blocks and bytes over: the same bytes and checksums."""
    total = (6 << 20) + 8 * 77 * 12
    source = np.random.default_rng(1).integers(0, 256, 8 << 20, dtype=np.uint8)
    lengths = cuts(total, [1000 * i * i for i in range(700)])
    src = fragment(source, lengths, list(range(len(lengths))), 3, 1)
    for blocks in (0, 1, 2, 12):
        target = np.zeros(total + 2 * GUARD, dtype=np.uint8)
        sums = pages.read_remote(os.getpid(), src, run(target.ctypes.data + GUARD, total), blocks, threads=threads)
        assert target[GUARD:-GUARD].tobytes() == stream(src)
        assert not target[:GUARD].any()
        assert not target[-GUARD:].any()
        assert sums.tolist() == reference.checksum(src, blocks).tolist()


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize(
    ("lengths", "first"),
    [([32768] * 40, 0), ([4096] * 300, 64), ([1032, 8, 65528] * 20, 0), ([16384, 17 << 10, 36864 + 512] * 20, 0)],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_streams_go_round_the_cache_whole(lengths: list[int], first: int, threads: int) -> None:
    """Large mapped streams take streaming stores where the destination is aligned, in each instruction set: stripes
    that a block's or a run's end cuts, runs that begin within one, any block length, stripes that go side by side and
    those left over."""
    total = sum(lengths)
    source = np.random.default_rng(1).integers(0, 256, total + 5000, dtype=np.uint8)
    src = fragment(source, lengths[::-1], np.random.default_rng(2).permutation(len(lengths)).tolist(), 3, 5)
    memory = np.zeros(total + 4 * GUARD + len(lengths) * GUARD, dtype=np.uint8)
    target = memory[-memory.ctypes.data % GUARD :]
    dst = fragment(target, lengths, np.random.default_rng(3).permutation(len(lengths)).tolist(), GUARD, GUARD + first)
    for blocks in (0, 1, 2, 20):
        target[:] = 0xA5
        sums = pages.read_mapped(src, dst, blocks, threads=threads)
        assert stream(dst) == stream(src)
        assert (target[~mask(target, dst)] == 0xA5).all()
        assert sums.tolist() == reference.checksum(src, blocks).tolist()


READS: dict[str, Callable[..., object]] = {
    "remote": lambda kernels, src, dst, ticket: kernels.read_remote(os.getpid(), src, dst, ticket=ticket),
    "mapped": lambda kernels, src, dst, ticket: kernels.read_mapped(src, dst, ticket=ticket),
}


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("read", READS)
def test_a_ticket_must_hold_before_and_after(kernels: ModuleType, read: str) -> None:
    """Nothing is read for a ticket that is void; one that is torn up while pages are read voids them."""
    data, target = block(), np.zeros(8192, dtype=np.uint8)
    words = np.array([77], dtype=np.uint64)
    source, into = run(data.ctypes.data, 8192), run(target.ctypes.data, 8192)
    READS[read](kernels, source, into, (words.ctypes.data, 77))
    assert (target == data).all()
    target[:] = 0
    for ticket in ((words.ctypes.data, 78), *([(4096, 77)] if read == "remote" else [])):
        with pytest.raises(OSError) as caught:
            READS[read](kernels, source, into, ticket)
        assert caught.value.errno == errno.ESTALE
        assert not target.any()
    # The copy itself tears up the ticket: its word lies within the destination.
    target.view(np.uint64)[5] = 77
    with pytest.raises(OSError) as caught:
        READS[read](kernels, source, into, (target.ctypes.data + 40, 77))
    assert caught.value.errno == errno.ESTALE


def test_a_ticket_that_ends_in_an_unmapped_page_is_void() -> None:
    """Half of it can be read: that is no error of the system call, and no word that holds."""
    target, page = np.zeros(8192, dtype=np.uint8), mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    at = libc.mmap(None, 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert libc.munmap(at + page, page) == 0
    try:
        data = block()
        with pytest.raises(OSError) as caught:
            pages.read_remote(
                os.getpid(), run(data.ctypes.data, 8192), run(target.ctypes.data, 8192), ticket=(at + page - 4, 77)
            )
        assert caught.value.errno == errno.ESTALE
        assert not target.any()
    finally:
        libc.munmap(at, page)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 130), st.integers(0, 25)), max_size=8),
)
def test_translation_moves_what_lies_within_a_span(sizes: list[int], wanted: list[tuple[int, int]]) -> None:
    """C and numpy agree with the definition, whatever a peer claims; a length that wraps around is outside."""
    spans, at = [], 3
    for number, size in enumerate(sizes):
        spans.append((at, at + size, (1 << 64) - 1 - number if number % 2 else 1000 * number))
        at += size + number % 3
    table = np.array(spans, dtype=np.uint64)
    for lengths in (wanted, [*wanted, (4, (1 << 64) - 2)]):
        runs = np.array(lengths, dtype=np.uint64).reshape(-1, 2)
        homes = [max((s for s in spans if s[0] <= a), default=None) for a, _ in lengths]
        inside = all(s is not None and a + n <= s[1] for (a, n), s in zip(lengths, homes, strict=True))
        expected = (
            [[(a + s[2]) % (1 << 64), n] for (a, n), s in zip(lengths, homes, strict=True) if s] if inside else None
        )
        for kernels in (pages, reference):
            found = kernels.translate(runs, table)
            assert (found.tolist() if found is not None else None) == expected


# -- what a checksum must find --------------------------------------------------------------------------------------


def block(nbytes: int = 8192) -> Bytes:
    return np.random.default_rng(3).integers(0, 256, nbytes, dtype=np.uint8)


def summed(data: Bytes, blocks: int = 1) -> list[int]:
    sums: list[int] = pages.checksum(run(data.ctypes.data, data.nbytes), blocks).tolist()
    return sums


@pytest.mark.parametrize("fill", ["random", "zeros", "keys"])
def test_every_single_bit_flip_is_found(fill: str) -> None:
    """Also over zeros, and over the key table itself, where one factor of every product is zero."""
    data = {
        "random": block(2056),
        "zeros": np.zeros(2056, dtype=np.uint8),
        "keys": np.resize(reference.KEYS, 257).view(np.uint8),
    }[fill].copy()
    honest = summed(data)
    for bit in range(data.size * 8):
        data[bit // 8] ^= 1 << bit % 8
        assert summed(data) != honest
        data[bit // 8] ^= 1 << bit % 8
    assert summed(data) == honest


def test_swapped_words_are_found() -> None:
    """Any two different words of a stripe, and of two stripes."""
    words = block(4096).view(np.uint64)
    honest, rng = summed(words.view(np.uint8)), np.random.default_rng(4)
    for _ in range(3000):
        i, j = rng.choice(words.size, 2, replace=False)
        words[i], words[j] = words[j], words[i]
        assert summed(words.view(np.uint8)) != honest
        words[i], words[j] = words[j], words[i]


def test_swapped_words_that_differ_in_one_bit_are_found() -> None:
    words = np.zeros(128, dtype=np.uint64)
    seen = []
    for i in range(128):
        words[:] = 0
        words[i] = 1 << 17
        seen += summed(words.view(np.uint8))
    assert len(set(seen)) == 128


def test_swapped_stripes_and_rotations_are_found() -> None:
    data = block(16 * 1024)
    honest = summed(data)
    stripes = data.reshape(16, 1024)
    for i in range(16):
        for j in range(i):
            moved = stripes.copy()
            moved[[i, j]] = moved[[j, i]]
            assert summed(moved.reshape(-1)) != honest
    for shift in (8, 1024, 4096):
        assert summed(np.roll(data, shift)) != honest


def test_swapped_blocks_are_found() -> None:
    data = block(8 * 2048).reshape(8, 2048)
    honest = summed(data, 8)
    assert len(set(honest)) == 8
    data[[2, 5]] = data[[5, 2]]
    assert [i for i, pair in enumerate(zip(summed(data, 8), honest, strict=True)) if pair[0] != pair[1]] == [2, 5]


def test_zeroed_ranges_are_found() -> None:
    """A page that was never written, and any aligned range of a block."""
    data = block()
    honest = summed(data)
    for length in (8, 64, 512, 1024, 4096, 8192):
        for start in range(0, data.size - length + 1, max(length, 512)):
            lost = data.copy()
            lost[start : start + length] = 0
            assert summed(lost) != honest


def test_truncated_and_extended_blocks_are_found() -> None:
    """Also where all that is lost or added is zeros."""
    data = np.zeros(8192, dtype=np.uint8)
    data[:100] = 1
    seen = [summed(data[:length])[0] for length in range(104, 8193, 8)]
    assert len(set(seen)) == len(seen)


def test_stale_pages_are_found() -> None:
    """One page of a block holds the right bytes of another request."""
    data, stale = block(64 << 10), block(64 << 10)[::-1].copy()
    honest = summed(data)
    for page in range(0, data.size, 4096):
        mixed = data.copy()
        mixed[page : page + 4096] = stale[page : page + 4096]
        assert summed(mixed) != honest


# -- bounds and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", BOTH)
def test_streams_of_different_lengths_are_refused_untouched(kernels: ModuleType) -> None:
    source, target = block(), np.zeros(8192, dtype=np.uint8)
    src = run(source.ctypes.data, 8192)
    for length in (0, 8, 8184):
        with pytest.raises(ValueError, match="8192 bytes long"):
            kernels.copy_runs(src, run(target.ctypes.data, length))
        with pytest.raises(ValueError, match="8192 bytes long"):
            kernels.read_remote(os.getpid(), src, run(target.ctypes.data, length))
    assert not target.any()


@pytest.mark.parametrize("kernels", BOTH)
def test_blocks_that_do_not_divide_the_stream_are_refused(kernels: ModuleType) -> None:
    data = block()
    for blocks in (3, 2048, -1):
        with pytest.raises(ValueError, match="blocks"):
            kernels.checksum(run(data.ctypes.data, 8192), blocks)


@pytest.mark.parametrize("kernels", BOTH)
def test_lengths_that_would_overflow_are_refused(kernels: ModuleType) -> None:
    """Two lengths that add up to the right total modulo 2**64 come from a liar."""
    data = block()
    lie = np.array([[data.ctypes.data, 1 << 63], [data.ctypes.data, (1 << 63) + 8192]], dtype=np.uint64)
    with pytest.raises(ValueError, match="longer than"):
        kernels.copy_runs(lie, run(data.ctypes.data, 8192))
    with pytest.raises(ValueError, match="uint64"):
        kernels.checksum(np.zeros((2, 2)), 1)


@pytest.mark.parametrize("kernels", BOTH)
def test_unmapped_remote_pages_raise_efault(kernels: ModuleType) -> None:
    """A partial read goes on until the hole, then says so; it does not loop and does not pretend."""
    area = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    whole = np.frombuffer(area, dtype=np.uint8)
    address = whole.ctypes.data
    hole = run(1 << 12, mmap.PAGESIZE)
    remote = np.concatenate([run(address, mmap.PAGESIZE), hole])
    target = np.zeros(2 * mmap.PAGESIZE, dtype=np.uint8)
    with pytest.raises(OSError) as caught:
        kernels.read_remote(os.getpid(), remote, run(target.ctypes.data, target.nbytes), 2)
    assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize("kernels", BOTH)
def test_a_process_that_is_gone_raises_esrch(kernels: ModuleType) -> None:
    data = block()
    with pytest.raises(OSError) as caught:
        kernels.read_remote((1 << 22) + 1, run(data.ctypes.data, 8), run(data.ctypes.data + 8, 8))
    assert caught.value.errno == errno.ESRCH


@pytest.mark.parametrize("kernels", BOTH)
def test_empty_streams_move_nothing(kernels: ModuleType) -> None:
    nothing = np.empty((0, 2), dtype=np.uint64)
    assert kernels.copy_runs(nothing, nothing).tolist() == []
    assert kernels.checksum(nothing, 2).tolist() == [GOLDEN[0]] * 2


# -- lists of runs --------------------------------------------------------------------------------------------------


def test_merging_joins_neighbours_only() -> None:
    runs = np.array([[0, 8], [8, 8], [32, 8], [40, 0], [40, 16], [0, 8]], dtype=np.uint64)
    assert merge_runs(runs).tolist() == [[0, 16], [32, 24], [0, 8]]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    points=st.lists(st.integers(0, 1000), max_size=10),
)
def test_cut_pieces_make_up_the_stream(lengths: list[int], points: list[int]) -> None:
    total = sum(lengths)
    runs = np.array([[1000 * i, n] for i, n in enumerate(lengths)], dtype=np.uint64)
    bounds = sorted({0, total, *(p % total for p in points)})
    flat = [address + i for address, n in runs.tolist() for i in range(n)]
    pieces = cut_runs(runs, bounds)
    assert len(pieces) == len(bounds) - 1
    for piece, low, high in zip(pieces, bounds, bounds[1:], strict=False):
        assert [address + i for address, n in piece.tolist() for i in range(n)] == flat[low:high]
