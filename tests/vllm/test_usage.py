"""What a client is told of cached tokens is what a plain server would say: prefill's own hits, not all that came."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.cases import BLOCK
from tests.rig.client import Client
from tests.rig.fixtures import Servers, forget
from tests.rig.prompts import Prompts
from tests.rig.router import routed
from tests.rig.servers import MODEL_NAME, Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SHARED = 4 * BLOCK + 5  # tokens that the second prompt of a pair begins with, too
CACHED = "vllm:prompt_tokens_cached_total"
ORDERS = {
    "serial": ("serial",),
    "concurrent": ("concurrent", "--first-token", "off"),
    "first token from prefill": ("concurrent", "--first-token", "auto"),
}
LINK = re.compile(r"\(\w+ pid=\d+\) INFO \d\d-\d\d [\d:]+ \[peers\.py:\d+\] pages (from|to) .* (come|go) over \w+")


def bodies(seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Pairs of requests, by each API and streamed or not: of each pair the second begins like the first."""
    prompts, made = Prompts(seed), []
    for stream in (False, True):
        more: dict[str, Any] = {"model": MODEL_NAME, "max_tokens": 3, "temperature": 0, "stream": stream}
        if stream:
            more["stream_options"] = {"include_usage": True}
        base = prompts.one(SHARED)
        tails = [prompts.one(40)[1:], prompts.one(70)[1:]]
        made += [(COMPLETIONS, {**more, "prompt": [*base, *tail]}) for tail in tails]
        text = f"# {seed} {stream}\n" + "def add(first, second):\n    return first + second\n\n\n" * 24
        made += [
            (CHAT, {**more, "messages": [{"role": "user", "content": text + tail}]})
            for tail in ("print(add(1, 2))", "class Adder:\n    pass\n" * 12)
        ]
    return made


async def usage(client: Client, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the answer says of its tokens."""
    async with client.post(f"{url}{path}", body) as response:
        assert response.headers.get("x-pd-path", "disaggregated") == "disaggregated", response.headers
        if not body["stream"]:
            return dict((await response.json())["usage"])
        lines = [line.strip().removeprefix(b"data: ") async for line in response.content]
    events = [json.loads(line) for line in lines if line and line != b"[DONE]"]
    (told,) = [event["usage"] for event in events if event.get("usage")]
    return dict(told)


async def cached_total(client: Client, server: Server) -> float:
    return watch.metric(await client.get_text(f"{server.url}/metrics"), CACHED)


@pytest.mark.parametrize("order", ORDERS)
def test_cached_tokens_are_prefills_own(order: str, servers: Servers, with_client: Any, logs: Path) -> None:
    """A prompt that nobody knows has none; one that begins like an earlier one has a plain server's count. vLLM's
    metric counts the same."""
    asked = bodies(4100 + len(order))
    how, *more = ORDERS[order]

    async def scenario(client: Client) -> None:
        async def all_of(url: str) -> list[dict[str, Any]]:
            await forget(client, *servers.all)
            return [await usage(client, url, path, body) for path, body in asked]

        plain = await all_of(servers.other_prefill.url)
        with routed([servers.prefill], [servers.decode], logs, how, *more) as router:  # type: ignore[arg-type]
            before = await cached_total(client, servers.decode)
            ours = await all_of(router.url)
            await watch.refresh(client, servers.decode)
            counted = await cached_total(client, servers.decode) - before
        assert ours == plain
        cached = [each["prompt_tokens_details"]["cached_tokens"] for each in ours]
        assert cached[::2] == [0] * 4
        assert all(cached[1::2]), cached
        assert counted == sum(cached)

    with_client(scenario)


def test_what_the_connector_logs_stands_in_vllms_log(servers: Servers) -> None:
    """Which link, why and how fast: in vLLM's form, each line once."""
    for server, what in ((servers.decode, "pages from"), (servers.prefill, "pages to")):
        lines = [line for line in server.log.read_text(errors="replace").splitlines() if what in line]
        assert lines, f"{server}: no line {what!r}"
        assert all(LINK.match(line) for line in lines), lines
        assert len(set(lines)) == len(lines), lines
