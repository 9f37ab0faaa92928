"""The page kernels on a real GPU, against the numpy reference. ``-k quick`` is the part for compute-sanitizer.

Needs numpy, cupy, pytest and hypothesis; the rest of the package is not imported.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdtransport.kernels import gpu, pieces, reference
from pdtransport.kernels.runs import Runs, layout_runs, run
from tests.unit.run_layouts import Bytes, Layout, laid_out, layouts, outside, placed, stream
from tests.unit.test_kernels import GOLDEN

pytestmark = pytest.mark.gpu
WAIT_MS = 20_000
CHILD_S = 120
KINDS = ("device", "pinned")
EXAMPLES = pytest.mark.parametrize("examples", [pytest.param(12, id="quick"), pytest.param(150, id="full")])


@pytest.fixture
def errors_welcome(cupy: Any) -> None:
    """For tests that provoke CUDA errors: compute-sanitizer would report them."""
    if "libsanitizer-" in Path("/proc/self/maps").read_text(encoding="utf-8"):
        pytest.skip("provokes CUDA errors, which compute-sanitizer reports")


class Buffer:
    """Memory of its own allocation, so that compute-sanitizer sees where it ends."""

    def __init__(self, cupy: Any, kind: str, data: Bytes) -> None:
        self.nbytes, self._cupy, self._array = data.nbytes, cupy, None
        if kind == "pinned":
            self._array = gpu.pinned(data.nbytes)
            self.address = self._array.ctypes.data
        else:
            cupy.cuda.Device(0).use()
            self.address = int(cupy.cuda.runtime.malloc(data.nbytes))
        gpu.from_host(self.address, data)

    def read(self) -> Bytes:
        return np.frombuffer(gpu.to_host(self.address, self.nbytes), dtype=np.uint8)

    def free(self) -> None:
        if self._array is None:
            self._cupy.cuda.runtime.free(self.address)


@contextmanager
def buffers(cupy: Any, *wanted: tuple[str, Bytes]) -> Iterator[list[Buffer]]:
    with ExitStack() as stack:
        made = []
        for kind, data in wanted:
            made.append(Buffer(cupy, kind, data))
            stack.callback(made[-1].free)
        yield made


def filled(nbytes: int, seed: int = 7) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def check(cupy: Any, pages: gpu.GpuPages, layout: Layout, kinds: tuple[str, str] = ("device", "device")) -> None:
    source, before = filled(layout.src_bytes), filled(layout.dst_bytes, 8)
    expected = reference.checksum(placed(layout.src, source.ctypes.data), layout.blocks).tolist()
    for blocks in (0, layout.blocks):
        with buffers(cupy, (kinds[0], source), (kinds[1], before)) as (a, b):
            src, dst = placed(layout.src, a.address), placed(layout.dst, b.address)
            copied = pages.copy_runs(src, dst, blocks)
            summed = pages.checksum(dst, layout.blocks)
            assert copied.wait().tolist() == (expected if blocks else [])
            assert summed.wait().tolist() == expected
            target = b.read()
        assert stream(target, layout.dst) == stream(source, layout.src)
        assert (outside(target, layout.dst) == outside(before, layout.dst)).all()


@EXAMPLES
def test_any_layout_is_copied_and_summed(cupy: Any, pages: gpu.GpuPages, examples: int) -> None:
    """Any fragmentation and alignment to words, device and host memory on either side: the bytes arrive, none beside
    the runs changes, and checksums, fused and alone, are the reference's."""

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(layout=layouts(), kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)))
    def property_holds(layout: Layout, kinds: tuple[str, str]) -> None:
        check(cupy, pages, layout, kinds)

    property_holds()


