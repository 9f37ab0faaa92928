"""Sends the shared pool hints about prompts that will be needed soon.

The pool then prefetches their chunks from disk, Redis or object storage while prefill tokenizes the request, finishes
its current step and serves requests queued before it.

A hint only affects timing: no request waits for it or fails because of it, and hints that can't be sent soon are
dropped.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from typing import Any

from aiohttp import ClientError, ClientSession

from pdtransport.router.call import Call
from pdtransport.router.endpoints import Fleet, usable
from pdtransport.router.metrics import Metrics
from pdtransport.router.settings import RouterPoolHint
from pdtransport.router.upstream import reason

log = logging.getLogger("pdtransport.router")

AT_ONCE = 4  # hints sent at a time
MAX_QUEUED_BYTES = 16 << 20  # total size of the prompts of all hints
MAX_ANSWER_BYTES = 64 << 10  # limit of the pool's answer
MAX_TOKENS_BYTES = 32 << 20  # limit of an answer of /tokenize
SAY_S = 60.0  # between two warnings in the log

Headers = list[tuple[str, str]]


class _Unsent(Exception):
    """Why a hint had no effect: an outcome for metrics, and a line for the log."""

    def __init__(self, outcome: str, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome


class Hinter:
    """Sends hints in the background.

    Args:
        key: key of the pool's HTTP API.
        salt: the engines' own salt (``pool.salt``), empty if there is none.
    """

    def __init__(
        self, settings: RouterPoolHint, key: str, salt: str, fleet: Fleet, http: ClientSession, metrics: Metrics
    ) -> None:
        self._settings, self._fleet, self._http, self._metrics = settings, fleet, http, metrics
        self._headers = [("Authorization", f"Bearer {key}"), ("Content-Type", "application/json")]
        self._salt = {"salt": salt} if salt else {}
        self._room = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes = 0
        self._say_at = 0.0

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def offer(self, call: Call, headers: Headers) -> None:
        """Queue a hint for a request that has arrived. Returns at once, never raises.

        ``headers`` are those that servers get with the request.
        """
        if call.decode_only_reason is not None or call.cache_salt is None:
            self._metrics.hints.add("unfit")  # no single prompt, or a cache_salt that servers will refuse
            return
        if not call.has_ids and self._settings.text == "off":
            self._metrics.hints.add("text")
            return
        body = call.prompt_json() if call.has_ids else call.prefill_head + b"}"
        if len(self._tasks) >= self._settings.max_queued or self._bytes + len(body) > MAX_QUEUED_BYTES:
            self._metrics.hints.add("dropped")
            return
        names = {"model": call.model, "cache_salt": call.cache_salt, **self._salt}
        self._bytes += len(body)
        task = asyncio.create_task(self._run(body, names, None if call.has_ids else headers))
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._forget(task, len(body)))

    def _forget(self, task: asyncio.Task[None], nbytes: int) -> None:
        self._tasks.discard(task)
        self._bytes -= nbytes

    async def _run(self, body: bytes, names: dict[str, str], tokenize: Headers | None) -> None:
        try:
            outcome = await asyncio.wait_for(self._send(body, names, tokenize), self._settings.timeout_s)
        except _Unsent as error:
            outcome = error.outcome
            self._say(str(error))
        except (
            ClientError,
            OSError,
            asyncio.TimeoutError,
            ValueError,
            RecursionError,
            LookupError,
            TypeError,
        ) as error:
            outcome = "failed"
            self._say(f"no usable answer within pool_hint.timeout_s: {reason(error)}")
        self._metrics.hints.add(outcome)

    async def _send(self, body: bytes, names: dict[str, str], tokenize: Headers | None) -> str:
        async with self._room:
            tokens = body if tokenize is None else await self._tokenized(body, tokenize)
            wish = json.dumps(names)[:-1].encode() + b',"tokens":' + tokens + b"}"
            url = f"{self._settings.url}/pool/hint"
            told = json.loads(await self._post("the pool", url, wish, self._headers, MAX_ANSWER_BYTES))
        done, of = told["done"], told["of"]
        return "nothing" if not of else "begun" if done == of else "partly"

    async def _tokenized(self, body: bytes, headers: Headers) -> bytes:
        """Token ids from the least loaded prefill server; all have the same tokenizer."""
        servers = usable(self._fleet.prefill)
        if not servers:
            raise _Unsent("failed", "no prefill server is healthy to tokenize it")
        url = f"{min(servers, key=lambda server: server.view.load).url}/tokenize"
        answer = json.loads(await self._post("prefill's /tokenize", url, body, headers, MAX_TOKENS_BYTES))
        return json.dumps(answer["tokens"]).encode()

    async def _post(self, who: str, url: str, body: bytes, headers: Headers, bound: int) -> bytes:
        async with self._http.post(url, data=io.BytesIO(body), headers=headers, allow_redirects=False) as answer:
            parts, size = [], 0
            while part := await answer.content.readany():
                parts.append(part)
                size += len(part)
                if size > bound:
                    raise _Unsent("failed", f"{who} answered with more than {bound} bytes")
            raw = b"".join(parts)
            if answer.status >= 300:
                outcome = "failed" if answer.status >= 500 else "refused"
                raise _Unsent(outcome, f"{who} answered {answer.status}: {_message(raw)}")
            return raw

    def _say(self, why: str) -> None:
        now = time.monotonic()
        if now >= self._say_at:
            self._say_at = now + SAY_S
            log.warning(
                "a hint to the pool had no effect (requests are served without it): %s", why[:300].replace("\n", " ")
            )


def _message(raw: bytes) -> str:
    """The message of an error answer, without anything that could contain prompt text."""
    try:
        text: Any = json.loads(raw)["error"]["message"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return "no reason given"
    return str(text)
