"""With the first token from prefill, a client sees what a plain server says, whatever becomes of the hand-off."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.cases import MARGIN
from tests.rig.client import Client, in_parallel, request_body
from tests.rig.fixtures import Book, Servers, forget
from tests.rig.lost_prefill import lost_prefill
from tests.rig.router import routed
from tests.rig.servers import MODEL_NAME

PROMPTS = 48  # of token ids; texts and chats come on top
LEAST_TOKENS = 64  # a shorter prompt is computed before decode has granted
AT_A_TIME = 8
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# Why decode may have to sample the first token of these tests: its grant came too late, the token is part of a
# character, or it is the last one.
EXPECTED = {"prefill", "decode; no_promise", "decode; partial_character", "decode; stopped"}
TEXTS = [
    "# Größenangaben für die Straße\nnamen = ['Jürgen', 'Zoë', 'Zoë', 'Jürgen', 'Zoë', 'J",
    "cities = {'Zürich': 1, 'Köln': 2, 'Århus': 3}\nprint(cities['Zürich'], cities['K",
    "GREETINGS = ['こんにちは', 'こんにちは', 'こんにちは', 'こん",
    "s = '日本語テキスト日本語テキスト日本語テキスト'\nt = '日本語",
    "PRICE = '€ 5'  # price in €\nOTHER = '€ 7'  # price in €\nLAST = '€ 9'  # price in ",
    "emoji = ['🙂', '🙂', '🙂', '🙂', '🙂', '",
    "def naïve(café):\n    return café\n\n\ndef naïve2(café):\n    return caf",
    "α, β, γ = 1, 2, 3\nprint(α, β, γ)\nprint(α + β + γ)\nprint(α, β, ",
]


@dataclass
class Told:
    """All that an answer says, however many events it came in."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)  # each time that the prompt's ids were told
    roles: list[str] = field(default_factory=list)
    ends: list[tuple[Any, Any]] = field(default_factory=list)  # finish and stop reasons
    usage: list[dict[str, int]] = field(default_factory=list)
    # Members of the first event (chat's: two), and of its choice. An event of several tokens may take its place.
    form: list[set[str]] = field(default_factory=list, compare=False)


def told(events: list[dict[str, Any]]) -> Told:
    said = Told()
    for event in events:
        if event.get("usage"):  # what was cached, tests/vllm/test_usage.py looks at
            usage = {**event["usage"], "prompt_tokens_details": None}
            said.usage.append({key: value for key, value in usage.items() if value is not None})
        for choice in event["choices"]:
            message = choice.get("delta") or choice.get("message") or choice
            said.text += message.get("text") or message.get("content") or ""
            said.tokens += choice.get("token_ids") or []
            said.roles += [message["role"]] if message.get("role") else []
            said.prompts += [ids for ids in (choice.get("prompt_token_ids"), event.get("prompt_token_ids")) if ids]
            if choice.get("finish_reason"):
                said.ends.append((choice["finish_reason"], choice.get("stop_reason")))
            elif len(said.form) < 2 * (1 + ("delta" in choice)):
                said.form += [set(event), set(choice)]
    return said


