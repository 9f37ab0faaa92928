"""Servers that tell the truth about themselves: schemathesis asks what an OpenAPI description allows, and what it does
not, and looks whether the answers are described."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

WITHIN_S = 60.0


def cases(paths: dict[str, Any]) -> list[Any]:
    """Each operation of a description, asked rightly and, where that can be, wrongly. Any text is a part of a path, and
    where there is neither query nor body there is nothing to do wrong."""
    return [
        pytest.param(path, mode, id=f"{path} {mode.value}")
        for path, operations in sorted(paths.items())
        for mode in GenerationMode
        for operation in operations.values()
        if mode is GenerationMode.POSITIVE
        or "requestBody" in operation
        or any(one["in"] == "query" for one in operation.get("parameters", ()))
    ]


def description(url: str) -> Any:
    """Of the server at ``url``, as schemathesis reads it. The tests bring the keys."""
    found = schemathesis.openapi.from_url(f"{url}/openapi.json", wait_for_schema=WITHIN_S)
    found.config.generation.with_security_parameters = False
    found.config.generation.allow_extra_parameters = False  # which are ignored, as HTTP servers do
    return found


def told_truly(described: Any, path: str, mode: Any, key: str, examples: int) -> None:
    """No 500; statuses, headers and bodies as described, so errors have their form; keys are asked for where that is
    said (schemathesis asks again without, and with others); what is wrong is refused."""
    (operation,) = described[path].values()
    tried = 0

    def ask(case: Any) -> None:
        nonlocal tried
        tried += 1
        case.call_and_validate(headers={"Authorization": f"Bearer {key}"}, timeout=WITHIN_S)

    limits: Callable[[Any], Any] = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    limits(given(case=operation.as_strategy(generation_mode=mode))(ask))()
    assert tried
