"""Draws the protocol from its source: Mermaid diagrams of the state tables, and tables of states and codes.

``python -m pdtransport.protocol.diagram --write docs/protocol.md`` redraws everything between the markers
``<!-- drawn: NAME -->`` and ``<!-- end -->`` of that file; ``--check`` reports whether that would change anything.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pdtransport.protocol import messages, states

_BLOCK = re.compile(r"(<!-- drawn: (?P<name>[a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_STATE_COMMENT = re.compile(r'= "(?P<state>\w+)"\s+# (?P<meaning>.+)')


class DiagramError(Exception):
    """The document can't be redrawn; the text says why."""


def state_diagram(moves: Mapping[Any, Mapping[Any, str]], begin: str) -> str:
    """A Mermaid diagram of one state table; ``begin`` labels the arrow into its first state."""
    first = next(iter(moves))
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {first.value}: {begin}"]
    for old, row in moves.items():
        lines += [f"    {old.value} --> {new.value}: {why}" for new, why in row.items()]
        if not row:
            lines.append(f"    {old.value} --> [*]")
    return "\n".join([*lines, "```"])


def state_table(enum: type[Enum]) -> str:
    """A table of the states and their meanings, taken from the comments in the source."""
    meanings = {m["state"]: m["meaning"] for m in _STATE_COMMENT.finditer(inspect.getsource(enum))}
    missing = [state.value for state in enum if state.value not in meanings]
    if missing:
        raise DiagramError(f"{enum.__name__}: no comment says what {missing[0]} means")
    rows = [f"| `{state.value}` | {meanings[state.value]} |" for state in enum]
    return "\n".join(["| state | meaning |", "|---|---|", *rows])


def code_table() -> str:
    """A table of the codes and their meanings."""
    return state_table(messages.Code).replace("| state |", "| code |", 1)


DRAWINGS: dict[str, Callable[[], str]] = {
    "decode states": lambda: state_diagram(states.CONSUMER_MOVES, "Grant"),
    "decode table": lambda: state_table(states.ConsumerState),
    "prefill states": lambda: state_diagram(states.PRODUCER_MOVES, "a grant meets its request / Accept"),
    "prefill table": lambda: state_table(states.ProducerState),
    "codes": code_table,
}


def redraw(document: str) -> str:
    """``document`` with every drawing redrawn.

    Raises:
        DiagramError: the document lacks the markers of a drawing, or names one that does not exist.
    """
    found = [match["name"] for match in _BLOCK.finditer(document)]
    for name in found:
        if name not in DRAWINGS:
            raise DiagramError(f"there is no drawing {name!r}; there are {', '.join(DRAWINGS)}")
    for name in DRAWINGS:
        if name not in found:
            raise DiagramError(f"the document has no block for {name!r}: add <!-- drawn: {name} --> and <!-- end -->")
    return _BLOCK.sub(lambda match: f"{match[1]}\n{DRAWINGS[match['name']]()}\n\n{match[3]}", document)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pdtransport.protocol.diagram", description=__doc__)
    parser.add_argument("document", type=Path, help="Markdown file with the markers, such as docs/protocol.md")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the file")
    what.add_argument("--check", action="store_true", help="exit with 1 if the file is not up to date")
    options = parser.parse_args(arguments)
    try:
        old = options.document.read_text(encoding="utf-8")
        new = redraw(old)
    except (OSError, DiagramError) as error:
        print(f"{options.document}: {error}", file=sys.stderr)
        return 2
    if options.write:
        options.document.write_text(new, encoding="utf-8")
        return 0
    if new != old:
        print(f"{options.document} is not up to date: run {parser.prog} --write {options.document}", file=sys.stderr)
    return int(new != old)


if __name__ == "__main__":
    sys.exit(main())
