"""Channels on which the receiver reads the sender's pages in place: the common part of `cma` and `shm`.

One copy, no staging, any fragmentation. Only the receiver writes its pages, and it verifies what it placed.

An offer names a *ticket*: a word in the sender's memory that holds a random number while the offer is valid. The
receiver checks the ticket before and after reading, so that a batch whose pages were withdrawn meanwhile is never
accepted, with or without checksums.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgpack
import numpy as np
import numpy.typing as npt

from pdtransport.errors import LinkError
from pdtransport.kernels import pages
from pdtransport.kernels.runs import Runs, as_runs, cut_runs, merge_runs, stream_bytes
from pdtransport.links.base import Channel, Done, LinkBusy, LinkStats, Prepared
from pdtransport.links.calls import call
from pdtransport.links.host import ProcessWatch
from pdtransport.links.memory import PAGE, Regions

SLICE_BYTES = 4 << 20  # read per turn (about 0.5 ms), so that control messages are not delayed
COPY_THREADS = min(2, os.cpu_count() or 1)  # per slice; two threads come close to memory bandwidth, one reaches half
MAX_TICKETS = 4096  # batches offered and not released, all peers together
MAX_QUEUED = 4096  # batches waiting to be read, per channel
MAX_OFFER_BYTES = (1 << 20) - 4096  # the limit of a control message, less its own fields

NOT_PERMITTED = (
    "the kernel forbids reading process {pid}: run both as the same user with sysctl kernel.yama.ptrace_scope at 0 "
    "or 1 (or grant CAP_SYS_PTRACE); in a container, let its seccomp profile allow process_vm_readv"
)


class Tickets:
    """Table of tickets, one word per valid offer, at a fixed place in this process's memory where peers read it.

    Args:
        words: memory of the table, shape (``MAX_TICKETS``,), zeros.
    """

    def __init__(self, words: npt.NDArray[np.uint64]) -> None:
        self._words = words
        self._free = list(range(MAX_TICKETS))

    @property
    def free(self) -> int:
        return len(self._free)

    def issue(self) -> tuple[int, int, int]:
        """Returns (ticket, address of its word, the number in it).

        Raises:
            LinkBusy: ``MAX_TICKETS`` offers are outstanding.
        """
        if not self._free:
            raise LinkBusy(f"{MAX_TICKETS} batches are offered and not released")
        ticket, number = self._free.pop(), secrets.randbits(64) | 1
        self._words[ticket] = number
        return ticket, self._words.ctypes.data + 8 * ticket, number

    def revoke(self, ticket: int) -> None:
        self._words[ticket] = 0
        self._free.append(ticket)


class Reader(Protocol):
    """Reads a peer's memory."""

    def read(self, source: Runs, target: Runs, blocks: int, ticket: tuple[int, int]) -> npt.NDArray[np.uint64]:
        """Copy the peer's runs ``source`` into ``target``; returns the checksums of ``blocks`` equally long blocks.

        Raises:
            OSError, ValueError: as :func:`pdtransport.kernels.pages.read_remote`.
        """

    def close(self) -> None:
        """Release what it holds of the peer."""


@dataclass
class _Read:
    """A batch to be placed.

    ``slices`` (remote runs, local runs, blocks, number of the first block) are cut when the batch's turn comes.
    """

    key: int
    offer: bytes
    runs: Runs
    checksums: bytes
    blocks: int
    done: Done
    ticket: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    slices: deque[tuple[Runs, Runs, int, int]] = field(default_factory=deque)
    started: bool = False


