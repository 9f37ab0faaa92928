"""Run lists on the wire."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdtransport.kernels.runs import MAX_RUNS
from pdtransport.links.packed import pack, unpack


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from([8, 8, 8, 16, 24])),
        max_size=60,
    )
)
def test_a_list_survives_packing(parts: list[tuple[int, int]]) -> None:
    """Whatever the addresses and lengths, the receiver reads the list that the sender wrote."""
    runs = np.array([[4096 + 64 * place, nbytes] for place, nbytes in parts], dtype=np.uint64).reshape(-1, 2)
    again = unpack(pack(runs), int(runs[:, 1].sum()))
    assert again.dtype == np.uint64
    np.testing.assert_array_equal(again, runs)


def test_strides_that_go_down_survive() -> None:
    """A pool whose pages were handed out downwards is no special case."""
    runs = np.array([[4096 - 8 * i, 8] for i in range(10)], dtype=np.uint64)
    np.testing.assert_array_equal(unpack(pack(runs), 80), runs)


def test_layers_of_shuffled_pages_take_one_entry_a_block() -> None:
    """A batch of many layers must fit a control message: 64 blocks of 32 layers are at most 28 bytes a block."""
    pages = np.random.default_rng(0).permutation(1000)[:64].astype(np.uint64)
    layers = np.arange(32, dtype=np.uint64) * np.uint64(1 << 30)
    addresses = (layers[None, :] + pages[:, None] * np.uint64(32768)).reshape(-1)
    runs = np.stack([addresses, np.full_like(addresses, 32768)], axis=1)
    packed = pack(runs)
    np.testing.assert_array_equal(unpack(packed, 64 * 32 * 32768), runs)
    assert len(packed) <= 64 * 28


@pytest.mark.parametrize(
    "packed",
    [
        b"x",
        b"\0" * 27,
        np.array([(0, 0, 1 << 31, 1)], dtype="<u8,<i8,<u4,<u8").tobytes(),
        np.array([(0, 0, 2, 1 << 60)], dtype="<u8,<i8,<u4,<u8").tobytes(),
        np.array([(0, 0, 2, 8)], dtype="<u8,<i8,<u4,<u8").tobytes(),
    ],
)
def test_what_is_no_list_of_that_length_is_refused(packed: bytes) -> None:
    """A peer's claim costs no memory beyond what the batch's length allows."""
    with pytest.raises(ValueError):
        unpack(packed, 64)
    assert MAX_RUNS < 1 << 31
