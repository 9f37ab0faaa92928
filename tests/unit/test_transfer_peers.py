"""Peers of a worker: up, down, which link carries the pair, and how fast it is found to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdtransport.protocol.messages import Code, Grant, LinkCall
from pdtransport.settings import LinkSettings
from pdtransport.transfer import peers as peers_module
from tests.unit.transfer_rig import TOKENS, TRANSFER, Worker, carry, meet, pair


def calls(worker: Worker) -> list[LinkCall]:
    return [message for _, message in worker.mail.letters if isinstance(message, LinkCall)]


def test_a_sender_that_does_not_answer_is_given_up_in_time() -> None:
    """ANSWER_S after it was asked whether it can use the link, and the transfers that wait hear why."""
    p, d = Worker("p"), Worker("d", port=2)
    d.fetch(TOKENS, [0])
    d.meet(p, dialled=True)
    assert len(calls(d)) == 1
    due = d.peers.next_deadline()
    assert due == peers_module.ANSWER_S
    d.peers.tick(due - 0.1)
    assert d.outcomes == []
    d.peers.tick(due)
    (outcome,) = d.outcomes
    assert outcome.code == Code.REFUSED.value
    assert "the sender did not answer" in outcome.reason
    assert d.peers.next_deadline() is None


def test_a_refused_peer_is_asked_again_after_a_while_and_not_before() -> None:
    """By the clock, whether the I/O thread had a turn since or not."""
    p, d = Worker("p"), Worker("d", port=2)
    d.fetch(TOKENS, [0])
    d.meet(p, dialled=True)
    d.now = peers_module.ANSWER_S
    d.peers.tick(d.now)
    d.mail.letters.clear()
    d.now += peers_module.REFUSED_S - 0.1
    d.fetch(TOKENS, [0], transfer="u")
    assert [outcome.transfer for outcome in d.outcomes] == [TRANSFER, "u"]
    d.now += 0.1
    d.fetch(TOKENS, [0], transfer="v")
    assert len(d.outcomes) == 2
    assert len(calls(d)) == 1
    p.meet(d, dialled=False)
    carry(p, d)
    assert d.peer(p).inbound is not None


def test_a_sender_without_the_link_says_why() -> None:
    p, d = Worker("p"), Worker("d", port=2)
    p.peers._links.clear()
    p.peers._unavailable["cma"] = "switched off here"
    d.fetch(TOKENS, [0])
    d.meet(p, dialled=True)
    p.meet(d, dialled=False)
    carry(p, d)
    (outcome,) = d.outcomes
    assert "the sender can't use it: switched off here" in outcome.reason


def test_a_pair_is_measured_before_its_first_page_and_gives_the_scratch_back() -> None:
    """A few rounds through the channel itself; the rate is in the status."""
    with pair(Worker("p", scratch=1 << 16), Worker("d", port=2, scratch=1 << 16)) as (p, d):
        status = d.peer(p).status()
        assert status["link"] == "cma"
        assert status["probe_bytes_s"] > 0
        assert p.peer(d).answering is None
        outbound: Any = p.peer(d).outbound
        assert outbound._offered == {}
        assert outbound.stats.batches_sent == 3


def test_a_probe_of_more_than_the_senders_scratch_is_refused() -> None:
    """links.probe_bytes differs: the pair is not measured, and works unless a bandwidth is demanded."""
    with pair(Worker("p", scratch=1 << 12), Worker("d", port=2, scratch=1 << 16)) as (p, d):
        assert d.peer(p).inbound is not None
        assert d.peer(p).measured is None
    floor = LinkSettings(order=("cma",), min_bandwidth_bytes_s=1.0)
    with pair(Worker("p", scratch=1 << 12), Worker("d", port=2, scratch=1 << 16, links=floor)) as (p, d):
        assert d.peer(p).inbound is None
        d.fetch(TOKENS, [0])
        assert "could not be measured (links.probe_bytes differs" in d.outcomes[0].reason


def test_a_receiver_that_forgets_its_probe_holds_no_scratch() -> None:
    p, d = Worker("p", scratch=1 << 16), Worker("d", port=2, scratch=1 << 16)
    with pair(p, d):
        p.peers._answer_probe(p.peer(d), "cma", 1 << 12)
        due = p.peers.next_deadline()
        assert due == peers_module.ANSWER_S
        p.peers.tick(due)
        outbound: Any = p.peer(d).outbound
        assert (p.peer(d).answering, outbound._offered) == (None, {})


def test_a_link_that_is_measured_already_is_not_taken_at_a_second_word() -> None:
    """A sender that was asked twice, after it had kept silent for long, agrees twice."""
    floor = LinkSettings(order=("cma",), min_bandwidth_bytes_s=1.0)
    p, d = Worker("p", scratch=1 << 16), Worker("d", port=2, scratch=1 << 16, links=floor)
    d.meet(p, dialled=True)
    p.meet(d, dialled=False)
    (use,) = calls(d)
    p.peers.link_call(d.id, use)
    carry(p, d)
    assert d.peer(p).measured > 0


def test_a_measurement_goes_over_the_link_that_it_is_of() -> None:
    """The receiver gave up another link in the middle of its measurement, and its word about that got lost."""
    p, d = Worker("p", scratch=1 << 16), Worker("d", port=2, scratch=1 << 16)
    with pair(p, d):
        p.peers._answer_probe(p.peer(d), "cma", 1 << 12)
        before: Any = p.peer(d).outbound
        p.peers._links["other"] = p.link
        p.peer(d).exports["other"] = d.me.links["cma"]
        p.peers._confirm(p.peer(d), "other")
        after: Any = p.peer(d).outbound
        after.link = "other"
        p.peers._answer_probe(p.peer(d), "other", 1 << 12)
        assert after is not before
        assert (len(before._offered), len(after._offered)) == (0, 1)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b"\x81\xa2op\xa3use", b"\x81\xa2op\x01", bytes(100)])
def test_garbage_about_links_changes_nothing(body: bytes) -> None:
    with pair() as (p, d):
        before = (p.peer(d).outbound, d.peer(p).inbound)
        for worker, other in ((p, d), (d, p)):
            for link in ("cma", "none"):
                worker.peers.link_call(other.id, LinkCall(link=link, body=body))
        assert (p.peer(d).outbound, d.peer(p).inbound) == before


def test_two_that_connect_to_each_other_share_one_channel() -> None:
    """One channel serves both directions: neither opens a second one to the same process."""
    with pair() as (p, d):
        assert p.peer(d).inbound is None
        p.meet(d, dialled=True)
        carry(p, d)
        for one, other in ((p, d), (d, p)):
            assert one.peer(other).inbound is one.peer(other).outbound
            assert len(one.peer(other).channels()) == 1


@pytest.mark.parametrize("how", ["no", "silence"])
def test_a_link_that_fails_in_one_direction_goes_on_in_the_other(how: str) -> None:
    """Prefill sends over the channel already, and offers it for what decode would send: decode does not use it."""
    with pair() as (p, d):
        channel: Any = p.peer(d).outbound
        p.meet(d, dialled=True)
        p.mail.letters.clear()
        assert p.peer(d).offered is channel
        if how == "no":
            d.peers._say(d.peer(p), "cma", "no", "not this way")
            carry(p, d)
        else:
            p.peers.tick(p.peers.next_deadline() or 0.0)
        assert "cma" in p.peer(d).excluded
        assert p.peer(d).offered is None
        assert not channel.closed
        assert p.peer(d).outbound is channel


def test_a_link_that_is_asked_for_again_is_not_opened_again() -> None:
    """The answer got lost, say: the same channel goes on, with what was offered over it."""
    with pair() as (p, d):
        before = p.peer(d).outbound
        for _ in range(2):
            d.peers._say(d.peer(p), "cma", "use")
            said = carry(p, d)
            assert len([message for message in said if isinstance(message, LinkCall)]) == 2
        assert p.peer(d).outbound is before


@pytest.mark.parametrize("ended", [True, False])
def test_a_peer_that_may_only_stand_still_keeps_what_it_still_writes_over(ended: bool) -> None:
    """Dead: the channel is closed at once. Silent: it is given up, so that what has begun may end first."""
    with pair() as (p, d):
        channel: Any = d.peer(p).inbound
        said: list[str] = []
        channel.close, channel.give_up = (lambda: said.append("close")), (lambda: said.append("give up"))
        d.peers.down(p.id, "gone", ended=ended)
        d.peers.down(p.id, "gone", ended=ended)  # it is no news
        assert said == ["close" if ended else "give up"]
        assert d.peers.get(p.id) is None


@pytest.mark.parametrize(("refused", "code"), [(True, Code.REFUSED), (False, Code.PEER_LOST)])
def test_a_connection_that_failed_ends_what_waits_for_it(refused: bool, code: Code) -> None:
    """Not compatible, or not there: people do other things about the two."""
    d = Worker("d")
    d.fetch(TOKENS, [0], port=9)
    d.fetch(TOKENS, [0], port=8, transfer="u")
    d.peers.connect_failed(("127.0.0.1", 9), "why", refused=refused)
    assert [(outcome.transfer, outcome.code, outcome.reason) for outcome in d.outcomes] == [
        (TRANSFER, code.value, "why")
    ]


def test_transfers_that_wait_for_a_peer_end_when_it_goes() -> None:
    p, d = Worker("p"), Worker("d", port=2)
    d.fetch(TOKENS, [0])
    d.meet(p, dialled=True)
    d.peers.down(p.id, "killed")
    assert [(outcome.code, outcome.reason) for outcome in d.outcomes] == [(Code.PEER_LOST.value, "killed")]


def test_a_request_that_comes_while_a_link_is_chosen_waits_for_it() -> None:
    """One question for all that wait, and each is granted."""
    p, d = Worker("p"), Worker("d", port=2)
    for transfer in ("a", "b"):
        d.fetch(TOKENS, [0], transfer=transfer)
    d.meet(p, dialled=True)
    d.fetch(TOKENS, [0], transfer="c")
    assert len(calls(d)) == 1
    p.meet(d, dialled=False)
    said = carry(p, d)
    assert [message.transfer for message in said if isinstance(message, Grant)] == ["a", "b", "c"]


def test_answers_that_nobody_waits_for_change_nothing() -> None:
    """Of another link, of a link that stands, of a probe that is over, of a peer that is gone."""
    with pair(Worker("p", scratch=1 << 12), Worker("d", port=2, scratch=1 << 12)) as (p, d):
        inbound, measured = d.peer(p).inbound, d.peer(p).measured
        assert measured is not None
        for op in ("ok", "no", "offer", "probed", "nonsense"):
            for link in ("cma", "ucx"):
                p.peers._say(p.peer(d), link, op, "late", key=5, offer=b"x")
        carry(p, d)
        assert (d.peer(p).inbound, d.peer(p).measured, d.peer(p).offered) == (inbound, measured, None)
        assert d.peer(p).excluded == {}
        stranger = Worker("stranger")
        d.peers.link_call(stranger.id, LinkCall(link="cma", body=b"\x81\xa2op\xa3use"))
        stranger.close()


def test_the_status_says_what_carries_a_pair_and_what_it_carried() -> None:
    with pair() as (p, d):
        d.fetch(TOKENS, [0])
        p.open(TOKENS)
        carry(p, d)
        p.ready([0], TOKENS)
        p.producer.finish(p, TRANSFER)
        carry(p, d)
        here, there = d.peer(p).status(), p.peer(d).status()
        nbytes = d.outcomes[0].nbytes
        assert (here["engine"], here["rank"], here["link"], here["link_errors"]) == ("p", 0, "cma", 0)
        assert (here["bytes_received"], here["batches_received"]) == (nbytes, 1)
        assert (there["bytes_sent"], there["batches_sent"]) == (nbytes, 1)
        assert here["bandwidth_bytes_s"] > 0
        assert "same host" in here["why"]
    p, d = Worker("p"), Worker("d", port=2)
    d.meet(p, dialled=True)
    assert d.peer(p).status()["why"] == "no link chosen yet"
    d.peers.tick(peers_module.ANSWER_S)
    assert "did not answer" in d.peer(p).status()["why"]
    assert d.peer(p).status()["link"] == ""


@pytest.mark.parametrize("first", [0, 1])
def test_nothing_is_granted_before_all_prefill_workers_are_there(first: int) -> None:
    """Of a tensor-parallel prefill each holds some heads: decode asks each for its own, once all can send."""
    ranks = [Worker("p", rank=rank, world=2, port=1 + rank) for rank in range(2)]
    d = Worker("d", port=9)
    for rank, worker in enumerate(ranks):
        worker.kv[:, 3] = 10 + rank
        worker.open(TOKENS)
    d.fetch(TOKENS, [7], ranks=2)
    meet(ranks[first], d)
    assert d.mail.letters == []
    assert [worker.producer.sending.machines(TRANSFER) for worker in ranks] == [[], []]
    meet(ranks[1 - first], d, ranks[first])
    grants = [machine.grant for worker in ranks for machine in worker.producer.sending.machines(TRANSFER)]
    assert [grant.groups[0][2:] for grant in grants] == [(0, 1), (1, 2)]
    for worker in ranks:
        worker.ready([3], TOKENS)
        worker.producer.finish(worker, TRANSFER)
    carry(*ranks, d)
    assert [outcome.ok for worker in (*ranks, d) for outcome in worker.outcomes] == [True] * 3
    assert (d.kv[:, 7, 0] == 10).all()
    assert (d.kv[:, 7, 1] == 11).all()
    assert not np.delete(d.kv, 7, axis=1).any()


@pytest.mark.parametrize("decoders", [1, 2])
def test_a_prefill_worker_whose_heads_another_one_sends_may_free_its_pages_too(decoders: int) -> None:
    """Each head is on two of four prefill workers, and decode reads it from one. The other one is told as soon: else it
    would hold the request's pages until its deadline, and the engine frees them only when all workers say so."""
    ranks = [Worker("p", rank=rank, world=4, port=1 + rank) for rank in range(4)]
    decode = [Worker("d", rank=rank, world=decoders, port=9 + rank) for rank in range(decoders)]
    for rank, worker in enumerate(ranks):
        worker.kv[:, 3] = 10 + rank // 2
        worker.open(TOKENS)
    for worker in decode:
        worker.fetch(TOKENS, [7], ranks=4)
        for rank in ranks:
            meet(rank, worker, *ranks, *decode)
    for worker in ranks:
        worker.ready([3], TOKENS)
        worker.producer.finish(worker, TRANSFER)
    carry(*ranks, *decode)
    assert [outcome.ok for worker in (*ranks, *decode) for outcome in worker.outcomes] == [True] * (4 + decoders)
    for worker in decode:
        heads = range(worker.kv.shape[2])
        assert [int(worker.kv[0, 7, head].max()) for head in heads] == [10 + head + worker.me.rank for head in heads]


