"""Bandwidth of each link between two processes on this host: ``python -m benchmarks.links``.

Pages of 4 KiB to 1 MiB, in order and shuffled, checksums off and full, moved by the channels that production uses;
beside them memcpy and ``ucx_perftest`` (from the libucx wheel) over shared memory: with messages of 4 MiB, which it
sends from one buffer again and again, so that it stays in the caches, and with messages as long as all that the links
move, which no cache holds. Everything is measured in turns, several rounds, so that a noisy machine disturbs all alike;
the table shows medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks._figures import FAILED, keep, measuring
from benchmarks._link_sides import Case, Pair
from benchmarks._needs import LACKING
from pdtransport.errors import LinkUnavailable
from pdtransport.kernels import pages
from pdtransport.settings import LinkSettings

LINKS = ("shm", "cma", "ucx")
PAGES_KIB = (4, 8, 16, 32, 64, 128, 256, 1024)
BATCH_BYTES = LinkSettings().batch_bytes
PERFTEST_TESTS = ("ucp_put_bw", "tag_bw")
PERFTEST_PORT = 21090
CACHED_BYTES = 4 << 20
PERFTEST_TOTAL = 2 << 30  # bytes of one measurement
WALK = ", uncached"
PERFTEST_S = 60.0

Rates = dict[tuple[str, str, int], list[float]]  # (what, how, page KiB) -> bytes a second, one a round


def main() -> int:
    arguments = parse()
    if find_perftest() is None:
        print(
            "ucx_perftest is not here, so nothing is compared with it: pip install 'pdtransport[ucx-cu13]'",
            file=sys.stderr,
        )
    pairs: dict[str, Pair] = {}
    for name in arguments.links:
        try:
            pairs[name] = Pair(name, arguments.bytes)
        except LinkUnavailable as error:
            print(f"{name}: {error}", file=sys.stderr)
    if not pairs:
        return LACKING
    rates: Rates = {}
    result: dict[str, Any] = {}
    with measuring() as ending:
        try:
            for number in range(1, arguments.rounds + 1):
                print(f"round {number} of {arguments.rounds}", file=sys.stderr, flush=True)
                measure(pairs, arguments.bytes, arguments.pages, rates)
                result = summarise(rates, {name: pair.why for name, pair in pairs.items()}, arguments)
                keep(arguments.json, json.dumps(result, indent=1) + "\n")
        finally:
            for pair in pairs.values():
                pair.close()
    if not result:
        return ending.status or FAILED
    print(table(result))
    return ending.status


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.links", description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--bytes", type=int, default=256 << 20, help="moved per measurement (default 256 MiB)")
    parser.add_argument(
        "--links", default=",".join(LINKS), help=f"which links, separated by commas (default {','.join(LINKS)})"
    )
    parser.add_argument("--pages", default=",".join(map(str, PAGES_KIB)), help="page sizes in KiB (default: all eight)")
    parser.add_argument("--rounds", type=int, default=5, help="medians are over so many (default 5)")
    arguments = parser.parse_args()
    if arguments.bytes < BATCH_BYTES or arguments.bytes % BATCH_BYTES:
        parser.error(f"--bytes: a multiple of {BATCH_BYTES} is needed")
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    arguments.links = [name.strip() for name in arguments.links.split(",") if name.strip()]
    try:
        arguments.pages = tuple(int(kib) for kib in arguments.pages.split(","))
    except ValueError:
        parser.error("--pages: numbers separated by commas")
    if not set(arguments.pages) <= set(PAGES_KIB):
        parser.error(f"--pages: some of {', '.join(map(str, PAGES_KIB))}")
    unknown = set(arguments.links) - set(LINKS)
    if unknown:
        parser.error(f"--links: {', '.join(sorted(unknown))} is not one of {', '.join(LINKS)}")
    return arguments


def measure(pairs: dict[str, Pair], nbytes: int, pages_kib: tuple[int, ...], rates: Rates) -> None:
    """One round of everything; the baselines stand next to each link's figures."""

    def note(what: str, how: str, page: int, rate: float | None) -> None:
        if rate is not None:
            rates.setdefault((what, how, page), []).append(rate)

    note("memcpy", "", 0, memcpy_rate(nbytes))
    for pair_name, pair in pairs.items():
        for test in PERFTEST_TESTS:
            note(f"ucx_perftest {test}", "", 0, perftest_rate(test, CACHED_BYTES))
            note(f"ucx_perftest {test}{WALK}", "", 0, perftest_rate(test, nbytes))
        for shuffled in (False, True):
            for checksums in (False, True):
                for kib in pages_kib:
                    case = Case(nbytes, kib << 10, shuffled, checksums)
                    note(pair_name, case.label, kib, pair.rate(case))


