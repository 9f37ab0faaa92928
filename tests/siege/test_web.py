"""Strangers at our HTTP servers cost nothing: a refused request's body is neither read, inflated nor logged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.siege import attacks_web as web
from tests.siege.attacks_web import HUGE, POOL_TARGETS, TARGETS, WebEffect
from tests.siege.bystander import Effect, in_the_suite

TAKEN_AT_MOST = HUGE // 4  # bytes of an unread body: what the system's buffers hold, and one read


def run(attack: str, folder: Path) -> WebEffect:
    effect: Effect = in_the_suite(getattr(web, attack), folder)
    assert isinstance(effect, WebEffect)
    assert effect.lines == []
    return effect


def test_compressed_bodies_to_the_router(tmp_path: Path) -> None:
    """A bomb is refused like any other body of a stranger's, whatever the path; who has a key is told that bodies are
    not taken compressed. Either way the connection ends, and all of it costs less than inflating one bomb would."""
    effect = run("compressed_bodies_to_the_router", tmp_path)
    assert [shot.status for shot in effect.shots] == [s for s in TARGETS.values() for _ in range(2)] + [415, 415]
    assert all(shot.ended for shot in effect.shots)
    assert effect.processor_s < 2.0


def test_compressed_bodies_to_the_pool(tmp_path: Path) -> None:
    """The same at the pool's HTTP API, and an engine's lookups are not held up."""
    effect = run("compressed_bodies_to_the_pool", tmp_path)
    assert [shot.status for shot in effect.shots] == list(POOL_TARGETS.values())
    assert all(shot.ended for shot in effect.shots)
    assert effect.processor_s < 2.0


@pytest.mark.parametrize("attack", ["lies_to_the_router", "lies_to_the_pool"])
def test_bodies_that_are_not_what_they_say(attack: str, tmp_path: Path) -> None:
    """Every lie gets an answer that says no in one status, and not a line of log."""
    effect = run(attack, tmp_path)
    assert {shot.status for shot in effect.shots} <= {200, 400, 401, 404, 415, 417, 501}
    refused = [shot.status for shot in effect.shots if shot.head.startswith("POST /v1/completions")]
    assert 415 in refused or attack == "lies_to_the_pool"


def test_bodies_that_nobody_wants(tmp_path: Path) -> None:
    """Of 64 MiB behind a refused head no more leaves the sender than buffers hold, nobody invites them by 100 Continue,
    the refusal reaches its sender though it is still sending, and what follows on the connection is not answered."""
    effect = run("unwanted_bodies_to_the_router", tmp_path)
    assert [shot.status for shot in effect.shots] == [status for status in TARGETS.values() for _ in range(4)]
    assert max(shot.sent for shot in effect.shots) < TAKEN_AT_MOST
    assert not any(shot.invited for shot in effect.shots)
    assert {shot.answers for shot in effect.shots} == {1}
