"""What keyed digests of chunks cost a tier's threads: ``python -m benchmarks.digests``.

Chunks of each size are sealed and opened as the pool does it, with and without a digest, by one thread; and written to
a disk tier (``--disk``) and read from it. Seconds are of processor time, so a machine that does other things as well
may run this, though it is slower then.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pdtransport.kernels import pages
from pdtransport.kernels.runs import run
from pdtransport.pool.settings import DiskSettings
from pdtransport.pool.tiers.base import fill
from pdtransport.pool.tiers.disk import DiskTier
from pdtransport.pool.tiers.envelope import Opening, seal
from pdtransport.pool.tiers.keyed_digest import Signer

KEY = bytes(32)
SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
ROWS = ("checksum alone", "sealed", "opened", "written to disk", "read from disk")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digests", description=__doc__)
    parser.add_argument("--bytes", type=int, default=256 << 20, help="that each figure is taken over (256 MiB)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts")
    parser.add_argument("--disk", type=Path, help="folder for the disk tier; default: the system's temporary one")
    arguments = parser.parse_args()
    print("| GB a second of one core | chunk | without | with a digest | added, ms a GB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="pdt-digests-", dir=arguments.disk) as folder:
        for nbytes in SIZES:
            times = max(1, arguments.bytes // nbytes)
            without, with_digest = (
                measure(nbytes, times, arguments.rounds, Path(folder), signer)
                for signer in (None, Signer([secrets.token_hex(32)]))
            )
            for row in ROWS:
                plain, signed = without[row], with_digest[row]
                rates = f"{1e-9 / plain:.2f} | {1e-9 / signed:.2f} | {1e12 * (signed - plain):.0f}"
                print(f"| {row} | {nbytes >> 10} KiB | {rates} |")
    return 0


def measure(nbytes: int, times: int, rounds: int, folder: Path, signer: Signer | None) -> dict[str, float]:
    """Seconds of processor time a byte, by row."""
    content = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    runs = run(content.ctypes.data, nbytes)
    checksum = int(pages.checksum(runs, 1)[0])
    tier = DiskTier(DiskSettings(path=folder / f"tier-{signer is not None}", bytes=1 << 20))
    into = np.zeros(nbytes, dtype=np.uint8)

    def sealed() -> list[bytes | memoryview]:
        if signer is not None:
            pages.checksum(runs, 1)
        return seal(KEY, [content.data], checksum, None, None, signer)

    value = b"".join(sealed())

    def opened() -> None:
        opening = Opening(KEY, [into.data], signer)
        fill(value, opening.place)
        opening.finish()
        pages.checksum(run(into.ctypes.data, nbytes), 1)

    def written() -> None:
        pieces = sealed()
        if signer is None:
            tier.write_checked(KEY, "", nbytes, pieces, checksum)
        else:
            tier.write(KEY, "", nbytes, pieces)

    def read() -> None:
        opening = Opening(KEY, [into.data], signer)
        taken = tier.read(KEY, "", nbytes, opening.place)
        opening.finish()
        if taken is None or not opening.plain:
            pages.checksum(run(into.ctypes.data, nbytes), 1)

    written()
    steps: tuple[Callable[[], object], ...] = (lambda: pages.checksum(runs, 1), sealed, opened, written, read)
    found = {row: min(_seconds(step, times) for _ in range(rounds)) for row, step in zip(ROWS, steps, strict=True)}
    tier.close()
    return {row: seconds / (nbytes * times) for row, seconds in found.items()}


def _seconds(step: Callable[[], object], times: int) -> float:
    begin = time.process_time()
    for _ in range(times):
        step()
    return time.process_time() - begin


if __name__ == "__main__":
    sys.exit(main())
