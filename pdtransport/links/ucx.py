"""UCX for host memory: shared memory on one host, TCP (or RDMA, where the UCX build has it) between hosts.

Fragmented pages are gathered into slots of a staging ring and cross as one large message; the receiver takes them into
a slot of its own ring and scatters verified bytes. The receiver *asks* for each batch once it has a slot for it, so
that

* nothing is in flight that was not asked for: memory on both sides is bounded by the rings, whatever is aborted;
* the pages of a fenced batch are safe at once: only its slot waits for the message;
* a batch that its sender took back costs one short answer.

Each channel has a UCX worker of its own: a peer that is killed while it writes into a worker's shared-memory queue
blocks that queue for good, and all who use it. The exported address is that of a *lobby* worker, which only serves to
find out whether and how a peer can be reached. Offers carry the address of the sender's channel, asks that of the
receiver's; tags are chosen by the channel that receives on them, so they can't collide.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Iterable

import msgpack

from pdtransport.errors import LinkUnavailable
from pdtransport.links import _ucx_binding as binding
from pdtransport.links.base import Link, Region
from pdtransport.links.calls import Callbacks
from pdtransport.links.memory import Regions, SlotRing
from pdtransport.links.ucx_channel import UcxChannel, sealed, unsealed
from pdtransport.settings import LinkSettings

logger = logging.getLogger(__name__)

EXPORT_VERSION = 1

# UCX_ variables (less the prefix) that the link sets unless the environment does.
OPTIONS = {
    "TLS": "^cuda",  # this link moves host memory
    "RNDV_FRAG_SIZE": "host:128K",  # a quarter of UCX' bounce buffers, at the same speed
}
# Shared memory must not be left out for want of error handling, which every endpoint needs: see _ucx_binding.
FORCED_OPTIONS = {"MM_ERROR_HANDLING": "y"}

SHARED_MEMORY = {"posix", "sysv", "xpmem", "cma", "knem"}


class UcxLink(Link):
    """See the module's docstring.

    Args:
        regions: memory that may be offered and written.
        settings: ``staging_bytes`` and ``batch_bytes`` size the two rings.

    Raises:
        LinkUnavailable: no UCX binding is installed, or UCX does not start.
    """

    name = "ucx"

    def __init__(self, regions: Regions | Iterable[Region], settings: LinkSettings) -> None:
        self.regions = regions if isinstance(regions, Regions) else Regions(regions)
        options = {key: value for key, value in OPTIONS.items() if f"UCX_{key}" not in os.environ}
        self._context = binding.open_context({**options, **FORCED_OPTIONS})
        self._lobby = self._context.worker()
        self._wakeups = select.epoll()
        self._wakeups.register(self._lobby.fileno(), select.EPOLLIN)
        self.sending = SlotRing(settings.staging_bytes, settings.batch_bytes)
        self.receiving = SlotRing(settings.staging_bytes, settings.batch_bytes)
        self.callbacks = Callbacks()
        self._channels: list[UcxChannel] = []

    @classmethod
    def open(cls, regions: Regions, settings: LinkSettings) -> UcxLink:
        return cls(regions, settings)

    def export(self) -> bytes:
        packed: bytes = msgpack.packb({"v": EXPORT_VERSION, "address": sealed(self._lobby.address)})
        return packed

    def connect(self, peer_export: bytes, peer_host: str) -> UcxChannel:
        lobby = _parse_export(peer_export)
        worker = self._context.worker()
        try:
            trial = worker.connect(lobby)
            lanes = trial.lanes()
            trial.close()
        except Exception as error:  # noqa: BLE001 - each binding has its own exceptions
            worker.close()
            hint = (
                " (of another user or container? UCX_TLS=tcp does without it)" if "hared memory" in str(error) else ""
            )
            raise LinkUnavailable(f"UCX can't reach {peer_host}: {error}{hint}") from None
        self._wakeups.register(worker.fileno(), select.EPOLLIN)
        channel = UcxChannel(self, worker, f"ucx ({carrier(lanes)})")
        self._channels.append(channel)
        return channel

    def progress(self) -> bool:
        """Move messages on, and run what is due; True if anything happened."""
        worked = self.callbacks.run()
        self._lobby.progress()
        for channel in self._channels:
            worked = channel.progress() or worked
        self._channels = [channel for channel in self._channels if not channel.ended]
        return self.callbacks.run() or worked

    def fileno(self) -> int:
        return self._wakeups.fileno()

    def arm(self) -> bool:
        workers = (self._lobby, *(channel.worker for channel in self._channels if not channel.ended))
        return not self.callbacks.waiting and all(worker.arm() for worker in workers)

    def forget(self, worker: binding.Worker) -> None:
        """A channel is about to close its worker."""
        self._wakeups.unregister(worker.fileno())

    def close(self) -> None:
        """Within about ``binding.CLOSE_S`` a channel."""
        for channel in self._channels:
            channel.close()
        while self._channels:  # each ends within its own deadline
            self.progress()
        self.callbacks.run()
        self._lobby.close()
        self._context.close()
        self._wakeups.close()


def carrier(lanes: list[str]) -> str:
    """What carries the bytes, in words: ``shared memory``, ``tcp``, ``rc_mlx5``, ..."""
    if not lanes:
        return "transport unknown"
    fast = [lane for lane in lanes if lane not in SHARED_MEMORY]
    return "shared memory" if len(fast) < len(lanes) else "+".join(fast)


def _parse_export(export: bytes) -> bytes:
    try:
        peer = msgpack.unpackb(export, raw=False)
    except (ValueError, TypeError, msgpack.UnpackException):
        peer = None
    if not isinstance(peer, dict) or not isinstance(peer.get("address"), bytes):
        raise LinkUnavailable("the peer does not offer it")
    if peer.get("v") != EXPORT_VERSION:
        raise LinkUnavailable(f"the peer speaks version {peer.get('v')} of it, this side {EXPORT_VERSION}")
    try:
        return unsealed(peer["address"])
    except ValueError as error:
        raise LinkUnavailable(f"the peer's export is damaged: {error}") from None
