"""``cuda_ipc``: same host, GPU memory. The receiver maps the sender's KV cache once and copies page to page.

One kernel per batch copies the pages, whatever their fragmentation or the split of heads, and computes checksums as it
goes.

Only the receiver writes its pages and verifies them, as in ``cma``. So a fence is local: it waits for kernels in
flight. A batch whose pages changed while they were read fails its checksums; real transfers always have checksums.

Senders never map receiver memory. A mapping ends with the peer's incarnation. Memory of a dead peer stays valid until
then (the driver counts references), so a kernel in the middle of a batch does no harm.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

from pdtransport.errors import LinkError, LinkUnavailable
from pdtransport.kernels import pages
from pdtransport.kernels.reference import Spans
from pdtransport.kernels.runs import Runs, as_runs, merge_runs, stream_bytes
from pdtransport.kv.geometry import HOST
from pdtransport.links.base import Channel, Done, Link, LinkBusy, LinkStats, Prepared
from pdtransport.links.calls import call
from pdtransport.links.host import ProcessWatch, host_id, my_start_ticks, neighbour
from pdtransport.links.memory import Regions
from pdtransport.links.packed import pack, unpack
from pdtransport.settings import LinkSettings

if TYPE_CHECKING:
    from pdtransport.kernels.gpu import Checksums, Launch, Plan

logger = logging.getLogger(__name__)

EXPORT_VERSION = 1
HANDLE_BYTES = 64  # size of a cudaIpcMemHandle_t
COOKIE_BYTES = 32
MAX_ALLOCATIONS = 1024  # in one export
MAX_OFFERED = 4096  # batches offered and not released, per channel
MAX_QUEUED = 4096  # batches waiting to be copied, per channel
MAX_UNDER_WAY = 4  # kernels in flight per channel: enough to hide launch latency
MAX_PREPARED = 16  # checksum kernels queued behind the model's kernels, all peers together
MAX_PREPARED_RUNS = 1 << 15  # per prepared batch: their tables wait in a ring of 8 MiB
MAX_FORESEEN = 16  # batches prepared from hints and not yet received, per channel; each up to 1 MiB of tables
MAX_OFFER_BYTES = (1 << 20) - 4096  # the limit of a control message, less its own fields
# Thread blocks of a copy between GPUs. Over NVLink (370 GB/s on H100s) as fast as four blocks on every SM, and the
# model keeps its SMs.
ACROSS_BLOCKS = 32
DRAIN_S = 5.0  # a copy takes a millisecond; a GPU that needs this long for one has hung
LOOK_S = 2e-5


class CudaIpcLink(Link):
    """Link for GPU memory of one host; the receiver maps the sender's memory with CUDA IPC.

    Args:
        regions: GPU memory that may be offered and written.

    Raises:
        LinkUnavailable: CUDA is not available here, or the memory can't be exported.
    """

    name = "cuda_ipc"
    memory = ("gpu",)
    one_host = True

    def __init__(self, regions: Regions) -> None:
        if regions.device == HOST:
            raise LinkUnavailable("KV is in host memory")
        from pdtransport.kernels import gpu
        from pdtransport.kernels.watch import DeviceMemory

        self.gpu = gpu
        self.regions, self.device = regions, regions.device
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._channels: list[CudaIpcChannel] = []
        self.prepared: deque[Launch] = deque()  # checksum kernels queued behind the model's kernels
        try:
            self.sending = gpu.GpuPages(self.device)
            self.receiving = gpu.GpuPages(self.device, wake_fd=self._wake)
            self.preparing = gpu.GpuPages(self.device)
            self._cookie = DeviceMemory(COOKIE_BYTES, self.device)
            cookie = secrets.token_bytes(COOKIE_BYTES)
            gpu.from_host(self._cookie.address, cookie, self.device)
            self._export = {
                "v": EXPORT_VERSION,
                "host": host_id(),
                "pid": os.getpid(),
                "start": my_start_ticks(),
                "gpu": gpu.device_uuid(self.device),
                "memory": self._handles(),
                "at": self._cookie.address,
                "cookie": cookie,
            }
        except gpu.GpuError as error:
            os.close(self._wake)
            raise LinkUnavailable(f"{error}") from None

    @classmethod
    def open(cls, regions: Regions, settings: LinkSettings) -> CudaIpcLink:
        return cls(regions)

    def _handles(self) -> list[tuple[int, int, bytes]]:
        """Returns (address, bytes, handle) of each allocation that holds a region."""
        allocations: dict[int, int] = {}
        for address in [*(region.address for region in self.regions), self._cookie.address]:
            base, nbytes = self.gpu.allocation_of(address)
            allocations[base] = nbytes
        return [(base, nbytes, self.gpu.ipc_handle(base)) for base, nbytes in allocations.items()]

    def export(self) -> bytes:
        packed: bytes = msgpack.packb(self._export)
        return packed

    def connect(self, peer_export: bytes, peer_host: str) -> CudaIpcChannel:
        peer = _parse_export(peer_export)
        channel = CudaIpcChannel(self, neighbour(peer["host"], peer["pid"], peer["start"]), peer)
        self._channels.append(channel)
        return channel

    def progress(self) -> bool:
        try:
            os.eventfd_read(self._wake)  # before checking kernels: a kernel that ends later writes it again
        except BlockingIOError:
            pass
        self._channels = [channel for channel in self._channels if not channel.closed]
        worked = False
        for channel in self._channels:
            worked = channel.progress() or worked
        return worked

    def fileno(self) -> int:
        return self._wake

    def arm(self) -> bool:
        return not any(channel.startable for channel in self._channels)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        for kernels in (self.sending, self.receiving, self.preparing):
            kernels.close()
        os.close(self._wake)


@dataclass(eq=False)
class _Copy:
    """A batch to be placed; ``done`` is None once it is fenced."""

    key: int
    plan: Plan
    nbytes: int
    checksums: bytes
    blocks: int
    done: Done | None
    launch: Launch | None = None


@dataclass(frozen=True)
class _Prepared(Prepared):
    launch: Launch


@dataclass(frozen=True)
class _Foreseen:
    runs: Runs
    blocks: int
    plan: Plan


@dataclass(eq=False)
class _FenceWait:
    copies: list[_Copy]
    done: Callable[[], None] = field(repr=False)


class CudaIpcChannel(Channel):
    """Copies from one peer process, and lets that peer copy from this process."""

    link = "cuda_ipc"

    def __init__(self, link: CudaIpcLink, watch: ProcessWatch, peer: dict[str, Any]) -> None:
        self._same_gpu = peer["gpu"] == link.gpu.device_uuid(link.device)
        self._most = 0 if self._same_gpu else ACROSS_BLOCKS
        where = "same GPU" if self._same_gpu else "GPUs of one host"
        self.why = f"cuda_ipc: {where}; one kernel copies pages in place"
        self.stats = LinkStats()
        self.closed = False
        self._link = link
        self._watch = watch
        self._peer = peer
        self._broken = ""
        self._spans: Spans | None = None
        self._mapped: list[int] = []
        self._offered: set[int] = set()
        self._queue: deque[_Copy] = deque()
        self._under_way: deque[_Copy] = deque()
        self._fences: list[_FenceWait] = []
        self._foreseen: dict[bytes, _Foreseen] = {}  # by offer

    # -- sender ------------------------------------------------------------------------------------------------------

    def prepare(self, runs: Runs, checksum_blocks: int, event_handle: int) -> _Prepared | None:
        """Queue the checksum kernel behind the event, on a stream that no other batch waits for."""
        waiting = self._link.prepared
        try:
            while waiting and waiting[0].done():
                waiting.popleft()
            if self._broken or not checksum_blocks or len(waiting) >= MAX_PREPARED or len(runs) > MAX_PREPARED_RUNS:
                return None
            runs = merge_runs(as_runs(runs))
            self._link.regions.check(runs)
            stream = self._link.preparing
            stream.after(event_handle)
            prepared = _Prepared(pack(runs), stream.checksum(runs, checksum_blocks, timed=False))
        except (ValueError, LinkError, self._link.gpu.GpuError):
            return None  # send() meets the same error and reports it
        waiting.append(prepared.launch)
        return prepared

    def send(self, key: int, runs: Runs, checksum_blocks: int, prepared: Prepared | None = None) -> tuple[bytes, bytes]:
        self._check_open()
        if key in self._offered:
            raise LinkError(f"key {key} is offered already")
        if len(self._offered) >= MAX_OFFERED:
            raise LinkBusy(f"{MAX_OFFERED} batches are offered and not released")
        launch: Launch | None
        try:
            if isinstance(prepared, _Prepared):
                offer, launch = prepared.offer, prepared.launch
            else:
                merged = merge_runs(as_runs(runs))
                self._link.regions.check(merged)
                offer = pack(merged)
                sums = self._link.sending.checksum
                launch = sums(merged, checksum_blocks, timed=False) if checksum_blocks else None
            if len(offer) > MAX_OFFER_BYTES:
                raise LinkError(f"a batch of {len(runs)} runs is too fragmented: lower links.gpu_batch_bytes")
            # Waiting here is fine: reading a batch takes less than a millisecond, and the model's kernels keep running.
            checksums = b"" if launch is None else self._await(launch).astype("<u8").tobytes()
        except (ValueError, self._link.gpu.GpuError) as error:
            raise LinkError(str(error)) from None
        self._offered.add(key)
        self.stats.bytes_sent += stream_bytes(runs)
        self.stats.batches_sent += 1
        return offer, checksums

    def _await(self, launch: Launch) -> Checksums:
        deadline = time.monotonic() + DRAIN_S
        while not launch.done():
            if time.monotonic() > deadline:
                raise LinkError(f"GPU {self._link.device} did not read a batch within {DRAIN_S} s: it has hung")
            time.sleep(LOOK_S)
        return launch.wait()

    def release(self, key: int) -> None:
        self._offered.discard(key)

    # -- receiver ----------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Map the peer's memory, and verify by its cookie that it is the peer's."""
        if self._spans is not None:
            return
        gpu, device = self._link.gpu, self._link.device
        spans = []
        try:
            ours = self._watch.pid == os.getpid()  # CUDA can't map a process's memory into itself
            gpu.reach(device, self._peer["gpu"], ours)
            for base, nbytes, handle in self._peer["memory"]:
                here = base
                if not ours:
                    here = gpu.ipc_open(handle, device)
                    self._mapped.append(here)
                spans.append((base, base + nbytes, (here - base) % (1 << 64)))
            self._spans = np.array(sorted(spans), dtype=np.uint64)
            cookie = self._translate(np.array([[self._peer["at"], COOKIE_BYTES]], dtype=np.uint64))
            found = gpu.to_host(int(cookie[0, 0]), COOKIE_BYTES, device, beside=True)
        except (gpu.GpuError, LinkError) as error:
            self._unmap()
            raise LinkUnavailable(f"the memory of process {self._watch.pid} can't be mapped: {error}") from None
        if found != self._peer["cookie"]:
            self._unmap()
            between = "" if self._same_gpu else f", or GPU {device} misreads memory of {self._peer['gpu']}"
            raise LinkUnavailable(f"process {self._watch.pid} is not the peer (its cookie differs){between}")

    def prepare_read(self, offer: bytes, runs: Runs, blocks: int) -> None:
        """Build the kernel's tables while prefill computes: for a GiB of small pages that takes a millisecond."""
        if self._broken or self._spans is None or len(runs) > MAX_PREPARED_RUNS:
            return
        try:
            plan = self._plan(offer, as_runs(runs), blocks)
        except (ValueError, LinkError):
            return  # receive() meets the same error and reports it
        self._foreseen.pop(offer, None)
        while len(self._foreseen) >= MAX_FORESEEN:
            del self._foreseen[next(iter(self._foreseen))]
        self._foreseen[offer] = _Foreseen(runs, blocks, plan)

    def receive(self, key: int, offer: bytes, runs: Runs, checksums: bytes, blocks: int, done: Done) -> None:
        self._check_open()
        if len(self._queue) >= MAX_QUEUED:
            raise LinkError(f"{MAX_QUEUED} batches wait to be copied")
        if self._spans is None:
            raise LinkError("the peer's memory is not mapped")
        try:
            runs = as_runs(runs)
            nbytes = stream_bytes(runs)
            if checksums and (len(checksums) != 8 * blocks or blocks < 1 or nbytes % (8 * blocks)):
                raise LinkError(f"{len(checksums) // 8} checksums for {blocks} blocks of {nbytes} bytes")
            blocks = blocks if checksums else 0
            known = self._foreseen.pop(offer, None)
            if known is not None and known.blocks == blocks and np.array_equal(known.runs, runs):
                plan = known.plan
            else:
                plan = self._plan(offer, runs, blocks)
        except ValueError as error:
            raise LinkError(str(error)) from None
        self._queue.append(_Copy(key, plan, nbytes, checksums, blocks, done))
        self._start()

    def _plan(self, offer: bytes, runs: Runs, blocks: int) -> Plan:
        """Plan the copy of the batch with this ``offer`` into ``runs``.

        Raises:
            ValueError, LinkError: the batch can't be copied.
        """
        self._link.regions.check(runs)
        source = self._translate(unpack(offer, stream_bytes(runs)))
        return self._link.receiving.plan(source, runs, blocks)

    def fence(self, keys: Sequence[int], done: Callable[[], None]) -> None:
        fenced = set(keys)
        self._queue = deque(copy for copy in self._queue if copy.key not in fenced)
        copies = [copy for copy in self._under_way if copy.key in fenced]
        for copy in copies:
            copy.done = None
        if copies:
            self._fences.append(_FenceWait(copies, done))
        else:
            done()

    @property
    def startable(self) -> bool:
        return bool(self._queue) and len(self._under_way) < MAX_UNDER_WAY

    def progress(self) -> bool:
        """Report copies that ended, in order, and start others; True if any ended."""
        worked = False
        while self._under_way and self._ended(self._under_way[0]):
            self._finish(self._under_way.popleft())
            worked = True
        self._start()
        return worked

    def _start(self) -> None:
        while self.startable:
            copy = self._queue.popleft()
            try:
                copy.launch = self._link.receiving.start(copy.plan, copy.blocks, self._most)
            except (ValueError, self._link.gpu.GpuError) as error:
                self._report(copy, f"link: {error}")
            else:
                self._under_way.append(copy)

    def _ended(self, copy: _Copy) -> bool:
        assert copy.launch is not None
        try:
            return copy.launch.done()
        except self._link.gpu.GpuError:
            return True  # _finish meets the same error and reports it

    def _finish(self, copy: _Copy) -> None:
        assert copy.launch is not None
        try:
            found = copy.launch.wait()
            self.stats.seconds_moving += copy.launch.seconds
        except self._link.gpu.GpuError as error:
            self._broken = str(error)
            self._report(copy, f"link: {error}")
        else:
            expected = np.frombuffer(copy.checksums, dtype="<u8")  # empty where none were wanted
            wrong = np.flatnonzero(found != expected)
            if wrong.size:
                first = f"{len(wrong)} of {copy.blocks} blocks differ from their checksums, first {wrong[0]}"
                self._report(copy, f"damaged: {first}")
            else:
                self.stats.bytes_received += copy.nbytes
                self.stats.batches_received += 1
                self._report(copy, None)
        for wait in [wait for wait in self._fences if copy in wait.copies]:
            wait.copies.remove(copy)
            if not wait.copies:
                self._fences.remove(wait)
                call(wait.done)

    def _report(self, copy: _Copy, error: str | None) -> None:
        if error is not None:
            self.stats.errors += 1
        done, copy.done = copy.done, None
        if done is not None:
            call(done, error)

    def _translate(self, runs: Runs) -> Runs:
        """Translate the peer's addresses to addresses in this process.

        Raises:
            LinkError: a run is outside the memory that the peer exported.
        """
        assert self._spans is not None
        here = pages.translate(runs, self._spans)
        if here is None:
            raise LinkError("the offer names memory that its sender did not export")
        return here

    # -- both --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Waits for kernels in flight, because the engine gets their pages back after this."""
        if self.closed:
            return
        self.closed = True
        self._broken = self._broken or "the channel is closed"
        deadline = time.monotonic() + DRAIN_S
        while self._under_way:
            if self._ended(self._under_way[0]):
                self._finish(self._under_way.popleft())
            elif time.monotonic() > deadline:
                logger.critical("GPU %d did not finish a copy within %s s: it has hung", self._link.device, DRAIN_S)
                break
            else:
                time.sleep(1e-4)
        for copy in (*self._under_way, *self._queue):
            self._report(copy, f"link: {self._broken}")
        self._queue.clear()
        self._foreseen.clear()
        self._offered.clear()
        if not self._under_way:
            self._unmap()
        self._watch.close()

    def _unmap(self) -> None:
        self._spans = None
        for address in self._mapped:
            try:
                self._link.gpu.ipc_close(address, self._link.device)
            except self._link.gpu.GpuError as error:
                logger.warning("a mapping of process %d was not closed: %s", self._watch.pid, error)
        self._mapped.clear()

    def _check_open(self) -> None:
        if self._broken:
            raise LinkError(self._broken)


