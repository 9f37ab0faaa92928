"""Memory of a peer, mapped read-only into this process."""

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

MAX_SPANS = 4096  # per peer
MAX_BYTES = 1 << 46  # total mapped per peer
F_SEAL_SHRINK = 0x0002
# On a small machine one core comes close to memory bandwidth, and the other stays free for the engine.
THREADS = 1 if (os.cpu_count() or 1) < 4 else COPY_THREADS
REST_S = 1.0  # without a batch; then the mapped pages leave our resident memory

Spans = Sequence[tuple[int, int, int, int]]  # as pdtransport.links.sharing.Span: address, nbytes, fd, offset


class PeerMemory:
    """Spans of process ``pid``, mapped read-only.

    Args:
        pid: the peer; the caller must verify afterwards that this is the intended process.
        spans: (address in the peer, nbytes, descriptor in the peer, offset in that file), as exported by the peer; the
            span with its tickets comes first.

    Raises:
        LinkUnavailable: the peer may not be read, or its export is wrong.
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
                    raise LinkUnavailable(f"file {number} of process {pid} is shorter than announced")
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
        table = [
            (span[0], span[0] + span[1], (place - span[0]) % (1 << 64))
            for span, (place, _) in zip(spans, self._mapped, strict=True)
        ]
        self._table = np.array(sorted(table), dtype=np.uint64)
        self._first = table[0]

    def here(self, runs: Runs) -> Runs | None:
        """Addresses of the peer's ``runs`` in this process; None if some are not mapped."""
        return pages.translate(runs, self._table)

    def word_here(self, address: int) -> int | None:
        """Address here of the peer's 64-bit word at ``address``; None if it is not in the first span."""
        low, high, shift = self._first
        inside = low <= address <= high - 8 and address % 8 == 0
        return (address + shift) % (1 << 64) if inside else None

    def rest(self) -> None:
        """Remove the pages from our resident memory; they stay mapped, and the peer keeps them."""
        for address, nbytes in self._mapped:
            vm.advise(address, nbytes, vm.DONTNEED)

    def close(self) -> None:
        """Unmap; nothing may be read afterwards."""
        while self._mapped:
            vm.unmap(*self._mapped.pop())


class MappedReader:
    """Copies from a peer's mapped memory; the rest (the ends of its regions) is read with process_vm_readv.

    Args:
        pid: the peer.
        peer: its memory; closed with the reader.
    """

    def __init__(self, pid: int, peer: PeerMemory) -> None:
        self._pid, self._peer = pid, peer
        self._last: float | None = None  # when pages of the peer became resident here

    def read(self, source: Runs, target: Runs, blocks: int, ticket: tuple[int, int]) -> npt.NDArray[np.uint64]:
        mapped = self._peer.here(source)
        word = self._peer.word_here(ticket[0])
        if mapped is None or word is None:
            return pages.read_remote(self._pid, source, target, blocks, threads=COPY_THREADS, ticket=ticket)
        self._last = time.monotonic()
        return pages.read_mapped(mapped, target, blocks, threads=THREADS, ticket=(word, ticket[1]))

    def rest(self) -> None:
        """Drop resident pages after ``REST_S`` without a batch; call it now and then while nothing is to be read."""
        if self._last is not None and time.monotonic() - self._last > REST_S:
            self._last = None
            self._peer.rest()

    def close(self) -> None:
        self._peer.close()


def _check(spans: Spans) -> None:
    """Check that the spans exported by a peer can be mapped at all.

    Raises:
        LinkUnavailable: they can't.
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
    """Open the peer's descriptor ``number`` for reading; it must be a memfd sealed against shrinking.

    Reading a file that shrinks would kill this process (SIGBUS).

    Raises:
        OSError: it can't be opened.
        LinkUnavailable: it is not such a memfd.
    """
    # Checked before it is opened: opening a pipe may block, opening a device may have any effect.
    handle = os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise LinkUnavailable(f"descriptor {number} of process {pid} is not memory")
        fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(handle)
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & F_SEAL_SHRINK
    except OSError:  # not a memfd
        sealed = 0
    if not sealed:
        os.close(fd)
        raise LinkUnavailable(f"descriptor {number} of process {pid} is not sealed memory")
    return fd
