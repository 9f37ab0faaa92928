"""Requests of one body have transfers of their own, the same ones on both sides; none is taken for another's."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from pdtransport.engine import request_batches as batches
from pdtransport.engine.commands import Open
from pdtransport.engine.request_batches import Batches
from pdtransport.vllm.scheduler import SchedulerSide
from tests.unit.test_vllm_scheduler import CONSUME, PRODUCE, request, scheduler_half

BODY = "cmpl-0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("request_id", "transfer"),
    [
        (f"{BODY}-0-0a1b2c3d", "t"),
        (f"{BODY}-1-0a1b2c3d", "t.1"),
        (f"{BODY}-12345-12345678", "t.12345"),
        (f"{BODY}-0", "t"),  # VLLM_DISABLE_REQUEST_ID_RANDOMIZATION
        (f"{BODY}-7", "t.7"),
        ("cmpl-mine-3-0-0a1b2c3d", "t"),  # X-Request-Id: mine-3
        ("cmpl-mine-3-2-0a1b2c3d", "t.2"),
        ("cmpl-a\nb-2-0a1b2c3d", "t.2"),
        ("chatcmpl-mine-3-0a1b2c3d", "t"),
        ("0_cmpl-x-0-0a1b2c3d", "t"),
        ("0_chatcmpl-x-0a1b2c3d", "t"),
        ("17", "t"),  # vLLM's own LLM class
        ("resp_123-1-0a1b2c3d", "t"),
    ],
)
def test_the_place_in_a_batch_names_the_transfer(request_id: str, transfer: str) -> None:
    assert Batches().transfer(request_id, "t", minted=False) == (transfer, "")


@pytest.mark.parametrize("request_id", ["1_cmpl-x-0-0a1b2c3d", "12_chatcmpl-x-0a1b2c3d", "3_cmpl-x-2-0a1b2c3d"])
def test_of_several_sequences_the_first_has_the_transfer(request_id: str) -> None:
    transfer, why = Batches().transfer(request_id, "t", minted=False)
    assert (transfer, "several sequences" in why) == ("", True)


def test_a_name_that_has_no_room_for_the_place_is_refused() -> None:
    known = Batches()
    assert known.transfer(f"{BODY}-0-0a1b2c3d", "x" * 128, minted=False) == ("x" * 128, "")
    assert known.transfer(f"{BODY}-1-0a1b2c3d", "x" * 126, minted=False)[0] == "x" * 126 + ".1"
    assert "too long" in known.transfer(f"{BODY}-1-0a1b2c3d", "x" * 127, minted=False)[1]


def test_prompts_of_a_batch_without_a_transfer_share_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode is told the transfer that prefill's answer names: the first prompt's."""
    monkeypatch.setattr(batches, "MAX_MINTED", 3)
    known = Batches()
    assert known.transfer(f"{BODY}-0-0a1b2c3d", "fresh0", minted=True) == ("fresh0", "")
    assert known.transfer(f"{BODY}-1-0a1b2c3d", "fresh1", minted=True) == ("fresh0.1", "")
    assert known.transfer(f"{BODY}-0-0a1b2c3e", "fresh2", minted=True) == ("fresh2", ""), "the same id, another body"
    assert known.transfer(f"{BODY}-1-0a1b2c3e", "fresh3", minted=True) == ("fresh2.1", "")
    assert known.transfer("chatcmpl-a-0a1b2c3e", "fresh4", minted=True) == ("fresh4", "")
    for other in range(10):
        known.transfer(f"cmpl-{other}-0-0a1b2c3d", "f", minted=True)
    assert len(known._minted) == 3
    assert known.transfer(f"{BODY}-2-0a1b2c3e", "fresh5", minted=True) == ("fresh5.2", "")


def side(**roles: Any) -> SchedulerSide:
    return scheduler_half(**roles)


def test_both_sides_name_the_transfers_of_a_batch_alike() -> None:
    prefill, decode = side(producer=True, consumer=False), side(producer=False, consumer=True)
    for index in range(3):
        prefill.on_new_request(request(PRODUCE, name=f"{BODY}-{index}-0a1b2c3{index}"))
        decode.on_new_request(request(CONSUME, name=f"cmpl-other-{index}-1a1b2c3{index}"))
    opened = [command.transfer for command in prefill._before if isinstance(command, Open)]
    assert opened == ["t", "t.1", "t.2"]
    assert [entry.params.transfer_id for entry in decode._consuming._requests.values()] == opened


def test_further_sequences_are_computed_here_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    both = side(producer=True, consumer=True)
    for params in (PRODUCE, CONSUME):
        both.on_new_request(request(params, name="1_cmpl-x-0-0a1b2c3d"))
    assert (len(both._producing), len(both._consuming), both._before) == (0, 0, [])
    assert "1_cmpl-x-0-0a1b2c3d is not handed over: of several sequences (n)" in caplog.text
