"""The cuda_ipc link between two processes, on one GPU and on two: over a stand-in for GPUs (see tests/rig/twin_gpu.py),
or, with PDT_DEVICE=cuda, on real ones."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from pdtransport.errors import LinkError, LinkUnavailable
from pdtransport.kernels.runs import Runs
from pdtransport.links import cuda_ipc
from pdtransport.links.base import Region
from pdtransport.links.cuda_ipc import CudaIpcChannel, CudaIpcLink
from pdtransport.links.memory import Regions
from tests.rig import twin_gpu
from tests.rig.device import need_cards

PAGE, PAGES = 4096, 64
ANSWER_S = 20.0


REAL = os.environ.get("PDT_DEVICE") == "cuda"
EXPECTED = np.random.default_rng(7).integers(0, 256, (PAGES, PAGE), dtype=np.uint8)


def gpu() -> AbstractContextManager[Any]:
    return nullcontext() if REAL else twin_gpu.installed()


class Pages:
    """Device memory, as pages."""

    def __init__(self, content: np.ndarray, card: int = 0) -> None:
        from pdtransport.kernels.watch import DeviceMemory

        self.card, self.memory = card, DeviceMemory(PAGES * PAGE, card)
        self.region = Region(self.memory.address, PAGES * PAGE, self.memory, card)
        self.write(0, content)

    def write(self, page: int, content: np.ndarray) -> None:
        from pdtransport.kernels.gpu import from_host

        from_host(self.memory.address + page * PAGE, content.tobytes(), self.card)

    def read(self) -> np.ndarray:
        from pdtransport.kernels.gpu import to_host

        raw = to_host(self.memory.address, PAGES * PAGE, self.card)
        return np.frombuffer(raw, dtype=np.uint8).reshape(PAGES, PAGE)

    def runs(self, pages: list[int]) -> Runs:
        return np.array([[self.memory.address + page * PAGE, PAGE] for page in pages], dtype=np.uint64)


def whole(value: int, pages: int = PAGES) -> np.ndarray:
    return np.full((pages, PAGE), value, dtype=np.uint8)


@pytest.mark.skipif(REAL, reason="a real GPU does not hang when it is told to")
def test_a_gpu_that_hangs_does_not_hang_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that serves all peers waits a bounded time for a batch's checksums."""
    monkeypatch.setattr(cuda_ipc, "DRAIN_S", 0.2)
    with twin_gpu.installed():
        memory = Pages(EXPECTED)
        link = CudaIpcLink(Regions([memory.region]))
        channel = link.connect(link.export(), "peer")
        twin_gpu.going.clear()
        try:
            with pytest.raises(LinkError, match=r"GPU 0 did not read a batch within 0\.2 s"):
                channel.send(1, memory.runs([0, 1]), 2, lambda error: None)
        finally:
            twin_gpu.going.set()
        assert channel.send(1, memory.runs([0, 1]), 2, lambda error: None)[1]
        link.close()


def sender(pipe: Connection, card: int) -> None:
    """Offers what it is told to."""
    with gpu():
        memory = Pages(EXPECTED, card)
        link = CudaIpcLink(Regions([memory.region]))
        pipe.send(link.export())
        channel = link.connect(pipe.recv(), "peer")
        while True:
            verb, value = pipe.recv()
            if verb == "send":
                pipe.send(channel.send(value[0], memory.runs(value[1]), len(value[1]), lambda error: None))
            elif verb == "overwrite":
                memory.write(value, EXPECTED[value] ^ 1)
                pipe.send(True)
            elif verb == "mappings":
                pipe.send(twin_gpu.open_mappings())


