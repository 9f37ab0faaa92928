"""The GPU page kernels between two processes on one GPU: ``python -m benchmarks.gpu_kernels``.

Shuffled pages go from one process' memory into another's (CUDA IPC), without and with checksums; checksums alone; to
and from pinned host memory with few blocks of threads; beside them CUDA's own copies. Each figure is a median over
runs, by CUDA events; GB/s count a byte that is read and written once. "call" is what the host spends on the launch,
"wall" the time from there to its end. After every copy the other process sums what arrived: a mismatch ends the run.

Needs numpy, cupy and one GPU with 6 GiB free.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

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
TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3  # cudaMemcpyKind


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
        return peer()
    runs = 5 if arguments.quick else 15
    pages_kib = (4, 32) if arguments.quick else PAGES_KIB
    try:
        figures = [*measure(runs, pages_kib, SIZES_MIB[:1] if arguments.quick else SIZES_MIB)]
    except gpu.GpuError as error:
        print(f"gpu_kernels: {error}", file=sys.stderr)
        return 1
    print(table(figures))
    if arguments.json:
        result = {"gpu": gpu.device_uuid(0), "runs": runs, "figures": [asdict(figure) for figure in figures]}
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="64 MiB, two sizes of pages, few runs")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(runs: int, pages_kib: tuple[int, ...], sizes_mib: tuple[int, ...]) -> Iterator[Figure]:
    largest = max(*sizes_mib, HOST_MIB) * MIB
    pages = gpu.GpuPages(0)
    with device_memory(largest) as ours, Peer(largest) as other:
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
            launch = self.pages.checksum(src, blocks) if dst is None else self.pages.copy_runs(src, dst, blocks)
            called = time.perf_counter()
            self.sums = launch.wait().tolist()
            wall_s.append(time.perf_counter() - begun)
            call_s.append(called - begun)
            gpu_s.append(launch.seconds)
        warm = slice(WARM_UPS, None)
        return figure(what, self.mib, self.kib, median(gpu_s[warm]), median(call_s[warm]), median(wall_s[warm]), target)


def plain_copy(what: str, mib: int, source: int, target: int, kind: int, runs: int) -> Figure:
    import cupy

    stream, begun, ended = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Event(), cupy.cuda.Event()
    seconds = []
    for _ in range(runs + WARM_UPS):
        begun.record(stream)
        cupy.cuda.runtime.memcpyAsync(target, source, mib * MIB, kind, stream.ptr)
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
def device_memory(nbytes: int) -> Iterator[int]:
    """Memory of cudaMalloc, which other processes can map."""
    import cupy

    cupy.cuda.Device(0).use()
    address = int(cupy.cuda.runtime.malloc(nbytes))
    try:
        yield address
    finally:
        cupy.cuda.runtime.free(address)


def fill(address: int, nbytes: int) -> None:
    step = 64 * MIB
    data = np.random.default_rng(0).integers(0, 1 << 63, step // 8, dtype=np.uint64)
    for offset in range(0, nbytes, step):
        gpu.from_host(address + offset, data + np.uint64(offset))


class Peer:
    """The other process, and its memory as it lies here."""

    def __init__(self, nbytes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_kernels", "--peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = 0
        try:
            self.address = gpu.ipc_open(bytes.fromhex(self._ask(nbytes)), 0)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            gpu.ipc_close(self.address, 0)
        finally:
            self._end()

    def sums(self, mib: int, kib: int, blocks: int) -> list[int]:
        return [int(word) for word in self._ask("sum", mib, kib, blocks).split()]

    def scribble(self) -> None:
        self._ask("scribble")

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


def peer() -> int:
    """Offers memory, and does what it is asked to, until its standard input ends."""
    import cupy

    nbytes = int(sys.stdin.readline())
    with device_memory(nbytes) as base:
        print(gpu.ipc_handle(base).hex(), flush=True)
        pages = gpu.GpuPages(0)
        for line in sys.stdin:
            what, *numbers = line.split()
            if what == "scribble":
                cupy.cuda.runtime.memset(base, 0xA5, nbytes)
                cupy.cuda.runtime.deviceSynchronize()
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
    return "\n".join([*lines, *fused_cost(figures)])


def fused_cost(figures: list[Figure]) -> list[str]:
    times = {(f.what, f.mib, f.page_kib): f.gpu_us for f in figures}
    costs = [
        f"{mib} MiB in {kib} KiB: {100 * (fused / times['copy', mib, kib] - 1):+.1f}%"
        for (what, mib, kib), fused in times.items()
        if what == "copy with checksums"
    ]
    return ["", "Checksums fused into the copy cost (target: under 5%): " + "; ".join(costs)]


if __name__ == "__main__":
    sys.exit(main())
