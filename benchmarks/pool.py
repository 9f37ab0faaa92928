"""The shared pool on this host: ``python -m benchmarks.pool``.

Bytes into and out of the pool beside memcpy (shuffled pages of 32 KiB, checksums and all, in turns, medians);
the same for the disk tier beside fio, where that is installed; lookups from several client processes, with few chunks
and with many; and the index alone, at several sizes: bytes a chunk, and whether lookups slow down as it grows. With
``--gpu`` the pages lie in the memory of GPU 0, and memcpy is cudaMemcpy between it and as many bytes of pinned host
memory, in one piece. ``--parts remote`` takes the way of a client on another host: UCX, within this one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks._figures import keep, measuring
from benchmarks._needs import CUPY, LACKING, SHARED_MEMORY, Need, gpus, package, room, tell_lacking
from benchmarks._pool_index import BATCH, index_of, sizes
from pdtransport.kernels.runs import Runs
from pdtransport.pool.admin.pool_admin import PoolAdmin
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.settings import DiskSettings, PoolSettings
from pdtransport.settings import LinkSettings, Settings

PAGE = 32 << 10
PARTS = ("bytes", "remote", "disk", "lookups", "index")
BATCHES = (BATCH, 256)  # keys in one lookup: prompts of 4096 and 16384 tokens in chunks of 64
LOOKUP_CHUNKS = 4096  # in the pool while lookups are measured
MAPPED_S = 0.5  # in which a pool and a client that just started map its memory, in the background
MiB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if tell_lacking("benchmarks.pool", needs_of(arguments)):
        return LACKING
    if "disk" in arguments.parts and shutil.which("fio") is None:
        print("fio is not here, so the disk is compared with nothing: apt-get install fio", file=sys.stderr)
    result: dict[str, Any] = {}
    with measuring() as ending:
        for part, found in measured(arguments):
            result[part] = found
            keep(arguments.json, json.dumps(result, indent=1) + "\n")
    print(table(result))
    return ending.status


def needs_of(arguments: argparse.Namespace) -> list[Need]:
    """What must be here for the parts that are chosen."""
    needs: list[Need] = []
    if {"bytes", "remote", "disk"} & set(arguments.parts):
        needs.append(room(SHARED_MEMORY, 4 * arguments.bytes, "or choose fewer --bytes"))
    if "bytes" in arguments.parts and arguments.gpu:
        needs += [gpus(1), package("cupy", CUPY)]
    if "remote" in arguments.parts:
        needs.append(package("ucxx", "pip install 'pdtransport[ucx-cu13]', or leave remote out of --parts"))
    if "disk" in arguments.parts:
        needs.append(room(arguments.disk, 4 * arguments.bytes, "or choose --disk, or fewer --bytes"))
    return needs


def measured(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The figures of each part, as soon as they are there; lookups and index grow."""
    if "bytes" in arguments.parts:
        moved = arguments.bytes, arguments.chunk, arguments.rounds
        yield "bandwidth", gpu_bandwidth(*moved, arguments.memory_dir) if arguments.gpu else bandwidth(*moved)
    if "remote" in arguments.parts:
        yield "remote", bandwidth(arguments.bytes, arguments.chunk, arguments.rounds, f"127.0.0.1:{arguments.port}")
    if "disk" in arguments.parts:
        yield "disk", disk(arguments.disk, arguments.bytes, arguments.chunk, arguments.rounds)
    if "lookups" in arguments.parts:
        found: list[dict[str, float]] = []
        for chunks in dict.fromkeys((LOOKUP_CHUNKS, arguments.entries)):
            found = [*found, *lookups(arguments.clients, arguments.seconds, chunks)]
            yield "lookups", found
    if "index" in arguments.parts:
        grown: list[dict[str, float]] = []
        for size in sizes(arguments.entries):
            grown = [*grown, in_process(index_of, size)]
            yield "index", grown


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pool", description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parts = "bytes,disk,lookups,index"
    parser.add_argument("--parts", default=parts, help=f"what to measure; also remote (default: {parts})")
    parser.add_argument("--disk", type=Path, default=Path(), help="where the disk is measured (default: here)")
    parser.add_argument("--port", type=int, default=7790, help="for remote, with the next one (default 7790)")
    parser.add_argument("--gpu", action="store_true", help="bytes out of and into GPU 0's memory")
    parser.add_argument("--memory-dir", type=Path, help="with --gpu: as of pdpool, a hugetlbfs (default: none)")
    parser.add_argument("--bytes", type=int, help="moved per measurement (default 256 MiB, with --gpu 1 GiB)")
    parser.add_argument("--chunk", type=int, default=2 * MiB, help="bytes of a chunk (default 2 MiB)")
    parser.add_argument("--rounds", type=int, default=7, help="medians are over so many (default 7)")
    parser.add_argument("--clients", type=int, default=8, help="processes that look up (default 8)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of lookups (default 3)")
    parser.add_argument("--entries", type=int, default=10_000_000, help="of the largest index (default 10 million)")
    arguments = parser.parse_args(argv)
    arguments.parts = [part.strip() for part in arguments.parts.split(",") if part.strip()]
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"--parts: unknown {', '.join(unknown)}; known are {', '.join(PARTS)}")
    arguments.bytes = arguments.bytes or (1024 if arguments.gpu else 256) * MiB
    if arguments.chunk % PAGE or arguments.bytes % arguments.chunk:
        parser.error(f"--chunk must be a multiple of {PAGE}, and --bytes of --chunk")
    return arguments