def _parse_export(export: bytes) -> dict[str, Any]:
    types = {"v": int, "host": str, "pid": int, "start": int, "gpu": str, "memory": list, "at": int, "cookie": bytes}
    try:
        peer = msgpack.unpackb(export, raw=False)
    except (ValueError, TypeError, msgpack.UnpackException):
        peer = None
    if not isinstance(peer, dict) or any(not isinstance(peer.get(key), kind) for key, kind in types.items()):
        raise LinkUnavailable("the peer does not offer it")
    if peer["v"] != EXPORT_VERSION:
        raise LinkUnavailable(f"the peer speaks version {peer['v']} of it, this side {EXPORT_VERSION}")
    sound = len(peer["cookie"]) == COOKIE_BYTES and 0 < peer["pid"] < 1 << 31 and 0 < peer["at"] < 1 << 63
    if not sound or not 0 < len(peer["memory"]) <= MAX_ALLOCATIONS or not all(map(_is_allocation, peer["memory"])):
        raise LinkUnavailable("the peer's export is damaged")
    return peer


def _is_allocation(item: Any) -> bool:
    if not isinstance(item, list) or len(item) != 3:
        return False
    base, nbytes, handle = item
    numbers = isinstance(base, int) and isinstance(nbytes, int) and min(base, nbytes) > 0 and base + nbytes < 1 << 63
    return numbers and isinstance(handle, bytes) and len(handle) == HANDLE_BYTES
