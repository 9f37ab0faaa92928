"""Prints the requirements of a wheel for this Python, one a line, without some packages.

python scripts/wheel_requirements.py FILE.whl --without NAME ...
"""

from __future__ import annotations

import argparse
import email
import re
import zipfile
from collections.abc import Iterator

MAX_METADATA = 1 << 20


def requirements(wheel: str) -> Iterator[str]:
    """Requirement lines of the wheel's metadata, but for extras'."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        with archive.open(name) as file:
            metadata = email.message_from_bytes(file.read(MAX_METADATA))
    for line in metadata.get_all("Requires-Dist") or ():
        if "extra ==" not in line:
            yield line


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("wheel")
    options.add_argument("--without", nargs="*", default=[], metavar="NAME")
    chosen = options.parse_args()
    unwanted = {canonical(name) for name in chosen.without}
    for line in requirements(chosen.wheel):
        name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line)
        if name is None or canonical(name.group()) not in unwanted:
            print(line)


if __name__ == "__main__":
    main()
