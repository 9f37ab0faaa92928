"""Whom decode's scheduler lets its workers call for a request: what a client names is checked first."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from pdtransport.control import names
from pdtransport.engine.callees import Callees
from pdtransport.engine.commands import Command, Decline, SendClaim, StartReceive
from pdtransport.engine.consuming import LEFT
from pdtransport.errors import SettingsError
from pdtransport.protocol.messages import Code
from pdtransport.settings import ControlSettings, Settings
from pdtransport.vllm.request_reader import COMPLAIN_S
from pdtransport.vllm.scheduler import REJECTED, SchedulerSide
from tests.unit.test_vllm_pool import Half, half  # noqa: F401 - a fixture
from tests.unit.test_vllm_scheduler import CONSUME, Clock, blocks, request, scheduler_half, step

ELSEWHERE = ["10.1.2.3", "169.254.169.254", "0.0.0.0", "evil.example.org", "::ffff:8.8.8.8"]


def made(clock: Clock | None = None, heads: int = 0, **control: Any) -> SchedulerSide:
    return scheduler_half(
        Settings.parse({"control": {"allow_plaintext": True, **control}}), heads=heads, clock=clock or Clock()
    )


def called(commands: list[Command]) -> list[str]:
    """Hosts that workers would call."""
    return [
        command.host for command in commands if isinstance(command, SendClaim | StartReceive | Decline) and command.host
    ]


def steps(side: SchedulerSide, until: Any, within_s: float = 20.0) -> list[Command]:
    """What workers are told until something of it is an ``until``."""
    told: list[Command] = []
    deadline = time.monotonic() + within_s
    while not any(isinstance(each, until) for each in told):
        assert time.monotonic() < deadline, told
        told += step(side).before
        time.sleep(0.002)
    return told


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What names mean, in the system's resolver."""
    table: dict[str, str] = {}

    def answer(name: str, *_: Any, **__: Any) -> list[Any]:
        if name not in table:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (table[name], 0))]

    monkeypatch.setattr(names.socket, "getaddrinfo", answer)
    return table


@pytest.mark.parametrize("host", ELSEWHERE)
def test_an_address_elsewhere_is_declined_and_the_prompt_computed_here(host: str) -> None:
    """No worker hears of the address; whoever watches hears which setting it fails, as of any other decline."""
    side = made()
    r = request({**CONSUME, "remote_host": host})
    side.on_new_request(r)
    assert side.matched_tokens(r, 0) == (0, False)
    told = step(side).before
    (declined,) = told
    assert isinstance(declined, Decline)
    assert (declined.transfer, declined.code, declined.host) == ("t", Code.REFUSED, "")
    assert declined.reason.startswith("remote_host: ")
    assert "control.peers" in declined.reason
    assert side.finished(r, ([],)) == (False, None)
    assert not step(side).before


@pytest.mark.parametrize("host", ELSEWHERE)
def test_no_way_of_ending_calls_an_address_elsewhere(host: str) -> None:
    """Nor a request that its server rejected, nor one whose client leaves: both would tell prefill otherwise."""
    side = made()
    stub = request({**CONSUME, "remote_host": host}, abort_immediately=True)
    side.on_new_request(stub)
    gone = request({**CONSUME, "transfer_id": "u", "remote_host": host}, name="s")
    side.on_new_request(gone)
    side.finished(gone, ([],))
    told = step(side).before
    assert REJECTED in [each.reason for each in told if isinstance(each, Decline)]
    assert {each.transfer for each in told if isinstance(each, Decline)} == {"t", "u"}
    assert called(told) == []


def test_a_prompt_that_may_not_be_fetched_is_looked_up_in_the_pool(
    half: Half,  # noqa: F811
    resolver: dict[str, str],
) -> None:
    """It is served like one that came without a transfer: at once, or when its host's name turned out to lead
    elsewhere."""
    half.arrive({**CONSUME, "remote_host": "10.1.2.3"}, name="now")
    assert len(half.pool.asked) == 1
    resolver["evil"] = "169.254.169.254"
    rule = ControlSettings(allow_plaintext=True, peers=["10.1.0.0/16"])
    half.side._consuming.callees = Callees(rule, 0, strict=True)
    later = half.arrive({**CONSUME, "transfer_id": "u", "remote_host": "evil"}, name="later")
    deadline = time.monotonic() + 20
    while len(half.pool.asked) == 1:
        assert half.side.matched_tokens(later, 0) == (None, False)
        assert time.monotonic() < deadline
    assert called(step(half.side).before) == []


def test_peers_that_are_named_are_called(resolver: dict[str, str]) -> None:
    """By address at once; by name as soon as it is looked up, at the address that was checked: the request waits for
    that, the engine does not."""
    resolver["prefill-1"] = "10.1.2.3"
    side = made(peers=["10.1.0.0/16"])
    for host in ("10.1.9.9", "prefill-1"):
        r = request({**CONSUME, "transfer_id": f"t-{host}", "remote_host": host}, name=host)
        side.on_new_request(r)
        deadline = time.monotonic() + 20
        while (found := side.matched_tokens(r, 0)) == (None, False):
            assert time.monotonic() < deadline
        assert found == (100, True)
        side.allocated(r, blocks(1, 2, 3, 4), 100)
    assert {each.host for each in step(side).before if isinstance(each, SendClaim | StartReceive)} == {
        "10.1.9.9",
        "10.1.2.3",
    }


