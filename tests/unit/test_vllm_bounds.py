"""The scheduler's half: whose KV is whose, which pages are final, and what it remembers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from pdtransport.engine.commands import Drop, Finish, Open, StartReceive
from pdtransport.settings import Settings
from pdtransport.vllm.scheduler import SchedulerSide
from tests.unit.test_vllm_scheduler import CONSUME, PRODUCE, Clock, request, scheduler_half, step, take


def side(**settings: Any) -> SchedulerSide:
    return scheduler_half(Settings(**settings), clock=Clock())


def key_of(**facts: Any) -> bytes:
    """The prompt's digest that prefill and decode name for this request: one and the same."""
    prefill, decode = side(), side()
    prefill.on_new_request(request(PRODUCE, **facts))
    (opened,) = step(prefill).before
    made = request(CONSUME, **facts)
    decode.on_new_request(made)
    (taken,) = take(decode, made, 0, 1, 2, 3, 4)
    assert isinstance(opened, Open)
    assert isinstance(taken, StartReceive)
    assert opened.prompt_digest == taken.prompt_digest
    return opened.prompt_digest


def test_a_tenants_salt_is_part_of_what_a_prompt_is() -> None:
    """Prefill of one tenant never fills a request of another, though both know the transfer's id and send the same
    tokens."""
    assert len({key_of(), key_of(cache_salt="a"), key_of(cache_salt="b")}) == 3
    assert key_of(cache_salt="a") == key_of(cache_salt="a")


def test_an_adapter_goes_with_what_asks_for_a_key() -> None:
    """Its content is a part of what the prompt is, and workers alone know it: both roles tell them which one it is."""
    adapter = SimpleNamespace(lora_name="one", lora_int_id=1, lora_path="/one")
    prefill, decode = side(), side()
    for facts in ({}, {"lora_request": adapter}):
        prefill.on_new_request(request(PRODUCE, **facts))
        made = request(CONSUME, **facts)
        decode.on_new_request(made)
        asked = [*step(prefill).before, *take(decode, made, 0, 1, 2, 3, 4)]
        assert [each.adapter for each in asked if isinstance(each, Open | StartReceive)] == [
            facts.get("lora_request")
        ] * 2
        prefill, decode = side(), side()


def picture(identifier: str, offset: int = 3, length: int = 5) -> Any:
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))


def test_pictures_and_their_places_are_part_of_what_a_prompt_is() -> None:
    """Placeholder tokens are the same for every picture."""
    keys = [key_of(mm_features=[picture(*each)]) for each in (("a",), ("b",), ("a", 4), ("a", 3, 6))]
    assert len({key_of(), *keys}) == 5


@pytest.mark.parametrize("left", [0, 1, 32])
def test_only_a_prompt_that_was_computed_to_its_last_token_is_handed_over(left: int) -> None:
    """vLLM can end a request whose prompt is not all there: decode must not wait for its last block, nor get it."""
    prefill = side()
    made = request(PRODUCE, status=RequestStatus.FINISHED_STOPPED, num_computed_tokens=100 - left)
    prefill.on_new_request(made)
    keep, told = prefill.finished(made, ([1, 2, 3, 4],))
    assert keep
    assert (told is not None) == (left == 0)
    _, end = step(prefill).before
    assert isinstance(end, Drop if left else Finish)


def test_a_prompt_of_embeddings_is_not_handed_over() -> None:
    """It has no tokens that its KV could be identified by: the request is served here, in both roles."""
    for params in (PRODUCE, CONSUME):
        one = side()
        made = request(params, prompt_token_ids=None)
        one.on_new_request(made)
        assert one.matched_tokens(made, 0) == (0, False)
        assert one.finished(made, ([],)) == (False, None)
        assert not any(isinstance(command, Open | StartReceive) for command in step(one).before)


def test_transfers_that_were_taken_are_remembered_within_a_bound() -> None:
    """An engine that runs for a year holds the last `tombstones` of them."""
    decode = side(tombstones=16)
    for number in range(50):
        made = request({**CONSUME, "transfer_id": f"t{number}"}, name=f"r{number}")
        decode.on_new_request(made)
        take(decode, made, 0, 1, 2, 3, 4)
        decode.finished(made, ([],))
    assert list(decode._consuming._taken) == [f"t{number}" for number in range(34, 50)]


@pytest.mark.parametrize(("max_tokens", "goes_on"), [(1, False), (2, True)])
def test_a_request_of_one_token_computes_it_itself(max_tokens: int, goes_on: bool) -> None:
    """Decode that went on from prefill's token would have nothing left to compute, and vLLM no step to end it in."""
    firsts: Any = SimpleNamespace(why_not=lambda made: "")
    decode = scheduler_half(first_tokens=firsts, clock=Clock())
    made = request({**CONSUME, "first_token": True}, max_tokens=max_tokens)
    decode.on_new_request(made)
    (taken,) = take(decode, made, 0, 1, 2, 3, 4)
    assert isinstance(taken, StartReceive)
    assert taken.first_token is goes_on
