"""``memfd``: host memory, one host. The sender copies a batch into a file in memory, which the receiver reads.

A link of another package, as ``docs/adding/link.md`` describes them: it uses nothing but what is named there. Files
have no name in any file system, so nothing is left of a process that was killed.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from pdtransport.errors import LinkError, LinkUnavailable
from pdtransport.kernels import pages
from pdtransport.kernels.runs import as_runs, run, stream_bytes
from pdtransport.links.base import Channel, Done, Link, LinkBusy, LinkStats, Prepared, Runs
from pdtransport.links.calls import Callbacks, call
from pdtransport.links.host import ProcessWatch, host_id, my_start_ticks, neighbour
from pdtransport.links.memory import Regions
from pdtransport.settings import LinkSettings

STAGED_BYTES = 64 << 20  # offered to one peer and not released; a single larger batch is allowed
MAX_OFFERED = 256  # descriptors that one peer may make this process hold
MAX_QUEUED = 4096  # batches that wait to be received, per channel
TICKET_BYTES = 16  # at the front of each file: its descriptor's number may be another file's by now


class MemfdLink(Link):
    name = "memfd"
    memory = ("host",)
    one_host = True
    needs_checksums = False  # `send` copies

    def __init__(self, regions: Regions) -> None:
        if not hasattr(os, "memfd_create"):
            raise LinkUnavailable("this system has no memfd_create")
        self.regions = regions
        self.callbacks = Callbacks()
        self._channels: list[MemfdChannel] = []

    @classmethod
    def open(cls, regions: Regions, settings: LinkSettings) -> MemfdLink:
        return cls(regions)

    def export(self) -> bytes:
        packed: bytes = msgpack.packb((host_id(), os.getpid(), my_start_ticks()))
        return packed

    def connect(self, peer_export: bytes, peer_host: str) -> MemfdChannel:
        host, pid, started = unpacked(peer_export, (str, int, int), LinkUnavailable)
        channel = MemfdChannel(self, neighbour(host, pid, started))
        self._channels.append(channel)
        return channel

    def progress(self) -> bool:
        worked = self.callbacks.run()
        self._channels = [channel for channel in self._channels if not channel.closed]
        for channel in self._channels:
            worked = channel.receive_next() or worked
        return worked

    def arm(self) -> bool:
        return not self.callbacks.waiting and not any(channel.queue for channel in self._channels)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self.callbacks.run()


@dataclass
class Batch:
    key: int
    offer: bytes
    runs: Runs
    checksums: bytes
    blocks: int
    done: Done


class Damaged(Exception):
    """Sending the batch again may help."""


class MemfdChannel(Channel):
    link = "memfd"

    def __init__(self, link: MemfdLink, watch: ProcessWatch) -> None:
        self.why = "memfd: same host; a copy in a file in memory"
        self.stats = LinkStats()
        self.closed = False
        self.queue: deque[Batch] = deque()
        self._link, self._watch = link, watch
        self._offered: dict[int, tuple[int, int]] = {}  # key -> descriptor, bytes

    # -- sender ------------------------------------------------------------------------------------------------------

    def send(self, key: int, runs: Runs, checksum_blocks: int, prepared: Prepared | None = None) -> tuple[bytes, bytes]:
        self._check(runs)
        if key in self._offered:
            raise LinkError(f"key {key} is offered already")
        nbytes = stream_bytes(runs)
        staged = sum(held for _, held in self._offered.values())
        if self._offered and (staged + nbytes > STAGED_BYTES or len(self._offered) >= MAX_OFFERED):
            raise LinkBusy("the peer has not received what was offered before")
        copy = np.empty(nbytes, dtype=np.uint8)
        try:
            sums = pages.gather(runs, copy.ctypes.data, checksum_blocks)  # of the bytes that were copied
        except ValueError as error:
            raise LinkError(str(error)) from None
        ticket = secrets.token_bytes(TICKET_BYTES)
        try:
            file = os.memfd_create("pdt-batch", os.MFD_CLOEXEC)
        except OSError as error:
            raise LinkError(f"memfd_create: {error.strerror}") from None
        self._offered[key] = (file, nbytes)
        try:
            os.writev(file, [ticket, copy])
            if os.fstat(file).st_size != TICKET_BYTES + nbytes:
                raise OSError(0, "no memory left for it")
        except OSError as error:
            self.release(key)
            raise LinkError(f"a batch can't be copied: {error.strerror}") from None
        self.stats.bytes_sent += nbytes
        self.stats.batches_sent += 1
        return msgpack.packb((file, ticket, nbytes)), sums.astype("<u8").tobytes()

    def release(self, key: int) -> None:
        file, _ = self._offered.pop(key, (-1, 0))
        if file >= 0:
            os.close(file)

    # -- receiver ----------------------------------------------------------------------------------------------------

    def receive(self, key: int, offer: bytes, runs: Runs, checksums: bytes, blocks: int, done: Done) -> None:
        self._check(runs)
        if len(self.queue) >= MAX_QUEUED:
            raise LinkError(f"{MAX_QUEUED} batches wait to be received")
        self.queue.append(Batch(key, offer, as_runs(runs), checksums, blocks, done))

    def receive_next(self) -> bool:
        """Place one batch: long enough a turn for the thread that control messages share."""
        if not self.queue:
            return False
        batch, begin = self.queue.popleft(), time.perf_counter()
        try:
            self._place(batch)
        except Damaged as error:
            problem: str | None = f"damaged: {error}"
        except (LinkError, OSError, ValueError) as error:
            problem = f"link: {error}"
        else:
            problem = None
            self.stats.bytes_received += stream_bytes(batch.runs)
            self.stats.batches_received += 1
            self.stats.seconds_moving += time.perf_counter() - begin
        self.stats.errors += problem is not None
        call(batch.done, problem)
        return True

    def _place(self, batch: Batch) -> None:
        self._watch.check()
        file, ticket, nbytes = unpacked(batch.offer, (int, bytes, int), LinkError)
        expected = stream_bytes(batch.runs)
        if nbytes != expected:
            raise LinkError(f"the offer is {nbytes} bytes long, {expected} are expected")
        found, copy = bytearray(TICKET_BYTES), np.empty(nbytes, dtype=np.uint8)
        self._read(file, found, copy)
        if len(ticket) != TICKET_BYTES or found != ticket:
            raise Damaged("withdrawn by its sender")
        if batch.checksums:
            if len(batch.checksums) != 8 * batch.blocks:
                raise LinkError(f"{len(batch.checksums) // 8} checksums for {batch.blocks} blocks")
            wanted = np.frombuffer(batch.checksums, dtype="<u8")
            wrong = np.flatnonzero(pages.checksum(run(copy.ctypes.data, nbytes), batch.blocks) != wanted)
            if len(wrong):
                raise Damaged(f"{len(wrong)} of {batch.blocks} blocks differ from their checksums, first {wrong[0]}")
        pages.scatter(copy.ctypes.data, batch.runs)  # verified before a page is touched

    def _read(self, number: int, *into: Any) -> None:
        try:  # the number is the peer's word: anything may be open under it, a pipe that would block included
            file = os.open(f"/proc/{self._watch.pid}/fd/{number}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Damaged("withdrawn by its sender") from None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode) or os.preadv(file, into, 0) != sum(map(len, into)):
                raise Damaged("withdrawn by its sender")
        finally:
            os.close(file)

    def fence(self, keys: Sequence[int], done: Callable[[], None]) -> None:
        self.queue = deque(batch for batch in self.queue if batch.key not in keys)
        done()  # a batch is placed whole in one turn, so none is half placed here

    # -- both --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for key in list(self._offered):
            self.release(key)
        while self.queue:
            call(self.queue.popleft().done, "link: the channel is closed")
        self._watch.close()

    def _check(self, runs: Runs) -> None:
        if self.closed:
            raise LinkError("the channel is closed")
        try:
            runs = as_runs(runs)
        except ValueError as error:
            raise LinkError(str(error)) from None
        self._link.regions.check(runs)


def unpacked(packed: bytes, types: tuple[type, ...], error: type[Exception]) -> tuple[Any, ...]:
    """What the peer packed, each member of its type.

    Raises:
        error: it is something else.
    """
    try:
        found = msgpack.unpackb(packed, raw=False)
        if [type(each) for each in found] == list(types):
            return tuple(found)
    except (ValueError, TypeError, msgpack.UnpackException):
        pass
    raise error("the peer says something that is not of this link")
