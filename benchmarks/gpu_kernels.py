"""The GPU page kernels between two processes, on one GPU or two: ``python -m benchmarks.gpu_kernels [--devices 0,1]``.

Shuffled pages go from one process' memory into another's (CUDA IPC), without and with checksums; checksums alone; to
and from pinned host memory with few blocks of threads; beside them CUDA's own copies. Each figure is a median over
runs, by CUDA events; GB/s count a byte that is read and written once. Each time has 10 to 20 us of the host's, for an
idle GPU waits between event and kernel for as long as the host takes to launch it. "call" is what the host spends on
the launch, "wall" the time from there to its end. After every copy the other process sums what arrived: a mismatch ends
the run.

With ``--devices A,B`` the other process' memory lies on GPU A, and kernels on GPU B pull pages out of it into memory of
their own, as the cuda_ipc link does; the limit beside them is ``cudaMemcpyPeer`` of as many bytes in one piece. The
checksums taken on the way are compared with those that the other process takes at home, and with those of what arrived.

Needs numpy, cupy and a GPU with 6 GiB free, or two.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks._figures import keep, measuring
from benchmarks._needs import CUPY, LACKING, gpus, package, tell_lacking
from pdtransport.kernels import gpu
from pdtransport.kernels.runs import Runs

KIB, MIB = 1 << 10, 1 << 20
PAGES_KIB = (4, 16, 32, 64, 128)
SIZES_MIB = (64, 2048)
HOST_PAGES_KIB = (4, 32, 64)
HOST_MIB = 256
HOST_BLOCKS = (16, 64)
BLOCK_BYTES = 2 * MIB  # that get a checksum: 16 tokens of a model with 128 KiB of KV each
CHILD_S = 60.0
WARM_UPS = 2
TO_DEVICE, TO_HOST, ON_DEVICE, BY_ADDRESS = 1, 2, 3, 4  # cudaMemcpyKind
FEWER_BLOCKS = (32, 132, 264)  # than the link's COPY_BLOCKS: what is left to the model's kernels meanwhile
FEWER_KIB = 32  # pages with which these, and pushing, are measured
SUMMED = " with checksums"
PEER_COPY = "cudaMemcpyPeer"


@dataclass(frozen=True)
class Figure:
    """One line of the table; medians."""

    what: str
    mib: int
    page_kib: int  # 0: contiguous
    gb_s: float
    gpu_us: float
    call_us: float
    wall_us: float
    target: float  # GB/s; 0: none


def main() -> int:
    arguments = parse()
    if arguments.peer:
        return peer(arguments.peer_device)
    devices = arguments.devices or (0,)
    if tell_lacking("benchmarks.gpu_kernels", [gpus(max(devices) + 1), package("cupy", CUPY)]):
        return LACKING
    runs = 5 if arguments.quick else 15
    pages_kib = (4, 32) if arguments.quick else PAGES_KIB
    sizes = SIZES_MIB[:1] if arguments.quick else SIZES_MIB
    figures: list[Figure] = []
    uuids: list[Any] = []
    with measuring(RuntimeError) as ending:  # GpuError, or CUDA's own
        uuids = [gpu.device_uuid(device) for device in devices]
        measured = measure_two if arguments.devices else measure
        for one in measured(devices, runs, pages_kib, sizes):
            figures.append(one)
            keep(arguments.json, document(uuids, runs, figures))
    print(table(figures))
    return ending.status


def document(uuids: Sequence[Any], runs: int, figures: Sequence[Figure]) -> str:
    """All figures so far, as JSON."""
    result = {"gpus": uuids, "runs": runs, "figures": [asdict(figure) for figure in figures]}
    return json.dumps(result, indent=1) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="64 MiB, two sizes of pages, few runs")
    parser.add_argument("--devices", type=two, default=(), metavar="A,B", help="pull from GPU A to GPU B")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer-device", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def two(text: str) -> tuple[int, int]:
    """Two different numbers of GPUs."""
    first, _, second = text.partition(",")
    if not first.isdecimal() or not second.isdecimal() or int(first) == int(second):
        raise argparse.ArgumentTypeError("two different GPUs, such as 0,1")
    return int(first), int(second)


def measure(
    devices: tuple[int, ...], runs: int, pages_kib: tuple[int, ...], sizes_mib: tuple[int, ...]
) -> Iterator[Figure]:
    """On one GPU."""
    (device,) = devices
    largest = max(*sizes_mib, HOST_MIB) * MIB
    pages = gpu.GpuPages(device)
    with device_memory(largest, device) as ours, Peer(largest, device, device) as other:
        fill(ours, largest)
        for mib in sizes_mib:
            yield plain_copy("CUDA copy, device to device", mib, ours, other.address, ON_DEVICE, runs)
            for kib in pages_kib:
                case = Case(pages, mib, kib, runs)
                src, dst = shuffled(ours, mib, kib, seed=1), shuffled(other.address, mib, kib, seed=2)
                yield case.timed("copy", src, dst, target=1750.0 if mib > 1024 else 1200.0)
                other.scribble()
                yield case.timed("copy with checksums", src, dst, sums=True)
                if other.sums(mib, kib, case.blocks) != case.sums:
                    raise gpu.GpuError(f"what arrived is not what was sent ({mib} MiB, pages of {kib} KiB)")
                yield case.timed("checksums alone", src, None, sums=True, target=2500.0)
        pages.close()
        yield from host(ours, runs)


def measure_two(
    devices: tuple[int, ...], runs: int, pages_kib: tuple[int, ...], sizes_mib: tuple[int, ...]
) -> Iterator[Figure]:
    """From the memory of another process on the first GPU to ours on the second."""
    holder, reader = devices
    largest = max(sizes_mib) * MIB
    pages = gpu.GpuPages(reader)
    with (
        device_memory(largest, holder) as there,
        device_memory(largest, reader) as ours,
        Peer(largest, holder, reader) as other,
    ):
        for one, another in ((holder, reader), (reader, holder)):
            gpu.reach(one, gpu.device_uuid(another), ours=True)
        other.fill()
        for mib in sizes_mib:
            yield peer_copy(mib, there, holder, ours, reader, runs)
            yield plain_copy("CUDA copy out of the other process", mib, other.address, ours, BY_ADDRESS, runs, reader)
            for kib in pages_kib:
                case = Case(pages, mib, kib, runs)
                src, dst = shuffled(other.address, mib, kib, seed=2), shuffled(ours, mib, kib, seed=1)
                yield case.timed("pull", src, dst)
                scribble(ours, largest, reader)
                yield case.timed("pull" + SUMMED, src, dst, sums=True)
                found = case.sums
                if other.sums(mib, kib, case.blocks) != found:
                    raise gpu.GpuError(f"what was read is not what was sent ({mib} MiB, pages of {kib} KiB)")
                yield case.timed("checksums of what arrived", dst, None, sums=True)
                if case.sums != found:
                    raise gpu.GpuError(f"what arrived is not what was read ({mib} MiB, pages of {kib} KiB)")
                if kib == FEWER_KIB:
                    yield case.timed("push", dst, src)  # brings back what is there already
                    yield case.timed("checksums over the link", src, None, sums=True)
                    yield from fewer_blocks(reader, case, src, dst)
    pages.close()


def fewer_blocks(reader: int, case: Case, src: Runs, dst: Runs) -> Iterator[Figure]:
    for blocks in FEWER_BLOCKS:
        pages = gpu.GpuPages(reader, blocks=blocks)
        fewer = Case(pages, case.mib, case.kib, case.runs)
        yield fewer.timed(f"pull{SUMMED}, {blocks} blocks", src, dst, sums=True)
        pages.close()


def host(ours: int, runs: int) -> Iterator[Figure]:
    memory = gpu.pinned(HOST_MIB * MIB)
    there = memory.ctypes.data
    yield plain_copy("CUDA copy, device to pinned", HOST_MIB, ours, there, TO_HOST, runs)
    yield plain_copy("CUDA copy, pinned to device", HOST_MIB, there, ours, TO_DEVICE, runs)
    for blocks in HOST_BLOCKS:
        pages = gpu.GpuPages(0, blocks=blocks)
        for kib in HOST_PAGES_KIB:
            case = Case(pages, HOST_MIB, kib, runs)
            device, pinned = shuffled(ours, HOST_MIB, kib, seed=1), shuffled(there, HOST_MIB, kib, seed=2)
            yield case.timed(f"to pinned, {blocks} blocks", device, pinned, target=50.0)
            yield case.timed(f"to pinned with checksums, {blocks} blocks", device, pinned, sums=True)
            yield case.timed(f"from pinned, {blocks} blocks", pinned, device, target=50.0 if blocks == 64 else 0.0)
            yield case.timed(f"from pinned with checksums, {blocks} blocks", pinned, device, sums=True)
        pages.close()


@dataclass
class Case:
    """One size and page size, measured in several ways; keeps the checksums of the last."""

    pages: gpu.GpuPages
    mib: int
    kib: int
    runs: int
    sums: list[int] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        return self.mib * MIB // BLOCK_BYTES

    def timed(self, what: str, src: Runs, dst: Runs | None, *, sums: bool = False, target: float = 0.0) -> Figure:
        blocks = self.blocks if sums else 0
        gpu_s, call_s, wall_s = [], [], []
        for _ in range(self.runs + WARM_UPS):
            begun = time.perf_counter()
            launch = self._launch(src, dst, blocks)
            called = time.perf_counter()
            self.sums = launch.wait().tolist()
            wall_s.append(time.perf_counter() - begun)
            call_s.append(called - begun)
            gpu_s.append(launch.seconds)
        warm = slice(WARM_UPS, None)
        return figure(what, self.mib, self.kib, median(gpu_s[warm]), median(call_s[warm]), median(wall_s[warm]), target)

    def _launch(self, src: Runs, dst: Runs | None, blocks: int) -> gpu.Launch:
        return self.pages.checksum(src, blocks) if dst is None else self.pages.copy_runs(src, dst, blocks)


def plain_copy(what: str, mib: int, source: int, target: int, kind: int, runs: int, device: int = 0) -> Figure:
    import cupy

    copy = cupy.cuda.runtime.memcpyAsync
    return timed_copy(what, mib, device, runs, lambda stream: copy(target, source, mib * MIB, kind, stream))


def peer_copy(mib: int, source: int, holder: int, target: int, reader: int, runs: int) -> Figure:
    """CUDA's own way from GPU ``holder`` to GPU ``reader``, both memories of this process."""
    import cupy

    copy = cupy.cuda.runtime.memcpyPeerAsync
    return timed_copy(
        PEER_COPY, mib, reader, runs, lambda stream: copy(target, reader, source, holder, mib * MIB, stream)
    )


