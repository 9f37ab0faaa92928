"""Two GPUs of one host: each worker is a process with its KV on a GPU of its own. On real ones (``pytest -m gpu``)
where the machine has two, and on the stand-in for GPUs of tests/rig/twin_gpu.py everywhere."""

from __future__ import annotations

import multiprocessing as mp
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import pytest

from pdtransport import KVGeometry, Settings, Transport, prompt_digest
from pdtransport.kv.geometry import LayerPages, Region, head_range
from pdtransport.transfer.outcome import Outcome
from tests.processes.killed import SIDES, Survivor
from tests.processes.link_rig import End, pair, shuffled
from tests.processes.test_links import assert_all_free, hand_over
from tests.processes.test_transport import free_ports
from tests.rig import twin_gpu
from tests.rig.device import need_cards

pytestmark = pytest.mark.timeout(180)

Device = Literal["twin", "cuda"]
LAYERS, BLOCKS, HEADS, BLOCK_SIZE = 4, 128, 4, 16
SLOT = {"twin": 64, "cuda": 1024}  # bytes of one head of one token: pages of 4 and of 64 KiB
MOVED = 96  # blocks of a transfer
CHUNKS = 3  # a prompt is computed in so many steps
LEFT = 0xA5  # what pages hold that nobody wrote
HOST = "127.0.0.1"
ANSWER_S = 60.0  # a process with a CUDA context takes a while to start
ENDED_S = 30.0
KILLS = 4
MIB = 1 << 20


@dataclass(frozen=True)
class Seat:
    """Where a worker's KV lies, and which heads it holds.

    Args:
        card: GPU, as the process numbers it.
        visible: CUDA_VISIBLE_DEVICES of the process; None leaves it as it is.
        unreachable: (device, peer) pairs of the stand-in without peer access.
    """

    device: Device
    engine: str
    card: int
    rank: int = 0
    ranks: int = 1
    port: int = 0
    link: str = "cuda_ipc"
    visible: str | None = None
    unreachable: frozenset[tuple[int, int]] = field(default_factory=frozenset)


class Memory:
    """The KV cache of one rank, ``[layers, blocks, tokens, heads, slot]``: as vLLM has it on GPUs, so that heads of
    different ranks lie between each other."""

    def __init__(self, seat: Seat) -> None:
        from pdtransport.kernels.watch import DeviceMemory

        self._seat = seat
        self._lo, self._hi = head_range(seat.rank, seat.ranks, HEADS)
        self._shape = (LAYERS, BLOCKS, BLOCK_SIZE, self._hi - self._lo, SLOT[seat.device])
        self._block = int(np.prod(self._shape[2:]))
        self._nbytes = LAYERS * BLOCKS * self._block
        self._memory = DeviceMemory(self._nbytes, seat.card)
        self.wipe()

    def wipe(self) -> None:
        self._write(0, np.full(self._nbytes, LEFT, dtype=np.uint8))

    @cached_property
    def geometry(self) -> KVGeometry:
        layers = [
            LayerPages(f"layer{i}", self._memory.address + i * BLOCKS * self._block, self._block) for i in range(LAYERS)
        ]
        return KVGeometry(
            layers=tuple(layers),
            num_blocks=BLOCKS,
            block_size=BLOCK_SIZE,
            heads=self._hi - self._lo,
            head_lo=self._lo,
            total_heads=HEADS,
            slot_bytes=SLOT[self._seat.device],
            heads_first=False,
            device=self._seat.card,
        )

    @property
    def regions(self) -> list[Region]:
        return [Region(self._memory.address, self._nbytes, self._memory, self._seat.card)]

    def content(self, seed: int, blocks: int) -> np.ndarray:
        """What a transfer's pages hold of this rank's heads; all ranks' heads are parts of one."""
        shape = (LAYERS, blocks, BLOCK_SIZE, HEADS, self._shape[-1])
        whole = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        return np.ascontiguousarray(whole[:, :, :, self._lo : self._hi])

    def fill(self, pages: Sequence[int], seed: int) -> None:
        content = self.content(seed, len(pages))
        for layer in range(LAYERS):
            for index, page in enumerate(pages):
                self._write((layer * BLOCKS + page) * self._block, content[layer, index])

    def holds_only(self, pages: Sequence[int], seed: int) -> bool:
        """The transfer's pages are right, and no other byte was written since :meth:`wipe`."""
        from pdtransport.kernels.gpu import to_host

        raw = to_host(self._memory.address, self._nbytes, self._seat.card)
        expected = np.full(self._shape, LEFT, dtype=np.uint8)
        expected[:, list(pages)] = self.content(seed, len(pages))
        return bool((np.frombuffer(raw, dtype=np.uint8).reshape(self._shape) == expected).all())

    def _write(self, offset: int, data: np.ndarray) -> None:
        from pdtransport.kernels.gpu import from_host

        from_host(self._memory.address + offset, np.ascontiguousarray(data).tobytes(), self._seat.card)


