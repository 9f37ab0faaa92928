"""Where KV lies: the stream of a slice is the same on every worker, and heads are split without loss or overlap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdtransport.kernels import pages
from pdtransport.kernels.runs import stream_bytes
from pdtransport.kv.geometry import KVGeometry, LayerPages, consumers_of, head_range, head_sources

LAYERS, BLOCKS, TOKENS, SLOT = 3, 7, 4, 16


def kv(heads: int, seed: int = 0) -> np.ndarray:
    """[layers, blocks, heads, tokens, slot bytes]"""
    shape = (LAYERS, BLOCKS, heads, TOKENS, SLOT)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tokens_outermost(array: np.ndarray, head_lo: int, total: int) -> tuple[np.ndarray, KVGeometry]:
    """The same KV with pages of [tokens, heads, slot]."""
    laid = np.ascontiguousarray(array.transpose(0, 1, 3, 2, 4))
    heads = array.shape[2]
    stride = laid.strides[1]
    layers = tuple(LayerPages(f"l{i}", laid.ctypes.data + i * laid.strides[0], stride) for i in range(LAYERS))
    geometry = KVGeometry(layers, BLOCKS, TOKENS, heads, head_lo, total, SLOT, heads_first=False)
    return laid, geometry


def stream(geometry: KVGeometry, ids: list[int], lo: int, hi: int) -> np.ndarray:
    runs = geometry.runs(ids, lo, hi)
    out = np.zeros(stream_bytes(runs), dtype=np.uint8)
    pages.gather(runs, out.ctypes.data)
    return out


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, BLOCKS - 1), max_size=10), st.integers(0, 5), st.integers(1, 6))
def test_the_stream_is_block_then_layer_then_page(ids: list[int], lo: int, count: int) -> None:
    """Whatever the layout: [heads, tokens] and [tokens, heads] pages each give their own order, of just these heads."""
    array = kv(6)
    hi = min(6, lo + count)
    heads_first = KVGeometry.of_array(array)
    expected = [array[layer, block, lo:hi] for block in ids for layer in range(LAYERS)]
    flat = np.concatenate([page.reshape(-1) for page in expected]) if expected else np.zeros(0, dtype=np.uint8)
    assert (stream(heads_first, ids, lo, hi) == flat).all()
    laid, tokens_first = tokens_outermost(array, 0, 6)
    expected = [laid[layer, block, :, lo:hi] for block in ids for layer in range(LAYERS)]
    flat = np.concatenate([page.reshape(-1) for page in expected]) if expected else np.zeros(0, dtype=np.uint8)
    assert (stream(tokens_first, ids, lo, hi) == flat).all()
    assert flat.size == len(ids) * heads_first.block_bytes(lo, hi)


@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
@pytest.mark.parametrize(("producers", "consumers"), [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4), (4, 2)])
def test_tensor_parallel_sizes_meet(layout: str, producers: int, consumers: int) -> None:
    """Copying each slice that `head_sources` names rebuilds exactly the consumers' shards."""
    total = 4
    whole = kv(total, 1)

    def worker(rank: int, ranks: int, filled: bool) -> tuple[np.ndarray, KVGeometry]:
        lo, hi = head_range(rank, ranks, total)
        shard = np.ascontiguousarray(whole[:, :, lo:hi]) if filled else np.zeros_like(whole[:, :, lo:hi])
        if layout == "tokens first":
            return tokens_outermost(shard, lo, total)
        return shard, KVGeometry.of_array(shard, head_lo=lo, total_heads=total)

    sources = [worker(rank, producers, True) for rank in range(producers)]
    ids_there, ids_here = [3, 1, 6], [0, 5, 2]
    for rank in range(consumers):
        shard, geometry = worker(rank, consumers, False)
        for source in head_sources(geometry.head_lo, geometry.head_hi, producers, total, rank):
            there = sources[source.rank][1].runs(ids_there, source.head_lo, source.head_hi)
            pages.copy_runs(there, geometry.runs(ids_here, source.head_lo, source.head_hi))
        expected = whole[:, ids_there, geometry.head_lo : geometry.head_hi]
        found = shard[:, ids_here]
        if layout == "tokens first":
            found = found.transpose(0, 1, 3, 2, 4)
        assert (found == expected).all()
        untouched = [block for block in range(BLOCKS) if block not in ids_here]
        assert not shard[:, untouched].any()