def timed_copy(what: str, mib: int, device: int, runs: int, copy: Callable[[int], None]) -> Figure:
    """``copy`` is given a stream of ``device``."""
    import cupy

    cupy.cuda.Device(device).use()
    stream, begun, ended = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Event(), cupy.cuda.Event()
    seconds = []
    for _ in range(runs + WARM_UPS):
        begun.record(stream)
        copy(stream.ptr)
        ended.record(stream)
        ended.synchronize()
        seconds.append(cupy.cuda.get_elapsed_time(begun, ended) / 1e3)
    return figure(what, mib, 0, median(seconds[WARM_UPS:]), 0.0, 0.0, 0.0)


def figure(what: str, mib: int, kib: int, gpu_s: float, call_s: float, wall_s: float, target: float) -> Figure:
    return Figure(what, mib, kib, mib * MIB / gpu_s / 1e9, gpu_s * 1e6, call_s * 1e6, wall_s * 1e6, target)


def shuffled(base: int, mib: int, kib: int, seed: int) -> Runs:
    """``mib`` MiB in pages of ``kib`` KiB, in random order."""
    count = mib * KIB // kib
    order = np.random.default_rng(seed).permutation(count).astype(np.uint64)
    return np.stack([np.uint64(base) + order * np.uint64(kib * KIB), np.full(count, kib * KIB, np.uint64)], axis=1)


