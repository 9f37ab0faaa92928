"""The router's OpenAPI description tells the truth: schemathesis asks a running router what the description allows, and
what it does not."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from pdtransport.router import openapi
from tests.processes.test_router import router, server
from tests.rig.described import WITHIN_S, cases, description, told_truly

CLIENT, ADMIN = "outside-key", "inside-key"
DESCRIBED = openapi.describe(public=True, admin=True, keys=True, admin_keys=True)["paths"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A router that asks for keys, in front of two servers."""
    folder = tmp_path_factory.mktemp("keys")
    options = []
    for name, key in (("api-key-file", CLIENT), ("admin-api-key-file", ADMIN)):
        (folder / name).write_text(key + "\n")
        options += [f"--{name}", str(folder / name)]
    with (
        server("prefill") as (p, _),
        server("decode") as (d, _),
        router("--prefill", p, "--decode", d, *options) as (url, _),
    ):
        yield url


@pytest.fixture(scope="module")
def described(running: str) -> Any:
    return description(running)


@pytest.mark.parametrize(("path", "mode"), cases(DESCRIBED))
def test_no_request_brings_an_answer_that_is_not_described(path: str, mode: Any, described: Any) -> None:
    inside = path.startswith("/pd/") or path == "/metrics"
    told_truly(described, path, mode, ADMIN if inside else CLIENT, examples=25)


def test_every_path_that_is_served_is_described_and_needs_no_key_to_read(running: str) -> None:
    with urllib.request.urlopen(f"{running}/openapi.json", timeout=WITHIN_S) as response:
        text = json.load(response)
    assert text["paths"] == DESCRIBED
    wants = {path: [*one.get("security", [])] for path, by in text["paths"].items() for one in by.values()}
    assert {path for path, security in wants.items() if not security} == {"/openapi.json", "/health", "/live"}
