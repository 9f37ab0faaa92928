"""Try families and write the table: ``python -m tests.layouts [FAMILY ...] [--write FILE] [--json FILE]``.

Rows of earlier runs stay in the JSON file, so that one family can be tried again alone. With ``--render`` nothing is
tried.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.layouts.families import FAMILIES, named
from tests.layouts.table import render
from tests.layouts.trial import as_json, try_family

RESULTS = Path(__file__).parent / "results.json"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.layouts", description=str(__doc__).splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    parser.add_argument("--write", type=Path, help="write the table here")
    parser.add_argument("--json", type=Path, default=RESULTS, help="rows by family, kept from run to run")
    parser.add_argument("--render", action="store_true", help="try nothing: write what the JSON file holds")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs here")
    asked = parser.parse_args(argv)
    rows: dict[str, dict[str, Any]] = json.loads(asked.json.read_text()) if asked.json.exists() else {}
    logs = asked.logs or Path(tempfile.mkdtemp(prefix="pdt-layouts-"))
    print(f"logs: {logs}", flush=True)
    for family in [] if asked.render else named(asked.families):
        work = Path(tempfile.mkdtemp(prefix=family.name.replace(" ", "-").replace(",", "") + "-", dir=logs))
        row = try_family(family, work)
        rows[family.name] = as_json(row)
        print(json.dumps(rows[family.name]), flush=True)
        asked.json.write_text(json.dumps({f.name: rows[f.name] for f in FAMILIES if f.name in rows}, indent=1) + "\n")
    if asked.write is not None:
        asked.write.write_text(render(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