def test_a_name_that_leads_elsewhere_is_declined_while_its_request_waits(resolver: dict[str, str]) -> None:
    """It waits for room, and nobody asks for its pages yet: prefill is not claimed, the decline names the setting."""
    resolver["evil"] = "169.254.169.254"
    side = made(peers=["10.1.0.0/16"])
    r = request({**CONSUME, "remote_host": "evil"})
    side.on_new_request(r)
    told = steps(side, Decline)
    (declined,) = told
    assert isinstance(declined, Decline)
    assert (declined.host, declined.code) == ("", Code.REFUSED)
    assert "evil is 169.254.169.254" in declined.reason
    assert "control.peers" in declined.reason
    assert side.matched_tokens(r, 0) == (0, False)
    assert side.finished(r, ([],)) == (False, None)


@pytest.mark.parametrize("address", ["10.1.2.3", "169.254.169.254", ""])
def test_prefill_that_is_named_hears_of_a_request_that_is_gone(resolver: dict[str, str], address: str) -> None:
    """As soon as its name is looked up; whoever may not be called hears nothing, and those who watch hear it all the
    same."""
    if address:
        resolver["prefill"] = address
    side = made(peers=["10.1.0.0/16"])
    r = request({**CONSUME, "remote_host": "prefill"})
    side.on_new_request(r)
    side.finished(r, ([],))
    if not side._before:
        assert side.has_pending_work(), "a step is owed"
    told = [each for each in steps(side, Decline) if isinstance(each, Decline)]
    assert [(each.transfer, each.reason) for each in told if each.reason == LEFT] == [("t", LEFT)] * (len(told) > 0)
    assert called(list(told)) == (["10.1.2.3"] if address == "10.1.2.3" else [])


@pytest.mark.parametrize(
    ("heads", "ranks", "may"), [(8, 1, True), (8, 8, True), (8, 3, False), (8, 16, False), (0, 3, True)]
)
def test_a_model_is_split_over_ranks_that_divide_its_heads(heads: int, ranks: int, may: bool) -> None:
    """vLLM runs no other tensor-parallel size: a client that names one has nobody called for it."""
    side = made(heads=heads)
    r = request({**CONSUME, "tp_size": ranks})
    side.on_new_request(r)
    assert side.matched_tokens(r, 0) == ((100, True) if may else (0, False))
    declined = [each for each in step(side).before if isinstance(each, Decline)]
    assert [each.reason for each in declined] == (
        [] if may else [f"tp_size: a model of {heads} attention heads is not split over {ranks} workers"]
    )


def test_a_batch_declines_each_of_its_own_transfers() -> None:
    """Prompts of one body have a transfer each: every one of them is told."""
    side = made()
    for prompt in range(3):
        side.on_new_request(request({**CONSUME, "remote_host": "10.1.2.3"}, name=f"cmpl-a-{prompt}"))
    declined = [each.transfer for each in step(side).before if isinstance(each, Decline)]
    assert declined == ["t", "t.1", "t.2"]


def test_what_clients_send_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """A line now and then, with how many more there were; a request's own name, which a client may choose, is cut."""
    clock = Clock()
    side = made(clock)
    for number in range(1000):
        side.on_new_request(request({**CONSUME, "remote_host": "10.1.2.3"}, name=f"{'x' * 5000}\n{number}"))
    clock.now = COMPLAIN_S
    side.on_new_request(request({**CONSUME, "remote_host": "10.1.2.3"}, name="last"))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 2
    assert "(and 999 more like it)" in lines[1]
    assert max(map(len, lines)) < 500
    assert not any("\n" in line for line in lines)


def test_decode_beyond_loopback_starts_with_peers_only() -> None:
    """Said once, at the start; prefill calls nobody and needs none."""
    with pytest.raises(SettingsError, match=r"control\.peers is not set"):
        made(host="10.0.0.1")
    made(host="10.0.0.1", peers=["10.0.0.0/24"])
    scheduler_half(
        Settings.parse({"control": {"host": "10.0.0.1", "allow_plaintext": True}}), consumer=False, clock=Clock()
    )


def test_heads_are_the_models() -> None:
    from pdtransport.vllm.geometry import attention_heads

    def config(**text: Any) -> Any:
        return SimpleNamespace(model_config=SimpleNamespace(hf_text_config=SimpleNamespace(**text)))

    assert [
        attention_heads(config(**each)) for each in ({"num_attention_heads": 8}, {}, {"num_attention_heads": [1]})
    ] == [
        8,
        0,
        0,
    ]