class Ends:
    """The receiver here, the sender in ``process``."""

    def __init__(self, pipe: Connection, process: Any, card: int) -> None:
        self.pipe, self.process = pipe, process
        self.memory = Pages(whole(255), card)
        self.link = CudaIpcLink(Regions([self.memory.region]))
        self.export = self.answer()
        pipe.send(self.link.export())
        self.channel: CudaIpcChannel = self.link.connect(self.export, "peer")
        self.channel.attach()
        self.ended: dict[int, str | None] = {}

    def answer(self) -> Any:
        assert self.pipe.poll(ANSWER_S)
        return self.pipe.recv()

    def ask(self, verb: str, value: Any = None) -> Any:
        self.pipe.send((verb, value))
        return self.answer()

    def receive(self, key: int, source: list[int], target: list[int]) -> None:
        offer, checksums = self.ask("send", (key, source))
        self.receive_offer(key, offer, checksums, target)

    def receive_offer(self, key: int, offer: bytes, checksums: bytes, target: list[int]) -> None:
        runs = self.memory.runs(target)
        self.channel.receive(key, offer, runs, checksums, len(target), lambda error: self.ended.update({key: error}))

    def progress_until(self, condition: Any) -> None:
        deadline = time.monotonic() + ANSWER_S
        while not condition():
            assert time.monotonic() < deadline
            self.link.progress()
            time.sleep(0.001)


@contextmanager
def two_ends(cards: tuple[int, int]) -> Iterator[Ends]:
    """The sender's pages on the first of ``cards``, the receiver's on the second."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=sender, args=(theirs, cards[0]), daemon=True)
    process.start()
    theirs.close()
    ends = Ends(ours, process, cards[1])
    try:
        yield ends
    finally:
        process.kill()
        process.join(10)
        ends.link.close()


@pytest.fixture(params=[(0, 0), (0, 1)], ids=["one-gpu", "0-to-1"])
def cards(request: pytest.FixtureRequest) -> tuple[int, int]:
    if REAL:
        need_cards(1 + max(request.param))
    pair: tuple[int, int] = request.param
    return pair


@pytest.fixture
def ends(cards: tuple[int, int]) -> Iterator[Ends]:
    with gpu(), two_ends(cards) as both:
        yield both


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    yield
    twin_gpu.delay_s = 0.0


def test_pages_arrive_whatever_their_order(ends: Ends) -> None:
    """A batch is byte for byte what the sender held, and nothing else is written."""
    source, target = [5, 2, 60, 7], [1, 30, 3, 63]
    ends.receive(1, source, target)
    ends.progress_until(lambda: 1 in ends.ended)
    assert ends.ended[1] is None
    np.testing.assert_array_equal(ends.memory.read()[target], EXPECTED[source])
    assert (np.delete(ends.memory.read(), target, axis=0) == 255).all()
    assert ends.channel.stats.bytes_received == 4 * PAGE


def test_a_channel_says_whether_both_are_on_one_gpu(ends: Ends, cards: tuple[int, int]) -> None:
    where = "same GPU" if cards[0] == cards[1] else "GPUs of one host"
    assert ends.channel.why == f"cuda_ipc: {where}; one kernel copies pages in place"


@pytest.mark.skipif(REAL, reason="real GPUs reach each other, or do not")
def test_gpus_without_peer_access_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is launched at memory that it can't read, which would end all CUDA work of the engine; the other
    direction, and other links, are free to work."""
    monkeypatch.setattr(twin_gpu, "unreachable", {(1, 0)})
    with (
        twin_gpu.installed(),
        pytest.raises(LinkUnavailable, match="can't be mapped: GPU 1 has no peer access to GPU twin-0"),
        two_ends((0, 1)),
    ):
        pass
    assert twin_gpu.open_mappings() == 0
    with twin_gpu.installed(), two_ends((1, 0)) as ends:
        ends.receive(1, [3], [4])
        ends.progress_until(lambda: ends.ended == {1: None})


def test_pages_cross_between_two_gpus_of_one_process() -> None:
    """Nothing is mapped then: a kernel that reads the other GPU's memory needs peer access all the same."""
    if REAL:
        need_cards(2)
    twin_gpu.reached.clear()
    with gpu():
        here, there = Pages(whole(255), 1), Pages(EXPECTED, 0)
        receiver, sender = CudaIpcLink(Regions([here.region])), CudaIpcLink(Regions([there.region]))
        channel = receiver.connect(sender.export(), "here")
        channel.attach()
        assert REAL or (twin_gpu.reached, twin_gpu.open_mappings()) == ([(1, 0)], 0)
        offering = sender.connect(receiver.export(), "here")
        offer, checksums = offering.send(1, there.runs([5, 2, 60]), 3, lambda error: None)
        ended: list[str | None] = []
        channel.receive(1, offer, here.runs([1, 30, 3]), checksums, 3, ended.append)
        deadline = time.monotonic() + ANSWER_S
        while not ended:
            assert time.monotonic() < deadline
            receiver.progress()
        assert ended == [None]
        np.testing.assert_array_equal(here.read()[[1, 30, 3]], EXPECTED[[5, 2, 60]])
        for link in (receiver, sender):
            link.close()


