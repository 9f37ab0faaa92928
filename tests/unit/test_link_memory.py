"""What links may touch, and the rings that bound what they hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pdtransport.errors import LinkError
from pdtransport.kv.geometry import Region
from pdtransport.links.host import start_ticks
from pdtransport.links.memory import Regions, SlotRing

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), max_size=6)


@given(spans, st.integers(1, 40))
@example([(10, 40), (20, 5)], 1)
@example([(10, 10), (20, 10)], 15)
def test_runs_are_allowed_exactly_where_memory_is_registered(regions: list[tuple[int, int]], length: int) -> None:
    """Nested, overlapping, touching and empty regions; a run may cross from one into the next without a gap."""
    known = {byte for low, nbytes in regions for byte in range(low, low + nbytes)}
    registry = Regions(Region(low, nbytes) for low, nbytes in regions)
    for start in range(100):
        run = np.array([[start, length]], dtype=np.uint64)
        if set(range(start, start + length)) <= known:
            registry.check(run)
        else:
            with pytest.raises(LinkError, match="outside the registered memory"):
                registry.check(run)


def test_a_run_that_wraps_around_is_refused() -> None:
    registry = Regions([Region(4096, 4096)])
    with pytest.raises(LinkError):
        registry.check(np.array([[4096, 2**64 - 8]], dtype=np.uint64))


def test_regions_come_and_go() -> None:
    registry, scratch = Regions(), Region(4096, 8)
    run = np.array([[4096, 8]], dtype=np.uint64)
    with pytest.raises(LinkError):
        registry.check(run)
    registry.add(scratch)
    registry.check(run)
    registry.remove(Region(4096, 8))  # another one that looks the same
    registry.check(run)
    registry.remove(scratch)
    with pytest.raises(LinkError):
        registry.check(run)


def test_a_ring_hands_out_no_slot_twice() -> None:
    """Slots do not overlap, at least two exist, and giving one back twice is a bug that shows."""
    ring = SlotRing(10_000, 5_000)
    assert (ring.count, ring.slot_bytes) == (2, 8192)
    first, second = ring.take(), ring.take()
    assert ring.free == 0
    with pytest.raises(IndexError):
        ring.take()
    ring.view(first, 8192)[:] = 1
    ring.view(second, 8192)[:] = 2
    assert (ring.view(first, 8192) == 1).all()
    assert ring.view(first, 1).ctypes.data % 4096 == 0
    ring.give_back(first)
    with pytest.raises(ValueError, match="twice"):
        ring.give_back(first)
    with pytest.raises(ValueError, match="do not fit"):
        ring.view(second, 8193)


def test_a_process_name_may_hold_anything() -> None:
    """Its start time is found behind the last parenthesis."""
    tail = b" S 1 " + b" ".join(str(n).encode() for n in range(5, 60))
    assert start_ticks(b"12 (a) b (c) R)" + tail) == 22
