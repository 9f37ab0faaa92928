"""Same host, host memory: the receiver reads the sender's pages straight into its own with process_vm_readv.

One copy, no staging, any fragmentation. Only the receiver touches its pages, and it verifies what it placed. An offer
names a *ticket*: a word in the sender's memory that holds a random number for as long as the sender stands by the
offer. The receiver looks at it before and after reading: a batch whose pages were taken back meanwhile is never
accepted, checksums or not.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from pdtransport.errors import LinkError, LinkUnavailable
from pdtransport.kernels import pages
from pdtransport.kernels.runs import Runs, as_runs, cut_runs, merge_runs, run, stream_bytes
from pdtransport.links.base import Channel, Done, Link, LinkBusy, LinkStats, Region
from pdtransport.links.calls import call
from pdtransport.links.host import ProcessWatch, allow_reads, host_id, my_start_ticks
from pdtransport.links.memory import PAGE, Regions
from pdtransport.settings import LinkSettings

SLICE_BYTES = 4 << 20  # read in one turn (about 0.5 ms), so that control messages get theirs
COPY_THREADS = min(2, os.cpu_count() or 1)  # a slice; two come near what memory can do, one reaches half
MAX_TICKETS = 4096  # batches offered and not released, over all peers
MAX_QUEUED = 4096  # batches to read, a channel
MAX_OFFER_BYTES = (1 << 20) - 4096  # what a control message carries, less its own fields
COOKIE_BYTES = 32
EXPORT_VERSION = 1

NOT_PERMITTED = (
    "the kernel forbids reading process {pid}: run both as the same user with sysctl kernel.yama.ptrace_scope at 0 "
    "or 1 (or grant CAP_SYS_PTRACE); in a container, let its seccomp profile allow process_vm_readv"
)


class CmaLink(Link):
    """See the module's docstring.

    Args:
        regions: the memory that may be offered and written.

    Raises:
        LinkUnavailable: this kernel or container does not allow process_vm_readv.
    """

    name = "cma"

    def __init__(self, regions: Regions | Iterable[Region]) -> None:
        self.regions = regions if isinstance(regions, Regions) else Regions(regions)
        self._cookie = np.frombuffer(bytearray(secrets.token_bytes(COOKIE_BYTES)), dtype=np.uint8)
        self.tickets = Tickets()
        self._channels: list[CmaChannel] = []
        try:
            self._export = {
                "v": EXPORT_VERSION,
                "host": host_id(),
                "pid": os.getpid(),
                "start": my_start_ticks(),
                "at": self._cookie.ctypes.data,
                "cookie": self._cookie.tobytes(),
            }
        except (OSError, ValueError) as error:
            raise LinkUnavailable(f"it needs Linux' /proc: {error}") from None
        allow_reads()
        _prove(os.getpid(), self._cookie.ctypes.data, self._cookie.tobytes())

    @classmethod
    def open(cls, regions: Regions, settings: LinkSettings) -> CmaLink:
        return cls(regions)

    def export(self) -> bytes:
        packed: bytes = msgpack.packb(self._export)
        return packed

    def connect(self, peer_export: bytes, peer_host: str) -> CmaChannel:
        peer = _parse_export(peer_export)
        if peer["host"] != self._export["host"]:
            same_kernel = peer["host"].split("/")[0] == str(self._export["host"]).split("/")[0]
            raise LinkUnavailable("another container (process namespace)" if same_kernel else "another host")
        try:
            watch = ProcessWatch(peer["pid"], peer["start"])
        except OSError:
            raise LinkUnavailable(f"process {peer['pid']} is gone") from None
        try:
            _prove(peer["pid"], peer["at"], peer["cookie"])
        except LinkUnavailable:
            watch.close()
            raise
        channel = CmaChannel(self, watch)
        self._channels.append(channel)
        return channel

    def progress(self) -> bool:
        """Read one slice of one channel's batches; channels take turns."""
        self._channels = [channel for channel in self._channels if not channel.closed]
        for _ in range(len(self._channels)):
            channel = self._channels.pop(0)
            self._channels.append(channel)
            if channel.read_slice():
                return True
        return False

    def arm(self) -> bool:
        return not any(channel.has_work for channel in self._channels)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._channels.clear()


class Tickets:
    """Words that say which offers stand; a fixed table in this process' memory that peers read."""

    def __init__(self) -> None:
        self._words = np.zeros(MAX_TICKETS, dtype=np.uint64)
        self._free = list(range(MAX_TICKETS))

    @property
    def free(self) -> int:
        return len(self._free)

    def issue(self) -> tuple[int, int, int]:
        """(ticket, address of its word, the number it holds).

        Raises:
            LinkBusy: ``MAX_TICKETS`` offers stand.
        """
        if not self._free:
            raise LinkBusy(f"{MAX_TICKETS} batches are offered and not released")
        ticket, number = self._free.pop(), secrets.randbits(64) | 1
        self._words[ticket] = number
        return ticket, self._words.ctypes.data + 8 * ticket, number

    def revoke(self, ticket: int) -> None:
        self._words[ticket] = 0
        self._free.append(ticket)