def test_a_copy_between_gpus_leaves_the_model_its_sms(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wires are full with a few blocks of threads; within a GPU's memory all of them are needed."""
    most, start = [], ends.link.receiving.start
    monkeypatch.setattr(ends.link.receiving, "start", lambda *given: most.append(given[2]) or start(*given))
    offer, checksums = ends.ask("send", (1, [5, 2]))
    ends.receive_offer(1, offer, checksums, [8, 9])
    ends.progress_until(lambda: len(ends.ended) == 1)
    across = ends.channel.why.startswith("cuda_ipc: GPUs of one host")
    assert most == [cuda_ipc.ACROSS_BLOCKS if across else 0]


def test_a_batch_that_was_foreseen_is_placed_as_any_other(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """What prefill announces ahead saves decode work and decides nothing: not what is copied, where to, or whether it
    is verified; advice that is wrong, or that nothing follows, costs nothing but a bounded table."""
    planned = []
    plan = ends.channel._plan
    monkeypatch.setattr(ends.channel, "_plan", lambda *given: planned.append(given[0]) or plan(*given))
    offer, checksums = ends.ask("send", (1, [5, 2]))
    ends.channel.prepare_read(offer, ends.memory.runs([8, 9]), 2)
    ends.receive_offer(1, offer, checksums, [8, 9])
    assert len(planned) == 1, "planned twice"
    ends.receive_offer(2, offer, checksums, [10, 11])  # foreseen once, used once
    ends.channel.prepare_read(offer, ends.memory.runs([12, 13]), 2)
    ends.receive_offer(3, offer, checksums, [14, 15])  # another target than was foreseen
    ends.channel.prepare_read(b"no offer", ends.memory.runs([1]), 1)
    ends.channel.prepare_read(offer, ends.memory.runs([1, 2, 3]), 3)
    ends.channel.prepare_read(offer, ends.memory.runs([0, 1]) + np.uint64(1 << 40), 2)  # not our memory
    offer, checksums = ends.ask("send", (4, [30, 31]))
    ends.channel.prepare_read(offer, ends.memory.runs([16, 17]), 2)
    ends.ask("overwrite", 31)
    ends.receive_offer(4, offer, checksums, [16, 17])
    ends.progress_until(lambda: len(ends.ended) == 4)
    assert [ends.ended[key] for key in (1, 2, 3)] == [None] * 3
    assert (ends.ended[4] or "").startswith("damaged: 1 of 2 blocks")
    memory = ends.memory.read()
    for first in (8, 10, 14):
        np.testing.assert_array_equal(memory[[first, first + 1]], EXPECTED[[5, 2]])
    assert (memory[[0, 1, 2, 3, 12, 13]] == 255).all()
    for key in range(100):
        ends.channel.prepare_read(ends.ask("send", (100 + key, [key % PAGES, 3]))[0], ends.memory.runs([0, 1]), 2)
    assert len(ends.channel._foreseen) == cuda_ipc.MAX_FORESEEN


@pytest.mark.skipif(REAL, reason="counts the mappings of the stand-in")
def test_the_sender_maps_nothing(ends: Ends) -> None:
    """Prefill pins no memory of the decode instances that it serves: they can be replaced freely."""
    ends.receive(1, [0], [0])
    ends.progress_until(lambda: 1 in ends.ended)
    assert ends.ask("mappings") == 0
    assert twin_gpu.open_mappings() >= 1
    ends.channel.close()
    assert twin_gpu.open_mappings() == 0, "a mapping outlived its channel"


def test_pages_that_changed_after_they_were_offered_are_damaged(ends: Ends) -> None:
    """A page that prefill overwrote meanwhile is noticed by its checksum, never attended to."""
    offer, checksums = ends.ask("send", (1, [4, 5]))
    ends.ask("overwrite", 5)
    ends.receive_offer(1, offer, checksums, [0, 1])
    ends.progress_until(lambda: 1 in ends.ended)
    assert ends.ended[1] is not None
    assert ends.ended[1].startswith("damaged: 1 of 2 blocks")


def test_a_fence_waits_for_the_kernels_on_their_way(ends: Ends) -> None:
    """Nothing is written after the fence is reported, and the fenced batch reports nothing."""
    twin_gpu.delay_s = 0.2
    fenced: list[bool] = []
    ends.receive(1, [4, 5], [0, 1])
    ends.channel.fence([1], lambda: fenced.append(True))
    assert REAL or not fenced, "reported while the kernel may still write"
    ends.progress_until(lambda: fenced)
    ends.memory.write(0, whole(9, 2))
    time.sleep(0.3)
    assert (ends.memory.read()[0:2] == 9).all()
    assert 1 not in ends.ended


def test_closing_waits_for_the_kernels_on_their_way(ends: Ends) -> None:
    """When the peer is lost its pages go back to the engine at once: no kernel may write them by then."""
    twin_gpu.delay_s = 0.2
    ends.receive(1, [4, 5], [0, 1])
    ends.channel.close()
    ends.memory.write(0, whole(9, 2))
    time.sleep(0.3)
    assert (ends.memory.read()[0:2] == 9).all()
    assert 1 in ends.ended


def test_more_batches_than_kernels_at_once_all_arrive(ends: Ends) -> None:
    """Batches queue in order; none is lost."""
    for key in range(1, 21):
        ends.receive(key, [key], [key])
    ends.progress_until(lambda: len(ends.ended) == 20)
    assert set(ends.ended.values()) == {None}
    np.testing.assert_array_equal(ends.memory.read()[1:21], EXPECTED[1:21])


def test_a_peer_that_dies_in_a_batch_takes_nobody_along(ends: Ends) -> None:
    """The kernel runs to its end on memory that stays mapped; afterwards the channel is closed in order."""
    twin_gpu.delay_s = 0.3
    ends.receive(1, [4, 5], [0, 1])
    os.kill(ends.process.pid, signal.SIGKILL)
    ends.process.join(10)
    ends.progress_until(lambda: 1 in ends.ended)
    assert ends.ended[1] is None
    np.testing.assert_array_equal(ends.memory.read()[0:2], EXPECTED[4:6])
    ends.channel.close()
    with pytest.raises(LinkError, match="closed"):
        ends.receive_offer(2, b"", b"", [1])
    with pytest.raises(LinkUnavailable, match="is gone"):
        ends.link.connect(ends.export, "peer")


@pytest.mark.parametrize("address", [4096, 1 << 62])
def test_an_offer_of_memory_that_was_not_exported_is_refused(ends: Ends, address: int) -> None:
    """A peer can't make us read addresses of our own, or anybody's."""
    from pdtransport.links.packed import pack

    with pytest.raises(LinkError, match="did not export"):
        ends.receive_offer(1, pack(np.array([[address, PAGE]], dtype=np.uint64)), b"", [0])
    with pytest.raises(LinkError, match="expected"):
        ends.receive_offer(1, pack(np.array([[address, PAGE + 8]], dtype=np.uint64)), b"", [0])
    with pytest.raises(LinkError):
        ends.receive_offer(1, b"garbage", b"", [0])


def test_pages_outside_the_registered_memory_are_not_written(ends: Ends) -> None:
    offer, checksums = ends.ask("send", (1, [0]))
    with pytest.raises(LinkError, match="outside the registered memory"):
        ends.receive_offer(1, offer, checksums, [PAGES + 600])


@pytest.mark.parametrize("damage", [b"", b"x", b"\x80", b"\xc1" * 40])
def test_a_damaged_export_is_refused(ends: Ends, damage: bytes) -> None:
    with pytest.raises(LinkUnavailable):
        ends.link.connect(damage, "peer")
