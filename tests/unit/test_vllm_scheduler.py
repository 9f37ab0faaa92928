"""The connector's scheduler half: what it asks of the workers, without an engine."""

from __future__ import annotations

import fcntl
import resource
import socket
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from pdtransport.engine.commands import (
    CancelLoad,
    Decline,
    Drop,
    Finish,
    Open,
    Pages,
    Rewind,
    SendClaim,
    StartReceive,
    WorkerReport,
)
from pdtransport.engine.consuming import CLAIM_EVERY_S, LEFT
from pdtransport.engine.params import parse
from pdtransport.engine.wakeups import WakeupReceiver, WakeupSender
from pdtransport.protocol.messages import Code
from pdtransport.settings import Settings
from pdtransport.vllm.cache_groups import HandedGroups
from pdtransport.vllm.scheduler import BLIND_WAIT_S, REJECTED, SchedulerSide

BLOCK = 32
CONSUME = {"do_remote_prefill": True, "transfer_id": "t", "remote_host": "127.0.0.1", "remote_port": 1, "tp_size": 2}
PRODUCE = {"do_remote_decode": True, "transfer_id": "t"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def scheduler_half(settings: Settings | None = None, **more: Any) -> SchedulerSide:
    """A scheduler's half of both roles and one cache group, but for what ``more`` says."""
    usual = {
        "producer": True,
        "consumer": True,
        "groups": HandedGroups.one(BLOCK),
        "engine": "e",
        "port": 7,
        "ranks": 1,
    }
    return SchedulerSide(settings or Settings(), **{**usual, **more})


@pytest.fixture
def side(clock: Clock) -> SchedulerSide:
    return scheduler_half(clock=clock)


def request(params: Any, tokens: int = 100, name: str = "r", **more: Any) -> Any:
    fields = {
        "request_id": name,
        "kv_transfer_params": params,
        "prompt_token_ids": list(range(tokens)),
        "num_prompt_tokens": tokens,
        "num_computed_tokens": 0,
        "num_output_tokens": 0,
        "lora_request": None,
        "mm_features": None,
        "cache_salt": None,
    }
    return SimpleNamespace(**{**fields, **more})


def blocks(*ids: int) -> Any:
    return SimpleNamespace(get_block_ids=lambda: (list(ids),))


def step(side: SchedulerSide, scheduled: dict[str, tuple[int, int]] | None = None, preempted: tuple = ()) -> Any:
    """One scheduler step; ``scheduled`` maps a request to (tokens computed before, tokens in this step)."""
    scheduled = scheduled or {}
    state = SimpleNamespace(get_block_ids=lambda req_id: ([10, 11, 12, 13, 14],))
    return side.build(
        SimpleNamespace(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=list(scheduled), num_computed_tokens=[before for before, _ in scheduled.values()]
            ),
            num_scheduled_tokens={name: now for name, (_, now) in scheduled.items()},
            total_num_scheduled_tokens=sum(now for _, now in scheduled.values()),
            preempted_req_ids=set(preempted),
            kv_connector_block_state=state,
        )
    )


def take(side: SchedulerSide, r: Any, held: int, *ids: int) -> list[Any]:
    external, later = side.matched_tokens(r, held)
    assert later == (external > 0)
    side.allocated(r, blocks(*ids), external)
    return step(side).before


def test_decode_asks_for_what_it_lacks(side: SchedulerSide) -> None:
    r = request(CONSUME)
    side.on_new_request(r)
    (command,) = take(side, r, 64, 5, 6, 7, 8)
    assert isinstance(command, StartReceive)
    assert (command.first_block, command.pages, command.ranks) == ((2,), ([7, 8],), 2)


@pytest.mark.parametrize(("tokens", "held"), [(1, 0), (33, 32), (97, 96)])
def test_decode_asks_for_nothing_if_it_computes_the_last_token_anyway(
    side: SchedulerSide, tokens: int, held: int
) -> None:
    r = request(CONSUME, tokens)
    side.on_new_request(r)
    (command,) = take(side, r, held)
    assert command.pages == ([],), "prefill must learn that it may free its pages"


