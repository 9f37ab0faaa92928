"""The ucx link with pages on a GPU: real processes, real UCX, and a stand-in for the GPU whose kernels end when the
test wants (:mod:`tests.rig.twin_gpu`). What host memory must do as well is tested in ``test_links.py``, a real GPU in
``test_links_gpu.py``."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pdtransport.errors import LinkUnavailable
from pdtransport.kernels.runs import run
from pdtransport.links.base import Region
from pdtransport.links.ucx.link import UcxLink
from pdtransport.settings import LinkSettings
from tests.processes.link_rig import End, pair, shuffled
from tests.rig import twin_gpu

pytestmark = pytest.mark.timeout(60)

BATCH = 256 << 10
PAGE = 8192
PAGES = BATCH // PAGE
BLOCKS = 8
SETTINGS: dict[str, Any] = {
    "order": ["ucx"],
    "gpu_slot_bytes": BATCH,
    "gpu_staging_bytes": 8 * BATCH,
    "probe_bytes": 0,
}


def end(gpu: str = "twin", **settings: Any) -> End:
    return End(8 * BATCH, {"gpu": gpu, **SETTINGS, **settings})


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[End, End]]:
    with end() as sender, end() as receiver:
        yield sender, receiver
        assert [receiver.finish(), sender.finish()] == [0, 0]


@pytest.fixture
def ends(processes: tuple[End, End]) -> Iterator[tuple[End, End]]:
    """A sender and a receiver with a fresh channel; in the end, every slot is back."""
    for one in processes:
        one.ask("forget")
    pair(*processes)
    processes[0].ask("fill", 1)
    processes[1].ask("fill", 2)
    yield processes
    processes[1].ask("hold_kernels", False)
    for one in processes:
        one.ask("close_channel")
    for one in processes:
        wait_until(lambda one=one: all(free == total for free, total in one.ask("free").values()))


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def begin_placing(ends: tuple[End, End], *keys: int) -> None:
    """Batches that arrived and whose kernels do not end: batch ``key`` goes to the ``key``-th place."""
    sender, receiver = ends
    receiver.ask("hold_kernels", True)
    for key in keys:
        offer, checksums = sender.ask("send", key, shuffled(PAGES, PAGE, key), BLOCKS)
        receiver.ask("receive", key, offer, [(key * BATCH, BATCH)], checksums, BLOCKS)
    wait_until(lambda: receiver.ask("kernels") == len(keys))


def test_batches_arrive_while_others_are_placed(ends: tuple[End, End]) -> None:
    """Receives are pipelined over several slots, and no batch counts before its kernel ended."""
    sender, receiver = ends
    begin_placing(ends, 1, 2)
    assert not [key for key in receiver.ask("ended") if key[0] == "receive"]
    receiver.ask("hold_kernels", False)
    for key in (1, 2):
        assert receiver.wait_for(("receive", key)) is None
        assert receiver.ask("read", [(key * BATCH, BATCH)]) == sender.ask("read", shuffled(PAGES, PAGE, key))
        sender.ask("release", key)


def test_a_fence_waits_for_the_kernel_that_writes(ends: tuple[End, End]) -> None:
    """Pages must not be given back while a launched kernel may still write them; a batch beside it is not affected."""
    _, receiver = ends
    begin_placing(ends, 1, 2)
    receiver.ask("fence", [1])
    receiver.ask("fence", [7])
    assert receiver.wait_for(("fence", (7,))) is None  # nothing of it was under way
    assert ("fence", (1,)) not in receiver.ask("ended")
    receiver.ask("hold_kernels", False)
    assert receiver.wait_for(("fence", (1,))) is None
    before = receiver.ask("read", [(BATCH, BATCH)])
    assert receiver.wait_for(("receive", 2)) is None
    assert ("receive", 1) not in receiver.ask("ended")
    assert receiver.ask("read", [(BATCH, BATCH)]) == before
    assert receiver.ask("stats")["errors"] == 0


def test_closing_answers_for_pages_once_their_kernel_ended(ends: tuple[End, End]) -> None:
    """A closed channel owes an error; it must not come while pages are still written. Closing itself does not wait."""
    _, receiver = ends
    begin_placing(ends, 1)
    assert receiver.ask("close_channel") < 2.0
    assert ("receive", 1) not in receiver.ask("ended")
    free, total = receiver.ask("free")["receiving"]
    assert free == total - 1
    receiver.ask("hold_kernels", False)
    assert receiver.wait_for(("receive", 1)) == "link: the channel is closed"


def test_a_fence_of_a_closed_channel_is_answered(ends: tuple[End, End]) -> None:
    """Fenced, then closed, then the kernel ends: the pages come back."""
    _, receiver = ends
    begin_placing(ends, 1)
    receiver.ask("fence", [1])
    receiver.ask("close_channel")
    assert ("fence", (1,)) not in receiver.ask("ended")
    receiver.ask("hold_kernels", False)
    assert receiver.wait_for(("fence", (1,))) is None
    assert ("receive", 1) not in receiver.ask("ended")


def test_an_ended_kernel_wakes_a_sleeping_thread() -> None:
    """The link's descriptor turns readable, so that nobody has to spin for a kernel."""
    pytest.importorskip("ucxx")
    with twin_gpu.installed():
        memory = twin_gpu.DeviceMemory(4 * PAGE, 0)
        link = UcxLink([Region(memory.address, 4 * PAGE, memory, 0)], LinkSettings.model_validate(SETTINGS))
        try:
            assert link._gpu is not None
            while link.progress() or not link.arm():
                pass
            twin_gpu.going.clear()
            launch = link._gpu.place(run(memory.address, PAGE), run(memory.address + PAGE, PAGE), 1, direct=False)
            rings = select.poll()
            rings.register(link.fileno(), select.POLLIN)
            assert not rings.poll(100)
            twin_gpu.going.set()
            assert rings.poll(10_000)
            wait_until(launch.done)
            link.progress()
            assert not rings.poll(100), "it must fall asleep again"
        finally:
            twin_gpu.going.set()
            link.close()