@EXAMPLES
def test_large_layouts(cupy: Any, pages: gpu.GpuPages, examples: int) -> None:
    """More tiles than warps: every warp takes several turns."""

    @settings(max_examples=-(-examples // 12), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        page=st.sampled_from([256, 1024, 4096, 5120, 16384, 40 << 10, 128 << 10]),
        mib=st.integers(1, 6 if examples < 100 else 80),
        gap=st.sampled_from([0, 8, 16, 1024]),
        blocks=st.integers(1, 7),
        seed=st.integers(0, 99),
    )
    def property_holds(page: int, mib: int, gap: int, blocks: int, seed: int) -> None:
        count = max(1, min(mib << 20, page * 20_000) // page // blocks) * blocks
        rng = np.random.default_rng(seed)
        src, src_bytes = laid_out([page] * count, rng.permutation(count).tolist(), gap, 0)
        dst, dst_bytes = laid_out([page * count // blocks] * blocks, rng.permutation(blocks).tolist(), gap, 16)
        check(cupy, pages, Layout(src, dst, src_bytes, dst_bytes, blocks))

    property_holds()


@pytest.mark.parametrize("length", GOLDEN)
def test_quick_checksum_is_the_documented_function(cupy: Any, pages: gpu.GpuPages, length: int) -> None:
    """The GPU's checksum is the wire protocol's."""
    with buffers(cupy, ("device", (np.arange(max(length, 8)) % 251).astype(np.uint8))) as (data,):
        assert int(pages.checksum(run(data.address, length), 1).wait()[0]) == GOLDEN[length]


@pytest.mark.parametrize("equal", [0, pieces.EQUAL_PIECES])
def test_quick_long_tables_go_in_parts(
    cupy: Any, pages: gpu.GpuPages, monkeypatch: pytest.MonkeyPatch, equal: int
) -> None:
    """More pieces than one table holds, and more tables than the ring holds, looked up either way."""
    monkeypatch.setattr(pieces, "EQUAL_PIECES", equal)
    count = 400_000
    order = np.random.default_rng(2).permutation(count)
    data = filled(16 * count)
    with buffers(cupy, ("device", data), ("device", np.zeros(8 * count, dtype=np.uint8))) as (a, b):
        src = np.stack([a.address + 16 * order, np.full(count, 8)], axis=1).astype(np.uint64)
        for blocks in (0, 1000):
            sums = pages.copy_runs(src, run(b.address, 8 * count), blocks).wait()
            found = b.read()
            assert (found.view(np.uint64) == data.view(np.uint64)[2 * order]).all()
            assert sums.tolist() == reference.checksum(run(found.ctypes.data, 8 * count), blocks).tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
@pytest.mark.parametrize(("tokens", "heads", "channels"), [(16, 8, 128), (32, 3, 72), (64, 1, 576)])
def test_quick_orders_and_head_slices(
    cupy: Any, pages: gpu.GpuPages, dtype: Any, tokens: int, heads: int, channels: int
) -> None:
    """Pages of strided KV tensors go from NHC to HNC, all heads or a slice, as numpy's transpose says."""
    cache = np.random.default_rng(1).integers(0, 200, (2, 9, tokens, heads, channels)).astype(dtype)
    row, keys = channels * cache.itemsize, cache[1]  # of two stacked tensors the second
    chosen = [7, 0, 3, 8, 2]
    with buffers(
        cupy, ("device", cache.view(np.uint8).reshape(-1)), ("device", np.zeros_like(keys).view(np.uint8))
    ) as (
        a,
        b,
    ):
        nhc = a.address + cache.strides[0] + np.array(chosen) * cache.strides[1]
        hnc = b.address + np.arange(5) * cache.strides[1]
        for first, count in {(0, heads), (heads // 2, heads - heads // 2)}:
            src = layout_runs(nhc, "NHC", tokens, heads, row, first=first, count=count)
            dst = layout_runs(hnc, "HNC", tokens, heads, row, first=first, count=count)
            sums = pages.copy_runs(src, dst, 5).wait().tolist()
            found = b.read().view(dtype).reshape(9, heads, tokens, channels)[:5, first : first + count]
            assert (found == keys[chosen, :, first : first + count].transpose(0, 2, 1, 3)).all()
            assert sums == pages.checksum(src, 5).wait().tolist() == pages.checksum(dst, 5).wait().tolist()


def test_quick_launches_run_in_order(cupy: Any, pages: gpu.GpuPages) -> None:
    """Hundreds under way: each sees what those before it wrote; the rings are used again and again."""
    nbytes = 64 << 10
    data = filled(nbytes)
    expected = reference.checksum(run(data.ctypes.data, nbytes), 8).tolist()
    with buffers(cupy, *[("device", data)] + [("device", np.zeros(nbytes, dtype=np.uint8))] * 2) as (a, b, c):
        order = np.random.default_rng(3).permutation(nbytes // 16)
        shuffled = np.stack([b.address + 16 * order, np.full(order.size, 16)], axis=1).astype(np.uint64)
        launches = []
        for _ in range(300):
            pages.copy_runs(run(a.address, nbytes), shuffled)
            pages.copy_runs(shuffled, run(c.address, nbytes))
            launches.append(pages.copy_runs(run(c.address, nbytes), run(a.address, nbytes), 8))
        assert all(launch.wait().tolist() == expected for launch in launches)
        assert all(launch.done() and launch.seconds > 0 for launch in launches)
        assert (c.read() == data).all()


def test_quick_a_copy_by_few_blocks_of_threads_is_the_same(cupy: Any, pages: gpu.GpuPages) -> None:
    nbytes = 3 << 20
    data = filled(nbytes)
    expected = reference.checksum(run(data.ctypes.data, nbytes), 6).tolist()
    order = np.random.default_rng(4).permutation(nbytes // 4096)
    for most in (1, 32, 0):
        with buffers(cupy, ("device", data), ("device", np.zeros(nbytes, dtype=np.uint8))) as (a, b):
            src = np.stack([a.address + 4096 * order, np.full(order.size, 4096)], axis=1).astype(np.uint64)
            plan = pages.plan(src, run(b.address, nbytes), 0)
            assert pages.start(plan, 0, most).wait().tolist() == []
            assert (b.read().reshape(-1, 4096) == data.reshape(-1, 4096)[order]).all()
            plan = pages.plan(run(a.address, nbytes), run(b.address, nbytes), 6)
            assert pages.start(plan, 6, most).wait().tolist() == expected


def test_quick_a_launch_waits_for_an_event(cupy: Any, pages: gpu.GpuPages) -> None:
    """Pages that another stream still computes are not read before the event behind it; and the other way round."""
    stream_of_model = cupy.cuda.Stream(non_blocking=True)
    nbytes = 64 << 20
    with buffers(cupy, *[("device", np.zeros(nbytes, dtype=np.uint8))] * 2) as (a, b):
        event = cupy.cuda.Event()
        for value in range(1, 6):
            for _ in range(20):
                cupy.cuda.runtime.memsetAsync(a.address, value, nbytes, stream_of_model.ptr)
            event.record(stream_of_model)
            pages.after(event.ptr)
            launch = pages.copy_runs(run(a.address, nbytes), run(b.address, nbytes))
            pages.record(event.ptr)
            stream_of_model.wait_event(event)  # the next memset may not overtake the copy
            assert launch.wait().tolist() == []
            assert set(gpu.to_host(b.address, 4096) + gpu.to_host(b.address + nbytes - 4096, 4096)) == {value}


@pytest.mark.parametrize("c", [True, False], ids=["c", "python"])
def test_quick_the_eventfd_is_rung(cupy: Any, monkeypatch: pytest.MonkeyPatch, c: bool) -> None:
    """Who polls the eventfd learns of every launch's end, and finds it ended."""
    if c and not gpu.bell():
        pytest.skip("the C extension is not built here")
    if not c:
        monkeypatch.setattr(gpu, "bell", lambda: 0)
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    pages = gpu.GpuPages(0, wake_fd=eventfd)
    poll = select.poll()
    poll.register(eventfd, select.POLLIN)
    try:
        with buffers(cupy, ("device", filled(1 << 20)), ("device", filled(1 << 20))) as (a, b):
            for _ in range(5):
                launch = pages.copy_runs(run(a.address, 1 << 20), run(b.address, 1 << 20), 4)
                assert poll.poll(WAIT_MS)
                assert os.eventfd_read(eventfd) == 1
                assert launch.done()
    finally:
        pages.close()
        os.close(eventfd)


def test_quick_empty_streams_move_nothing(pages: gpu.GpuPages) -> None:
    nothing: Runs = np.empty((0, 2), dtype=np.uint64)
    assert pages.copy_runs(nothing, nothing).wait().tolist() == []
    assert pages.checksum(nothing, 2).wait().tolist() == [GOLDEN[0]] * 2


def test_quick_what_does_not_fit_is_refused(pages: gpu.GpuPages) -> None:
    """Nothing is launched, and the next launch works."""
    with pytest.raises(ValueError, match="multiples of 8"):
        pages.copy_runs(run(4096, 12), run(8192, 12))
    with pytest.raises(ValueError, match="8 bytes long"):
        pages.copy_runs(run(4096, 8), run(8192, 16))
    nothing: Runs = np.empty((0, 2), dtype=np.uint64)
    assert pages.checksum(nothing, 1).wait().tolist() == [GOLDEN[0]]


def test_quick_a_closed_one_says_so(cupy: Any) -> None:
    """Closing waits for what is under way, may be repeated, and leaves results readable."""
    pages = gpu.GpuPages(0, priority=False)
    with buffers(cupy, ("device", filled(1 << 20))) as (data,):
        launch = pages.checksum(run(data.address, 1 << 20), 2)
        pages.close()
        pages.close()
        assert launch.done()
        assert launch.wait().tolist() == reference.checksum(run(filled(1 << 20).ctypes.data, 1 << 20), 2).tolist()
        with pytest.raises(gpu.GpuError, match="closed"):
            pages.checksum(run(data.address, 8), 1)


def test_memory_and_devices(cupy: Any) -> None:
    """Allocations are found from any address within; pinned memory is zeroed and writable; a device is named."""
    with buffers(cupy, ("device", filled(3 << 20))) as (data,):
        assert gpu.allocation_of(data.address + 12345) == (data.address, 3 << 20)
        assert gpu.device_of(data.address) == 0
    array = gpu.pinned(5000)
    assert not array.any()
    assert array.flags.writeable
    with pytest.raises(gpu.GpuError, match="device memory"):
        gpu.allocation_of(array.ctypes.data)
    assert gpu.device_uuid(0).startswith("GPU-")
    assert len(gpu.device_uuid(0)) == 40
    assert gpu.can_access(0, 0)


@pytest.mark.usefixtures("errors_welcome")
def test_a_device_that_is_not_there_is_named(cupy: Any) -> None:
    for use in (lambda: gpu.device_uuid(99), lambda: gpu.GpuPages(99), lambda: gpu.can_access(0, 99)):
        with pytest.raises(gpu.GpuError, match="GPU 99"):
            use()


PEER = """
import sys
from pdtransport.kernels import gpu
from pdtransport.kernels.runs import run
address = gpu.ipc_open(bytes.fromhex(sys.argv[1]), 0)
pages, nbytes = gpu.GpuPages(0), int(sys.argv[2])
before = pages.checksum(run(address, nbytes), 4).wait().tolist()
pages.copy_runs(run(address, nbytes // 2), run(address + nbytes // 2, nbytes // 2)).wait()
pages.close()
gpu.ipc_close(address, 0)
print(*before)
"""

FAULT = """
from pdtransport.kernels import gpu
from pdtransport.kernels.runs import run
pages = gpu.GpuPages(0)
wild = run(1 << 30, 4096)
for use in (lambda: pages.checksum(wild, 1).wait(), lambda: pages.checksum(wild, 1), lambda: pages.after(1)):
    try:
        use()
    except gpu.GpuError as error:
        print(error)
pages.close()
"""


def child(code: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=CHILD_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_another_process_works_on_our_memory(cupy: Any) -> None:
    """A peer that maps our allocation sums and copies pages in it."""
    data = filled(4 << 20)
    with buffers(cupy, ("device", data)) as (ours,):
        [line] = child(PEER, gpu.ipc_handle(ours.address).hex(), str(data.nbytes))
        assert [int(word) for word in line.split()] == reference.checksum(
            run(data.ctypes.data, data.nbytes), 4
        ).tolist()
        found = ours.read()
    assert (found.reshape(2, -1) == data[: data.nbytes // 2]).all()


@pytest.mark.usefixtures("errors_welcome")
def test_what_cannot_be_mapped_says_why(cupy: Any) -> None:
    """Our own handle, one that is none, and memory that was not made by cudaMalloc."""
    with buffers(cupy, ("device", filled(4096))) as (data,):
        handle = gpu.ipc_handle(data.address)
        with pytest.raises(gpu.GpuError, match="different processes"):
            gpu.ipc_open(handle, 0)
    with pytest.raises(ValueError, match="64 bytes"):
        gpu.ipc_open(b"short", 0)
    runtime = cupy.cuda.runtime
    pooled = runtime.mallocAsync(1 << 20, runtime.streamLegacy)
    try:
        with pytest.raises(gpu.GpuError, match="expandable_segments"):
            gpu.ipc_handle(pooled)
    finally:
        runtime.freeAsync(pooled, runtime.streamLegacy)
    with pytest.raises(gpu.GpuError):
        gpu.ipc_close(0x1000, 0)


@pytest.mark.usefixtures("errors_welcome")
def test_a_bad_address_is_an_error_now_and_later(cupy: Any) -> None:
    """A fault is reported by the launch that met it, and by every use after it; closing still works. In a process of
    its own, whose CUDA is lost."""
    first, *later = child(FAULT)
    assert "waiting for a launch: cudaErrorIllegalAddress" in first
    assert len(later) == 2
    assert all("can't be used: earlier, waiting for a launch: cudaErrorIllegalAddress" in line for line in later)