@contextlib.contextmanager
def daemon(
    settings: PoolSettings, more: tuple[dict[str, str], list[str]] = ({}, []), listen: str = ""
) -> Iterator[None]:
    """The pool in a process of its own, as people run it. ``more``: environment and options beside the settings'."""
    options = [
        f"--{name.replace('_', '-')}={getattr(settings, name)}"
        for name in ("dir", "memory_bytes", "frame_bytes", "max_chunks", "memory_dir")
        if getattr(settings, name) is not None
    ]
    options += ["--listen", listen] if listen else []
    command = [sys.executable, "-m", "pdtransport.pool.cli", *options, *more[1]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | more[0]) as process:
        try:
            assert process.stdout is not None
            assert "serves" in process.stdout.readline()
            yield
        finally:
            process.terminate()


# -- bytes ------------------------------------------------------------------------------------------


def bandwidth(nbytes: int, chunk: int, rounds: int, listen: str = "") -> dict[str, float]:
    """Bytes a second: memcpy, store, load; and the share of memcpy, each round's store and load beside its memcpy.
    ``listen``: as a client on another host."""
    far = Settings(links=LinkSettings(order=("ucx",)))
    count = nbytes // chunk
    source, target, spare = (_memory(nbytes) for _ in range(3))
    source[:] = np.random.default_rng(0).integers(0, 256, source.shape, dtype=np.uint8)
    runs, back = (_runs(memory.ctypes.data, nbytes, count, seed) for seed, memory in enumerate((source, target)))
    taken: dict[str, list[float]] = {"memcpy": [], "store": [], "load": []}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        made = PoolSettings(dir=Path(place) / "p", memory_bytes=4 * nbytes)
        place_of_it: dict[str, Any] = {"address": f"tcp://{listen}"} if listen else {"directory": made.dir}
        with daemon(made, listen=listen), PoolClient(**place_of_it, settings=far, deadline_s=60.0) as client:
            for number in range(rounds + 1):  # the first one warms up: pages are mapped, threads started
                keys = [os.urandom(32) for _ in range(count)]
                begin = time.perf_counter()
                np.copyto(spare, source)
                copied = time.perf_counter()
                stored = client.store(keys, runs).result()
                between = time.perf_counter()
                loaded = client.load(keys, back).result()
                end = time.perf_counter()
                assert stored.prefix == loaded.prefix == count, (stored.error, loaded.error)
                if number:
                    taken["memcpy"].append(copied - begin)
                    taken["store"].append(between - copied)
                    taken["load"].append(end - between)
                PoolAdmin(client).clear()
    rates = {what: nbytes / median(seconds) for what, seconds in taken.items()}
    shares = {
        f"{what} / memcpy": median(base / own for base, own in zip(taken["memcpy"], taken[what], strict=True))
        for what in ("store", "load")
    }
    return rates | shares


def _memory(nbytes: int) -> np.ndarray:
    """Pages as engines have them: aligned, and touched before."""
    raw = np.ones(nbytes + PAGE, dtype=np.uint8)
    skip = -raw.ctypes.data % PAGE
    return raw[skip : skip + nbytes].reshape(-1, PAGE)


