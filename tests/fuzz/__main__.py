"""``python -m tests.fuzz wire --seconds 600``: fuzz what arrives from outside.

``wire``, ``exports``: what peers say; ``topology``: files for ``pdlaunch``; ``http``: a router's clients and servers;
``pool``: a pool's clients, its HTTP API, and what lies on its tiers; ``params``: ``kv_transfer_params`` in requests and
answers. ``all``: each of them in a process of its own, two at a time, as ``make fuzz`` does.

Guided by coverage where atheris is installed (``pip install atheris``), else by chance; ``--guided``: or not at all. An
input that crashes or hangs is written to the working directory; ``--input FILE`` runs it again. ``--corpus DIR`` keeps
what reached new code, and ``--pack DIR`` adds that to what every later run begins with (``corpus/TARGET.pack``): of
inputs that reach the same code, the shortest.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

HANG_S = 30  # of wall time, on a machine that may be busy
MAX_LENGTH = 1 << 16
MAX_RSS_MB = 2048
AT_ONCE = 2  # processes
END_S = 120  # for a run of all to start and end, beside its seconds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=["all", "exports", "http", "params", "pool", "topology", "wire"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the unguided mutations")
    parser.add_argument("--corpus", type=Path, help="keep what atheris finds here; default: a folder thrown away")
    parser.add_argument("--guided", action="store_true", help="fail where atheris is not installed")
    parser.add_argument("--input", type=Path, help="run this input only")
    parser.add_argument("--pack", type=Path, help="add the inputs of this folder to the kept ones, and run nothing")
    args = parser.parse_args()
    if args.target == "all":
        return run_all(args.seconds)
    if args.pack is not None:
        return pack(args.target, args.pack)
    if args.input is not None:
        from tests.fuzz.targets import target

        target(args.target)(args.input.read_bytes())
        return 0
    try:
        import atheris
    except ImportError:
        if args.guided:
            parser.error("atheris is not installed: pip install -e '.[dev]', with a Python that it has a wheel for")
        return by_chance(args.target, args.seconds, args.seed)
    with atheris.instrument_imports(include=["pdtransport", "tests.fuzz", "msgpack", "yaml"]):
        from tests.fuzz.seeds import seeds
        from tests.fuzz.targets import target

        run = target(args.target)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = args.corpus or Path(scratch)
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds(args.target)):
            (corpus / f"seed-{number}").write_bytes(seed)
        options = [f"-max_total_time={args.seconds}", f"-timeout={HANG_S}", f"-max_len={MAX_LENGTH}"]
        options += [f"-rss_limit_mb={MAX_RSS_MB}", f"-artifact_prefix=crash-{args.target}-", "-close_fd_mask=0"]
        atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", str(corpus)], run)
        atheris.Fuzz()  # ends the process
    return 0


def run_all(seconds: int) -> int:
    """Every target for so long, some at once; says how many inputs each tried. 1: one found something, or is not
    guided."""
    from tests.fuzz.targets import TARGETS

    def run(name: str) -> int:
        command = [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(seconds), "--guided"]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds + END_S)
        said = ended.stdout + ended.stderr
        tried = re.search(r"number_of_executed_units: *(\d+)", said)
        print(f"{name}: {tried.group(1) if tried else '?'} inputs in {seconds} s", flush=True)
        if ended.returncode:
            print(f"{name} found something:\n{said[-6000:]}", flush=True)
        return ended.returncode

    with ThreadPoolExecutor(AT_ONCE) as workers:
        return int(any(list(workers.map(run, sorted(TARGETS)))))


def pack(target: str, folder: Path) -> int:
    """Keep those of the inputs in ``folder``, and of those kept before, that reach steps from line to line that no
    shorter one reaches. Says how many of how many."""
    from tests.fuzz.seeds import PACKS, kept, write_pack
    from tests.fuzz.targets import target as target_of

    found = sorted(
        {*kept(target), *(file.read_bytes() for file in folder.iterdir())}, key=lambda each: (len(each), each)
    )
    run = target_of(target)
    seen: set[tuple[str, int, int]] = set()
    chosen = []
    for data in found:
        reached = arcs(lambda data=data: run(data))  # type: ignore[misc]
        if not reached <= seen:
            seen |= reached
            chosen.append(data)
    write_pack(target, chosen)
    print(f"{target}: kept {len(chosen)} of {len(found)} inputs in {PACKS / target}.pack")
    return 0


def arcs(call: Callable[[], None]) -> set[tuple[str, int, int]]:
    """The steps from line to line that ``call`` takes, in our code and in what parses for us."""
    taken: set[tuple[str, int, int]] = set()

    def local(frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            at = (frame.f_code.co_filename, last.get(id(frame), 0), frame.f_lineno)
            taken.add(at)
            last[id(frame)] = frame.f_lineno
        return local

    def entered(frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        last.pop(id(frame), None)  # of a frame before this one
        return local if "pdtransport" in name or "yaml" in name else None

    last: dict[int, int] = {}
    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(None)
    return taken


def by_chance(target: str, seconds: float, seed: int) -> int:
    from tests.fuzz.seeds import mutated, seeds
    from tests.fuzz.targets import target as target_of

    inputs, chance, run = seeds(target), random.Random(seed), target_of(target)
    tried, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        data = mutated(inputs, chance)
        try:
            run(data)
        except BaseException:
            Path(f"crash-{target}").write_bytes(data)
            print(f"{target}: a crash after {tried} inputs, written to crash-{target}")
            raise
        tried += 1
    print(f"{target}: {tried} inputs, no crash (unguided: atheris is not installed)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
