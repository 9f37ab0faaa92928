"""Requests to vLLM servers: plain ones, and disaggregated ones in both dispatch orders, as a router sends them."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import aiohttp

from tests.rig.ports import HOST
from tests.rig.servers import MODEL_NAME, NIXL, Server

REQUEST_S = 900.0
JSON_HEADERS = {"Content-Type": "application/json"}
KEEP_ALIVE_S = 2.0  # vLLM closes idle connections after 5 s: a request sent just then would be lost
ERROR_CHARS = 600

Order = Literal["concurrent", "serial"]
KVParams = Mapping[str, Any]
T = TypeVar("T")


class RequestFailed(Exception):
    """A server answered with an error; ``status`` is HTTP's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text[:ERROR_CHARS]}")
        self.status = status
        self.text = text


@dataclass
class Answer:
    """What a server said. Times are ``time.time`` seconds; ``margins`` holds, for each token, how far its log
    probability lies above the runner-up's, and ``logprobs`` that log probability (only where they were asked for).
    ``arrivals``: when each event of a stream that brought a token was here."""

    tokens: list[int]
    finish: str | None
    kv_params: dict[str, Any] | None
    sent: float
    first_token: float
    done: float
    margins: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    headers: Mapping[str, str] = field(default_factory=dict)
    arrivals: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.first_token - self.sent


@dataclass
class Handed:
    """A disaggregated request: prefill's answer (None if it failed), decode's, and the transfer's id."""

    transfer: str
    prefill: Answer | None
    decode: Answer
    prefill_error: RequestFailed | None = None

    @property
    def tokens(self) -> list[int]:
        return self.decode.tokens


def request_body(
    prompt: Sequence[int],
    max_tokens: int,
    kv: KVParams | None = None,
    *,
    stream: bool = False,
    logprobs: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "seed": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
    }
    if kv is not None:
        body["kv_transfer_params"] = dict(kv)
    if logprobs is not None:
        body["logprobs"] = logprobs
        body["return_tokens_as_token_ids"] = True
    return {**body, **more}


def margins_of(logprobs: Mapping[str, Any] | None) -> list[float]:
    """Distance from each token to the runner-up, in nats."""
    if not logprobs:
        return []
    margins = []
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        others = [value for name, value in top.items() if name != token]
        margins.append(top[token] - max(others))
    return margins


@dataclass(frozen=True)
class Prepared:
    """A request that only needs to be sent: the JSON of a long prompt takes milliseconds to write."""

    url: str
    payload: bytes
    stream: bool
    headers: Mapping[str, str] | None = None


