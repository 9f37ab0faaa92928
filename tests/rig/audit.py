"""Compare the bytes of pages that prefill sent with those that decode verified, from the workers' audit files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """Some heads of one block on their way from one worker to another. ``block`` counts within the request's cache
    group."""

    transfer: str
    producer_rank: int
    consumer_rank: int
    group: int
    block: int
    head_lo: int
    head_hi: int


@dataclass(frozen=True)
class Expected:
    """Blocks ``first_block .. blocks`` of a cache group of a transfer must have crossed, all heads of each exactly
    once."""

    first_block: int
    blocks: int
    heads: int = 4
    group: int = 0


Hashes = dict[Part, list[str]]


def read(directory: Path, transfers: Iterable[str]) -> tuple[Hashes, Hashes]:
    """SHA-256 of each part as its producer sent it and as its consumer verified it, in the order written."""
    wanted = set(transfers)
    sent: Hashes = defaultdict(list)
    verified: Hashes = defaultdict(list)
    for file in sorted(directory.glob("*.jsonl")):
        for text in file.read_text().splitlines():
            line = json.loads(text)
            if line["transfer"] not in wanted:
                continue
            producing = line["role"] == "producer"
            ranks = (line["rank"], line["peer_rank"]) if producing else (line["peer_rank"], line["rank"])
            part = Part(line["transfer"], *ranks, line["group"], line["block"], line["head_lo"], line["head_hi"])
            (sent if producing else verified)[part].append(line["sha256"])
    return sent, verified


def problems(directory: Path, expected: Mapping[str, Expected]) -> list[str]:
    """What is wrong with the transfers named by ``expected``: bytes that differ, blocks or heads that never crossed
    or crossed twice. Empty if all is well."""
    sent, verified = read(directory, expected)
    found = []
    covered: dict[str, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for part, hashes in verified.items():
        # A resent part has several hashes on the producer's side: what was verified is what was sent last.
        if part not in sent:
            found.append(f"{part}: verified, but never sent")
        elif len(hashes) > 1:
            found.append(f"{part}: verified {len(hashes)} times")
        elif hashes[0] != sent[part][-1]:
            attempts = ", ".join(each[:12] for each in sent[part])
            found.append(f"{part}: the bytes differ, sent (in this order): {attempts}; verified: {hashes[0][:12]}")
        covered[part.transfer][part.group, part.block] += range(part.head_lo, part.head_hi)
    for transfer, want in expected.items():
        blocks = covered[transfer]
        wanted = {(want.group, block) for block in range(want.first_block, want.blocks)}
        missing, extra = wanted - set(blocks), set(blocks) - wanted
        if missing or extra:
            found.append(f"{transfer}: blocks {sorted(missing)} missing, {sorted(extra)} not asked for, of {want}")
        for block, heads in blocks.items():
            if sorted(heads) != list(range(want.heads)):
                found.append(f"{transfer}: block {block} crossed with heads {sorted(heads)}")
    return found