class Worker:
    """What a worker's process does for the test: methods are called by name."""

    def __init__(self, seat: Seat, transport: Transport, memory: Memory) -> None:
        self._transport, self._memory = transport, memory
        self._ended: dict[str, Any] = {}

    def port(self) -> int:
        return self._transport.port

    def give(self, transfer: str, seed: int, pages: Sequence[int]) -> None:
        """Prefill's part: the pages become final in a few steps."""
        self._memory.fill(pages, seed)
        tokens = len(pages) * BLOCK_SIZE
        self._ended[transfer] = offer = self._transport.offer(transfer, prompt_digest([seed]), tokens)
        for chunk in range(1, CHUNKS + 1):
            offer.ready(pages, tokens * chunk // CHUNKS)
        offer.finish()

    def take(self, transfer: str, seed: int, pages: Sequence[int], port: int, ranks: int) -> None:
        """Decode's part."""
        self._memory.wipe()
        tokens = len(pages) * BLOCK_SIZE
        self._ended[transfer] = self._transport.receive(
            transfer, prompt_digest([seed]), tokens, pages, host=HOST, port=port, ranks=ranks
        )

    def outcome(self, transfer: str) -> Outcome:
        found: Outcome = self._ended.pop(transfer).future.result(ENDED_S)
        return found

    def holds_only(self, pages: Sequence[int], seed: int) -> bool:
        return self._memory.holds_only(pages, seed)

    def status(self) -> dict[str, Any]:
        return self._transport.status()


def serve(pipe: Connection, seat: Seat) -> None:
    with ExitStack() as stack:
        stack.enter_context(twin_gpu.installed() if seat.device == "twin" else nullcontext())
        twin_gpu.unreachable = set(seat.unreachable)
        memory = Memory(seat)
        settings = Settings.parse(
            {
                "links": {"require": seat.link, "gpu_batch_bytes": MIB},
                "deadlines": {"arrival_s": 10.0, "answer_s": 5.0, "hold_s": 10.0},
            }
        )
        transport = Transport(
            memory.geometry,
            settings,
            engine=seat.engine,
            rank=seat.rank,
            world=seat.ranks,
            port=seat.port,
            regions=memory.regions,
        )
        worker = Worker(seat, stack.enter_context(transport), memory)
        while True:
            try:
                verb, arguments = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send((True, getattr(worker, verb)(*arguments)))
            except Exception as error:  # noqa: BLE001 - told to the test
                pipe.send((False, f"{type(error).__name__}: {error}"))


class Process:
    """A worker in a process of its own. Every call has a deadline."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = dict(os.environ)
        if seat.visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = seat.visible
        try:
            self._process = context.Process(target=serve, args=(theirs, seat), daemon=True)
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()

    def ask(self, verb: str, *arguments: Any) -> Any:
        self._pipe.send((verb, arguments))
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError(f"{verb}: no answer within {ANSWER_S} s")
        good, value = self._pipe.recv()
        assert good, value
        return value

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@dataclass
class Instances:
    """Ranks of one prefill and of one decode instance."""

    prefill: list[Process]
    decode: list[Process]

    def transfer(self) -> tuple[list[Outcome], int, list[int]]:
        """Hand shuffled pages over to other shuffled pages: decode's outcomes, the content's seed, decode's pages."""
        seed, name = secrets.randbits(32), secrets.token_hex(16)
        dice = np.random.default_rng(seed)
        source, target = (dice.permutation(BLOCKS)[:MOVED].tolist() for _ in range(2))
        for one in self.decode:
            one.ask("take", name, seed, target, self.prefill[0].seat.port, len(self.prefill))
        for one in self.prefill:
            one.ask("give", name, seed, source)
        return [one.ask("outcome", name) for one in self.decode], seed, target

    def check(self) -> None:
        """A transfer goes well, byte for byte."""
        outcomes, seed, target = self.transfer()
        for outcome in outcomes:
            assert outcome.ok, f"{outcome.code}: {outcome.reason}"
        assert sum(outcome.nbytes for outcome in outcomes) == LAYERS * MOVED * BLOCK_SIZE * HEADS * self._slot
        for one in self.decode:
            assert one.ask("holds_only", target, seed), f"decode's rank {one.seat.rank} has other bytes"

    @property
    def _slot(self) -> int:
        return SLOT[self.decode[0].seat.device]

    def whys(self) -> set[str]:
        """How decode's ranks reach prefill's."""
        return {peer["why"] for one in self.decode for peer in one.ask("status")["peers"]}


Places = Sequence[int]  # a card for each rank


class Rig:
    """Starts workers."""

    def __init__(self) -> None:
        self._started: list[Process] = []

    def started(self, device: Device, prefill: Places, decode: Places, **more: Any) -> Instances:
        base = free_ports(len(prefill))
        seats = [
            Seat(device, "prefill", card, rank, len(prefill), base + rank, **more) for rank, card in enumerate(prefill)
        ]
        seats += [Seat(device, "decode", card, rank, len(decode), **more) for rank, card in enumerate(decode)]
        return self.of(seats)

    def of(self, seats: Sequence[Seat]) -> Instances:
        fresh = [Process(seat) for seat in seats]
        self._started += fresh
        for one in fresh:
            one.ask("port")  # it is up
        return Instances(*([one for one in fresh if one.seat.engine == side] for side in ("prefill", "decode")))

    def close(self) -> None:
        for one in self._started:
            one.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


@pytest.fixture(params=["twin", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    name: Device = request.param
    if name == "cuda":
        need_cards(2)
        pytest.importorskip("cupy")
    return name


@pytest.mark.parametrize("cards", [(0, 1), (1, 0)], ids=["0-to-1", "1-to-0"])
def test_shuffled_pages_cross_from_one_gpu_to_the_other(rig: Rig, device: Device, cards: tuple[int, int]) -> None:
    """Whatever their order, transfer after transfer: the bytes are prefill's, no other byte of decode's changes, every
    checksum was right the first time, and the reason names the way."""
    instances = rig.started(device, cards[:1], cards[1:])
    for _ in range(4):
        instances.check()
    assert instances.whys() == {"cuda_ipc: GPUs of one host; one kernel copies pages in place"}
    (decode,) = instances.decode
    counters = decode.ask("status")["counters"]
    assert not counters.get("batches_damaged", 0) + counters.get("batches_failed", 0), counters
    assert counters["bytes_received"] == 4 * LAYERS * MOVED * BLOCK_SIZE * HEADS * SLOT[device], counters


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [((0, 1), (1,)), ((1,), (0, 1)), ((0, 1), (1, 0))],
    ids=["2-to-1", "1-to-2", "2-to-2-crossed"],
)
def test_ranks_on_both_gpus(rig: Rig, device: Device, prefill: Places, decode: Places) -> None:
    """Heads are split and joined between tensor-parallel ranks on their own GPUs: some pages stay on their GPU, some
    cross, all are right."""
    instances = rig.started(device, prefill, decode)
    for _ in range(2):
        instances.check()


@pytest.mark.more
def test_a_peer_killed_on_the_other_gpu(device: Device) -> None:
    """Peers on the second GPU die in the middle of batches; the survivor on the first, as prefill and as decode by
    turns, accepts no wrong byte, holds nothing for them and serves the next."""
    with Survivor("cuda_ipc", device, seed=3, cards=(0, 1)) as survivor:
        tallies = [survivor.round(SIDES[number % 2]) for number in range(KILLS)]
        print(f"\n{survivor.no_leak()}; {sum(bool(tally.cut) for tally in tallies)} of {KILLS} in the middle")
    assert any(tally.cut for tally in tallies), f"no transfer was under way: nothing was shown: {tallies}"


@pytest.mark.gpu
def test_gpus_that_processes_do_not_show_each_other(rig: Rig) -> None:
    """As under ``pdlaunch``, which shows each instance its own GPU alone. Pages cross all the same, or the pair is
    refused with a reason that names the variable; which of the two, ``pytest -s`` tells."""
    need_cards(2)
    instances = rig.of(
        [
            Seat("cuda", "prefill", 0, port=free_ports(1), visible="0"),
            Seat("cuda", "decode", 0, visible="1"),
        ]
    )
    (outcome,), seed, target = instances.transfer()
    print(f"\nGPUs hidden from each other: {'handed over' if outcome.ok else outcome.reason}; {instances.whys()}")
    if outcome.ok:
        assert instances.decode[0].ask("holds_only", target, seed)
        assert instances.whys() == {"cuda_ipc: GPUs of one host; one kernel copies pages in place"}
    else:
        assert "CUDA_VISIBLE_DEVICES" in outcome.reason


def test_gpus_without_peer_access_are_refused_by_name(rig: Rig) -> None:
    """A transfer between them fails at once and says why: nothing is tried that could end the engine's CUDA work."""
    instances = rig.started("twin", (0,), (1,), unreachable=frozenset({(1, 0)}))
    started = time.monotonic()
    (outcome,), *_ = instances.transfer()
    assert not outcome.ok
    assert "GPU 1 has no peer access to GPU twin-0" in outcome.reason
    assert time.monotonic() - started < ENDED_S / 2, "a deadline ended it, not the reason"


UCX: dict[str, Any] = {"order": ["ucx"], "gpu_slot_bytes": 16 * MIB, "gpu_staging_bytes": 64 * MIB, "probe_bytes": 0}
SENT = "GPU memory sent directly"


@pytest.mark.parametrize("way", ["direct", "staged", "auto"])
def test_ucx_moves_memory_of_one_gpu_to_the_other(device: Device, way: str) -> None:
    """Directly (CUDA IPC, over what links the two) and staged through pinned host memory, in both directions; left to
    itself it says which of the two it took."""
    pytest.importorskip("ucxx")
    if device == "twin" and way == "direct":
        pytest.skip("UCX knows no memory of the stand-in")
    ends = [End(64 * MIB, {**UCX, "gpu": device, "card": card, "ucx_gpu_memory": way}) for card in (0, 1)]
    with ends[0] as one, ends[1] as other:
        whys = set(pair(one, other))
        print(f"\nucx between two GPUs, {way}: {whys}")
        assert len(whys) == 1, whys
        assert way == "auto" or (SENT in whys.pop()) == (way == "direct")
        for key, (here, there) in enumerate([(one, other), (other, one)] * 2, 1):
            here.ask("fill", key, 16 * MIB)
            source, target = shuffled(16 * 32, 32 << 10, key), shuffled(16 * 64, 16 << 10, key + 9)
            target = [(32 * MIB + offset, nbytes) for offset, nbytes in target]
            outside = [(16 * MIB, 16 * MIB), (48 * MIB, 16 * MIB)]
            before = there.ask("read", outside)
            assert hand_over(here, there, key, source, target, 8) is None
            assert there.ask("read", target) == here.ask("read", source)
            assert there.ask("read", outside) == before
        for end in ends:
            end.ask("close_channel")
        for end in ends:
            assert_all_free(end)
        assert (one.finish(), other.finish()) == (0, 0)