@dataclass
class _Read:
    """A batch to be placed; ``slices`` (remote runs, local runs, blocks, number of the first block) are cut once its
    turn comes."""

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


class CmaChannel(Channel):
    """Reads from one peer process, and lets it read from this one."""

    link = "cma"
    one_sided = False

    def __init__(self, link: CmaLink, watch: ProcessWatch) -> None:
        self.why = "cma: same host; reads pages directly"
        self.stats = LinkStats()
        self.closed = False
        self._regions, self._tickets = link.regions, link.tickets
        self._watch = watch
        self._broken = ""
        self._offered: dict[int, tuple[int, Done]] = {}  # key -> ticket, done
        self._reads: deque[_Read] = deque()

    # -- sender ------------------------------------------------------------------------------------------------------

    def send(self, key: int, runs: Runs, checksum_blocks: int, done: Done) -> tuple[bytes, bytes]:
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
        self._offered[key] = (ticket, done)
        self.stats.bytes_sent += stream_bytes(runs)
        self.stats.batches_sent += 1
        return msgpack.packb((address, number, *packed)), checksums

    def release(self, key: int) -> None:
        ticket, done = self._offered.pop(key, (-1, None))
        if done is not None:
            self._tickets.revoke(ticket)
            call(done, None)

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
            self._finish(read, f"link: {error!r}")  # or it would be tried for ever
            raise
        return True

    def _start(self, read: _Read) -> None:
        """Check the offer, which nobody vouches for, against what we expect, and cut the batch into slices."""
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
            found = pages.read_remote(self._watch.pid, source, target, blocks, threads=COPY_THREADS, ticket=read.ticket)
        except OSError as error:
            raise self._read_failed(error) from None
        except ValueError as error:  # blocks of odd length
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
        if error.errno == errno.ESRCH:  # dead, and not yet reaped by its parent
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
        for key in list(self._offered):
            ticket, done = self._offered.pop(key)
            self._tickets.revoke(ticket)
            call(done, f"link: {self._broken}")
        while self._reads:
            call(self._reads.popleft().done, f"link: {self._broken}")
        self._watch.close()

    def _check_open(self) -> None:
        if self._broken:
            raise LinkError(self._broken)


class _Damaged(Exception):
    """The bytes are not what was offered; sending them again may help."""


# -- wire forms ----------------------------------------------------------------------------------------------------


def pack_runs(runs: Runs) -> tuple[int, bytes]:
    """``(nbytes, addresses)`` where all runs are equally long, else ``(0, pairs)``; little-endian u64.

    Raises:
        LinkError: longer than what a control message carries.
    """
    equal = len(runs) > 0 and bool((runs[:, 1] == runs[0, 1]).all())
    packed = (runs[:, 0] if equal else runs).astype("<u8").tobytes()
    if len(packed) > MAX_OFFER_BYTES:
        raise LinkError(f"a batch of {len(runs)} runs is too fragmented for one offer: lower links.batch_bytes")
    return int(runs[0, 1]) if equal else 0, packed


def unpack_offer(offer: bytes) -> tuple[Runs, tuple[int, int]]:
    """The sender's runs, and its ticket's (address, number).

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
        raise LinkError(f"not an offer of the cma link: {error}") from None


def _parse_export(export: bytes) -> dict[str, Any]:
    types = {"v": int, "host": str, "pid": int, "start": int, "at": int, "cookie": bytes}
    try:
        peer = msgpack.unpackb(export, raw=False)
    except (ValueError, TypeError, msgpack.UnpackException):
        peer = None
    if not isinstance(peer, dict) or any(not isinstance(peer.get(key), kind) for key, kind in types.items()):
        raise LinkUnavailable("the peer does not offer it")
    if peer["v"] != EXPORT_VERSION:
        raise LinkUnavailable(f"the peer speaks version {peer['v']} of it, this side {EXPORT_VERSION}")
    if len(peer["cookie"]) != COOKIE_BYTES or not 0 < peer["pid"] < 1 << 31 or not 0 < peer["at"] < 1 << 63:
        raise LinkUnavailable("the peer's export is damaged")
    return peer


def _prove(pid: int, address: int, cookie: bytes) -> None:
    """Read the cookie back: proves that ``pid`` is the process meant and that we may read it.

    Raises:
        LinkUnavailable: we may not, or it is another process.
    """
    found = np.zeros(len(cookie), dtype=np.uint8)
    try:
        pages.read_remote(pid, run(address, len(cookie)), run(found.ctypes.data, len(cookie)))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            raise LinkUnavailable(NOT_PERMITTED.format(pid=pid)) from None
        raise LinkUnavailable(f"process {pid} can't be read: {error.strerror}") from None
    if found.tobytes() != cookie:
        raise LinkUnavailable(f"process {pid} is not the peer (its cookie differs)")
