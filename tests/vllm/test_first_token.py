"""With the first token from prefill, a client sees what a plain server says, whatever becomes of the hand-off."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from tests.rig import watch
from tests.rig.cases import MARGIN
from tests.rig.client import Client, in_parallel, request_body
from tests.rig.fixtures import Book, Servers, forget
from tests.rig.gate import gated
from tests.rig.router import RunningRouter, routed
from tests.rig.servers import MODEL_NAME

PROMPTS = 64
AT_A_TIME = 4
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# What may send a request of these tests back to today's way: decode's grant came too late, or the first token is part
# of a character.
EXPECTED = {"prefill", "decode; no_promise", "decode; partial_character"}
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


def bare(event: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between any two answers of one server."""
    kept = {key: value for key, value in event.items() if key not in {"id", "created"}}
    if isinstance(kept.get("usage"), dict):
        kept["usage"] = {key: value for key, value in kept["usage"].items() if value is not None}
    return kept


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


def flat(events: list[dict[str, Any]]) -> str:
    pieces = []
    for event in events:
        for choice in event["choices"]:
            piece = choice.get("text") or choice.get("delta", choice.get("message", {})).get("content")
            pieces.append(piece or "")
    return "".join(pieces)


async def sure_chats(client: Client, url: str, contents: list[str]) -> list[dict[str, Any]]:
    """Chat bodies to whose answers the server is sure of each token."""

    async def learn(content: str) -> dict[str, Any] | None:
        body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": content}], "temperature": 0}
        question = {**body, "max_tokens": 12, "logprobs": True, "top_logprobs": 2, "stream": False}
        ((answer,), _) = await ask(client, url, CHAT, question)
        sure = 0
        for token in answer["choices"][0]["logprobs"]["content"]:
            best, other = (one["logprob"] for one in token["top_logprobs"][:2])
            if best - other < MARGIN:
                break
            sure += 1
        return {**body, "max_tokens": sure} if sure >= 2 else None

    found = await in_parallel(AT_A_TIME, [partial(learn, content) for content in contents])
    return [body for body in found if body is not None]


def test_answers_equal_a_plain_servers(servers: Servers, book: Book, with_client: Any, logs: Path) -> None:
    """Streamed and not, completions and chat, text of many bytes a character: tokens, pieces of text, usage and finish
    reason are a plain server's, event by event, and nearly all began with prefill's token."""
    cases = [case for case in book.assorted if len(case.tokens) >= 2]
    cases = cases[:: max(1, len(cases) // PROMPTS)][:PROMPTS]

    async def scenario(client: Client) -> None:
        plain = servers.decode.url
        bodies = [(COMPLETIONS, request_body(case.prompt, len(case.tokens))) for case in cases]
        for _, body in bodies[::2]:
            body["return_token_ids"] = False
        contents = [*TEXTS, *(flat_text(book, index) for index in range(16))]
        bodies += [(CHAT, body) for body in await sure_chats(client, plain, contents)]
        bodies += [(COMPLETIONS, {**body, "prompt": TEXTS[i % len(TEXTS)]}) for i, (_, body) in enumerate(bodies[:8])]
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
                    assert list(map(bare, got)) == list(map(bare, want)), (path, body, headers)
            print(f"\n{len(bodies)} prompts twice: {dict(seen)}")
            assert set(seen) <= EXPECTED
            assert seen["prefill"] >= 2 * len(bodies) * 0.7, seen
        await watch.settled(client, servers.all)

    with_client(scenario)


def usage(stream: bool) -> dict[str, Any]:
    return {"stream_options": {"include_usage": True}} if stream else {}


def flat_text(book: Book, index: int) -> str:
    from tests.rig.prompts import tokenizer

    return str(tokenizer().decode(list(book.assorted[index * 3].prompt[1:400])))


def first_from(router: RunningRouter, transfer: str) -> dict[str, Any]:
    trace: dict[str, Any] = router.get_json(f"/pd/trace/{transfer}")
    return trace


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
        async with gated(servers.prefill, cut=True) as gate:
            options = ("--first-token", "auto")
            with routed(
                [servers.prefill], [servers.decode], logs, "concurrent", *options, control_port=gate.port
            ) as router:
                got, headers = await ask(client, router.url, COMPLETIONS, body)
                assert headers["x-pd-first-token"] == "prefill"
                assert gate.reached.is_set()
                trace = first_from(router, headers["x-pd-transfer-id"])
        assert [dispatch["order"] for dispatch in trace["dispatches"]] == ["concurrent", "continued"], trace
        assert list(map(bare, got)) == list(map(bare, want))
        await watch.settled(client, servers.all)

    with_client(scenario)


def test_a_client_that_leaves_after_the_first_token(servers: Servers, book: Book, with_client: Any, logs: Path) -> None:
    """It has prefill's token and goes before decode said anything: both servers are free again."""
    case = max(book.assorted, key=lambda case: len(case.prompt))
    body = {**request_body(case.prompt, 50), "stream": True}

    async def scenario(client: Client) -> None:
        await forget(client, *servers.all)
        async with gated(servers.prefill, cut=False) as gate:
            options = ("--first-token", "auto")
            with routed(
                [servers.prefill], [servers.decode], logs, "concurrent", *options, control_port=gate.port
            ) as router:
                async with client.post(f"{router.url}{COMPLETIONS}", body) as response:
                    assert response.headers["x-pd-first-token"] == "prefill"
                    line = await response.content.readline()
                    assert json.loads(line.removeprefix(b"data: "))["choices"][0]["token_ids"] == [case.tokens[0]]
                await asyncio.wait_for(gate.reached.wait(), 10)
                gate.open()
                await watch.settled(client, servers.all)

    with_client(scenario)
