"""UCX for host memory: shared memory on one host, TCP (or RDMA, where the UCX build has it) between hosts.

Fragmented pages are gathered into slots of a staging ring and cross as one large message; the receiver takes them into
a slot of its own ring and scatters verified bytes. The receiver *asks* for each batch once it has a slot for it, so
that

* nothing is in flight that was not asked for: memory on both sides is bounded by the rings, whatever is aborted;
* the pages of a fenced batch are safe at once: only its slot waits for the message;
* a batch that its sender took back costs one short answer.

Tags are chosen by the worker that receives on them: 31 bits number the channel, 32 bits the message; number 0 is where
a channel hears what its peer asks for. A peer learns a tag from an offer or from an ask, so tags can't collide.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Iterable

import msgpack

from pdtransport.errors import LinkUnavailable
from pdtransport.links import _ucx_binding as binding
from pdtransport.links.base import Link, Region
from pdtransport.links.calls import Callbacks
from pdtransport.links.memory import Regions, SlotRing
from pdtransport.links.ucx_channel import UcxChannel
from pdtransport.settings import LinkSettings

logger = logging.getLogger(__name__)

EXPORT_VERSION = 1
MAX_ADDRESS_BYTES = 64 << 10
SPIN_S = 50e-6  # before sleeping, while batches are on their way
CHANNEL_NUMBERS = 1 << 31

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
        self._worker = binding.open_worker({**options, **FORCED_OPTIONS})
        self.sending = SlotRing(settings.staging_bytes, settings.batch_bytes)
        self.receiving = SlotRing(settings.staging_bytes, settings.batch_bytes)
        self.callbacks = Callbacks()
        self.orphans: list[tuple[binding.Request, SlotRing, int]] = []  # slots of messages that outlived a channel
        self._channels: list[UcxChannel] = []
        self._next_channel = secrets.randbelow(CHANNEL_NUMBERS)

    def export(self) -> bytes:
        packed: bytes = msgpack.packb(
            {"v": EXPORT_VERSION, "address": self._worker.address, "digest": _digest(self._worker.address)}
        )
        return packed

    def connect(self, peer_export: bytes, peer_host: str) -> UcxChannel:
        address = _parse_export(peer_export)
        try:
            endpoint = self._worker.connect(address)
        except Exception as error:  # noqa: BLE001 - each binding has its own exceptions
            hint = (
                " (of another user or container? UCX_TLS=tcp does without it)" if "hared memory" in str(error) else ""
            )
            raise LinkUnavailable(f"UCX can't reach {peer_host}: {error}{hint}") from None
        number, self._next_channel = self._next_channel, (self._next_channel + 1) % CHANNEL_NUMBERS
        channel = UcxChannel(self, endpoint, number, f"ucx ({carrier(endpoint.lanes())})")
        self._channels.append(channel)
        return channel

    def progress(self) -> bool:
        """Move messages on, and run what is due; True if anything happened."""
        worked = self.callbacks.run()
        self._channels = [channel for channel in self._channels if not channel.closed]
        self._worker.progress()
        worked = self._advance() or worked
        if not worked and any(channel.moving for channel in self._channels):
            self._spin()
            worked = self._advance()
        if self.orphans:
            self._adopt_orphans()
        return self.callbacks.run() or worked

    def _advance(self) -> bool:
        return any([channel.advance() for channel in self._channels])  # noqa: C419 - all of them, not up to the first

    def _spin(self) -> None:
        """Going to sleep and waking up costs more than the next fragment takes to come, if the peer is at it."""
        deadline = time.perf_counter() + SPIN_S
        while time.perf_counter() < deadline:
            self._worker.progress()
            if any(channel.due for channel in self._channels):
                return

    def fileno(self) -> int:
        return self._worker.fileno()

    def arm(self) -> bool:
        return not self.callbacks.waiting and self._worker.arm()

    def close(self) -> None:
        """Within ``CLOSE_S`` a channel."""
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        self.callbacks.run()
        binding.wait(lambda: not self._adopt_orphans(), self._worker.progress, binding.CLOSE_S)
        if self.orphans:
            logger.error("ucx: %d messages did not end when their channels were closed", len(self.orphans))
        self._worker.close()

    def _adopt_orphans(self) -> bool:
        """Take back slots whose message has ended at last; True while some have not."""
        for request, ring, slot in self.orphans:
            if request.completed:
                ring.give_back(slot)
        self.orphans = [orphan for orphan in self.orphans if not orphan[0].completed]
        return bool(self.orphans)


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
    # UCX trusts an address blindly: a damaged one would crash this process.
    if not 0 < len(peer["address"]) <= MAX_ADDRESS_BYTES or peer.get("digest") != _digest(peer["address"]):
        raise LinkUnavailable("the peer's export is damaged")
    address: bytes = peer["address"]
    return address


def _digest(address: bytes) -> bytes:
    return hashlib.blake2b(address, digest_size=16, person=b"pdt-ucx-address").digest()