class PullChannel(Channel):
    """Reads from one peer process, and lets that peer read from this process.

    Args:
        link: name of the link.
        why: one line: why this link was chosen for the pair.
        regions: memory that may be offered and written.
        tickets: the link's ticket table, shared by its channels.
        watch: detects the end of the peer process.
        reader: reads the peer's memory; closed with the channel.
    """

    def __init__(
        self, link: str, why: str, regions: Regions, tickets: Tickets, watch: ProcessWatch, reader: Reader
    ) -> None:
        self.link, self.why = link, why
        self.stats = LinkStats()
        self.closed = False
        self.reader = reader
        self._regions, self._tickets, self._watch = regions, tickets, watch
        self._broken = ""
        self._offered: dict[int, int] = {}  # key -> ticket
        self._reads: deque[_Read] = deque()

    # -- sender ------------------------------------------------------------------------------------------------------

    def send(self, key: int, runs: Runs, checksum_blocks: int, prepared: Prepared | None = None) -> tuple[bytes, bytes]:
        self._check_open()
        if key in self._offered:
            raise LinkError(f"key {key} is offered already")
        try:
            runs = merge_runs(as_runs(runs))
            self._regions.check(runs)
            packed = pack_runs(runs)
            checksums = pages.checksum(runs, checksum_blocks).astype("<u8").tobytes()
        except ValueError as error:
            raise LinkError(str(error)) from None
        ticket, address, number = self._tickets.issue()
        self._offered[key] = ticket
        self.stats.bytes_sent += stream_bytes(runs)
        self.stats.batches_sent += 1
        return msgpack.packb((address, number, *packed)), checksums

    def release(self, key: int) -> None:
        ticket = self._offered.pop(key, None)
        if ticket is not None:
            self._tickets.revoke(ticket)

    # -- receiver ----------------------------------------------------------------------------------------------------

    def receive(self, key: int, offer: bytes, runs: Runs, checksums: bytes, blocks: int, done: Done) -> None:
        self._check_open()
        if len(self._reads) >= MAX_QUEUED:
            raise LinkError(f"{MAX_QUEUED} batches wait to be read")
        try:
            runs = as_runs(runs)
        except ValueError as error:
            raise LinkError(str(error)) from None
        self._regions.check(runs)
        self._reads.append(_Read(key, offer, runs, checksums, blocks, done))

    def fence(self, keys: Sequence[int], done: Callable[[], None]) -> None:
        fenced = set(keys)
        self._reads = deque(read for read in self._reads if read.key not in fenced)
        done()

    @property
    def has_work(self) -> bool:
        return bool(self._reads)

    def read_slice(self) -> bool:
        """Read and verify the next slice; True if there was anything to do."""
        if not self._reads:
            return False
        read = self._reads[0]
        try:
            if self._broken:
                raise LinkError(self._broken)
            if not read.started:
                self._start(read)
            if read.slices:
                self._place(read)
            if not read.slices:
                self._finish(read, None)
        except _Damaged as error:
            self._finish(read, f"damaged: {error}")
        except LinkError as error:
            self._finish(read, f"link: {error}")
        except Exception as error:
            self._finish(read, f"link: {error!r}")  # else the same read would be retried forever
            raise
        return True

    def _start(self, read: _Read) -> None:
        """Check the untrusted offer against what is expected, and cut the batch into slices."""
        read.started = True
        total = stream_bytes(read.runs)
        remote, read.ticket = unpack_offer(read.offer)
        if stream_bytes(remote) != total:
            raise LinkError(f"the offer is {stream_bytes(remote)} bytes long, {total} are expected")
        if read.checksums and (len(read.checksums) != 8 * read.blocks or read.blocks < 1 or total % read.blocks):
            raise LinkError(f"{len(read.checksums) // 8} checksums for {read.blocks} blocks of {total} bytes")
        local = merge_runs(read.runs)
        if total <= SLICE_BYTES:
            read.slices.append((remote, local, read.blocks if read.checksums else 0, 0))
            return
        block = total // read.blocks if read.checksums else PAGE
        step = max(1, SLICE_BYTES // block) * block
        bounds = [*range(0, total, step), total]
        first = 0
        for source, target in zip(cut_runs(remote, bounds), cut_runs(local, bounds), strict=True):
            blocks = stream_bytes(target) // block if read.checksums else 0
            read.slices.append((source, target, blocks, first))
            first += blocks

    def _place(self, read: _Read) -> None:
        source, target, blocks, first = read.slices.popleft()
        begin = time.perf_counter()
        try:
            found = self.reader.read(source, target, blocks, read.ticket)
        except OSError as error:
            raise self._read_failed(error) from None
        except ValueError as error:  # blocks of invalid length
            raise LinkError(str(error)) from None
        finally:
            read.seconds += time.perf_counter() - begin
        if blocks:
            expected = np.frombuffer(read.checksums, dtype="<u8")[first : first + blocks]
            wrong = np.flatnonzero(found != expected)
            if len(wrong):
                raise _Damaged(f"{len(wrong)} of {blocks} blocks differ from their checksums, first {first + wrong[0]}")

    def _read_failed(self, error: OSError) -> Exception:
        pid = self._watch.pid
        try:
            self._watch.check()
        except ProcessLookupError as gone:
            self._broken = str(gone)
            return LinkError(self._broken)
        if error.errno == errno.ESRCH:  # dead, but not yet reaped by its parent
            self._broken = f"process {pid} is gone"
            return LinkError(self._broken)
        if error.errno == errno.ESTALE:
            return _Damaged("withdrawn by its sender before or while it was read")
        if error.errno == errno.EFAULT:
            return _Damaged(f"process {pid} has no such memory")
        if error.errno in (errno.EPERM, errno.ENOSYS):
            return LinkError(NOT_PERMITTED.format(pid=pid))
        return LinkError(f"reading process {pid}: {error.strerror}")

    def _finish(self, read: _Read, error: str | None) -> None:
        self._reads.popleft()
        if error is None:
            self.stats.bytes_received += stream_bytes(read.runs)
            self.stats.batches_received += 1
            self.stats.seconds_moving += read.seconds
        else:
            self.stats.errors += 1
        call(read.done, error)

    # -- both --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._broken = self._broken or "the channel is closed"
        for ticket in self._offered.values():
            self._tickets.revoke(ticket)
        self._offered.clear()
        while self._reads:
            call(self._reads.popleft().done, f"link: {self._broken}")
        self.reader.close()
        self._watch.close()

    def _check_open(self) -> None:
        if self._broken:
            raise LinkError(self._broken)


class _Damaged(Exception):
    """The bytes are not those that were offered; sending them again may help."""


# -- wire forms ----------------------------------------------------------------------------------------------------


def pack_runs(runs: Runs) -> tuple[int, bytes]:
    """Runs as ``(nbytes, addresses)`` if all are equally long, else ``(0, pairs)``; little-endian u64.

    Raises:
        LinkError: the result exceeds what a control message carries.
    """
    equal = len(runs) > 0 and bool((runs[:, 1] == runs[0, 1]).all())
    packed = (runs[:, 0] if equal else runs).astype("<u8").tobytes()
    if len(packed) > MAX_OFFER_BYTES:
        raise LinkError(f"a batch of {len(runs)} runs is too fragmented for one offer: lower links.batch_bytes")
    return int(runs[0, 1]) if equal else 0, packed


def unpack_offer(offer: bytes) -> tuple[Runs, tuple[int, int]]:
    """Returns the sender's runs and its ticket's (address, number).

    Raises:
        LinkError: not an offer of this link.
    """
    try:
        ticket_at, ticket, nbytes, packed = msgpack.unpackb(offer, raw=False)
        if not all(isinstance(number, int) for number in (ticket_at, ticket, nbytes)):
            raise ValueError("a number is none")
        if not 0 < ticket_at < 1 << 63 or not 0 < ticket < 1 << 64 or not 0 <= nbytes < 1 << 63:
            raise ValueError("a number is out of range")
        words = np.frombuffer(packed, dtype="<u8").astype(np.uint64)
        if nbytes:
            runs = np.empty((len(words), 2), dtype=np.uint64)
            runs[:, 0], runs[:, 1] = words, nbytes
        else:
            runs = words.reshape(-1, 2)
        return as_runs(runs), (ticket_at, ticket)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise LinkError(f"not an offer of this kind of link: {error}") from None
