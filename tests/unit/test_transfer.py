"""The halves of an exchange: when a page is final, whom a batch goes to, and what they refuse of each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdtransport.control.events import PeerId
from pdtransport.protocol.messages import Batch, BatchHint, Code
from pdtransport.settings import LinkSettings
from pdtransport.transfer import peers as peers_module
from tests.unit.transfer_rig import (
    BLOCK_BYTES,
    TOKENS,
    TRANSFER,
    PreparingChannel,
    PreparingLink,
    Worker,
    carry,
    grants,
    meet,
    pair,
)


def batches(said: list[Any]) -> list[int]:
    return [message.first_block for message in said if isinstance(message, Batch)]


def test_pages_cross_and_both_sides_hear_of_the_end() -> None:
    """The rig's own proof: bytes arrive where decode wants them, and each side ends its transfer well."""
    with pair() as (p, d):
        p.kv[:, :3] = np.random.default_rng(1).integers(1, 256, p.kv[:, :3].shape, dtype=np.uint8)
        d.fetch(3 * TOKENS, [7, 9, 8])
        p.open(3 * TOKENS)
        p.ready([0, 1, 2], 3 * TOKENS)
        p.producer.finish(p, TRANSFER)
        carry(p, d)
        assert [(o.ok, o.nbytes) for o in p.outcomes + d.outcomes] == [(True, 3 * BLOCK_BYTES)] * 2
        assert (d.kv[:, [7, 9, 8]] == p.kv[:, :3]).all()
        assert not d.kv[:, :7].any()


