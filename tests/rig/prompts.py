"""Prompts of real text as token ids: the running Python's standard library, which tiny-lm knows well.

The same seed gives the same prompts for the same Python; nothing else about the machine matters.
"""

from __future__ import annotations

import random
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

from tests.rig.servers import TINY_LM

BOS = 1
MIN_FILE_BYTES = 8_000
MAX_FILE_BYTES = 250_000  # a token is about 3.5 bytes: enough for 8,000 of them many times over
SKIPPED = {"test", "tests", "site-packages", "__pycache__", "idlelib", "lib2to3", "encodings", "pydoc_data"}


@cache
def sources() -> tuple[Path, ...]:
    """Source files of the standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py")) + sorted(root.glob("*/*.py"))
    return tuple(
        file
        for file in files
        if not SKIPPED & set(file.relative_to(root).parts) and MIN_FILE_BYTES <= file.stat().st_size <= MAX_FILE_BYTES
    )


@cache
def tokenizer(model: Path = TINY_LM) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json"))


@cache
def tokens_of(file: Path, model: Path = TINY_LM) -> tuple[int, ...]:
    """Token ids of a source file, without BOS."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return tuple(tokenizer(model).encode(text, add_special_tokens=False).ids)


class Prompts:
    """A seeded stream of prompts; each is BOS and a stretch of one source file that starts at a line."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def one(self, length: int) -> list[int]:
        """``length`` token ids, BOS among them."""
        if length < 1:
            raise ValueError("a prompt holds at least one token")
        for _ in range(1000):
            tokens = tokens_of(self._random.choice(sources()))
            spare = len(tokens) - (length - 1)
            if spare >= 0:
                start = self._random.randint(0, spare)
                return [BOS, *tokens[start : start + length - 1]]
        raise ValueError(f"no source file of the standard library has {length} tokens")

    def many(self, lengths: list[int]) -> list[list[int]]:
        return [self.one(length) for length in lengths]

    def below(self, low: int, high: int) -> int:
        """A number of ``low..high``, both included."""
        return self._random.randint(low, high)