def _runs(address: int, nbytes: int, count: int, seed: int) -> list[Runs]:
    """``count`` chunks over the memory's pages in random order."""
    pages = np.random.default_rng(seed).permutation(nbytes // PAGE).reshape(count, -1)
    runs = np.empty((*pages.shape, 2), dtype=np.uint64)
    runs[..., 0] = address + pages * PAGE
    runs[..., 1] = PAGE
    return list(runs)


def gpu_bandwidth(nbytes: int, chunk: int, rounds: int, memory_dir: Path | None = None) -> dict[str, float]:
    """Bytes a second between GPU memory and the pool, beside one contiguous cudaMemcpy of as many bytes each way
    between it and memory of CUDA's own (``memcpy``); what the kernels, and cudaMemcpy, reach on the pool's memory; and
    how many seconds it took from the client's making to that being registered with CUDA."""
    from pdtransport.kernels import gpu
    from pdtransport.kernels.watch import DeviceMemory

    sys.setswitchinterval(0.0001)  # as the connector does in an engine
    count = nbytes // chunk
    source, target = DeviceMemory(nbytes, 0), DeviceMemory(nbytes, 0)
    host = gpu.pinned(nbytes)
    host[:] = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    gpu.from_host(source.address, host)
    runs, back = (_runs(memory.address, nbytes, count, seed) for seed, memory in enumerate((source, target)))
    taken: dict[str, list[float]] = {"memcpy out": [], "memcpy in": [], "store": [], "load": []}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        made = PoolSettings(dir=Path(place) / "p", memory_bytes=4 * nbytes, memory_dir=memory_dir)
        with daemon(made):
            begin = time.perf_counter()
            with PoolClient(directory=made.dir, deadline_s=60.0, device=0, threads=1) as client:
                client.load([os.urandom(32)], back[:1]).result()
                registered = time.perf_counter() - begin
                kernels = _kernels_alone(client, np.concatenate(runs), np.concatenate(back))
                for number in range(rounds + 1):  # the first one warms up
                    keys = [os.urandom(32) for _ in range(count)]
                    moments = [time.perf_counter()]
                    _cuda_memcpy(host.ctypes.data, source.address, nbytes)
                    moments.append(time.perf_counter())
                    _cuda_memcpy(target.address, host.ctypes.data, nbytes)
                    moments.append(time.perf_counter())
                    stored = client.store(keys, runs).result()
                    moments.append(time.perf_counter())
                    loaded = client.load(keys, back).result()
                    moments.append(time.perf_counter())
                    assert stored.prefix == loaded.prefix == count, (stored.error, loaded.error)
                    if number:
                        for what, seconds in zip(taken, np.diff(moments).tolist(), strict=True):
                            taken[what].append(seconds)
                    PoolAdmin(client).clear()
    for page in (0, chunk // PAGE, nbytes // PAGE - 1):
        pair = (np.concatenate(each)[page, 0] for each in (runs, back))
        assert len({gpu.to_host(int(address), PAGE) for address in pair}) == 1, "a page is not what it was"
    rates = {what: nbytes / median(seconds) for what, seconds in taken.items()}
    shares = {
        "store / memcpy": rates["store"] / rates["memcpy out"],
        "load / memcpy": rates["load"] / rates["memcpy in"],
    }
    return rates | kernels | shares | {"registered s": registered}


def _kernels_alone(client: PoolClient, source: Runs, target: Runs) -> dict[str, float]:
    """Bytes a second of launches of 64 MiB between these pages and shuffled frames of the pool's memory, with
    checksums, without the pool; its content is void then. Best of three."""
    from pdtransport.kernels import gpu

    session, count = client._wire.session, (64 << 20) // PAGE
    assert session is not None
    assert session.mapping is not None
    frames = min(len(source), session.mapping.nbytes // PAGE)
    places = np.random.default_rng(2).permutation(frames)[: min(count, frames)]
    pool = np.empty((len(places), 2), dtype=np.uint64)
    pool[:, 0], pool[:, 1] = session.mapping.address + places * PAGE, PAGE
    found = {}
    for what in ("out", "in"):
        ends = [session.mapping.address, int(source[:, 0].min())]
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            _cuda_memcpy(*(ends if what == "out" else ends[::-1]), len(places) * PAGE)
            taken.append(time.perf_counter() - begin)
        found[f"memcpy pool {what}"] = len(places) * PAGE / min(taken)
    for what, blocks, ours in (("out", 16, source), ("out", 64, source), ("in", 16, target), ("in", 64, target)):
        pages, ours = gpu.GpuPages(0, blocks=blocks), ours[: len(places)]
        one, other = (ours, pool) if what == "out" else (pool, ours)
        launches = [pages.copy_runs(one, other, 32 if len(places) % 32 == 0 else 1) for _ in range(4)]
        for launch in launches:
            launch.wait()
        found[f"kernel {what}/{blocks}b"] = len(places) * PAGE / min(launch.seconds for launch in launches[1:])
        pages.close()
    return found


def _cuda_memcpy(target: int, source: int, nbytes: int) -> None:
    import cupy

    cupy.cuda.runtime.memcpy(target, source, nbytes, 4)  # cudaMemcpyDefault
    cupy.cuda.runtime.deviceSynchronize()


# -- disk ---------------------------------------------------------------------------------------------


def disk(place: Path, nbytes: int, chunk: int, rounds: int) -> dict[str, float]:
    """Bytes a second of the disk tier, through a whole pool: from a store until all is written, and loads of a pool
    that has just started; and what fio does with files and threads like these, each round beside its own. The tier's
    directories are there, as in a pool that has run for a while."""
    count, threads = nbytes // chunk, DiskSettings.model_fields["threads"].default
    source = _memory(nbytes)
    source[:] = np.random.default_rng(0).integers(0, 256, source.shape, dtype=np.uint8)
    runs = _runs(source.ctypes.data, nbytes, count, 0)
    rates: dict[str, list[float]] = {"disk write": [], "disk read": []}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as short, tempfile.TemporaryDirectory(dir=place) as folder:
        made = PoolSettings(dir=Path(short) / "p", memory_bytes=2 * nbytes)
        options = [f"--disk={folder}/tier", f"--disk-bytes={4 * nbytes}", f"--disk-threads={threads}"]
        options.append(f"--writeback-bytes={2 * nbytes}")
        Path(folder, "tier").mkdir(mode=0o700)  # closed to others: its chunks need no digest
        for number in range(4096):  # which a pool makes as it goes, each once
            Path(folder, "tier", "t-", f"{number:03x}").mkdir(parents=True)
        for _ in range(rounds):
            keys = [os.urandom(32) for _ in range(count)]
            with PoolClient(directory=made.dir, deadline_s=60.0) as client:
                with daemon(made, ({}, options)):
                    client.status().result()
                    time.sleep(MAPPED_S)
                    begin = time.perf_counter()
                    assert client.store(keys, runs).result().prefix == count
                    while client.status().result()["writeback_bytes"]:
                        time.sleep(0.002)
                    rates["disk write"].append(nbytes / (time.perf_counter() - begin))
                    written = client.status().result()["counters"].get("disk_written_bytes", 0)
                    assert written >= nbytes, f"only {written} bytes were written: see the log"
                with daemon(made, ({}, options)):
                    while client.lookup(keys).result().there < count:
                        time.sleep(0.01)
                    time.sleep(MAPPED_S)
                    begin = time.perf_counter()
                    assert client.load(keys, runs).result().prefix == count
                    rates["disk read"].append(nbytes / (time.perf_counter() - begin))
                    PoolAdmin(client).clear()
            for what in ("write", "read"):
                found = _fio(folder, what, chunk, count, threads)
                if found:
                    rates.setdefault(f"fio {what}", []).append(found)
    shares = {
        f"{what} / fio": median(
            own / other for own, other in zip(rates[f"disk {what}"], rates[f"fio {what}"], strict=True)
        )
        for what in ("write", "read")
        if f"fio {what}" in rates
    }
    return {what: median(each) for what, each in rates.items()} | shares


def _fio(folder: str, what: str, chunk: int, count: int, threads: int) -> float:
    """Bytes a second; 0 without fio."""
    command = ["fio", "--name=fio", f"--directory={folder}", f"--rw={what}", f"--bs={chunk}", f"--filesize={chunk}"]
    command += [f"--nrfiles={count // threads}", f"--numjobs={threads}", "--thread", "--ioengine=psync", "--direct=1"]
    command += ["--group_reporting", "--file_service_type=sequential", "--openfiles=1", "--fallocate=none"]
    try:
        done = subprocess.run(
            [*command, "--output-format=json"], capture_output=True, text=True, timeout=300, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return 0.0
    if what == "read":
        for file in Path(folder).glob("fio.*"):
            file.unlink()
    return float(json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][what]["bw_bytes"])


# -- lookups ------------------------------------------------------------------------------------------


TIER = """
import numpy as np
from benchmarks.pool import names
from pdtransport.pool.tiers.base import Stored, Tier

class Names(Tier):
    overhead_bytes, threads, shared = 0, 1, True
    def __init__(self, options):
        self.chunks = int(options["chunks"])
    def scan(self):
        raw = names(self.chunks)
        for at in range(0, len(raw), 32):
            yield Stored(raw[at : at + 32], "", 4096, 8)
    def write(self, key, tenant, nbytes, pieces):
        raise OSError("this tier only has names")
    read = delete = write
"""


def names(chunks: int) -> bytes:
    """Keys of so many chunks, always the same."""
    return np.random.default_rng(7).bytes(32 * chunks)


def install(place: Path, chunks: int) -> tuple[dict[str, str], list[str]]:
    """A package with a tier that knows so many names, so that an index can be filled without their bytes: environment
    and options of a pool that uses it."""
    info = place / "pdt_names-1.dist-info"
    info.mkdir()
    (place / "pdt_names.py").write_text(TIER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pdt-names\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pdtransport.pool.tiers]\nnames = pdt_names:Names\n")
    path = os.pathsep.join([str(place), *filter(None, sys.path)])
    return {"PYTHONPATH": path}, ["--tier=names=1TiB", f"--tier-option=names.chunks={chunks}"]


def lookups(clients: int, seconds: float, chunks: int) -> list[dict[str, float]]:
    """Keys looked up a second by so many processes together, some in a message, all of them there, in a pool that
    knows ``chunks``."""
    raw = names(chunks)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        made = PoolSettings(dir=Path(place) / "p", memory_bytes=64 * MiB, max_chunks=chunks + 1)
        with daemon(made, install(Path(place), chunks)), PoolClient(directory=made.dir) as client:
            keys = [raw[at : at + 32] for at in range(0, len(raw), 32 * max(1, chunks // LOOKUP_CHUNKS))][
                :LOOKUP_CHUNKS
            ]
            while client.status(deadline_s=60).result()["chunks"] < chunks:
                time.sleep(0.2)
            return [_together(clients, seconds, batch, made.dir, keys) | {"chunks": chunks} for batch in BATCHES]


def _together(clients: int, seconds: float, batch: int, directory: Path, keys: list[bytes]) -> dict[str, float]:
    context = mp.get_context("spawn")
    start, results = context.Barrier(clients + 1), context.Queue()
    asking = [
        context.Process(target=_ask, args=(directory, keys, seconds, batch, start, results), daemon=True)
        for _ in range(clients)
    ]
    for process in asking:
        process.start()
    start.wait(120)
    found = [results.get(timeout=seconds + 60) for _ in asking]
    for process in asking:
        process.join(30)
    latencies = sorted(each for _, own in found for each in own)
    return {
        "clients": clients,
        "batch": batch,
        "keys a second": sum(count for count, _ in found) / seconds,
        "p50 ms": 1e3 * latencies[len(latencies) // 2],
        "p99 ms": 1e3 * latencies[int(len(latencies) * 0.99)],
    }


def _ask(directory: Path, keys: list[bytes], seconds: float, batch: int, start: Any, results: Any) -> None:
    with PoolClient(directory=directory) as client:
        client.lookup(keys[:1]).result()
        start.wait(120)
        done, taken, at = 0, [], 0
        ends = time.perf_counter() + seconds
        while (begin := time.perf_counter()) < ends:
            done += client.lookup(keys[at : at + batch]).result().there
            taken.append(time.perf_counter() - begin)
            at = (at + batch) % len(keys)
        results.put((done, taken[:: max(1, len(taken) // 10_000)]))


# -- tables ------------------------------------------------------------------------------------------


def in_process(function: Any, *arguments: Any) -> Any:
    """Call it in a fresh process: what it takes up is its own."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def table(result: dict[str, Any]) -> str:
    lines: list[str] = []
    parts = ("bandwidth", "remote", "disk")
    for what, value in [item for part in parts for item in result.get(part, {}).items()]:
        unit = f"{100 * value:8.0f} %" if "/ " in what else f"{value / 1e9:8.2f} GB/s"
        lines.append(f"{what:16} " + (f"{value:8.2f}" if what.endswith(" s") else unit))
    lines += [
        f"lookups          {found['keys a second']:8.0f} keys/s from {found['clients']} clients in batches of "
        f"{found['batch']}, {found['chunks']} chunks; p50 {found['p50 ms']:.2f} ms, p99 {found['p99 ms']:.2f} ms"
        for found in result.get("lookups", [])
    ]
    lines += [
        f"index            {each['chunks']:8} chunks: {each['bytes a chunk']:.0f} bytes each, "
        f"{each['lookups a second'] / 1e6:.2f} M lookups/s, {each['adds a second'] / 1e6:.2f} M adds/s"
        for each in result.get("index", [])
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