def memcpy_rate(nbytes: int) -> float:
    """Bytes a second of one thread's memcpy between two warm buffers."""
    source, target = (np.ones(nbytes, dtype=np.uint8) for _ in range(2))
    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        np.copyto(target, source)
        best = max(best, nbytes / (time.perf_counter() - begin))
    return best


def perftest_rate(test: str, message_bytes: int) -> float | None:
    """Overall bytes a second of ucx_perftest between two processes of this host; None where it is not installed."""
    found = find_perftest()
    if found is None:
        return None
    binary, libraries = found
    environment = {**os.environ, "UCX_LOG_LEVEL": "error"}
    if libraries:
        environment["LD_LIBRARY_PATH"] = f"{libraries}:{environment.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    common = [binary, "-p", str(PERFTEST_PORT)]
    server = subprocess.Popen(common, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        count = max(4, PERFTEST_TOTAL // message_bytes)
        wanted = ["-t", test, "-s", str(message_bytes), "-n", str(count), "-w", str(min(20, count // 4)), "-v"]
        client = subprocess.run(
            [*common, "127.0.0.1", *wanted], env=environment, capture_output=True, text=True, timeout=PERFTEST_S
        )
    except subprocess.TimeoutExpired:
        return None
    finally:
        server.kill()
        server.wait()
    return parse_perftest(client.stdout)


def find_perftest() -> tuple[str, str] | None:
    """(the binary, folder of its libraries): from the libucx wheel, else from the path."""
    spec = importlib.util.find_spec("libucx")
    for folder in spec.submodule_search_locations or [] if spec else []:
        binary = Path(folder) / "bin" / "ucx_perftest"
        if binary.exists():
            return str(binary), str(Path(folder) / "lib")
    found = shutil.which("ucx_perftest")
    return (found, "") if found else None


def parse_perftest(output: str) -> float | None:
    """The overall bandwidth of the last line of figures that ``-v`` prints: comma separated, in MB of 2**20 bytes."""
    rows = [line for line in output.splitlines() if re.fullmatch(r"[\d.]+(,[\d.]+){6,}", line.strip())]
    return float(rows[-1].split(",")[5]) * (1 << 20) if rows else None


def summarise(rates: Rates, why: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians in bytes a second, and the ratio of each to the better of ucx_perftest's tests, cached and not."""
    middle = {key: median(values) for key, values in rates.items()}
    tests = {what: rate for (what, _, _), rate in middle.items() if what.startswith("ucx_perftest")}
    perftest = max((rate for what, rate in tests.items() if not what.endswith(WALK)), default=None)
    walking = max((rate for what, rate in tests.items() if what.endswith(WALK)), default=None)
    rows = [
        {
            "what": what,
            "how": how,
            "page_kib": page,
            "bytes_s": round(rate),
            "of_perftest": round(rate / perftest, 3) if perftest else None,
            "of_perftest_uncached": round(rate / walking, 3) if walking else None,
            "all_bytes_s": [round(value) for value in rates[what, how, page]],
        }
        for (what, how, page), rate in middle.items()
    ]
    return {
        "bytes": arguments.bytes,
        "rounds": arguments.rounds,
        "pages_kib": arguments.pages,
        "kernels": pages.BACKEND,
        "why": why,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Baselines, then a line for each link and manner with a column a page size: GB/s."""
    rows = result["rows"]
    lines = [
        f"{result['bytes'] >> 20} MiB a measurement, medians of {result['rounds']}, GB/s, {result['kernels']} kernels"
    ]
    lines += [f"{row['what']:<42}{row['bytes_s'] / 1e9:6.1f}" for row in rows if not row["how"]]
    lines += [f"{name}: {why}" for name, why in result["why"].items()]
    lines.append(f"{'pages of KiB':<42}" + "".join(f"{kib:>6}" for kib in result["pages_kib"]))
    for name in result["why"]:
        chosen = [row for row in rows if row["what"] == name]
        for how in dict.fromkeys(row["how"] for row in chosen):
            figures = "".join(f"{row['bytes_s'] / 1e9:6.1f}" for row in chosen if row["how"] == how)
            lines.append(f"{name + ' ' + how:<42}{figures}")
    for name in result["why"]:
        for row in rows:
            if (
                row["what"] == name
                and row["page_kib"] == 32
                and row["how"].startswith("shuffled")
                and row["of_perftest"]
            ):
                lines.append(
                    f"{name} 32 KiB {row['how']}: {row['of_perftest']:.0%} of ucx_perftest from the caches, "
                    f"{row['of_perftest_uncached']:.0%} of it over as many bytes"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
