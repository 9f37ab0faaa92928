"""What an identity costs: a checkpoint's digest, computed and remembered, beside reading it once, and a checksum
over weights in memory. ``python -m benchmarks.identity --gigabytes 2``
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks._needs import LACKING, room, tell_lacking
from pdtransport.kernels import pages
from pdtransport.kernels.runs import run
from pdtransport.kv.checkpoint import TENSORS, digest_tensors
from pdtransport.kv.digest_cache import SETTLED_S, DigestCache

TENSOR_BYTES = 32 << 20  # one projection of an 8B model
FILE_BYTES = 1 << 30
READ_BYTES = 1 << 20
WAIT_S = 600.0


def main() -> int:
    options = parse()
    place = Path(options.dir or tempfile.gettempdir())
    needed = room(place, int(options.gigabytes * 1e9), "or choose --dir, or fewer --gigabytes")
    if tell_lacking("benchmarks.identity", [needed]):
        return LACKING
    with tempfile.TemporaryDirectory(prefix="pdt-identity-", dir=options.dir) as folder:
        files = checkpoint(Path(folder), int(options.gigabytes * 1e9))
        total = sum(file.stat().st_size for file in files)
        cores = len(os.sched_getaffinity(0))
        print(f"{total / 1e9:.2f} GB in {len(files)} safetensors files, {cores} cores, files in the page cache\n")
        print("| what | s, fastest | s, median | GB/s |\n|---|---|---|---|")
        cache = DigestCache(Path(folder) / "cache")
        rows: list[tuple[str, Callable[[], object]]] = [
            ("read the files once, one thread", partial(read, files)),
            ("SHA-256 of what is read, one thread", partial(read, files, hashlib.sha256)),
            ("digest, one thread", partial(digest_tensors, files, threads=1)),
            (f"digest, as a start computes it ({min(cores, 8)} threads)", partial(digest_tensors, files)),
            (
                "digest, remembered",
                lambda: cache.identity(TENSORS, files, partial(digest_tensors, files), WAIT_S),
            ),
        ]
        time.sleep(SETTLED_S)
        rows[-1][1]()  # computes and remembers it
        for what, call in rows:
            told(what, total, [timed(call) for _ in range(options.runs)])
    weights = np.random.default_rng(0).integers(0, 256, int(options.gigabytes * 1e9) // 8 * 8, dtype=np.uint8)
    held = run(weights.ctypes.data, weights.size)
    told(
        "checksum over as many weights in memory",
        weights.size,
        [timed(lambda: pages.checksum(held, 1)) for _ in range(3)],
    )
    return 0


def checkpoint(folder: Path, nbytes: int) -> list[Path]:
    """Random tensors of one size, the way that checkpoints are cut into files."""
    rng, files, left, number = np.random.default_rng(0), [], nbytes, 0
    while left > 0:
        header, at = {}, 0
        while at < min(FILE_BYTES, left):
            name, number = f"model.layers.{number}.weight", number + 1
            header[name] = {"dtype": "U8", "shape": [TENSOR_BYTES], "data_offsets": [at, at + TENSOR_BYTES]}
            at += TENSOR_BYTES
        raw = json.dumps(header).encode()
        file = folder / f"model-{len(files)}.safetensors"
        with file.open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            for _ in header:
                stream.write(rng.integers(0, 256, TENSOR_BYTES, dtype=np.uint8).tobytes())
        files.append(file)
        left -= at
    return files


def read(files: Sequence[Path], hashing: Callable[[], hashlib._Hash] | None = None) -> None:
    state, room = hashing() if hashing else None, memoryview(bytearray(READ_BYTES))
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(room):
                if state is not None:
                    state.update(room[:count])


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def told(what: str, nbytes: int, seconds: Sequence[float]) -> None:
    best, middle = min(seconds), sorted(seconds)[len(seconds) // 2]
    print(f"| {what} | {best:.4f} | {middle:.4f} | {nbytes / best / 1e9:.1f} |", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.identity", description=str(__doc__).splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the made checkpoint (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="of each row (default: %(default)s)")
    parser.add_argument("--dir", help="where to make it; default: the system's folder for temporary files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
