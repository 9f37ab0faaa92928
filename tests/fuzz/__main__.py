"""``python -m tests.fuzz wire --seconds 600``: fuzz what arrives from outside (``wire``, ``exports``, ``topology``).

Guided by coverage where atheris is installed (``pip install atheris``), else by chance. An input that crashes
or hangs is written to the working directory; ``--input FILE`` runs it again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

HANG_S = 30  # of wall time, on a machine that may be busy
MAX_LENGTH = 1 << 16


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=["wire", "exports", "topology"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the unguided mutations")
    parser.add_argument("--corpus", type=Path, help="keep what atheris finds here; default: a folder thrown away")
    parser.add_argument("--input", type=Path, help="run this input only")
    args = parser.parse_args()
    if args.input is not None:
        from tests.fuzz.targets import TARGETS

        TARGETS[args.target](args.input.read_bytes())
        return 0
    try:
        import atheris
    except ImportError:
        return by_chance(args.target, args.seconds, args.seed)
    with atheris.instrument_imports(include=["pdtransport", "tests.fuzz", "msgpack", "yaml"]):
        from tests.fuzz.seeds import seeds
        from tests.fuzz.targets import TARGETS
    with tempfile.TemporaryDirectory() as scratch:
        corpus = args.corpus or Path(scratch)
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds(args.target)):
            (corpus / f"seed-{number}").write_bytes(seed)
        options = [f"-max_total_time={args.seconds}", f"-timeout={HANG_S}", f"-max_len={MAX_LENGTH}"]
        atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", str(corpus)], TARGETS[args.target])
        atheris.Fuzz()  # ends the process
    return 0


def by_chance(target: str, seconds: float, seed: int) -> int:
    from tests.fuzz.seeds import mutated, seeds
    from tests.fuzz.targets import TARGETS

    inputs, chance = seeds(target), random.Random(seed)
    tried, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        data = mutated(inputs, chance)
        try:
            TARGETS[target](data)
        except BaseException:
            Path(f"crash-{target}").write_bytes(data)
            print(f"{target}: a crash after {tried} inputs, written to crash-{target}")
            raise
        tried += 1
    print(f"{target}: {tried} inputs, no crash (unguided: atheris is not installed)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