@pytest.mark.parametrize("tokens", [TOKENS + 4, 3 * TOKENS - 1, 2 * TOKENS + 1])
def test_the_last_partial_block_is_final_only_with_the_whole_prompt(tokens: int) -> None:
    """Announced while its last tokens are still to be computed, decode would attend to what was there before."""
    blocks = -(-tokens // TOKENS)
    with pair() as (p, d):
        d.fetch(tokens, range(blocks))
        p.open(tokens)
        carry(p, d)
        announced: list[int] = []
        for computed in range(1, tokens + 1):
            p.ready(list(range(blocks)), computed)
            announced += batches(carry(p, d))
            assert announced == list(range(blocks if computed == tokens else computed // TOKENS))


def test_what_was_to_go_to_a_lost_peer_is_dropped() -> None:
    """More batches than one turn stages: those of a peer that died leave the queue with it, those of others go on."""
    p, d, other = Worker("p"), Worker("d", port=2), Worker("other", port=3)
    with pair(p, d):
        meet(p, other)
        count = 20
        for worker, transfer in ((d, TRANSFER), (other, "u")):
            worker.fetch(count * TOKENS, range(count), transfer=transfer)
            p.open(count * TOKENS, transfer)
            carry(p, d, other)
        for transfer in (TRANSFER, "u"):
            p.ready(list(range(count)), count * TOKENS, transfer)
        left = p.producer.live()["queued_pushes"]
        assert left > count
        p.peers.down(d.id, "killed")
        p.producer.peer_lost(d.id, "killed")
        assert p.producer.live()["queued_pushes"] == count
        p.mail.letters.clear()
        while p.producer.push_some():
            pass
        assert {peer for peer, message in p.mail.letters if isinstance(message, Batch)} == {other.id}
        other.close()


def test_a_batch_that_was_taken_back_before_its_turn_is_never_staged() -> None:
    """A preemption while batches wait: the pages belong to another request now, and what would be staged of them nobody
    would ever give back."""
    count = 20
    with pair() as (p, d):
        d.fetch(count * TOKENS, range(count))
        p.open(count * TOKENS)
        carry(p, d)
        p.ready(list(range(count)), count * TOKENS)
        assert p.producer.live()["queued_pushes"]
        p.ready([], 0)
        assert p.producer.live() == {"producing": 1, "early_grants": 0, "staged": 0, "queued_pushes": 0}
        p.ready(list(range(count)), count * TOKENS)
        p.producer.finish(p, TRANSFER)
        carry(p, d)
        assert [outcome.ok for outcome in p.outcomes + d.outcomes] == [True, True]
        assert not any(p.producer.live().values())


def test_a_batch_that_was_prepared_is_used_only_for_the_pages_that_it_was_prepared_for() -> None:
    """The engine may give a request other pages before the event passes (a preemption, a block copied): what was
    prepared holds the checksums of the old ones."""
    p, d = Worker("p", link=PreparingLink), Worker("d", port=2, link=PreparingLink)
    with pair(p, d):
        d.fetch(2 * TOKENS, [0, 1])
        p.open(2 * TOKENS)
        carry(p, d)
        p.producer.prepare(p, TRANSFER, ([3, 4],), 2 * TOKENS, event=1)
        p.ready([3, 5], 2 * TOKENS)
        channel = p.peer(d).outbound
        assert isinstance(channel, PreparingChannel)
        assert [each is not None for each in channel.used] == [True, False]
        p.kv[:, [3, 5]] = 9
        p.producer.finish(p, TRANSFER)


@pytest.mark.parametrize(("rank", "world"), [(0, 2), (0, 4)])
def test_a_prefill_of_another_tensor_parallel_size_than_the_request_says_is_refused(rank: int, world: int) -> None:
    """Its pages would hold other heads than decode believes: the request fails by name, and nothing is granted."""
    with pair(prefill=Worker("p", rank=rank, world=world)) as (p, d):
        d.fetch(TOKENS, [0])
        assert grants(carry(p, d)) == []
        (outcome,) = d.outcomes
        assert outcome.code == Code.REFUSED.value
        assert f"tp_size: 127.0.0.1:1 is rank {rank} of {world}, the request says 0 of 1" in outcome.reason


def test_a_peer_that_is_another_rank_than_its_port_says_is_refused() -> None:
    with pair(prefill=Worker("p", rank=1, world=2)) as (p, d):
        d.fetch(TOKENS, [0], ranks=2)
        assert grants(carry(p, d)) == []
        assert [outcome.code for outcome in d.outcomes] == [Code.REFUSED.value]


@pytest.mark.parametrize(("first", "blocks"), [(2, 3), (3, 2), (0, 5), (4, 1), (1 << 20, 1)])
def test_a_hint_about_blocks_that_were_not_granted_prepares_nothing(first: int, blocks: int) -> None:
    """Nobody vouches for a hint: one that is longer than the grant, or lies outside, is ignored, as is one about blocks
    that decode holds already."""
    p, d = Worker("p", link=PreparingLink), Worker("d", port=2, link=PreparingLink)
    with pair(p, d):
        d.fetch(4 * TOKENS, [6, 7, 8], first_block=1)
        (grant,) = grants(carry(p, d))
        channel = d.peer(p).inbound
        assert isinstance(channel, PreparingChannel)
        about = {"transfer": TRANSFER, "generation": grant.generation, "offer": b"here"}
        d.consumer.coming(p.id, BatchHint(**about, first_block=first, blocks=blocks))
        assert (channel.foreseen, d.counters["batches_foreseen"]) == ([], 0)
        d.consumer.coming(p.id, BatchHint(**about, first_block=2, blocks=2))
        assert [count for _, count in channel.foreseen] == [2]


def test_a_hint_of_a_stranger_prepares_nothing() -> None:
    """Only who was granted may say what will come."""
    p, d = Worker("p", link=PreparingLink), Worker("d", port=2, link=PreparingLink)
    with pair(p, d):
        d.fetch(TOKENS, [6])
        (grant,) = grants(carry(p, d))
        hint = BatchHint(transfer=TRANSFER, generation=grant.generation, first_block=0, blocks=1, offer=b"here")
        d.consumer.coming(PeerId("stranger", 0, 1), hint)
        assert d.counters["batches_foreseen"] == 0


def test_transfers_that_wait_for_one_peer_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill that never comes up holds MAX_WAITERS requests; the next one fails at once, and says why."""
    monkeypatch.setattr(peers_module, "MAX_WAITERS", 2)
    d = Worker("d")
    for number in range(3):
        d.fetch(TOKENS, [0], port=9, transfer=f"t{number}")
    (outcome,) = d.outcomes
    assert (outcome.transfer, outcome.code) == ("t2", Code.OVERLOADED.value)
    d.peers.connect_failed(("127.0.0.1", 9), "nobody answers", refused=False)
    assert [outcome.transfer for outcome in d.outcomes] == ["t2", "t0", "t1"]
    d.close()


def test_a_link_that_is_slower_than_is_asked_for_carries_nothing() -> None:
    """links.min_bandwidth_bytes_s refuses the pair, and names what was measured."""
    floor = LinkSettings(order=("cma",), min_bandwidth_bytes_s=1e18)
    with pair(Worker("p", scratch=1 << 16), Worker("d", port=2, links=floor, scratch=1 << 16)) as (p, d):
        d.fetch(TOKENS, [0])
        carry(p, d)
        (outcome,) = d.outcomes
        assert outcome.code == Code.REFUSED.value
        assert "links.min_bandwidth_bytes_s wants" in outcome.reason
        assert d.peer(p).inbound is None
