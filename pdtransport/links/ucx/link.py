"""UCX: shared memory or CUDA IPC on one host, TCP (or RDMA, where the UCX build has it) between hosts.

Fragmented pages are gathered into slots of a staging ring and cross as one large message; the receiver takes them into
a slot of its own ring and scatters verified bytes. The receiver *asks* for each batch once it has a slot for it, so
that

* nothing is in flight that was not asked for: memory on both sides is bounded by the rings, whatever is aborted;
* the pages of a fenced batch are safe at once: only its slot waits for the message;
* a batch that its sender took back costs three short messages.

Where pages lie in GPU memory, kernels gather and scatter them. The ring lies in GPU memory as well where UCX can send
that over its lanes to the peer (*direct*), else in pinned host memory (*staged*); each channel's ``why`` says which,
and ``links.ucx_gpu_memory`` can demand one. Whatever one end does, the other end may do otherwise.

Each channel has a UCX worker of its own: a peer that is killed while it writes into a worker's shared-memory queue
blocks that queue for good, and all who use it. The exported address is that of a *lobby* worker, which only serves to
find out whether and how a peer can be reached. Offers carry the address of the sender's channel, asks that of the
receiver's; tags are chosen by the channel that receives on them, so they can't collide.
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

# UCX_ variables (less the prefix) that the link sets unless the environment does.
OPTIONS = {
    "RNDV_FRAG_SIZE": "host:128K",  # a quarter of UCX' bounce buffers, at the same speed
}
HOST_OPTIONS = {"TLS": "^cuda"}  # while UCX sends no GPU memory, it need not know of it
DIRECT_OPTIONS = {"MEMTYPE_CACHE": "n"}  # the cache takes GPU memory that it did not see allocated for host memory
# Shared memory must not be left out for want of error handling, which every endpoint needs: see _ucx_binding.
FORCED_OPTIONS = {"MM_ERROR_HANDLING": "y"}

GPU_END_S = 5.0  # closing waits this long for kernels that write pages


class UcxLink(Link):
    """See the module's docstring.

    Args:
        regions: memory that may be offered and written, of the host or of one GPU.
        settings: sizes of slots and rings, and how GPU memory moves.
        make_gpu: the GPU with a number, which writes to an eventfd when a kernel ended.

    Raises:
        LinkUnavailable: no UCX binding is installed, UCX does not start, the GPU can't be used, or UCX knows no GPU
            memory though ``ucx_gpu_memory`` is ``direct``.
    """

    name = "ucx"

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
        self._memories: dict[bool, PageMemory] = {}  # by whether UCX sends GPU memory directly
        self._channels: list[UcxChannel] = []
        self._gpu: Gpu | None = None
        self._launches = -1  # an eventfd: a kernel ended
        self._wakeups = select.epoll()
        if self.regions.device >= 0:
            self._launches = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            if self._launches >= 0:
                self._gpu = make_gpu(self.regions.device, self._launches)  # before UCX, which looks for its context
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
        """What channels opened so far use; their rings take memory with the first batch."""
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
        channel = UcxChannel(self, worker, memory, f"ucx ({carrier(lanes, memory is self._memories.get(True))}{why})")
        self._channels.append(channel)
        return channel

    def _memory_for(self, lanes: Sequence[str]) -> tuple[PageMemory, str]:
        """Where slots for a peer behind ``lanes`` lie, and how to say so.

        Raises:
            LinkUnavailable: ``ucx_gpu_memory`` demands what these lanes can't do.
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
        """Move messages on, and run what is due; True if anything happened."""
        if self._launches >= 0:
            drain(self._launches)  # before looking at kernels: one that ends from now on rings again
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
        """A channel is about to close its worker."""
        self._wakeups.unregister(worker.fileno())

    def close(self) -> None:
        """Within about ``binding.CLOSE_S`` a channel, or ``GPU_END_S`` where kernels write pages."""
        for channel in self._channels:
            channel.close()
        deadline = time.monotonic() + GPU_END_S + len(self._channels) * 2 * binding.CLOSE_S
        while self._channels and time.monotonic() < deadline:  # each ends within its own deadline, if its kernels do
            self.progress()
        self.callbacks.run()
        if self._channels:
            logger.error("a kernel of the ucx link did not end within %s s", GPU_END_S)
            return  # what it uses must stay
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
