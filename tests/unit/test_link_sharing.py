"""Private memory that becomes shared in place, and the peer's half that maps it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from pdtransport.errors import LinkUnavailable
from pdtransport.kernels.runs import run
from pdtransport.links import vm
from pdtransport.links.base import Region
from pdtransport.links.mapping import PeerMemory
from pdtransport.links.memory import PAGE
from pdtransport.links.sharing import SLICE_BYTES, SharedMemory

Bytes = npt.NDArray[np.uint8]

SIZE = 2 * SLICE_BYTES + 5 * PAGE + 1000  # slices, pages and bytes over
WORDS = 8


@pytest.fixture
def area() -> Iterator[mmap.mmap]:
    """Private memory of our own, with content where it was touched: not in the second slice."""
    memory = mmap.mmap(-1, SIZE + 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = np.frombuffer(memory, dtype=np.uint8)
    random = np.random.default_rng(1)
    for low, high in ((0, SLICE_BYTES // 2), (2 * SLICE_BYTES, view.size)):
        view[low:high] = random.integers(0, 256, high - low, dtype=np.uint8)
    return memory


def region(memory: mmap.mmap, skip: int = 100, nbytes: int = SIZE) -> tuple[Region, Bytes]:
    """A region that begins within a page, and what it holds."""
    view = np.frombuffer(memory, dtype=np.uint8)[skip : skip + nbytes]
    return Region(view.ctypes.data, nbytes, view), view


def permissions(view: Bytes) -> set[str]:
    low = view.ctypes.data
    return {one.permissions for one in vm.within(vm.areas(), -(-low // PAGE) * PAGE, (low + view.size) // PAGE * PAGE)}


def mapped(shared: SharedMemory) -> PeerMemory:
    return PeerMemory(os.getpid(), [(s.address, s.nbytes, s.fd, s.offset) for s in shared.spans])


def seen(peer: PeerMemory, view: Bytes) -> bytes:
    """What the peer sees of whole pages of ours."""
    runs = peer.here(run(view.ctypes.data, view.size))
    assert runs is not None
    return ctypes.string_at(int(runs[0, 0]), view.size)


def inner(view: Bytes) -> Bytes:
    """The whole pages of it."""
    skip = -view.ctypes.data % PAGE
    return view[skip : skip + (view.size - skip) // PAGE * PAGE]


def test_content_and_addresses_stay(area: mmap.mmap) -> None:
    """In place: every byte as before, bytes beside the region too; and from then on a peer sees what is written."""
    whole = np.frombuffer(area, dtype=np.uint8)
    before = whole.tobytes()
    one, view = region(area)
    shared = SharedMemory([one], WORDS)
    assert whole.tobytes() == before
    assert permissions(view) == {"rw-s"}
    assert (shared.nbytes, shared.registered) == (inner(view).size, SIZE)
    peer = mapped(shared)
    assert seen(peer, inner(view)) == inner(view).tobytes()
    view[:] = np.random.default_rng(2).integers(0, 256, SIZE, dtype=np.uint8)
    assert seen(peer, inner(view)) == inner(view).tobytes()
    shared.own[3] = 77
    assert seen(peer, shared.own.view(np.uint8))[24] == 77
    peer.close()
    shared.close()


def test_untouched_pages_stay_unallocated(area: mmap.mmap) -> None:
    """An idle engine's memory does not grow by being shared."""
    one, view = region(area)
    shared = SharedMemory([one], WORDS)
    held = os.fstat(shared.spans[1].fd).st_blocks * 512
    assert held <= SLICE_BYTES // 2 + 6 * PAGE
    assert not view[SLICE_BYTES : SLICE_BYTES + PAGE].any()
    shared.close()


def test_closing_makes_memory_private_again(area: mmap.mmap) -> None:
    """Same content; a fork or a peer that kept its mapping has no part in it any more; descriptors are closed."""
    descriptors = len(os.listdir("/proc/self/fd"))
    one, view = region(area)
    before = view.tobytes()
    shared = SharedMemory([one], WORDS)
    peer = mapped(shared)
    shared.close()
    assert permissions(view) == {"rw-p"}
    assert view.tobytes() == before
    view[:] = 1
    assert seen(peer, inner(view)) != inner(view).tobytes()
    peer.close()
    del shared
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_memory_can_be_shared_time_and_again(area: mmap.mmap) -> None:
    """Also while another transport of the process shares it, whoever closes first."""
    one, view = region(area)
    before = view.tobytes()
    SharedMemory([one], WORDS).close()
    first = SharedMemory([one], WORDS)
    second = SharedMemory([region(area, PAGE + 7, SIZE - 2 * PAGE)[0]], WORDS)
    assert {span.fd for span in second.spans[1:]} == {span.fd for span in first.spans[1:]}
    first.close()
    assert permissions(view) == {"rw-s"}
    view[2 * PAGE] ^= 1
    peer = mapped(second)
    assert seen(peer, inner(view)) == inner(view).tobytes()
    peer.close()
    second.close()
    assert permissions(view) == {"rw-p"}
    view[2 * PAGE] ^= 1
    assert view.tobytes() == before


