"""Streams that a decode server answers without pause, read in a process of their own: the gaps between their tokens."""

from __future__ import annotations

import asyncio
import json
import multiprocessing as mp
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import aiohttp

from tests.rig.client import request_body

ANSWER_S = 30.0
PAUSE_S = 0.2  # before a stream that failed is asked for again


@dataclass(frozen=True)
class Gap:
    """From one token of a stream to the next: when it ended (``time.time``), and how long it was, in seconds."""

    ended: float
    seconds: float


class Streams:
    """``count`` requests under way on a server at all times, each ``tokens`` long after a prompt of ``length`` ids.

    The reader is a process of its own, so that what the benchmark does meanwhile (JSON of long prompts) delays no
    reading.
    """

    def __init__(self, url: str, count: int, length: int, tokens: int, vocabulary: int) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: Any = context.Process(
            target=_read, args=(theirs, url, count, length, tokens, vocabulary), daemon=True
        )
        self._process.start()
        theirs.close()

    def close(self) -> tuple[list[Gap], int]:
        """End the streams; all gaps, and how many requests failed.

        Raises:
            RuntimeError: the reader did not answer.
        """
        try:
            self._pipe.send("stop")
            if not self._pipe.poll(ANSWER_S):
                raise RuntimeError(f"the reader of decode's streams did not answer within {ANSWER_S:.0f} s")
            gaps, failed = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError("the reader of decode's streams ended") from None
        finally:
            self._pipe.close()
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()
        return [Gap(*gap) for gap in gaps], failed


def within(gaps: Sequence[Gap], begin: float, end: float) -> list[float]:
    """Seconds of the gaps that lie wholly within a window."""
    return [gap.seconds for gap in gaps if begin <= gap.ended - gap.seconds and gap.ended <= end]


def _read(pipe: Connection, url: str, count: int, length: int, tokens: int, vocabulary: int) -> None:
    asyncio.run(_streams(pipe, url, count, length, tokens, vocabulary))


async def _streams(pipe: Connection, url: str, count: int, length: int, tokens: int, vocabulary: int) -> None:
    gaps: list[tuple[float, float]] = []
    failed = [0]
    timeout = aiohttp.ClientTimeout(total=None, sock_read=ANSWER_S)
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=1 << 20) as session:
        tasks = [
            asyncio.create_task(_stream(session, url, random.Random(n), length, tokens, vocabulary, gaps, failed))
            for n in range(count)
        ]
        try:
            while not pipe.poll(0):
                await asyncio.sleep(0.02)
        except EOFError:
            pass
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    pipe.send((gaps, failed[0]))


async def _stream(
    session: aiohttp.ClientSession,
    url: str,
    dice: random.Random,
    length: int,
    tokens: int,
    vocabulary: int,
    gaps: list[tuple[float, float]],
    failed: list[int],
) -> None:
    while True:
        prompt = [dice.randrange(3, vocabulary) for _ in range(length)]
        try:
            async with session.post(
                f"{url}/v1/completions", json=request_body(prompt, tokens, stream=True)
            ) as response:
                response.raise_for_status()
                last = 0.0
                async for line in response.content:
                    now = time.time()
                    if not line.startswith(b"data: {"):
                        continue
                    fresh = sum(len(c.get("token_ids") or ()) for c in json.loads(line[6:]).get("choices", ()))
                    if not fresh:
                        continue
                    if last:  # the gap before a stream's first token is its prefill
                        gaps.append((now, (now - last) / fresh))
                    last = now
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            failed[0] += 1
            await asyncio.sleep(PAUSE_S)
