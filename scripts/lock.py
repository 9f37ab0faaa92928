"""Writes scripts/requirements.lock: what this environment has, each package with its version and a hash of its file.

    python scripts/lock.py [--report FILE ...]

pip says which file it would install for each pinned version, and that file's SHA-256; nothing is installed. The lock
holds for this minor version of Python on this kind of machine. torch is not in it: which of its builds there is (CPU,
CUDA) depends on the index, and scripts/setup_env.sh pins its version. --report: what pip said before (pip install
--dry-run --no-deps --ignore-installed --report FILE -r PINS), instead of asking it again.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

LOCK = Path(__file__).with_name("requirements.lock")
LEFT_OUT = {"torch", "pdtransport", "pip"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Version by name of all that is installed here and belongs into the lock."""
    found = {canonical(one.name): one.version for one in distributions()}
    return {name: version for name, version in sorted(found.items()) if name not in LEFT_OUT}


def ask(wanted: dict[str, str]) -> Any:
    """pip's report about these versions."""
    with tempfile.TemporaryDirectory() as folder:
        listed, report = Path(folder, "pins.txt"), Path(folder, "report.json")
        listed.write_text("".join(f"{name}=={version}\n" for name, version in wanted.items()))
        how = ["--dry-run", "--no-deps", "--ignore-installed", "--no-input", "-q"]
        command = [sys.executable, "-m", "pip", "install", *how, "--report", str(report), "-r", str(listed)]
        subprocess.run(command, check=True)
        return json.loads(report.read_text())


def lines(reports: list[Any], wanted: dict[str, str]) -> list[str]:
    """The lock's lines, in the order of names.

    Raises:
        SystemExit: a package has no hash.
    """
    hashes = {}
    for report in reports:
        for one in report["install"]:
            about, archive = one["metadata"], one["download_info"].get("archive_info", {})
            hashes[canonical(about["name"]), about["version"]] = archive.get("hashes", {}).get("sha256")
    missing = [f"{name}=={version}" for name, version in wanted.items() if not hashes.get((name, version))]
    if missing:
        sys.exit(f"lock: pip told no SHA-256 of {', '.join(missing)}")
    return [f"{name}=={version} --hash=sha256:{hashes[name, version]}" for name, version in wanted.items()]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--report", type=Path, nargs="+", default=[])
    chosen = options.parse_args()
    wanted = pins()
    reports = [json.loads(path.read_text()) for path in chosen.report] or [ask(wanted)]
    made = lines(reports, wanted)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    head = [
        f"# python {python}, {platform.system()} {platform.machine()}",
        "# Made by scripts/lock.py; all but torch, see there.",
    ]
    LOCK.write_text("\n".join([*head, *made]) + "\n")
    print(f"lock: {len(made)} packages in {LOCK}")


if __name__ == "__main__":
    main()