def test_what_was_unmapped_meanwhile_is_left_alone(area: mmap.mmap) -> None:
    """The engine freed its memory and something else took the address: closing must not touch that."""
    one, view = region(area)
    shared = SharedMemory([one], WORDS)
    address = inner(view).ctypes.data
    fd = os.memfd_create("other")
    os.ftruncate(fd, PAGE)
    os.pwrite(fd, b"other", 0)
    vm.map_file(address, PAGE, fd, 0, write=True, shared=True)
    shared.close()
    assert ctypes.string_at(address, 5) == b"other"
    assert permissions(view) == {"rw-p", "rw-s"}
    os.close(fd)


def test_nobody_else_can_write_or_shrink_it(area: mmap.mmap) -> None:
    """A bus error, or a peer that writes, is ruled out by seals."""
    shared = SharedMemory([region(area)[0]], WORDS)
    for fd in {span.fd for span in shared.spans}:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        with pytest.raises(PermissionError):
            mmap.mmap(again, PAGE)
        os.close(again)
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    shared.close()


def of_a_file() -> mmap.mmap:
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        return mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE)


def locked() -> mmap.mmap:
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    if ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(SIZE)):
        pytest.skip("may not lock memory")
    return memory


def kept_from_forks() -> mmap.mmap:
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    return memory


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (of_a_file, "memory mapped from a file"),
        (locked, "memory that is locked"),
        (kept_from_forks, "memory that is kept from forks"),
        (lambda: mmap.mmap(-1, SIZE), "memory that is shared already"),
        (lambda: mmap.mmap(-1, 32 << 10, flags=mmap.MAP_PRIVATE), "regions below 64 KiB"),
    ],
)
def test_memory_that_must_not_be_turned_is_left(make: Callable[[], mmap.mmap], why: str) -> None:
    """Others see it, pinned it or rely on where it is: it stays what it is, and the reason is named."""
    memory = make()
    view = np.frombuffer(memory, dtype=np.uint8)
    before = permissions(view)
    shared = SharedMemory([Region(view.ctypes.data, view.size, view)], WORDS)
    assert shared.left == {why: view.size - view.size % PAGE} | (
        {"parts of pages at the ends": view.size % PAGE} if view.size >= SIZE else {}
    )
    assert permissions(view) == before
    assert shared.nbytes == 0
    shared.close()


# -- the peer's half ------------------------------------------------------------------------------------------------


def test_runs_outside_the_spans_are_not_here(area: mmap.mmap) -> None:
    """Partly outside, between two spans, or wrapping around: no address is ever made up."""
    _, view = region(area, 0, 1 << 20)
    far = np.frombuffer(area, dtype=np.uint8)[(1 << 20) + PAGE :][: 1 << 20]
    shared = SharedMemory([Region(part.ctypes.data, part.size, part) for part in (view, far)], WORDS)
    peer, low = mapped(shared), view.ctypes.data
    assert peer.here(run(low, 1 << 20)) is not None
    assert peer.here(np.array([[low + 5, 7], [far.ctypes.data, 1 << 20]], dtype=np.uint64)) is not None
    for address, nbytes in ((low - 1, 2), (low, (1 << 20) + 1), (low + (1 << 20), 8), (low, 2**64 - 8), (0, 8), (8, 0)):
        assert peer.here(np.array([[low, 8], [address, nbytes]], dtype=np.uint64)) is None
    peer.close()
    shared.close()


def test_lies_about_spans_are_refused(area: mmap.mmap) -> None:
    """Nothing is mapped that could end in a bus error, block, or overlap."""
    one, _ = region(area)
    shared = SharedMemory([one], WORDS)
    own, span = ((s.address, s.nbytes, s.fd, s.offset) for s in shared.spans)
    address, nbytes, fd, offset = span
    pipe, other = os.pipe()
    plain = tempfile.TemporaryFile()  # noqa: SIM115
    plain.truncate(1 << 30)
    mappings = len(vm.areas())
    for spans in (
        [],
        [(address + 1, nbytes, fd, offset)],
        [(address, nbytes + 1, fd, offset)],
        [(address, nbytes, fd, offset + 8)],
        [(address, 0, fd, offset)],
        [own, span, (address + PAGE, PAGE, fd, offset)],
        [(address, 1 << 50, fd, offset)],
        [(address, nbytes + (1 << 30), fd, offset)],
        [own, (address, nbytes, pipe, offset)],
        [own, (address, nbytes, plain.fileno(), offset)],
        [own, (address, nbytes, 999_999, offset)],
        [(PAGE * i, PAGE, fd, 0) for i in range(1, 5000)],
    ):
        with pytest.raises(LinkUnavailable):
            PeerMemory(os.getpid(), spans)
    assert len(vm.areas()) == mappings
    for number in (pipe, other):
        os.close(number)
    plain.close()
    shared.close()
