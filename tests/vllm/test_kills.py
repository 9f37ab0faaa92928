"""Fifty requests at real vLLM while a process is killed or stopped: ``python -m tests.soak.kills``, as a test."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.soak.kills import HEADER, STRIKES, rounds


@pytest.mark.long
def test_no_request_hangs_and_each_ends_with_an_answer_or_a_clear_error(logs: Path) -> None:
    """Whoever is killed or stopped: each request ends with the plain server's tokens or an error in the API's form,
    requests are answered again afterwards, and nothing is held."""
    done = asyncio.run(rounds(list(STRIKES), logs, seed=1))
    print(HEADER, *(outcome.row() for outcome in done), sep="\n")
    problems = {outcome.what: outcome.problems for outcome in done if outcome.problems}
    assert not problems
    stopped = next(outcome for outcome in done if "engine core for" in outcome.what)
    assert stopped.unready_s is not None
    assert set(stopped.ends) <= {"ok", "HTTP 503"}
