"""``ucx``: shared memory or CUDA IPC within a host, TCP (or RDMA, if the UCX build has it) between hosts.

The sender gathers fragmented pages into a slot of its staging ring and sends them as one large message. The receiver
receives into a slot of its own ring, verifies the bytes and scatters them into its pages; in GPU memory it verifies
while it scatters. The receiver *asks* for each batch once it has a free slot. Therefore

* nothing is in flight that was not asked for: the rings bound the memory on both sides, whatever is aborted;
* the pages of a fenced batch are safe at once: only its slot waits for the message;
* a batch that its sender withdrew costs three short messages.

If pages are in GPU memory, kernels gather and scatter them. The ring is in GPU memory too if UCX can send that over its
lanes to the peer (*direct*), else in pinned host memory (*staged*). Each channel's ``why`` says which, and
``links.ucx_gpu_memory`` can require one. The two ends choose independently.

Each channel has its own UCX worker: a peer that is killed while it writes into a worker's shared-memory queue blocks
that queue for good, for all its users. The exported address belongs to a *lobby* worker, which only serves to find out
whether and how a peer can be reached. Offers carry the address of the sender's channel, asks that of the receiver's. A
tag is chosen by the channel that receives on it, so tags can't collide.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Callable, Iterable, Sequence

import msgpack

from pdtransport.errors import LinkUnavailable
from pdtransport.links.base import Link, Region
from pdtransport.links.calls import Callbacks
from pdtransport.links.memory import Regions
from pdtransport.links.ucx import binding
from pdtransport.links.ucx.channel import UcxChannel
from pdtransport.links.ucx.gpu import CudaGpu, Gpu, drain
from pdtransport.links.ucx.lanes import carrier
from pdtransport.links.ucx.memory import GpuMemory, HostMemory, PageMemory
from pdtransport.links.ucx.wire import sealed, unsealed
from pdtransport.settings import LinkSettings

logger = logging.getLogger(__name__)

EXPORT_VERSION = 2

# UCX_ variables (without the prefix) that the link sets unless the environment sets them.
OPTIONS = {
    "RNDV_FRAG_SIZE": "host:128K",  # UCX' bounce buffers take a quarter of the default memory, at the same speed
}
HOST_OPTIONS = {"TLS": "^cuda"}  # UCX does not need CUDA if it sends no GPU memory
DIRECT_OPTIONS = {"MEMTYPE_CACHE": "n"}  # the cache mistakes GPU memory whose allocation it missed for host memory
# Without this, UCX excludes shared memory because it lacks error handling, which every endpoint needs: see
# binding._UcxxEndpoint.
FORCED_OPTIONS = {"MM_ERROR_HANDLING": "y"}

GPU_END_S = 5.0  # closing waits this long for kernels that write pages


class UcxLink(Link):
    """Link over UCX, for host memory or the memory of one GPU.

    Args:
        regions: memory that may be offered and written, of the host or of one GPU.
        settings: sizes of slots and rings, and how GPU memory moves.
        make_gpu: makes a :class:`Gpu` from a device number and an eventfd to write when a kernel ended.

    Raises:
        LinkUnavailable: no UCX binding is installed, UCX does not start, the GPU can't be used, or ``ucx_gpu_memory``
            is ``direct`` and UCX does not support GPU memory.
    """

    name = "ucx"
    memory = ("host", "gpu")
    one_host = False
    needs_checksums = False

    def __init__(
        self,
        regions: Regions | Iterable[Region],
        settings: LinkSettings,
        make_gpu: Callable[[int, int], Gpu] = CudaGpu,
    ) -> None:
        self.regions = regions if isinstance(regions, Regions) else Regions(regions)
        self.callbacks = Callbacks()
        self._settings = settings
        self._wanted = settings.ucx_gpu_memory
        self._memories: dict[bool, PageMemory] = {}  # key: UCX sends GPU memory directly
        self._channels: list[UcxChannel] = []
        self._gpu: Gpu | None = None
        self._launches = -1  # eventfd, written when a kernel ended
        self._wakeups = select.epoll()
        if self.regions.device >= 0:
            self._launches = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            if self._launches >= 0:
                self._gpu = make_gpu(self.regions.device, self._launches)  # before UCX, which needs its context
                self._wakeups.register(self._launches, select.EPOLLIN)
            self._context = self._open_context()
        except LinkUnavailable:
            self._close_gpu()
            self._wakeups.close()
            raise
        self._lobby = self._context.worker()
        self._wakeups.register(self._lobby.fileno(), select.EPOLLIN)

    def _open_context(self) -> binding.Context:
        direct = self._gpu is not None and self._wanted != "staged"
        options = {**OPTIONS, **(DIRECT_OPTIONS if direct else HOST_OPTIONS)}
        options = {key: value for key, value in options.items() if f"UCX_{key}" not in os.environ}
        context = binding.open_context({**options, **FORCED_OPTIONS})
        if self._gpu is not None and self._wanted == "direct" and not self._gpu.sendable(context):
            context.close()
            raise LinkUnavailable(_direct_wanted(NO_CUDA))
        return context

    @property
    def memories(self) -> list[PageMemory]:
        """Memory of the channels opened so far; rings are allocated with the first batch."""
        return list(self._memories.values())

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
            memory, why = self._memory_for(lanes)
        except LinkUnavailable:
            worker.close()
            raise
        except Exception as error:  # noqa: BLE001 - each binding has its own exceptions
            worker.close()
            hint = (
                " (of another user or container? UCX_TLS=tcp does without it)" if "hared memory" in str(error) else ""
            )
            raise LinkUnavailable(f"UCX can't reach {peer_host}: {error}{hint}") from None
        self._wakeups.register(worker.fileno(), select.EPOLLIN)
        channel = UcxChannel(
            worker,
            memory,
            f"ucx ({carrier(lanes, memory is self._memories.get(True))}{why})",
            regions=self.regions,
            callbacks=self.callbacks,
            forget=self.forget,
        )
        self._channels.append(channel)
        return channel

    def _memory_for(self, lanes: Sequence[str]) -> tuple[PageMemory, str]:
        """The memory that holds slots for a peer reached over ``lanes``, and its description for ``why``.

        Raises:
            LinkUnavailable: ``ucx_gpu_memory`` requires what these lanes can't do.
        """
        if self._gpu is None:
            return self._memories.setdefault(False, HostMemory(self._settings)), ""
        if self._wanted == "staged":
            reason = "links.ucx_gpu_memory says so"
        elif not self._gpu.sendable(self._context):
            reason = NO_CUDA
        else:
            reason = self._gpu.why_not_direct(self._context, lanes)
        if reason and self._wanted == "direct":
            raise LinkUnavailable(_direct_wanted(reason))
        direct = not reason
        if direct not in self._memories:
            self._memories[direct] = GpuMemory(self._gpu, self._settings, direct)
        how = "sent directly" if direct else f"staged through pinned host memory: {reason}"
        return self._memories[direct], f"; GPU memory {how}"

    def progress(self) -> bool:
        """Advance messages and run due callbacks; True if anything happened."""
        if self._launches >= 0:
            drain(self._launches)  # before checking kernels: a kernel that ends later writes it again
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

    def forget(self, worker: binding.UcxWorker) -> None:
        """Called by a channel that is about to close its worker."""
        self._wakeups.unregister(worker.fileno())

    def close(self) -> None:
        """Blocks for up to ``2 * binding.CLOSE_S`` per channel, plus ``GPU_END_S`` while kernels write pages."""
        for channel in self._channels:
            channel.close()
        deadline = time.monotonic() + GPU_END_S + len(self._channels) * 2 * binding.CLOSE_S
        while self._channels and time.monotonic() < deadline:  # each ends within its own deadline, if its kernels end
            self.progress()
        self.callbacks.run()
        if self._channels:
            logger.error("a kernel of the ucx link did not end within %s s", GPU_END_S)
            return  # the kernel may still use all of it
        self._lobby.close()
        self._context.close()
        self._close_gpu()
        self._wakeups.close()

    def _close_gpu(self) -> None:
        if self._gpu is not None:
            self._gpu.close()
        if self._launches >= 0:
            os.close(self._launches)
            self._launches = -1


NO_CUDA = "this UCX has no CUDA support, or sees no GPU"


def _direct_wanted(reason: str) -> str:
    return f"links.ucx_gpu_memory is direct, but {reason}; auto stages GPU memory through pinned host memory"


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
