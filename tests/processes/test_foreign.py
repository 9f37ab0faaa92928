"""Another known peer speaks under a transfer's id and grant: real channels and links, and it changes nothing."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import numpy as np
import pytest

from pdtransport import Settings, prompt_digest
from pdtransport.control.events import Identity, MessageReceived, PeerUp
from pdtransport.protocol.digest import commit_digest
from pdtransport.protocol.messages import Abort, Batch, Code, Commit, Grant, GrantedGroup, Revoke
from pdtransport.transport import fingerprint_of
from tests.processes.control_rig import HOST, Bench, Node
from tests.processes.test_transport import BLOCK_SIZE, WAIT_S, Cluster, fill_pages, gathered, receive_all, worker
from tests.unit.test_protocol_foreign import consumer_words, producer_words

PAGES = [3, 1, 2, 7]
SENT = 2  # of the pages, when the stranger begins
TOKENS = len(PAGES) * BLOCK_SIZE


@pytest.fixture(params=["cma", "ucx"])
def pair(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    settings = Settings.parse({"links": {"order": [request.param], "batch_bytes": 1 << 16, "staging_bytes": 1 << 19}})
    p = worker(0, 1, settings, 0, 0, "prefill", BLOCK_SIZE)
    d = worker(0, 1, settings, 0, 255, "decode", BLOCK_SIZE)
    with p.transport, d.transport:
        yield Cluster([p], [d])


def counted(cluster: Cluster) -> tuple[int, int]:
    """Messages that decode and prefill count as nobody's business of theirs."""
    found = []
    for one in (cluster.decode[0], cluster.prefill[0]):
        counters = one.transport.status()["counters"]
        found.append(sum(counters.get(name, 0) for name in ("stale_messages", "foreign_messages")))
    return found[0], found[1]


def wait_for(what: str, condition: object) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.parametrize("right", [True, False], ids=["right generation", "another"])
def test_a_known_peer_changes_nothing_of_anothers_transfer(pair: Cluster, right: bool) -> None:
    """It may know id, generation, prompt and all: no byte of decode's memory, no page of prefill's, no end is its to
    say. Both sides count each word, and the transfer ends as if it had been silent."""
    p, d = pair.prefill[0].transport, pair.decode[0].transport
    transfer, digest = secrets.token_hex(16), prompt_digest(list(range(TOKENS)))
    whole = fill_pages(pair, PAGES, seed=1)
    offer = p.offer(transfer, digest, TOKENS)
    (receipt,) = receive_all(pair, transfer, digest, TOKENS, PAGES)
    offer.ready(PAGES[:SENT], SENT * BLOCK_SIZE)
    wait_for("the first pages cross", lambda: (gathered(pair, PAGES[:SENT]) == whole[:, :SENT]).all())
    consumer = d._engine.consumer.receiving
    (generation,) = d._reactor.ask(lambda: [one.grant.generation for one in consumer.machines(transfer)])
    generation += not right

    bench = Bench()
    facts = fingerprint_of(d.groups, 1)
    mallory: Node = bench.node("mallory", me=Identity("mallory", 0, 1, secrets.randbits(60) | 1, facts, {}))
    try:
        for port in (d.port, p.port):
            mallory.channel.connect(HOST, port)
        bench.until(lambda: len(mallory.of(PeerUp)) == 2)
        peers = {up.peer.engine: up.peer for up in mallory.of(PeerUp)}
        about = {"transfer": transfer, "generation": generation}
        places = [(0, 0, 0, len(PAGES), 1 << 16)]
        said = {
            "decode": [word.model_copy(update={"transfer": transfer}) for word in producer_words(generation)]
            + [Commit(**about, batches=1, tokens=TOKENS, digest=commit_digest(digest, places))]
            + [Batch(**about, seq=SENT, first_block=SENT, blocks=1, nbytes=64, checksums=bytes(8), offer=b"")],
            "prefill": [word.model_copy(update={"transfer": transfer}) for word in consumer_words(generation)]
            + [Grant(**about, groups=(GrantedGroup(0, len(PAGES), 0, 4),), tokens=TOKENS, prompt_digest=digest,
                     window_bytes=1 << 30)],
        }  # fmt: skip
        before = counted(pair)
        for engine, words in said.items():
            for word in words:
                assert mallory.channel.send(peers[engine], word)
        want = (before[0] + len(said["decode"]), before[1] + len(said["prefill"]))

        def all_counted() -> bool:
            bench.turn()
            return counted(pair) == want

        wait_for(f"counted as foreign: {want}", all_counted)
        assert not receipt.future.done()
        assert not offer.future.done()
        answers = [one.message for one in mallory.of(MessageReceived)]
        assert all(isinstance(one, Abort | Revoke) for one in answers), answers
        assert all(one.code in (Code.REUSED, Code.UNKNOWN) for one in answers)
        assert np.array_equal(gathered(pair, PAGES[:SENT]), whole[:, :SENT])
        assert (pair.decode[0].kv[:, [page for page in range(40) if page not in PAGES]] == 255).all()
    finally:
        bench.close()

    offer.ready(PAGES, TOKENS)
    offer.finish()
    assert receipt.result(WAIT_S).ok
    assert offer.result(WAIT_S).ok
    assert np.array_equal(gathered(pair, PAGES), whole)
