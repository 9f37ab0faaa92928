"""The ``params`` target: ``kv_transfer_params`` as the connector's scheduler side gets them, and as the router gets
them in prefill's answer.

An input is JSON. A list is a conversation: each member is the parameters of a request that comes, is computed or taken,
and ends.
"""

from __future__ import annotations

import contextlib
import functools
import json
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.request import Request, RequestStatus

from pdtransport.engine.commands import Command, Decline, Open, SendClaim, StartReceive
from pdtransport.engine.params import asked_transfer, parse
from pdtransport.protocol.messages import Code
from pdtransport.router.endpoints import Endpoint
from pdtransport.router.first_token import Unusable, read
from pdtransport.router.settings import EndpointSettings
from pdtransport.router.upstream import UpstreamError, _handover
from pdtransport.settings import Settings
from pdtransport.vllm.cache_groups import HandedGroups
from pdtransport.vllm.scheduler import SchedulerSide
from tests.fuzz.faults import Faults

MAX_REQUESTS = 8  # of one input
BLOCK, TOKENS = 32, 100
ANSWER_KEYS = {
    "do_remote_prefill", "do_remote_decode", "transfer_id", "remote_engine_id", "remote_request_id", "remote_block_ids",
    "remote_host", "remote_port", "tp_size", "first_token", "first_token_declined", "not_handed_over",
}  # fmt: skip


def params(data: bytes) -> None:
    """Whatever a request's parameters hold: they are understood, or a problem in one line; what workers are told names
    transfers, hosts, ports and ranks within bounds, and nothing is kept of a request that is over."""
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):
        return
    faults().begin()
    for each in (given if isinstance(given, list) else [given])[:MAX_REQUESTS]:
        for producer, consumer in ((True, True), (True, False), (False, True)):
            wanted = parse(each, producer=producer, consumer=consumer)
            assert "\n" not in wanted.problem
            assert len(wanted.problem) < 500, wanted.problem
        assert isinstance(asked_transfer(each), str)
        _in_answers(each)
    _in_requests(given if isinstance(given, list) else [given])
    faults().check()


@functools.cache
def faults() -> Faults:
    return Faults()


@functools.cache
def side() -> SchedulerSide:
    """For all inputs of a process: what they leave behind shows."""
    return SchedulerSide(
        Settings(), producer=True, consumer=True, groups=HandedGroups.one(BLOCK), engine="e", port=7, ranks=1
    )


def _request(number: int, given: Any) -> Request | None:
    """As vLLM's server makes it of a body with these parameters; None: it refuses them itself, say, integers of more
    than 64 bits."""
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=8, extra_args={"kv_transfer_params": given})
    except VLLMValidationError:
        return None
    request = Request(f"r{number}", list(range(TOKENS)), sampling, None)
    request.kv_transfer_params = given  # vLLM's own server takes objects only
    request.num_computed_tokens = TOKENS
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    return request


def _in_requests(conversation: list[Any]) -> None:
    here = side()
    made = [_request(number, given) for number, given in enumerate(conversation[:MAX_REQUESTS])]
    requests = [request for request in made if request is not None]
    for request in requests:
        here.on_new_request(request)
    for request in requests:
        external, later = here.matched_tokens(request, 0)
        assert external in (None, 0, TOKENS)  # None: its host's name is being looked up
        assert later == bool(external)
        blocks = SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4],))
        if external is not None and request.request_id in here._consuming:
            here.allocated(request, blocks, external)
    _check(_step(here, requests))
    for request in requests:
        kept, told = here.finished(request, ([1, 2, 3, 4],))
        assert isinstance(kept, bool)
        assert told is None or set(told) <= ANSWER_KEYS
        json.dumps(told)
    _check(_step(here, []))
    assert not here._producing, "requests that are over are kept"
    assert not here._consuming, "requests that are over are kept"
    here._awaited.clear()  # workers would have reported their ends
    here._consuming._taken.clear()


def _step(here: SchedulerSide, requests: list[Any]) -> list[Command]:
    state = SimpleNamespace(get_block_ids=lambda req_id: ([1, 2, 3, 4],))
    scheduled = [request.request_id for request in requests]
    built = here.build(
        SimpleNamespace(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(req_ids=scheduled, num_computed_tokens=[0] * len(scheduled)),
            num_scheduled_tokens=dict.fromkeys(scheduled, TOKENS),
            total_num_scheduled_tokens=TOKENS * len(scheduled),
            preempted_req_ids=set(),
            kv_connector_block_state=state,
        )
    )
    return [*built.before, *built.after]


def _check(commands: list[Command]) -> None:
    for command in commands:
        if isinstance(command, Open | StartReceive | SendClaim | Decline):
            assert 1 <= len(command.transfer) <= 128
            assert command.transfer.isascii()
        if isinstance(command, StartReceive | SendClaim) or (isinstance(command, Decline) and command.host):
            assert 1 <= len(command.host) <= 255
            assert 1 <= command.port <= 65535
            assert 1 <= command.ranks <= 4096
        if isinstance(command, Decline):
            assert isinstance(command.code, Code)


def _in_answers(given: Any) -> None:
    """The same as the hand-off in prefill's answer, with the answer around it."""
    endpoint = Endpoint("prefill", EndpointSettings(url="http://h:1"))
    body = given if isinstance(given, dict) and "choices" in given else {"choices": [], "kv_transfer_params": given}
    with contextlib.suppress(UpstreamError):
        answer = _handover(endpoint, json.dumps(body).encode(), "t")
        if answer.params is not None:
            endpoint.learn(answer.params)
            endpoint.describe()
            for api in ("completions", "chat"):
                with contextlib.suppress(Unusable):
                    read(api, answer.answer, answer.params)  # type: ignore[arg-type]
