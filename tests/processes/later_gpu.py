"""A GPU whose memory is the host's: kernels run in a thread of their own, in order, end later, and ring the eventfd, as
the real ones do. What is real beside it: the ucx link, UCX, and the processes."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from pdtransport.kernels import pages
from pdtransport.kernels.runs import Runs
from pdtransport.links import probe
from pdtransport.links.base import Region
from pdtransport.links.memory import HostBlock, Regions
from pdtransport.links.negotiate import OpenedLinks
from pdtransport.links.ucx import UcxLink
from pdtransport.settings import LinkSettings

KERNEL_S = 0.001  # about ten times what a real one takes
WAIT_S = 10.0

_going = threading.Event()
_going.set()


begun: list[LaterLaunch] = []  # and not ended


def hold(held: bool) -> None:
    """Let the kernels of this process wait, or go on."""
    (_going.clear if held else _going.set)()


def opened(region: Region, settings: LinkSettings, direct: bool) -> OpenedLinks:
    """The ucx link alone, on such a GPU. ``direct``: UCX sends its memory as it lies."""
    links = OpenedLinks(Regions([region]))
    links.links["ucx"] = UcxLink(links.regions, settings, make_gpu=LaterDirectGpu if direct else LaterGpu)
    probe.scratch = _scratch
    return links


def _scratch(nbytes: int, device: int) -> Region:
    block = HostBlock(nbytes)
    return Region(block.address, nbytes, owner=block, device=device)


class LaterLaunch:
    def __init__(self, src: Runs, dst: Runs, blocks: int) -> None:
        self._arguments = src, dst, blocks
        self._sums: Any = None
        self._ended = threading.Event()

    def run(self) -> None:
        time.sleep(KERNEL_S)
        _going.wait()
        self._sums = pages.copy_runs(*self._arguments)
        begun.remove(self)
        self._ended.set()

    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> Any:
        if not self._ended.wait(WAIT_S):
            raise RuntimeError(f"a kernel did not end within {WAIT_S} s")
        return self._sums


class LaterGpu:
    """See the module's docstring; stands in for :class:`pdtransport.links.ucx_gpu.CudaGpu`."""

    def __init__(self, device: int, wake_fd: int) -> None:
        self._wake_fd = wake_fd
        self._launches: queue.SimpleQueue[LaterLaunch | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"gpu-{device}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (launch := self._launches.get()) is not None:
            launch.run()
            os.eventfd_write(self._wake_fd, 1)

    def gather(self, src: Runs, dst: Runs, blocks: int, direct: bool) -> Any:
        return self.place(src, dst, blocks, direct).wait()

    def place(self, src: Runs, dst: Runs, blocks: int, direct: bool) -> LaterLaunch:
        total = int(src[:, 1].sum())
        if total != int(dst[:, 1].sum()) or (blocks and (total % blocks or total // blocks % 8)):
            raise ValueError(f"a stream of {total} bytes does not hold {blocks} equally long blocks of whole words")
        launch = LaterLaunch(src, dst, blocks)
        begun.append(launch)
        self._launches.put(launch)
        return launch

    def device_block(self, nbytes: int) -> HostBlock:
        return HostBlock(nbytes)

    def pinned_block(self, nbytes: int) -> HostBlock:
        return HostBlock(nbytes)

    def sendable(self, context: Any) -> bool:
        return False

    def why_not_direct(self, context: Any, lanes: Sequence[str]) -> str:
        raise AssertionError("UCX sends no such memory")

    def close(self) -> None:
        self._launches.put(None)
        self._thread.join(WAIT_S)


class LaterDirectGpu(LaterGpu):
    def sendable(self, context: Any) -> bool:
        return True

    def why_not_direct(self, context: Any, lanes: Sequence[str]) -> str:
        return "" if lanes else "no lanes"