async def ask(client: Client, url: str, path: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The events of an answer (one, if it is not streamed), and its headers."""
    async with client.post(f"{url}{path}", body) as response:
        headers = {key.lower(): value for key, value in response.headers.items()}
        if not body["stream"]:
            return [await response.json()], headers
        events, ids = [], set()
        async for raw in response.content:
            line = raw.strip().removeprefix(b"data: ")
            if line and line != b"[DONE]":
                events.append(json.loads(line))
                ids.add(events[-1].get("id"))
        assert len(ids) == 1, f"one answer under several names: {ids}"
        return events, headers


async def sure(client: Client, url: str, path: str, prompts: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Bodies to whose answers the server is sure of each token."""

    async def learn(prompt: str) -> dict[str, Any] | None:
        body: dict[str, Any] = {"model": MODEL_NAME, "temperature": 0, "max_tokens": 12, "stream": False}
        if path == CHAT:
            body["messages"] = [{"role": "user", "content": prompt}]
            ((answer,), _) = await ask(client, url, path, {**body, "logprobs": True, "top_logprobs": 2})
            tops = [[o["logprob"] for o in t["top_logprobs"]] for t in answer["choices"][0]["logprobs"]["content"]]
        else:
            body["prompt"] = prompt
            more = {"logprobs": 2, "return_tokens_as_token_ids": True}
            ((answer,), _) = await ask(client, url, path, {**body, **more})
            tops = [sorted(top.values(), reverse=True) for top in answer["choices"][0]["logprobs"]["top_logprobs"]]
        many = next((i for i, top in enumerate(tops) if top[0] - top[1] < MARGIN), len(tops))
        return {**body, "max_tokens": many} if many >= 2 else None

    found = await in_parallel(AT_A_TIME, [partial(learn, prompt) for prompt in prompts])
    return [(path, body) for body in found if body is not None]


def test_answers_equal_a_plain_servers(servers: Servers, book: Book, with_client: Any, logs: Path) -> None:
    """Streamed and not, completions and chat, characters of many bytes: tokens, text, usage, finish reason and events'
    form are a plain server's, and most answers began with prefill's token."""
    cases = [case for case in sorted(book.assorted, key=lambda case: len(case.prompt)) if len(case.tokens) >= 2]
    cases = [case for case in cases if len(case.prompt) > LEAST_TOKENS][:PROMPTS]

    async def scenario(client: Client) -> None:
        plain = servers.decode.url
        bodies = [(COMPLETIONS, request_body(case.prompt, len(case.tokens))) for case in cases]
        for _, body in bodies[::2]:
            body["return_token_ids"] = False
        contents = [*TEXTS, *(flat_text(book, index) for index in range(16))]
        bodies += await sure(client, plain, CHAT, contents)
        bodies += await sure(client, plain, COMPLETIONS, TEXTS)
        assert len(bodies) >= 60
        seen: Counter[str] = Counter()
        with routed([servers.prefill], [servers.decode], logs, "concurrent", "--first-token", "auto") as router:
            for stream in (True, False):
                asked = [(path, {**body, "stream": stream, **usage(stream)}) for path, body in bodies]
                jobs = {url: [partial(ask, client, url, *one) for one in asked] for url in (plain, router.url)}
                await forget(client, *servers.all)
                wanted = await in_parallel(AT_A_TIME, jobs[plain])
                await forget(client, *servers.all)
                given = await in_parallel(AT_A_TIME, jobs[router.url])
                for (path, body), (want, _), (got, headers) in zip(asked, wanted, given, strict=True):
                    seen[headers["x-pd-first-token"]] += 1
                    ours, theirs = told(got), told(want)
                    assert ours == theirs, (path, body, headers)
                    if len(ours.form) == len(theirs.form):
                        assert ours.form == theirs.form
            print(f"\n{len(bodies)} prompts twice: {dict(seen)}")
            assert set(seen) <= EXPECTED
            assert seen["prefill"] >= len(bodies) // 2, seen  # on a busy machine decode often promises too late
        await watch.settled(client, servers.all)

    with_client(scenario)


def usage(stream: bool) -> dict[str, Any]:
    return {"stream_options": {"include_usage": True}} if stream else {}


def flat_text(book: Book, index: int) -> str:
    from tests.rig.prompts import tokenizer

    return str(tokenizer().decode(list(book.assorted[index * 3].prompt[1:250])))


@pytest.mark.more
def test_a_hand_off_that_fails_after_the_first_token(
    servers: Servers, book: Book, with_client: Any, logs: Path
) -> None:
    """Prefill is lost between its answer and its commit. The client has its token: decode goes on from that one."""
    case = max(book.long, key=lambda case: len(case.tokens))
    body = {**request_body(case.prompt, len(case.tokens)), "stream": True, **usage(True)}

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all)
        want, _ = await ask(client, servers.decode.url, COMPLETIONS, body)
        await forget(client, *servers.all)
        async with lost_prefill(servers.prefill) as prefill:
            with routed([prefill], [servers.decode], logs, "concurrent", "--first-token", "auto") as router:
                got, headers = await ask(client, router.url, COMPLETIONS, body)
                trace = await asyncio.to_thread(router.get_json, f"/pd/trace/{headers['x-pd-transfer-id']}")
        assert headers["x-pd-first-token"] == "prefill"
        assert prefill.answers == 1
        assert [dispatch["order"] for dispatch in trace["dispatches"]] == ["concurrent", "continued"], trace
        assert told(got) == told(want)
        await watch.settled(client, servers.all)

    with_client(scenario)


@pytest.mark.more
def test_a_client_that_leaves_after_the_first_token(servers: Servers, book: Book, with_client: Any, logs: Path) -> None:
    """It has prefill's token and goes before decode said anything: both servers are free again."""
    case = max(book.long, key=lambda case: len(case.tokens))
    body = {**request_body(case.prompt, 50), "stream": True}

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all)
        async with lost_prefill(servers.prefill) as prefill:
            with routed([prefill], [servers.decode], logs, "concurrent", "--first-token", "auto") as router:
                async with client.post(f"{router.url}{COMPLETIONS}", body) as response:
                    assert response.headers["x-pd-first-token"] == "prefill"
                    line = await response.content.readline()
                    assert json.loads(line.removeprefix(b"data: "))["choices"][0]["token_ids"] == [case.tokens[0]]
                await watch.settled(client, servers.all)

    with_client(scenario)
