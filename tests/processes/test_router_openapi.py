"""The router's OpenAPI description tells the truth: schemathesis asks a running router what the description allows, and
what it does not."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

from pdtransport.router import openapi  # noqa: E402
from tests.processes.test_router import router, server  # noqa: E402

CLIENT, ADMIN = "outside-key", "inside-key"
WITHIN_S = 20.0
DESCRIBED = openapi.describe(public=True, admin=True, keys=True, admin_keys=True)["paths"]
CASES = [
    pytest.param(path, mode, id=f"{path} {mode.value}")
    for path, operations in sorted(DESCRIBED.items())
    for mode in GenerationMode
    for operation in operations.values()
    # any text is a path's part, and where there is neither query nor body there is nothing to do wrong
    if mode is GenerationMode.POSITIVE
    or "requestBody" in operation
    or any(one["in"] == "query" for one in operation.get("parameters", ()))
]
LIMITS = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


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
    found = schemathesis.openapi.from_url(f"{running}/openapi.json", wait_for_schema=WITHIN_S)
    found.config.generation.with_security_parameters = False  # the test brings the keys
    found.config.generation.allow_extra_parameters = False  # which are ignored, as HTTP servers do
    return found


@pytest.mark.parametrize(("path", "mode"), CASES)
def test_no_request_brings_an_answer_that_is_not_described(path: str, mode: Any, described: Any) -> None:
    """No 500; statuses, headers and bodies as described, so errors are in OpenAI's form; keys are asked for where that
    is said (schemathesis asks again without, and with others); what is wrong is refused."""
    inside = path.startswith("/pd/") or path == "/metrics"
    shown = {"Authorization": f"Bearer {ADMIN if inside else CLIENT}"}
    (operation,) = described[path].values()
    tried = 0

    @LIMITS
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        nonlocal tried
        tried += 1
        case.call_and_validate(headers=shown, timeout=WITHIN_S)

    ask()
    assert tried


def test_every_path_that_is_served_is_described_and_needs_no_key_to_read(running: str) -> None:
    with urllib.request.urlopen(f"{running}/openapi.json", timeout=WITHIN_S) as response:
        text = json.load(response)
    assert text["paths"] == DESCRIBED
    wants = {path: [*one.get("security", [])] for path, by in text["paths"].items() for one in by.values()}
    assert {path for path, security in wants.items() if not security} == {"/openapi.json", "/health"}
