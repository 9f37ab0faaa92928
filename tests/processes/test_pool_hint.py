"""Hints: chunks of a prompt that lie on disk are in memory while the request still waits at prefill, because the router
told the pool of it. Pool and router are real; prefill is a server that asks the pool as an engine does.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pdtransport.errors import SettingsError
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.core.key_spaces import Space
from pdtransport.router.settings import RouterSettings
from tests.processes.pool_rig import CHUNK, Pages, daemon, status, until
from tests.processes.test_launch_pool import HALVES
from tests.unit.router_rig import Rig, ask, rigged, run

KEY = "open-sesame"
SPACE, SALTED = Space.of(HALVES, served=("m",)), Space.of(HALVES, served=("m",), salted=True)
TOKENS = list(range(1000, 1032))  # four chunks in two parts each
PARTS = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("keys", KEY), ("salt", "engines' own")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    return tmp_path


@contextmanager
def pool(directory: Path, folder: Path) -> Iterator[str]:
    """With room for twice what hints may bring up; the URL of its API."""
    options = ["--disk", str(folder / "disk"), "--disk-bytes", "64MiB", "--http", "127.0.0.1:0"]
    memory = str(64 * CHUNK)
    with daemon(directory, *options, "--http-key-file", str(folder / "keys"), memory=memory) as made:
        yield made.url()


def keys_of(space: Space, **salts: str) -> list[bytes]:
    return [key for chunk in space.parts(TOKENS, **salts) for key in chunk]


def fill(client: PoolClient, keys: list[bytes]) -> None:
    memory = Pages(1)
    assert client.store(keys, [memory.runs(0)] * len(keys)).result().prefix == len(keys)
    until(lambda: not status(client)["writeback_bytes"], "chunks were not written to disk")


def introduce(client: PoolClient, space: Space) -> None:
    client.lookup([]).result()
    client.introduce(space.model_dump_json())
    until(lambda: client.spaces().result(), "it was not told of the keys")


def hinting(url: str, folder: Path, **more: Any) -> dict[str, Any]:
    return {"pool_hint": {"url": url, "key_file": folder / "keys", **more}}


async def hints(rig: Rig, outcome: str) -> int:
    return int(await rig.metric(f'pdrouter_pool_hints_total{{outcome="{outcome}"}}'))


@pytest.mark.parametrize("salted", [False, True])
def test_chunks_on_disk_are_in_memory_when_prefill_asks(directory: Path, folder: Path, salted: bool) -> None:
    """After a restart of the pool all chunks lie on disk. While prefill still has the request in its queue, those of
    its prompt come up; under the engines' salt and the request's, too."""
    salts = {"salt": "engines' own", "cache_salt": "request's"} if salted else {}
    space, keys = SALTED if salted else SPACE, keys_of(SALTED if salted else SPACE, **salts)
    with PoolClient(directory=directory) as client:
        with pool(directory, folder):
            fill(client, keys)
        with pool(directory, folder) as url:
            until(lambda: client.lookup(keys).result().there == PARTS, "they were not found again")
            assert client.lookup(keys).result().in_memory == 0
            introduce(client, space)

            async def waits(_request: web.Request, body: dict[str, Any]) -> web.Response:
                """In prefill's queue, until the pool has all of it in memory."""
                await asyncio.to_thread(
                    until, lambda: client.lookup(keys).result().in_memory == PARTS, "they did not come up"
                )
                return web.json_response(rig_of[0].p.prefill_answer(body))

            async def test() -> None:
                more = {"salt_file": folder / "salt"} if salted else {}
                async with rigged(**hinting(url, folder, **more)) as rig:
                    rig_of.append(rig)
                    rig.p.script = waits
                    wish = ask(prompt=TOKENS, **({"cache_salt": "request's"} if salted else {}))
                    assert (await rig.ask(wish)).status == 200
                    assert await hints(rig, "begun") == 1
                    assert (await rig.ask(wish)).status == 200
                    await soon_counted(rig, "nothing", 1)

            rig_of: list[Rig] = []
            run(test)
            counters = status(client)["counters"]
            assert (counters["hint_begun"], counters["disk_read_bytes"]) == (PARTS, PARTS * CHUNK)


async def soon_counted(rig: Rig, outcome: str, times: int) -> None:
    for _ in range(400):
        if await hints(rig, outcome) == times:
            return
        await asyncio.sleep(0.02)
    raise TimeoutError(f"{outcome} was not counted {times} times")


def test_what_goes_wrong_with_a_hint_is_counted_and_costs_no_request(
    directory: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pool that no engine told of its keys, one that knows another key, is gone, or accepts and says nothing:
    requests are answered as ever. Prompts that are text are left to the engines, batches name no prompt."""

    async def asks(rig: Rig, outcome: str, **more: Any) -> None:
        assert (await rig.ask(ask(prompt=TOKENS, **more))).status == 200
        await soon_counted(rig, outcome, 1)

    async def test() -> None:
        with pool(directory, folder) as url:
            async with rigged(**hinting(url, folder)) as rig:
                await asks(rig, "refused")
                assert "no engine has reported its key space" in caplog.text
                assert (await rig.ask(ask(prompt="text"))).status == 200
                assert (await rig.ask(ask(prompt=[TOKENS, TOKENS]))).status == 200
                assert (await hints(rig, "text"), await hints(rig, "unfit")) == (1, 1)
            (folder / "keys").write_text("another")
            async with rigged(**hinting(url, folder)) as rig:
                await asks(rig, "refused")
        async with rigged(**hinting(url, folder)) as rig:
            await asks(rig, "failed")
        with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts for it
            port = silent.getsockname()[1]
            async with rigged(**hinting(f"http://127.0.0.1:{port}", folder, timeout_s=0.3, max_queued=2)) as rig:
                for _ in range(4):
                    assert (await rig.ask(ask(prompt=TOKENS))).status == 200
                assert await hints(rig, "dropped") >= 1
                await soon_counted(rig, "failed", 2)
            async with rigged(**hinting(f"http://127.0.0.1:{port}", folder, timeout_s=60)) as rig:
                assert (await rig.ask(ask(prompt=TOKENS))).status == 200  # and the router stops with a hint under way

    with caplog.at_level(logging.WARNING):
        run(test)
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"url": "http://h:1"}, "needs key_file"),
        ({"url": "h:1", "key_file": "k"}, "http://HOST:PORT"),
        ({"url": "http://u:p@h:1", "key_file": "k"}, "http://HOST:PORT"),
        ({"url": "http://h:1/pool", "key_file": "k"}, "http://HOST:PORT"),
    ],
)
def test_settings_that_can_not_be_used_are_said_in_one_line(given: dict[str, Any], says: str) -> None:
    raw = {"prefill": ["http://p:1"], "decode": ["http://d:1"], "pool_hint": given}
    with pytest.raises(SettingsError, match=says) as caught:
        RouterSettings.build(raw)
    assert "\n" not in str(caught.value)