# -- direct or staged -----------------------------------------------------------------------------------------------


def test_each_end_says_how_gpu_memory_moves_and_may_differ(processes: tuple[End, End]) -> None:
    """One end sends GPU memory as it lies, the other stages it; the bytes are the same."""
    _, staged = processes
    staged.ask("forget")
    with end("twin-direct") as direct:
        whys = pair(direct, staged)
        assert "GPU memory sent directly" in whys[0]
        assert "GPU memory staged through pinned host memory: this UCX has no CUDA support" in whys[1]
        direct.ask("fill", 3)
        offer, checksums = direct.ask("send", 1, shuffled(PAGES, PAGE, 1), BLOCKS)
        staged.ask("receive", 1, offer, [(BATCH, BATCH)], checksums, BLOCKS)
        assert staged.wait_for(("receive", 1)) is None
        assert staged.ask("read", [(BATCH, BATCH)]) == direct.ask("read", shuffled(PAGES, PAGE, 1))
        assert direct.finish() == 0


def test_a_demand_is_met_or_refused(processes: tuple[End, End]) -> None:
    """links.ucx_gpu_memory: neither falls back in silence."""
    refused = r"links.ucx_gpu_memory is direct, but this UCX has no CUDA support.*auto stages"
    with pytest.raises(LinkUnavailable, match=refused):
        end("twin", ucx_gpu_memory="direct")
    with end("twin-direct", ucx_gpu_memory="staged") as one:
        why = one.ask("connect", processes[0].ask("export"))
        assert "staged through pinned host memory: links.ucx_gpu_memory says so" in why


def test_a_batch_larger_than_a_slot_names_the_setting_for_gpus(ends: tuple[End, End]) -> None:
    with pytest.raises(Exception, match=f"raise links.gpu_slot_bytes to {2 * BATCH}"):
        ends[0].ask("send", 1, [(0, 2 * BATCH)], 1)
