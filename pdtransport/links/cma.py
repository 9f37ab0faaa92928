"""``cma``: same host, host memory. The receiver copies the sender's pages into its own with process_vm_readv."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from pdtransport.errors import LinkUnavailable
from pdtransport.kernels import pages
from pdtransport.kernels.runs import Runs, run
from pdtransport.links.base import Link, Region
from pdtransport.links.host import allow_reads, host_id, my_start_ticks, neighbour
from pdtransport.links.memory import Regions
from pdtransport.links.reading import COPY_THREADS, MAX_TICKETS, NOT_PERMITTED, PullChannel, Reader, Tickets
from pdtransport.settings import LinkSettings

COOKIE_BYTES = 32
OWN_WORDS = COOKIE_BYTES // 8 + MAX_TICKETS  # 64-bit words that peers read besides pages: cookie, then tickets
EXPORT_VERSION = 1


class CmaLink(Link):
    """Link for host memory of one host; the receiver reads with process_vm_readv.

    Args:
        regions: memory that may be offered and written.
        own: memory for the cookie and the tickets, shape (``OWN_WORDS``,), zeros.

    Raises:
        LinkUnavailable: this kernel or container does not allow process_vm_readv.
    """

    name = "cma"
    memory = ("host",)
    one_host = True

    def __init__(self, regions: Regions | Iterable[Region], own: npt.NDArray[np.uint64] | None = None) -> None:
        self.regions = regions if isinstance(regions, Regions) else Regions(regions)
        own = np.zeros(OWN_WORDS, dtype=np.uint64) if own is None else own
        self._cookie, words = own[: COOKIE_BYTES // 8].view(np.uint8), own[COOKIE_BYTES // 8 :]
        self._cookie[:] = np.frombuffer(secrets.token_bytes(COOKIE_BYTES), dtype=np.uint8)
        self.tickets = Tickets(words)
        self._channels: list[PullChannel] = []
        try:
            self._export: dict[str, Any] = {
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

    def connect(self, peer_export: bytes, peer_host: str) -> PullChannel:
        peer = _parse_export(peer_export)
        watch = neighbour(peer["host"], peer["pid"], peer["start"])
        try:
            _prove(peer["pid"], peer["at"], peer["cookie"])
            reader, why = self._reader(peer)
            _prove(peer["pid"], peer["at"], peer["cookie"])  # the pid may belong to another process by now
        except LinkUnavailable:
            watch.close()
            raise
        channel = PullChannel(self.name, f"{self.name}: {why}", self.regions, self.tickets, watch, reader)
        self._channels.append(channel)
        return channel

    def _reader(self, peer: dict[str, Any]) -> tuple[Reader, str]:
        """Returns the reader for the peer's memory, and a few words for the channel's ``why``.

        Raises:
            LinkUnavailable: the peer's memory can't be read.
        """
        return KernelReader(peer["pid"]), "same host; reads pages directly"

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


class KernelReader:
    """Reads memory of process ``pid`` with process_vm_readv."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def read(self, source: Runs, target: Runs, blocks: int, ticket: tuple[int, int]) -> npt.NDArray[np.uint64]:
        return pages.read_remote(self._pid, source, target, blocks, threads=COPY_THREADS, ticket=ticket)

    def close(self) -> None:
        """Nothing to release."""


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
    """Read the peer's cookie back: proves that ``pid`` is the intended process and that we may read it.

    Raises:
        LinkUnavailable: reading is not permitted, or the process is another one.
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
