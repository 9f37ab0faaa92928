"""``python -m tests.siege``: every attack beside a bystander, as a table (``--only WORD`` for some, ``--json FILE``).

Attacks are functions of ``tests/siege/attacks_*.py`` that take a folder and return an :class:`Effect`; their tests run
the same functions (``tests/siege/test_*.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.siege.bystander import HEADER, Effect


def attacks() -> dict[str, Callable[[Path], Effect]]:
    """All of them by name: public functions of the modules ``attacks_*`` that return an :class:`Effect`."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("attacks_*.py")):
        module = importlib.import_module(f"tests.siege.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and inspect.signature(function).return_annotation in (Effect, "Effect"):
                found[name] = function
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.siege", description=__doc__)
    parser.add_argument("--only", default="", help="attacks whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    figures, complaints = {}, []
    print(HEADER, flush=True)
    for name, attack in attacks().items():
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            effect = attack(Path(folder))
        print(effect.row(), flush=True)
        figures[name] = dataclasses.asdict(effect)
        if complaint := effect.complaint():
            complaints.append(f"{name}: {complaint}")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1))
    print("\n".join(complaints) or f"{len(figures)} attacks: nobody is held up")
    return 1 if complaints or not figures else 0


if __name__ == "__main__":
    sys.exit(main())
