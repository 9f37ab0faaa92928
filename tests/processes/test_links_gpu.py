"""The ucx link on a real GPU, between processes: GPU memory sent directly and staged. ``pytest -m gpu`` on a machine
with one; elsewhere all of it is skipped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pdtransport.errors import LinkError
from pdtransport.links.base import LinkBusy
from tests.processes.link_rig import End, Spans, pair, shuffled
from tests.processes.test_links import assert_all_free, hand_over

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

MIB = 1 << 20
SLOT = 16 * MIB
MEMORY = 4 * SLOT
PAGE = 32 << 10
BLOCKS = 8
SETTINGS: dict[str, Any] = {"order": ["ucx"], "gpu_slot_bytes": SLOT, "gpu_staging_bytes": 4 * SLOT, "probe_bytes": 0}
WAYS = ["direct", "staged", "tcp"]
SENT, STAGED = "GPU memory sent directly", "GPU memory staged through pinned host memory"


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Skips, with the reason, where there is none."""
    if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/dxg"):
        pytest.skip("no NVIDIA GPU on this machine")
    pytest.importorskip("cupy")
    pytest.importorskip("ucxx")


def end(way: str, **settings: Any) -> End:
    """``tcp``: auto, behind lanes that carry no GPU memory."""
    environment = {"UCX_TLS": "tcp,cuda_copy"} if way == "tcp" else {}
    wanted = "auto" if way == "tcp" else way
    return End(MEMORY, {"gpu": "cuda", "ucx_gpu_memory": wanted, **SETTINGS, **settings}, environment)


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, tuple[End, End]]]:
    started: dict[str, tuple[End, End]] = {}
    yield started
    for one in (one for ends in started.values() for one in ends):
        with one:
            assert one.finish() == 0


def of_way(processes: dict[str, tuple[End, End]], way: str) -> tuple[End, End]:
    if way not in processes:
        processes[way] = end(way), end(way)
    for one in processes[way]:
        one.ask("forget")
    return processes[way]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def ends(processes: dict[str, tuple[End, End]], way: str) -> Iterator[tuple[End, End]]:
    sender, receiver = of_way(processes, way)
    pair(sender, receiver)
    sender.ask("fill", 1, MEMORY)
    receiver.ask("fill", 2, MEMORY)
    yield sender, receiver
    for one in (sender, receiver):
        one.ask("close_channel")
    for one in (sender, receiver):
        assert_all_free(one)


def test_a_channel_says_how_gpu_memory_moves(processes: dict[str, tuple[End, End]], way: str) -> None:
    """Processes on one GPU: CUDA IPC where UCX may, and the reason where it is staged."""
    whys = pair(*of_way(processes, way))
    assert whys[0] == whys[1]
    if way == "direct":
        assert whys[0] == f"ucx (cuda_ipc; {SENT})"
    elif way == "tcp":
        assert whys[0] == f"ucx (tcp; {STAGED}: UCX reaches the peer by tcp alone, which takes no GPU memory)"
    else:
        assert whys[0] == f"ucx (shared memory; {STAGED}: links.ucx_gpu_memory says so)"


def test_auto_sends_gpu_memory_directly_on_one_gpu() -> None:
    with end("auto") as one, end("auto") as other:
        assert [SENT in why for why in pair(one, other)] == [True, True]
        assert (one.finish(), other.finish()) == (0, 0)