def test_a_worker_that_goes_while_another_is_waited_for_ends_the_request() -> None:
    """At once, and by that name: nothing is granted to who is gone, and nobody waits for its answer."""
    ranks = [Worker("p", rank=rank, world=2, port=1 + rank) for rank in range(2)]
    d = Worker("d", port=9)
    d.fetch(TOKENS, [7], ranks=2)
    meet(ranks[0], d)
    d.peers.down(ranks[0].id, "killed")
    d.consumer.peer_lost(ranks[0].id, "killed")
    meet(ranks[1], d, ranks[0])
    (outcome,) = d.outcomes
    assert outcome.code == Code.PEER_LOST.value
    assert d.consumer.live() == {"consuming": 0}
    assert not any(worker.producer.live()["early_grants"] for worker in ranks)


def test_a_peer_that_goes_while_it_is_measured_ends_what_waits_for_it() -> None:
    """The probe that fails with it is no answer: nothing is granted over a link that is closed, and no other link is
    tried."""
    p, d = Worker("p", scratch=1 << 16), Worker("d", port=2, scratch=1 << 16)
    d.fetch(TOKENS, [0])
    d.meet(p, dialled=True)
    p.meet(d, dialled=False)
    while d.link.arm():  # until a scratch batch is on its way
        for one, other in ((d, p), (p, d)):
            letters, one.mail.letters = one.mail.letters, []
            for _, message in letters:
                other.hear(one.id, message)
    d.peers.down(p.id, "killed")
    assert [(outcome.code, outcome.reason) for outcome in d.outcomes] == [(Code.PEER_LOST.value, "killed")]
    assert d.mail.letters == []


def test_an_answer_about_another_link_than_was_asked_for_opens_none() -> None:
    p, d = Worker("p"), Worker("d", port=2)
    d.meet(p, dialled=True)
    d.peers.link_call(p.id, LinkCall(link="ucx", body=b"\x81\xa2op\xa2ok"))
    assert d.peer(p).inbound is None
    d.peers.link_call(p.id, LinkCall(link="cma", body=b"\x81\xa2op\xa2ok"))
    assert d.peer(p).inbound is not None