@pytest.mark.parametrize("held", [0, 32])
def test_fewer_tokens_than_offered_end_neither_the_engine_nor_in_a_gap(side: SchedulerSide, held: int) -> None:
    """vLLM may take fewer tokens than a connector offered: what is asked for then stops short of the prompt's end.
    Prefill refuses that, so that vLLM computes the request itself."""
    r = request(CONSUME, 4 * BLOCK)
    side.on_new_request(r)
    side.matched_tokens(r, held)
    side.allocated(r, blocks(*range(5, 5 + held // BLOCK + 1)), BLOCK)
    (command,) = step(side).before
    (first,), (pages,) = command.first_block, command.pages
    assert pages, "the workers must report the end of what vLLM waits for"
    assert first + len(pages) < 4, "prefill refuses blocks that do not reach the prompt's end"


def test_a_question_asked_again_changes_nothing(side: SchedulerSide) -> None:
    r = request(CONSUME)
    side.on_new_request(r)
    assert [side.matched_tokens(r, 0) for _ in range(3)] == [(100, True)] * 3


def test_a_request_is_loaded_once_however_its_load_ended(side: SchedulerSide) -> None:
    """A failed load is computed here; a preempted request does not ask prefill again."""
    r = request(CONSUME)
    side.on_new_request(r)
    take(side, r, 0, 1, 2, 3, 4)
    side.update_output(SimpleNamespace(finished_recving={"r"}, finished_sending=None))
    assert side.matched_tokens(r, 0) == (0, False)
    assert take(side, r, 0) == []


def test_the_clean_up_after_a_failed_request_takes_nothing_again(side: SchedulerSide) -> None:
    """vLLM replays arrival and end of a request that failed: its transfer must not be opened a second time."""
    r = request(CONSUME)
    side.on_new_request(r)
    take(side, r, 0, 1, 2, 3, 4)
    side.update_output(SimpleNamespace(finished_recving={"r"}, finished_sending=None))
    side.finished(r, ([],))
    again = request(CONSUME, name="r2")
    side.on_new_request(again)
    side.finished(again, ([],))
    assert step(side).before == []


def test_a_request_that_ends_before_it_got_room_frees_prefill(side: SchedulerSide) -> None:
    """Its client left: there is no grant to say so with. vLLM's stub, which comes behind, says nothing new."""
    r = request(CONSUME)
    side.on_new_request(r)
    assert side.finished(r, ([],)) == (False, None)
    assert step(side).before == [Decline("t", Code.CANCELLED, LEFT, "127.0.0.1", 1, 2)]
    reject(side, CONSUME)
    assert step(side).before == []


def reject(side: SchedulerSide, params: Any) -> None:
    """As vLLM's engine handles ``notify_kv_transfer_request_rejected``."""
    stub = request(params, tokens=1, name="stub", abort_immediately=True)
    side.on_new_request(stub)
    assert side.finished(stub, ([],)) == (False, None)


def test_a_request_that_the_server_rejected_frees_prefill(side: SchedulerSide) -> None:
    """vLLM's stub of it is no request for one token: prefill must not be asked for another prompt than it has."""
    reject(side, CONSUME)
    assert step(side).before == [Decline("t", Code.REJECTED, REJECTED, "127.0.0.1", 1, 2)]
    for params in (PRODUCE, {**CONSUME, "remote_port": "x"}, {"continue_from": 5}, None):
        reject(side, params)
    assert step(side).before == []


def test_a_stub_takes_nothing_away_from_a_request_that_was_taken(side: SchedulerSide) -> None:
    """A client that leaves while pages are on their way: the abort ends the transfer, and the stub does nothing."""
    r = request(CONSUME)
    side.on_new_request(r)
    take(side, r, 0, 1, 2, 3, 4)
    side.finished(r, ([],))
    reject(side, CONSUME)
    assert step(side).before == [CancelLoad("r")]


def stats_of(prompt: int, local: int = 0, external: int = 0) -> Any:
    from vllm.v1.metrics.stats import PrefillStats

    stats = PrefillStats()
    stats.set(prompt, local, external)
    return stats


@pytest.mark.parametrize("found", [0, 64])
def test_prefill_tells_what_it_found_once(side: SchedulerSide, found: int) -> None:
    """With a request's first step; a preempted request finds its own pages, which says nothing about the client's."""
    r = request(PRODUCE, prefill_stats=stats_of(100, found))
    side.on_new_request(r)
    told = [step(side, {"r": (found, 10)}).after[0].cached, step(side, {"r": (0, 100)}).after[0].cached]
    assert told == [found, None]


def test_decode_counts_what_prefill_found_and_not_what_came(side: SchedulerSide) -> None:
    """By the workers' word before the first output is made; not more than the prompt; and a transfer that failed
    brought nothing."""
    r = request(CONSUME, prefill_stats=stats_of(100, 32, 68))
    side.on_new_request(r)
    take(side, r, 32, 1, 2, 3, 4)
    news = WorkerReport(cached={"r": 64, "unknown": 3})
    side.update_output(SimpleNamespace(finished_recving={"r"}, finished_sending=None, kv_connector_worker_meta=news))
    stats = r.prefill_stats
    assert (stats.num_cached_tokens, stats.num_local_cached_tokens, stats.num_external_cached_tokens) == (64, 32, 68)
    failed = request(CONSUME | {"transfer_id": "u"}, name="f", prefill_stats=stats_of(100, 32, 68))
    side.on_new_request(failed)
    take(side, failed, 32, 1, 2, 3, 4)
    side.update_output(SimpleNamespace(finished_recving={"f"}, finished_sending=None, failed_recving={"f"}))
    assert failed.prefill_stats == stats_of(100, 32, 0)


def test_an_abort_while_loading_is_passed_on(side: SchedulerSide) -> None:
    r = request(CONSUME)
    side.on_new_request(r)
    take(side, r, 0, 1, 2, 3, 4)
    assert side.finished(r, ([],)) == (False, None)
    assert step(side).before == [CancelLoad("r")]


def test_decode_claims_while_it_has_no_room(side: SchedulerSide, clock: Clock) -> None:
    r = request(CONSUME)
    side.on_new_request(r)
    assert step(side).before == [SendClaim("t", "127.0.0.1", 1, 2)]
    assert step(side).before == []
    clock.now += CLAIM_EVERY_S
    assert step(side).before == [SendClaim("t", "127.0.0.1", 1, 2)]
    take(side, r, 0, 1, 2, 3, 4)
    clock.now += CLAIM_EVERY_S
    assert step(side).before == []


def test_prefill_names_pages_step_by_step_and_hands_over_at_the_end(side: SchedulerSide) -> None:
    from vllm.v1.request import RequestStatus

    r = request(PRODUCE)
    side.on_new_request(r)
    first = step(side, {"r": (0, 64)})
    assert isinstance(first.before[0], Open)
    assert first.after == [Pages("r", ([10, 11, 12, 13],), 64, cached=0)]
    assert step(side, {"r": (64, 36)}).after == [Pages("r", ([10, 11, 12, 13],), 100)]
    assert step(side, {"r": (100, 1)}).after == [], "the prompt is complete: decode steps are not announced"
    r.status, r.num_computed_tokens = RequestStatus.FINISHED_LENGTH_CAPPED, 100
    keep, params = side.finished(r, ([10, 11, 12, 13],))
    assert keep
    assert step(side).before == [Finish("r")]
    assert params is not None
    assert (params["remote_port"], params["tp_size"], params["transfer_id"]) == (7, 1, "t")
    assert params["do_remote_prefill"] is True


def test_an_aborted_prefill_hands_nothing_over(side: SchedulerSide) -> None:
    from vllm.v1.request import RequestStatus

    r = request(PRODUCE, status=RequestStatus.FINISHED_ABORTED)
    side.on_new_request(r)
    assert side.finished(r, ([],)) == (True, None)
    assert isinstance(step(side).before[1], Drop)


def test_a_preempted_prefill_lets_go_before_the_step_runs(side: SchedulerSide) -> None:
    r = request(PRODUCE)
    side.on_new_request(r)
    step(side, {"r": (0, 64)})
    assert step(side, preempted=("r",)).before == [Rewind("r")]


@pytest.mark.parametrize(
    "params",
    [
        5,
        "x",
        [1],
        {"do_remote_prefill": True},
        {**CONSUME, "transfer_id": 3},
        {**CONSUME, "transfer_id": "a b"},
        {**CONSUME, "remote_port": "7"},
        {**CONSUME, "remote_port": 0},
        {**CONSUME, "remote_host": ""},
        {**CONSUME, "remote_host": "a\nb"},
        {**CONSUME, "tp_size": -1},
        {**PRODUCE, "transfer_id": "x" * 500},
        {**PRODUCE, "do_remote_decode": "yes"},
    ],
)
def test_malformed_parameters_are_served_without_a_hand_over(side: SchedulerSide, params: Any) -> None:
    r = request(params)
    side.on_new_request(r)
    assert side.matched_tokens(r, 0) == (0, False)
    assert side.finished(r, ([],)) == (False, None)
    assert all(isinstance(each, Decline) for each in step(side).before)


def test_an_empty_step_waits_for_the_bell_and_no_other_does(side: SchedulerSide) -> None:
    """What the engine has to compute, or to tell its workers, never waits."""
    waits: list[float] = []
    side._bell.wait = lambda seconds, _unless: bool(waits.append(seconds))  # type: ignore[method-assign]
    r = request(CONSUME)
    side.on_new_request(r)
    step(side)
    assert waits == [], "there was something to say"
    step(side, {"other": (0, 5)})
    assert waits == [], "there was something to compute"
    side.allocated(r, blocks(1, 2, 3, 4), side.matched_tokens(r, 0)[0])
    step(side)
    assert waits == [], "there was something to say"
    step(side)
    assert waits == [], "the step that computed may still be under way"
    step(side)
    assert waits == [BLIND_WAIT_S], "and no longer where nothing says that clients ask for something"
    side.update_output(SimpleNamespace(finished_recving={"r"}, finished_sending=None))
    step(side)
    assert len(waits) == 1, "nothing is awaited any more"


def test_what_the_bell_announced_does_not_wait_for_another_bell(side: SchedulerSide) -> None:
    """With asynchronous scheduling the outcome of the step that heard the bell is looked at one step later."""
    waits: list[float] = []
    side._bell.wait = lambda seconds, _unless: waits.append(seconds) is None  # type: ignore[method-assign]
    r = request(CONSUME)
    side.on_new_request(r)
    side.allocated(r, blocks(1, 2, 3, 4), side.matched_tokens(r, 0)[0])
    for _ in range(4):  # what to say; the wait that ends with the bell; two that look
        step(side)
    assert len(waits) == 1
    step(side)
    assert len(waits) == 2


def test_the_bell_of_an_engine_with_thousands_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that holds more descriptors than select() takes waits for its bell like any other."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    bell, rope = WakeupReceiver(), WakeupSender()
    far = socket.socket(fileno=fcntl.fcntl(bell._socket.fileno(), fcntl.F_DUPFD_CLOEXEC, 2000))
    bell._socket.close()
    monkeypatch.setattr(bell, "_socket", far)
    rope.name = bell.name
    try:
        assert not bell.wait(0.001)
        rope.pull()
        assert bell.wait(5.0)
        assert not bell.wait(0.05)
    finally:
        bell.close()
        rope.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_bell_rings_from_another_process_end() -> None:
    bell, rope = WakeupReceiver(), WakeupSender()
    assert not bell.wait(0.05)
    rope.pull()  # not told the name yet
    assert not bell.wait(0.05)
    rope.name = bell.name
    for _ in range(5000):  # more than the socket holds: never blocks, never raises
        rope.pull()
    assert bell.wait(1.0)
    assert not bell.wait(0.05), "one look takes all rings"
    bell.close()
    rope.pull()
    rope.close()


def test_words_are_heard_once_and_as_they_were_said() -> None:
    bell, rope = WakeupReceiver(), WakeupSender()
    rope.name = bell.name
    rope.arrived("r", 3, 7)
    rope.arrived("\N{SNOWMAN}", 0)
    rope.promised("s")
    rope._socket.sendto(b"a\0\0short", bell.name + "-words")
    assert bell.arrivals() == {("r", 3): 7, ("\N{SNOWMAN}", 0): None}
    assert bell.promises() == {"s"}
    assert (bell.promises(), bell.arrivals()) == (set(), {})
    bell.close()
    rope.close()


def test_a_word_is_no_ring() -> None:
    """It is not lost either: whoever asks for it hears it, and what an engine waits for is the bell."""
    bell, rope = WakeupReceiver(), WakeupSender()
    rope.name = bell.name
    rope.arrived("r", 0)
    assert not bell.wait(0.01)
    assert bell.arrivals() == {("r", 0): None}
    bell.close()
    rope.close()


def test_a_router_without_transfer_ids_gets_one_from_prefill(side: SchedulerSide) -> None:
    """vLLM's own proxies know no transfer_id: prefill mints it, and its response carries it to decode."""
    r = request({"do_remote_decode": True})
    side.on_new_request(r)
    (command,) = step(side).before
    assert isinstance(command, Open)
    assert len(command.transfer) == 32


NIXL_KEYS = ("do_remote_prefill", "do_remote_decode", "remote_engine_id", "remote_request_id", "remote_block_ids",
             "remote_host", "remote_port", "tp_size")  # fmt: skip


def test_a_router_that_copies_only_nixl_keys_hands_over_the_very_transfer(side: SchedulerSide) -> None:
    """Routers that know vLLM's NIXL keys alone drop transfer_id: what is left names the transfer all the
    same. A request id of another connector is never taken for one."""
    from vllm.v1.request import RequestStatus

    r = request({"do_remote_decode": True})
    side.on_new_request(r)
    r.status, r.num_computed_tokens = RequestStatus.FINISHED_LENGTH_CAPPED, 101
    _, params = side.finished(r, ([1, 2, 3, 4],))
    assert params is not None
    kept = {key: params[key] for key in NIXL_KEYS}
    wanted = parse(kept, producer=False, consumer=True)
    assert wanted.consume is not None
    assert wanted.consume.transfer_id == params["transfer_id"]
    for foreign in ("cmpl-4711-0-abcdef", "pdtransport:", "pdtransport:a b", 5, None):
        refused = parse({**kept, "remote_request_id": foreign}, producer=False, consumer=True)
        assert refused.consume is None
        assert refused.problem.startswith("kv_transfer_params.transfer_id")


@pytest.mark.parametrize(
    ("params", "more", "why"),
    [
        ({**CONSUME, "remote_port": 0}, {}, "remote_port"),
        (CONSUME, {"prompt_token_ids": None}, "embeddings"),
        (CONSUME, {"prompt_embeds": [[0.0]] * 100, "prompt_is_token_ids": [True] * 50 + [False] * 50}, "embeddings"),
        ({**CONSUME, "remote_host": "a b"}, {}, "remote_host"),
    ],
)
def test_a_request_that_asks_for_a_transfer_in_vain_has_it_declined(
    side: SchedulerSide, params: dict[str, Any], more: dict[str, Any], why: str
) -> None:
    """Promise 5: what never becomes a transfer is told to those who watch, with its reason."""
    side.on_new_request(request(params, **more))
    (declined,) = step(side).before
    assert (type(declined), declined.transfer, declined.code) == (Decline, "t", Code.REFUSED)
    assert why in declined.reason


def test_decode_that_is_no_consumer_declines(clock: Clock) -> None:
    side = scheduler_half(consumer=False, clock=clock)
    side.on_new_request(request(CONSUME))
    (declined,) = step(side).before
    assert declined.transfer == "t"
    assert "kv_producer" in declined.reason


@pytest.mark.parametrize(
    "params", [{"do_remote_decode": True, "transfer_id": 7}, {**CONSUME, "transfer_id": "a b"}, {}]
)
def test_nothing_is_declined_under_an_id_that_is_none_or_that_prefill_has(side: SchedulerSide, params: Any) -> None:
    side.on_new_request(request(params))
    assert not [each for each in step(side).before if isinstance(each, Decline)]


def test_a_sequence_that_has_no_transfer_declines_none(side: SchedulerSide) -> None:
    """The second of several sequences is computed here; the transfer that its body names is the first one's."""
    for name in ("0_cmpl-a-0", "1_cmpl-a-0"):
        side.on_new_request(request(CONSUME, name=name))
    assert not [each for each in step(side).before if isinstance(each, Decline)]