@pytest.mark.parametrize("total", [1, 2, 4, 8])
@pytest.mark.parametrize("producers", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("consumers", [1, 2, 4, 8, 16])
def test_every_head_has_one_source_and_sources_know_their_takers(total: int, producers: int, consumers: int) -> None:
    """Also where ranks hold replicas of a head: each consumer takes each head once, and a producer counts exactly the
    consumers that will grant from it."""
    takers: dict[int, set[int]] = {rank: set() for rank in range(producers)}
    for consumer in range(consumers):
        lo, hi = head_range(consumer, consumers, total)
        taken = []
        for source in head_sources(lo, hi, producers, total, consumer):
            held = head_range(source.rank, producers, total)
            assert held[0] <= source.head_lo < source.head_hi <= held[1]
            taken += range(source.head_lo, source.head_hi)
            takers[source.rank].add(consumer)
        assert sorted(taken) == list(range(lo, hi))
    for rank in range(producers):
        assert set(consumers_of(rank, producers, consumers, total)) == takers[rank]


def test_replicas_share_the_load() -> None:
    """With more producer ranks than heads, consumers do not all take from the first replica."""
    chosen = {source.rank for me in range(4) for source in head_sources(0, 1, 4, 1, me)}
    assert chosen == {0, 1, 2, 3}


def test_pages_and_heads_not_held_are_refused() -> None:
    """A peer's word about heads, or an engine's about pages, never leads outside the cache."""
    array = kv(2)
    geometry = KVGeometry.of_array(array, head_lo=2, total_heads=4)
    for lo, hi in ((0, 2), (1, 3), (2, 5), (3, 3), (3, 2)):
        with pytest.raises(ValueError, match="not held here"):
            geometry.runs([0], lo, hi)
        with pytest.raises(ValueError, match="not held here"):
            geometry.checked_block_bytes(lo, hi)
    for ids in ([-1], [BLOCKS], [0, 1 << 40]):
        with pytest.raises(ValueError, match="page id"):
            geometry.runs(ids, 2, 4)


def test_regions_span_exactly_the_pages() -> None:
    array = kv(2)
    geometry = KVGeometry.of_array(array)
    regions = geometry.regions()
    assert regions[0].address == array.ctypes.data
    assert regions[-1].address + regions[-1].nbytes == array.ctypes.data + array.nbytes
    runs = geometry.runs(list(range(BLOCKS)), 0, 2)
    for address, nbytes in runs.tolist():
        assert any(r.address <= address and address + nbytes <= r.address + r.nbytes for r in regions)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": ()},
        {"num_blocks": 0},
        {"slot_bytes": 12},
        {"head_lo": 3, "total_heads": 4},
    ],
)
def test_impossible_geometries_are_refused(wrong: dict[str, object]) -> None:
    facts = {
        "layers": (LayerPages("l", 4096, 1024),),
        "num_blocks": 2,
        "block_size": 4,
        "heads": 2,
        "head_lo": 0,
        "total_heads": 2,
        "slot_bytes": 16,
        "heads_first": True,
    }
    with pytest.raises(ValueError):
        KVGeometry(**{**facts, **wrong})  # type: ignore[arg-type]


def test_an_array_that_is_not_dense_is_refused() -> None:
    """Its pages would be taken to lie where other bytes do: a transposed view, a slice of heads, one of every other
    page."""
    array = kv(4)
    for wrong in (array.transpose(0, 1, 3, 2, 4), array[:, :, 1:3], array[:, ::2], array[0]):
        with pytest.raises(ValueError, match=r"C-contiguous|of shape"):
            KVGeometry.of_array(wrong)
    assert KVGeometry.of_array(array[1:]).regions()[0].address == array[1].ctypes.data
