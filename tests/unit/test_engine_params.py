"""``kv_transfer_params`` as a client may send them: every field has its bounds, and a wrong one is one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdtransport.engine.params import MAX_RANKS, asked_transfer, parse

CONSUME = {"do_remote_prefill": True, "transfer_id": "t", "remote_host": "127.0.0.1", "remote_port": 1, "tp_size": 1}
DEEP: Any = json.loads("[" * 500 + "]" * 500)
WRONG: list[Any] = [
    None, "", "a\0b", "a b", "ü", "\N{SNOWMAN}", "\ud800", "x" * 300, "x" * 1_000_000, -1, 0, 1 << 31, 1 << 64,
    -(1 << 64), 10**400, 1.5, float("nan"), float("inf"), True, False, [], {}, ["t"], {"t": 1}, DEEP, b"t",
]  # fmt: skip
# What a field takes of these; everything else is refused by its name.
TAKES: dict[str, list[Any]] = {
    "transfer_id": [],
    "remote_host": [],
    "remote_port": [],
    "tp_size": [],
    "first_token": [True, False],
}


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("field", TAKES)
def test_a_field_of_a_wrong_kind_is_refused_by_its_name(field: str) -> None:
    """Whatever a client puts there: no exception, one short line, and the line does not say back what it sent."""
    for value in WRONG:
        if any(same(value, taken) for taken in TAKES[field]):
            continue
        found = parse({**CONSUME, field: value}, producer=True, consumer=True)
        assert found.consume is None, value
        assert found.problem.startswith(f"kv_transfer_params.{field}"), (value, found.problem)
        assert len(found.problem) < 200
        assert found.problem.isprintable()


@pytest.mark.parametrize("value", [*WRONG, 7.0, "7"])
def test_a_token_to_go_on_from_is_one(value: Any) -> None:
    """Where it is none, the request must not start: a client has its first token already."""
    found = parse({"continue_from": value}, producer=True, consumer=True)
    if value is None:
        assert (found.continue_from, found.problem) == (None, "")
    elif same(value, 0):
        assert found.continue_from == 0
    else:
        assert found.lost
        assert found.problem.startswith("kv_transfer_params.continue_from")
        assert len(found.problem) < 200


@pytest.mark.parametrize("field", ["remote_engine_id", "remote_block_ids", "remote_request_id", "anything", "pp_size"])
def test_fields_that_are_others_may_be_anything(field: str) -> None:
    """Routers add what they like, and of vLLM's NIXL keys only the transfer that prefill's answer names is read."""
    for value in WRONG:
        assert parse({**CONSUME, field: value}, producer=True, consumer=True).consume is not None


@pytest.mark.parametrize(
    ("port", "ranks", "may"),
    [
        (65535, 1, True),
        (65535, 2, False),
        (64512, MAX_RANKS, True),
        (64513, MAX_RANKS, False),
        (1, MAX_RANKS + 1, False),
    ],
)
def test_all_ranks_have_a_port(port: int, ranks: int, may: bool) -> None:
    """``tp_size`` multiplies ports: none lies beyond the last one, and there are so many at most."""
    found = parse({**CONSUME, "remote_port": port, "tp_size": ranks}, producer=True, consumer=True)
    assert (found.consume is not None) is may
    assert may or "tp_size" in found.problem


@pytest.mark.parametrize("params", [[], [1], "text", 5, True, 1.5, DEEP, b"x"])
def test_what_is_no_object_asks_for_nothing(params: Any) -> None:
    found = parse(params, producer=True, consumer=True)
    assert (found.produce, found.consume, found.continue_from) == (None, None, None)
    assert asked_transfer(params) == ""


def test_a_giant_name_of_a_transfer_is_cut_before_it_is_looked_at() -> None:
    """Prefill's answer names its transfer in ``remote_request_id``; a client's may be of any length."""
    giant = {**CONSUME, "transfer_id": None, "remote_request_id": "pdtransport:" + "x" * 1_000_000}
    found = parse(giant, producer=True, consumer=True)
    assert found.problem == "kv_transfer_params.transfer_id: String should have at most 128 characters"
