"""Memory of a peer, mapped into this process to be read."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pdtransport.errors import LinkUnavailable
from pdtransport.kernels import pages
from pdtransport.kernels.runs import Runs
from pdtransport.links import vm
from pdtransport.links.memory import PAGE
from pdtransport.links.reading import COPY_THREADS, NOT_PERMITTED

MAX_SPANS = 4096  # of one peer
MAX_BYTES = 1 << 46  # of one peer's memory, mapped in all
F_SEAL_SHRINK = 0x0002
REST_S = 1.0  # without a batch; then what we read leaves our resident memory

Spans = Sequence[tuple[int, int, int, int]]  # as pdtransport.links.sharing.Span: address, nbytes, fd, offset


class PeerMemory:
    """Spans of process ``pid``, mapped read-only.

    Args:
        pid: the peer; that it is the process meant has to be checked afterwards.
        spans: (address in the peer, nbytes, its descriptor, offset in that file), as the peer says.

    Raises:
        LinkUnavailable: the peer may not be read, or what it says is not so.
    """

    def __init__(self, pid: int, spans: Spans) -> None:
        self._mapped: list[tuple[int, int]] = []  # (address here, nbytes)
        files: dict[int, int] = {}
        try:
            _check(spans)
            for _, nbytes, number, offset in spans:
                if number not in files:
                    files[number] = _open(pid, number)
                if os.fstat(files[number]).st_size < offset + nbytes:
                    raise LinkUnavailable(f"file {number} of process {pid} is shorter than it says")
                place = vm.map_file(None, nbytes, files[number], offset, write=False, shared=True)
                self._mapped.append((place, nbytes))
        except OSError as error:
            self.close()
            if isinstance(error, PermissionError):
                raise LinkUnavailable(NOT_PERMITTED.format(pid=pid)) from None
            raise LinkUnavailable(f"memory of process {pid} can't be mapped: {error.strerror}") from None
        except LinkUnavailable:
            self.close()
            raise
        finally:
            for fd in files.values():
                os.close(fd)
        table = np.array([span[:2] for span in spans], dtype=np.uint64)
        here = np.array([place for place, _ in self._mapped], dtype=np.uint64)
        order = np.argsort(table[:, 0])
        self._starts = table[order, 0]
        self._ends = self._starts + table[order, 1]
        with np.errstate(over="ignore"):
            self._shift = here[order] - self._starts  # modulo 2**64

    def here(self, runs: Runs) -> Runs | None:
        """Where the peer's ``runs`` stand in this process; None if some are not mapped."""
        first, last = runs[:, 0], runs[:, 0] + runs[:, 1]
        index = np.searchsorted(self._starts, first, side="right").astype(np.int64) - 1
        index = np.maximum(index, 0)
        if not ((first >= self._starts[index]) & (last >= first) & (last <= self._ends[index])).all():
            return None
        moved = runs.copy()
        moved[:, 0] += self._shift[index]
        return moved

    def rest(self) -> None:
        """Take the pages out of our resident memory; they stay where they are, and mapped."""
        for address, nbytes in self._mapped:
            vm.advise(address, nbytes, vm.DONTNEED)

    def close(self) -> None:
        """Unmap. Nothing may be read any more."""
        while self._mapped:
            vm.unmap(*self._mapped.pop())


class MappedReader:
    """Copies from a peer's mapped memory; what is not mapped (the ends of its regions) the kernel reads.

    Args:
        pid: the peer.
        peer: its memory; closed with the reader.
    """

    def __init__(self, pid: int, peer: PeerMemory) -> None:
        self._pid, self._peer = pid, peer
        self._last: float | None = None  # when pages of the peer became resident here

    def read(self, source: Runs, target: Runs, blocks: int, ticket: tuple[int, int]) -> npt.NDArray[np.uint64]:
        mapped = self._peer.here(source)
        word = self._peer.here(np.array([[ticket[0], 8]], dtype=np.uint64))
        if mapped is None or word is None or ticket[0] % 8:
            return pages.read_remote(self._pid, source, target, blocks, threads=COPY_THREADS, ticket=ticket)
        self._last = time.monotonic()
        at = int(word[0, 0])
        return pages.read_mapped(mapped, target, blocks, threads=COPY_THREADS, ticket=(at, ticket[1]))

    def rest(self) -> None:
        """Call now and then while nothing is to be read."""
        if self._last is not None and time.monotonic() - self._last > REST_S:
            self._last = None
            self._peer.rest()

    def close(self) -> None:
        self._peer.close()


def _check(spans: Spans) -> None:
    """What a peer says of its memory can be mapped at all.

    Raises:
        LinkUnavailable: it can't.
    """
    total, end = 0, 0
    for address, nbytes, number, offset in sorted(spans):
        whole = all(value % PAGE == 0 for value in (address, nbytes, offset))
        if not whole or nbytes < PAGE or not end <= address < 1 << 63 or offset < 0 or not 0 <= number < 1 << 31:
            raise LinkUnavailable("the peer's export is damaged")
        total, end = total + nbytes, address + nbytes
    if not spans or len(spans) > MAX_SPANS or total > MAX_BYTES or max(span[3] for span in spans) > MAX_BYTES:
        raise LinkUnavailable("the peer's export is damaged")


def _open(pid: int, number: int) -> int:
    """Descriptor ``number`` of the peer, to read: a file that can't shrink, or reading it could kill us.

    Raises:
        OSError: it can't be opened.
        LinkUnavailable: it is something else.
    """
    # Looked at before it is opened: opening a pipe may block, opening a device may do anything.
    handle = os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise LinkUnavailable(f"descriptor {number} of process {pid} is no memory")
        fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(handle)
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & F_SEAL_SHRINK
    except OSError:  # not a memfd
        sealed = 0
    if not sealed:
        os.close(fd)
        raise LinkUnavailable(f"descriptor {number} of process {pid} is no sealed memory")
    return fd
