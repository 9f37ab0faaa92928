"""The code blocks of a document, and the commands in them: what a reader types, for tests that type it too."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*=")
SERVER = ("python", "-m", "vllm.entrypoints.openai.api_server")


@dataclass(frozen=True)
class Command:
    """One command of a shell block. ``text`` is as it stands; ``words`` are without the variables before it."""

    text: str
    words: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.words[0]

    @property
    def is_vllm(self) -> bool:
        return self.words[: len(SERVER)] == SERVER

    @property
    def runs_on(self) -> bool:
        """Whether it is a server, which a reader leaves running in its terminal."""
        return self.is_vllm or (self.name in ("pdrouter", "pdlaunch", "pdpool") and not self._asks)

    @property
    def _asks(self) -> bool:
        """``pdlaunch pool status``, ``pdpool --status``."""
        return self.words[1] in ("check", "status", "pool", "size", "keys") or "--status" in self.words

    def option(self, name: str, default: str = "") -> str:
        """The value that follows ``name``."""
        return self.words[self.words.index(name) + 1] if name in self.words else default

    @property
    def arguments(self) -> list[str]:
        """What the program itself is given."""
        return list(self.words[len(SERVER) if self.is_vllm else 1 :])


@dataclass(frozen=True)
class Block:
    """One fenced block. ``line``: of its first line of text in the document."""

    language: str
    text: str
    line: int

    @property
    def commands(self) -> list[Command]:
        """Of a shell block, in their order; a command may go on over lines."""
        found: list[Command] = []
        pending = ""
        for line in self.text.splitlines():
            pending = f"{pending}\n{line}" if pending else line
            try:
                done = not line.endswith("\\") and shlex.split(pending.replace("\\\n", ""), comments=True)
            except ValueError:  # within quotes
                continue
            if done:
                found.append(_command(pending, done))
            if done or not line.endswith("\\"):
                pending = ""
        if pending.strip():
            raise ValueError(f"line {self.line}: a command has no end: {pending}")
        return found


def _command(text: str, words: Sequence[str]) -> Command:
    count = next((at for at, word in enumerate(words) if not _VARIABLE.match(word)), len(words))
    pairs = (word.partition("=") for word in words[:count])
    return Command(text, tuple(words[count:]), {name: value for name, _, value in pairs})


def blocks(document: Path, language: str = "") -> list[Block]:
    """The fenced blocks of ``document``, or those of a language."""
    text = document.read_text(encoding="utf-8")
    found = [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in _BLOCK.finditer(text)]
    return [block for block in found if not language or block.language == language]