def prepare(
    to: Server | str,
    prompt: Sequence[int],
    max_tokens: int,
    kv: KVParams | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> Prepared:
    """A completion of token ids. ``more`` goes into the request's body."""
    body = request_body(prompt, max_tokens, kv, **more)
    url = to if isinstance(to, str) else to.url
    return Prepared(f"{url}/v1/completions", json.dumps(body).encode(), body["stream"], headers)


class Client:
    """One HTTP session. Use as ``async with Client() as client``."""

    def __init__(self, timeout_s: float = REQUEST_S) -> None:
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(timeout=self._timeout, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def post(
        self, url: str, body: Mapping[str, Any] | bytes, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response of a POST of an object, or of JSON text.

        Raises:
            RequestFailed: it is not 200.
        """
        assert self._session is not None, "use `async with Client()`"
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self._session.post(url, data=payload, headers={**JSON_HEADERS, **(headers or {})}) as response:
            if response.status != 200:
                raise RequestFailed(response.status, await response.text())
            yield response

    async def get_text(self, url: str) -> str:
        assert self._session is not None, "use `async with Client()`"
        async with self._session.get(url) as response:
            text = await response.text()
            if response.status != 200:
                raise RequestFailed(response.status, text)
            return text

    async def complete(
        self, to: Server | str, prompt: Sequence[int], max_tokens: int, kv: KVParams | None = None, **more: Any
    ) -> Answer:
        """One completion of token ids; see :func:`prepare`.

        Raises:
            RequestFailed: the server answered with an error, or a stream carried one.
        """
        return await self.send(prepare(to, prompt, max_tokens, kv, **more))

    async def send(self, request: Prepared) -> Answer:
        """What is answered to a prepared request; its time begins here.

        Raises:
            RequestFailed: the server answered with an error, or a stream carried one.
        """
        sent = time.time()
        async with self.post(request.url, request.payload, request.headers) as response:
            if request.stream:
                return await _read_stream(response, sent)
            data = await response.json()
            answered = response.headers.copy()
        done = time.time()
        choice = data["choices"][0]
        if choice["finish_reason"] == "error":
            raise RequestFailed(200, json.dumps(choice))
        return Answer(
            tokens=choice.get("token_ids") or [],
            finish=choice["finish_reason"],
            kv_params=data.get("kv_transfer_params"),
            sent=sent,
            first_token=done,
            done=done,
            margins=margins_of(choice.get("logprobs")),
            logprobs=(choice.get("logprobs") or {}).get("token_logprobs", []),
            headers=answered,
        )


async def _read_stream(response: aiohttp.ClientResponse, sent: float) -> Answer:
    answer = Answer([], None, None, sent, 0.0, 0.0, headers=response.headers.copy())
    async for raw in response.content:
        line = raw.strip()
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        data = json.loads(line[len(b"data: ") :])
        if "error" in data:
            raise RequestFailed(200, json.dumps(data["error"]))
        for choice in data.get("choices", ()):
            fresh = choice.get("token_ids") or []
            if fresh or "token_ids" not in choice or choice["token_ids"] is None:
                answer.arrivals.append(time.time())  # vLLM sends no event without a token
                answer.first_token = answer.arrivals[0]
            answer.tokens += fresh
            answer.finish = choice.get("finish_reason") or answer.finish
            if answer.finish == "error":
                raise RequestFailed(200, json.dumps(choice))
    answer.done = time.time()
    return answer


def new_transfer() -> str:
    """Minted per dispatch, as the router does."""
    return secrets.token_hex(16)


def to_prefill(server: Server, transfer: str) -> dict[str, Any]:
    params: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer}
    if server.spec.connector in NIXL:  # its toy proxy sends these keys too, and no transfer id
        del params["transfer_id"]
        params |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
    return params


def to_decode(prefill: Server, transfer: str) -> dict[str, Any]:
    """What decode is told when both are dispatched at once, before prefill answered."""
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": transfer,
        "remote_host": HOST,
        "remote_port": prefill.control_port,
        "tp_size": prefill.spec.tp,
    }
    if prefill.spec.connector == "nixl-push":  # it pairs requests by their ids
        params |= {
            "remote_engine_id": prefill.spec.engine_id(prefill.control_port),
            "remote_request_id": f"cmpl-{transfer}-0",
            "pp_size": 1,
        }
    return params


async def hand_off(
    client: Client,
    prefill: Server,
    decode: Server,
    prompt: Sequence[int],
    max_tokens: int,
    order: Order = "concurrent",
    *,
    transfer: str | None = None,
    echo: bool = True,
    model: str = MODEL_NAME,
    **more: Any,
) -> Handed:
    """One disaggregated completion. ``more`` goes into decode's request; without ``echo`` the answers name no token
    ids, as most clients want them: a server spends milliseconds on the ids of a long prompt.

    Raises:
        RequestFailed: decode answered with an error, or (serial) prefill did or said nothing to hand over.
    """
    transfer = transfer or new_transfer()
    both: dict[str, Any] = {"return_token_ids": echo, "model": model}
    if order == "serial":
        first = await client.complete(prefill, prompt, 1, to_prefill(prefill, transfer), **both)
        if not first.kv_params:
            raise RequestFailed(200, "prefill's answer has no kv_transfer_params")
        answer = await client.complete(decode, prompt, max_tokens, first.kv_params, **both, **more)
        return Handed(transfer, first, answer)
    same = {"X-Request-Id": transfer} if prefill.spec.connector == "nixl-push" else None  # see to_decode
    requests = (  # prefill first, as routers do: it is what everything waits for
        prepare(prefill, prompt, 1, to_prefill(prefill, transfer), headers=same, **both),
        prepare(decode, prompt, max_tokens, to_decode(prefill, transfer), headers=same, **both, **more),
    )
    prefilling, decoding = (asyncio.create_task(client.send(request)) for request in requests)
    try:
        answer = await decoding
        (outcome,) = await asyncio.gather(prefilling, return_exceptions=True)
    finally:
        decoding.cancel()
        prefilling.cancel()
    if isinstance(outcome, RequestFailed):
        return Handed(transfer, None, answer, outcome)
    if isinstance(outcome, BaseException):
        raise outcome
    return Handed(transfer, outcome, answer)


async def in_parallel(limit: int, jobs: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Results of ``jobs`` in order, at most ``limit`` under way at a time. The first error ends all of them."""
    gate = asyncio.Semaphore(limit)

    async def run(job: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await job()

    tasks = [asyncio.create_task(run(job)) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