@contextmanager
def device_memory(nbytes: int, device: int) -> Iterator[int]:
    """Memory of cudaMalloc, which other processes can map."""
    import cupy

    cupy.cuda.Device(device).use()
    address = int(cupy.cuda.runtime.malloc(nbytes))
    try:
        yield address
    finally:
        cupy.cuda.Device(device).use()
        cupy.cuda.runtime.free(address)


def scribble(address: int, nbytes: int, device: int) -> None:
    import cupy

    cupy.cuda.Device(device).use()
    cupy.cuda.runtime.memset(address, 0xA5, nbytes)
    cupy.cuda.runtime.deviceSynchronize()


def fill(address: int, nbytes: int) -> None:
    step = 64 * MIB
    data = np.random.default_rng(0).integers(0, 1 << 63, step // 8, dtype=np.uint64)
    for offset in range(0, nbytes, step):
        gpu.from_host(address + offset, data + np.uint64(offset))


class Peer:
    """The other process, and its memory on GPU ``holder`` as GPU ``reader`` sees it from here."""

    def __init__(self, nbytes: int, holder: int, reader: int) -> None:
        self._reader = reader
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_kernels", "--peer", "--peer-device", str(holder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = 0
        try:
            self.address = gpu.ipc_open(bytes.fromhex(self._ask(nbytes)), reader)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            gpu.ipc_close(self.address, self._reader)
        finally:
            self._end()

    def sums(self, mib: int, kib: int, blocks: int) -> list[int]:
        return [int(word) for word in self._ask("sum", mib, kib, blocks).split()]

    def scribble(self) -> None:
        self._ask("scribble")

    def fill(self) -> None:
        self._ask("fill")

    def _ask(self, *words: object) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*words, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise gpu.GpuError("the other process ended; see above")
        return answer

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(CHILD_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def peer(device: int) -> int:
    """Offers memory, and does what it is asked to, until its standard input ends."""
    nbytes = int(sys.stdin.readline())
    with device_memory(nbytes, device) as base:
        print(gpu.ipc_handle(base).hex(), flush=True)
        pages = gpu.GpuPages(device)
        for line in sys.stdin:
            what, *numbers = line.split()
            if what == "scribble":
                scribble(base, nbytes, device)
                print("done", flush=True)
            elif what == "fill":
                fill(base, nbytes)
                print("done", flush=True)
            else:
                mib, kib, blocks = map(int, numbers)
                print(*pages.checksum(shuffled(base, mib, kib, seed=2), blocks).wait().tolist(), flush=True)
        pages.close()
    return 0


def table(figures: list[Figure]) -> str:
    lines = ["| what | size | pages | GB/s | GPU | call | wall | target |", "|---|---|---|---|---|---|---|---|"]
    for f in figures:
        page = f"{f.page_kib} KiB" if f.page_kib else "-"
        call, wall = (f"{x:,.0f} us" if x else "-" for x in (f.call_us, f.wall_us))
        target = "-" if not f.target else f"{'met' if f.gb_s >= f.target else 'MISSED'} ({f.target:,.0f})"
        lines.append(
            f"| {f.what} | {f.mib} MiB | {page} | {f.gb_s:,.0f} | {f.gpu_us:,.0f} us | {call} | {wall} | {target} |"
        )
    return "\n".join([*lines, *fused_cost(figures), *of_the_limit(figures)])


def fused_cost(figures: list[Figure]) -> list[str]:
    times = {(f.what, f.mib, f.page_kib): f.gpu_us for f in figures}
    costs = [
        f"{mib} MiB in {kib} KiB: {100 * (fused / times[what.removesuffix(SUMMED), mib, kib] - 1):+.1f}%"
        for (what, mib, kib), fused in times.items()
        if what in ("copy" + SUMMED, "pull" + SUMMED)
    ]
    return ["", "Checksums fused into the copy cost (target: under 5%): " + "; ".join(costs)]


def of_the_limit(figures: list[Figure]) -> list[str]:
    """Between two GPUs: what the link moves, of what CUDA itself does in one piece."""
    limits = {f.mib: f.gb_s for f in figures if f.what == PEER_COPY}
    shares = [
        f"{f.mib} MiB in {f.page_kib} KiB: {f.gb_s / limits[f.mib]:.0%}"
        for f in figures
        if f.what == "pull" + SUMMED and f.mib in limits
    ]
    return [f"Pulled with checksums, of {PEER_COPY}: " + "; ".join(shares)] if shares else []


if __name__ == "__main__":
    sys.exit(main())