def test_auto_stages_for_a_peer_that_must_stage(processes: dict[str, tuple[End, End]]) -> None:
    """Its UCX opens no way for GPU memory; the two understand each other, in both directions."""
    staged, _ = of_way(processes, "staged")
    with end("auto") as one:
        whys = pair(one, staged)
        assert [STAGED in why for why in whys] == [True, True], whys
        for key, (here, there) in enumerate([(one, staged), (staged, one)], 1):
            here.ask("fill", key, SLOT)
            spans = shuffled(SLOT // PAGE, PAGE, key)
            assert hand_over(here, there, key, spans, [(SLOT, SLOT)], BLOCKS) is None
            assert there.ask("read", [(SLOT, SLOT)]) == here.ask("read", spans)
        assert one.finish() == 0


@pytest.mark.parametrize("blocks", [0, 1, BLOCKS])
def test_shuffled_pages_arrive_and_nothing_else_changes(ends: tuple[End, End], blocks: int) -> None:
    sender, receiver = ends
    source = shuffled(SLOT // PAGE, PAGE, 3)
    target = [(SLOT + o, n) for o, n in shuffled(2 * SLOT // PAGE, PAGE // 2, 4)]
    outside = [(0, SLOT), (2 * SLOT, 2 * SLOT)]
    before = receiver.ask("read", outside)
    assert hand_over(sender, receiver, 7, source, target, blocks) is None
    assert receiver.ask("read", target) == sender.ask("read", source)
    assert receiver.ask("read", outside) == before


@pytest.mark.parametrize("nbytes", [8, 16, 1000, 4104, 70000, SLOT - 8])
def test_batches_of_any_length_arrive(ends: tuple[End, End], nbytes: int) -> None:
    """Eager and rendezvous messages of UCX, aligned or not."""
    sender, receiver = ends
    for key, blocks in enumerate((0, 1), 1):
        assert hand_over(sender, receiver, key, [(8, nbytes)], [(24, nbytes)], blocks) is None
        assert receiver.ask("read", [(24, nbytes)]) == sender.ask("read", [(8, nbytes)])


def test_more_batches_than_slots_arrive(ends: tuple[End, End]) -> None:
    """Backpressure holds, slots are used again, and what was gathered may be overwritten at once."""
    sender, receiver = ends
    nbytes, waiting, sent = SLOT // 4, list(range(1, 17)), []
    expected = {}
    deadline = time.monotonic() + 60
    while waiting or sent:
        assert time.monotonic() < deadline
        if waiting and len(sent) < 8:  # places are used again
            key = waiting[0]
            spans = shuffled(nbytes // PAGE, PAGE, key)
            try:
                offer, checksums = sender.ask("send", key, spans, BLOCKS)
                expected[key] = sender.ask("read", spans)
                sender.ask("fill", 100 + key, nbytes)
                place: Spans = [(key % 8 * nbytes, nbytes)]
                receiver.ask("receive", key, offer, place, checksums, BLOCKS)
                sent.append((waiting.pop(0), place))
                continue
            except LinkBusy:
                pass
        key, place = sent.pop(0)
        assert receiver.wait_for(("receive", key)) is None
        assert receiver.ask("read", place) == expected[key]
        sender.ask("release", key)


def test_damage_is_reported_and_a_withdrawn_batch_never_accepted(ends: tuple[End, End]) -> None:
    """Forged checksums name the block; a batch taken back is refused even without checksums."""
    sender, receiver = ends
    spans = shuffled(SLOT // PAGE, PAGE, 2)
    offer, checksums = sender.ask("send", 1, spans, BLOCKS)
    forged = checksums[:40] + bytes(8) + checksums[48:]
    receiver.ask("receive", 1, offer, [(0, SLOT)], forged, BLOCKS)
    assert receiver.wait_for(("receive", 1)) == "damaged: 1 of 8 blocks differ from their checksums, first 5"
    sender.ask("release", 1)
    for key, blocks in ((2, BLOCKS), (3, 0)):
        offer, checksums = sender.ask("send", key, spans, blocks)
        sender.ask("release", key)
        receiver.ask("receive", key, offer, [(0, SLOT)], checksums, max(1, blocks))
        assert str(receiver.wait_for(("receive", key))).startswith("damaged: withdrawn")


def test_runs_that_the_kernels_do_not_take_are_errors(ends: tuple[End, End]) -> None:
    """No CUDA error, which would end all of the process' work: the next batch arrives."""
    sender, receiver = ends
    with pytest.raises(LinkError):
        sender.ask("send", 1, [(3, 1001)], 1)
    with pytest.raises(LinkError, match="outside the registered memory"):
        sender.ask("send", 1, [(MEMORY, 8)], 1)
    offer, checksums = sender.ask("send", 2, [(0, PAGE)], 1)
    receiver.ask("receive", 2, offer, [(3, PAGE)], checksums, 1)
    assert str(receiver.wait_for(("receive", 2))).startswith("link: ")
    assert hand_over(sender, receiver, 3, [(0, PAGE)], [(PAGE, PAGE)], 1) is None


def test_a_fenced_batch_is_not_reported_and_not_written_later(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    spans = shuffled(SLOT // PAGE, PAGE, 1)
    for key in range(1, 9):
        offer, checksums = sender.ask("send", key, spans, BLOCKS)
        receiver.ask("receive_and_fence", key, offer, [(0, SLOT)], checksums, BLOCKS)
        assert receiver.wait_for(("fence", (key,))) is None
        after = receiver.ask("read", [(0, SLOT)])
        time.sleep(0.05)
        assert receiver.ask("read", [(0, SLOT)]) == after
        assert ("receive", key) not in receiver.ask("ended")
        assert_all_free(receiver)
        sender.ask("release", key)


@pytest.mark.parametrize("delay_s", [0.0, 0.0005, 0.002])
@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_the_other_end_survives(processes: dict[str, tuple[End, End]], way: str, victim: str, delay_s: float) -> None:
    """A peer killed in the middle of batches: the survivor's slots come back, and it serves another peer."""
    survivor, other = of_way(processes, way)
    with end(way) as dead:
        sender, receiver = (dead, survivor) if victim == "sender" else (survivor, dead)
        pair(sender, receiver)
        spans = shuffled(SLOT // PAGE, PAGE, 1)
        offers = [(key, *sender.ask("send", key, spans, BLOCKS)) for key in (1, 2)]
        for key, offer, checksums in offers:
            receiver.ask("receive", key, offer, [(key * SLOT, SLOT)], checksums, BLOCKS)
        time.sleep(delay_s)
        dead.signal(signal.SIGKILL)
        assert survivor.ask("close_channel") < 2.0
        owed = [("receive", 1), ("receive", 2)] if survivor is receiver else []
        verdicts = [survivor.wait_for(key) for key in owed]
        assert all(verdict is None or verdict.startswith(("link: ", "damaged: ")) for verdict in verdicts)
        assert_all_free(survivor)
    pair(other, survivor)
    other.ask("fill", 5)
    spans = shuffled(MIB // PAGE, PAGE, 5)
    assert hand_over(other, survivor, 11, spans, [(0, MIB)], BLOCKS) is None
    assert survivor.ask("read", [(0, MIB)]) == other.ask("read", spans)
