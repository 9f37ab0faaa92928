"""What became of each transfer is told to those who watch, at the moment it ends."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq

from pdtransport.control.watching import WorkerWatch
from pdtransport.errors import TransferFailed
from pdtransport.kv.keys import prompt_digest
from pdtransport.protocol.messages import Code, Ended, Watching
from pdtransport.settings import ControlSettings, Settings
from tests.processes.test_transport import BLOCK_SIZE, WAIT_S, Cluster, fill_pages, free_ports, receive_all, worker


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as it:
        yield it


def made(stack: ExitStack, decode_block: int = BLOCK_SIZE, ranks: int = 1) -> Cluster:
    settings = Settings.parse({"links": {"order": ["cma"]}})
    base = free_ports(ranks)
    prefill = [worker(r, ranks, settings, base + r, 0, "prefill", BLOCK_SIZE) for r in range(ranks)]
    decode = [worker(r, ranks, settings, 0, 255, "decode", decode_block) for r in range(ranks)]
    for one in (*prefill, *decode):
        stack.enter_context(one.transport)
    return Cluster(prefill, decode)


class Watcher:
    """Watches one decode worker, and waits for its reports."""

    def __init__(self, stack: ExitStack, cluster: Cluster, rank: int = 0) -> None:
        context: zmq.Context = stack.enter_context(zmq.Context())
        self.watch = WorkerWatch(context, "127.0.0.1", cluster.decode[rank].transport.port, ControlSettings(), None)
        stack.callback(self.watch.close)
        self.watch.ask()
        self.heard: list = []
        self.until(1)
        assert isinstance(self.heard[0], Watching)
        assert (self.heard[0].engine, self.heard[0].rank, self.heard[0].world) == ("decode", rank, len(cluster.decode))
        self.heard.clear()

    def until(self, count: int) -> list:
        deadline = time.monotonic() + WAIT_S
        while len(self.heard) < count:
            assert time.monotonic() < deadline, self.heard
            self.heard += self.watch.read(100)[0]
            time.sleep(0.002)
        return self.heard


def test_each_rank_says_what_it_took_and_how_long_that_took(stack: ExitStack) -> None:
    c = made(stack, ranks=2)
    watchers = [Watcher(stack, c, rank) for rank in range(2)]
    digest, transfer = prompt_digest([1, 2]), secrets.token_hex(16)
    fill_pages(c, [0], 1)
    for one in c.prefill:
        offer = one.transport.offer(transfer, digest, 2)
        offer.ready([0], 2)
        offer.finish()
    outcomes = [receipt.result(WAIT_S) for receipt in receive_all(c, transfer, digest, 2, [0])]
    for watcher, outcome in zip(watchers, outcomes, strict=True):
        (said,) = watcher.until(1)
        assert (said.transfer, said.code, said.blocks, said.link) == (transfer, None, 1, "cma")
        assert said.nbytes == outcome.nbytes > 0
        assert said.taken_us >= said.exposed_us >= 0


def test_a_prompt_that_decode_holds_is_told_before_prefill_is_through(stack: ExitStack) -> None:
    """Nobody waits for the end of a transfer of nothing, so it is told at its beginning, and once."""
    c = made(stack)
    watcher = Watcher(stack, c)
    digest, transfer = prompt_digest([1, 2, 3]), secrets.token_hex(16)
    offer = c.prefill[0].transport.offer(transfer, digest, 3)
    (receipt,) = receive_all(c, transfer, digest, 3, [], first=1)
    assert watcher.until(1) == [Ended(transfer=transfer)]
    offer.ready([0], 3)
    offer.finish()
    assert receipt.result(WAIT_S).ok
    receive_all(c, transfer, digest, 3, [0])  # the id was used: told, too, and so the next report
    assert [said.code for said in watcher.until(2)] == [None, Code.REUSED]


def test_a_refusal_is_told_with_its_reason(stack: ExitStack) -> None:
    """A pair that does not fit together says so for each transfer, and names what differs."""
    c = made(stack, decode_block=2 * BLOCK_SIZE)
    watcher = Watcher(stack, c)
    transfer = secrets.token_hex(16)
    (receipt,) = receive_all(c, transfer, prompt_digest([1]), 1, [0])
    with pytest.raises(TransferFailed):
        receipt.result(WAIT_S)
    (said,) = watcher.until(1)
    assert (said.transfer, said.code, said.nbytes) == (transfer, Code.REFUSED, 0)
    assert "block_size" in said.reason


def test_what_never_became_a_transfer_is_told_too(stack: ExitStack) -> None:
    c = made(stack)
    watcher = Watcher(stack, c)
    c.decode[0].transport.decline("t", Code.REFUSED, "line one\nline two" + "x" * 1000)
    (said,) = watcher.until(1)
    assert (said.transfer, said.code) == ("t", Code.REFUSED)
    assert said.reason.startswith("line one?line two")
