"""The table of families as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tests.layouts.families import FAMILIES
from tests.layouts.trial import CONTROL, CONTROLS, ENOUGH, MAX_LEN, TOLERANCE, TURN

Row = Mapping[str, Any]
COMMAND = "python -m tests.layouts --write docs/models.md"
NOT_RUN = "not run"
COLUMNS = (
    "family",
    "plain server runs here",
    "pages by group",
    "tokens equal",
    f"log-probabilities within {TOLERANCE:g}",
    "prefix hit",
    "preemption",
    "pool",
    "answers changed by one broken page",
)
_KINDS = {
    "FullAttentionSpec": "full",
    "MLAAttentionSpec": "MLA",
    "SlidingWindowSpec": "window",
    "ChunkedLocalAttentionSpec": "chunk",
}

_TEXT = f"""\
<!-- Written by `{COMMAND}`; edit tests/layouts. -->
# Model families

Each row is a tiny model of that architecture with random weights, in float32 on a CPU: a plain vLLM server, and a
prefill and a decode server whose answers must be the plain one's. The layout of the cache is that of the large models:
kinds of attention, windows and chunks by layer, latent attention. Sizes are not, nor are the attention kernels those of
a GPU; layouts that only GPUs have were not run.

- **plain server runs here**: and goes on from its own first token as it did before; a server that does not can't be
  compared with, and its row is void. Otherwise the first error of its log.
- **pages by group**: the cache groups of the decode server (kind of attention and its window, layers, tokens a page),
  and the pages of each that crossed for a prompt of {TURN} tokens. Where vLLM turns its hybrid cache manager off, all
  layers are in one group of full attention.
- **tokens equal**: greedy answers to prompts that straddle the edges of blocks, windows and chunks, in both dispatch
  orders, up to the first token that the plain server itself is unsure of (less than {2 * TOLERANCE:g} nats ahead).
  Decode must have computed the last token of each prompt alone.
- **log-probabilities**: the largest difference of a compared token's log-probability.
- **prefix hit**: prompt tokens of a second turn that decode had from the first one.
- **preemption**: answers to more requests than decode has blocks for, and how many preemptions there were.
- **pool**: tokens that prefill loaded from the pool after it had forgotten a prompt of {TURN}.
- **answers changed by one broken page**: the negative control. The last whole page of one group is zeroed on decode
  after its receipt; of {CONTROLS} prompts of {CONTROL} tokens {ENOUGH:.0%} or more must be answered otherwise, in each
  group, or the row is void: equal tokens would then say little.

Where a cell holds an error, these are its words. Prompts and answers are at most {MAX_LEN} tokens long.
"""


def render(rows: Mapping[str, Row]) -> str:
    """The page, from rows by family."""
    lines = [_TEXT, _when(rows), "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(_cells(family.name, rows.get(family.name))) for family in FAMILIES]
    return "\n".join(lines) + "\n"


def _when(rows: Mapping[str, Row]) -> str:
    done = [row for row in rows.values() if row["date"]]
    dates, versions = sorted({row["date"] for row in done}), sorted({row["vllm"] for row in done})
    if not done:
        return f"Not run yet: `{COMMAND}`."
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"Run {span} with vLLM {', '.join(versions)}: `{COMMAND}`."


def _cells(name: str, row: Row | None) -> list[str]:
    rest = len(COLUMNS) - 2
    if row is None:
        return [name, NOT_RUN, *[""] * rest]
    if row["plain"].startswith("yes, but"):
        return [f"{name} (**void**)", row["plain"], _groups(row), *[""] * (rest - 1)]
    if row["plain"] != "yes":
        return [name, f"plain server does not run here: {row['plain']}", *[""] * rest]
    if row["refused"]:
        return [name, "yes", f"refused: {row['refused']}", *[""] * (rest - 1)]
    failed = f" ({'; '.join(row['failed'])})" if row["failed"] else ""
    return [
        f"{name} (**void**)" if row["void"] else name,
        "yes",
        _groups(row),
        (row["tokens"] or NOT_RUN) + failed,
        _gap(row["logprobs"]),
        *(row[column] or NOT_RUN for column in ("prefix", "preemption", "pool")),
        ", ".join(f"{share:.0%}" for share in row["control"]) or NOT_RUN,
    ]


def _gap(worst: str) -> str:
    if not worst:
        return NOT_RUN
    return f"yes: {worst}" if float(worst) <= TOLERANCE else f"no: {worst}"


def _groups(row: Row) -> str:
    pages: Sequence[int | None] = row["pages"] or [None] * len(row["groups"])
    said: Counter[str] = Counter()
    for group, count in zip(row["groups"], pages, strict=True):
        kind, _, window = group["kind"].partition(":")
        what = " ".join(filter(None, [_KINDS.get(kind, kind), window]))
        layers = f"{group['layers']} layer{'s' if group['layers'] > 1 else ''}"
        said[f"{what} ({layers}, {group['block_size']})" + ("" if count is None else f": {count}")] += 1
    return "; ".join(f"{times} x {what}" if times > 1 else what for what, times in said.items())


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
