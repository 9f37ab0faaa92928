"""Links between real processes: what they promise while both ends live, lie, stop or die."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest

from pdtransport.errors import LinkError, LinkUnavailable
from pdtransport.links.base import LinkBusy
from tests.processes.link_rig import End, Spans, pair, shuffled

pytestmark = pytest.mark.timeout(120)

BATCH = 256 << 10  # what most tests move
BIG = 16 << 20  # takes 5 to 20 ms to copy
MEMORY = 2 * BIG
SETTINGS: dict[str, Any] = {
    "batch_bytes": BIG,
    "staging_bytes": 4 * BIG,
    "gpu_slot_bytes": BIG,
    "gpu_staging_bytes": 4 * BIG,
    "probe_bytes": 0,
}
PAGE = 8192
SEEN = 4 * BATCH  # what `fill` fills and tests compare
PAGES = BATCH // PAGE
BLOCKS = 8
OUTSIDE = os.environ.get("PDT_LINKS", "").split()  # links for host memory, of other packages
KINDS = OUTSIDE or ["shm", "cma", "ucx", "ucx-tcp", "ucx-twin"]  # the last: pages on the stand-in for a GPU


def end(kind: str, **settings: Any) -> End:
    name = kind if kind in OUTSIDE else kind.split("-")[0]
    environment = {"UCX_TLS": "tcp"} if kind.endswith("-tcp") else {}
    if kind.endswith("-twin"):
        settings = {"gpu": "twin", **settings}
    return End(MEMORY, {**SETTINGS, "order": [name], **settings}, environment)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, tuple[End, End]]]:
    """Two long-lived processes of each kind, started at first use."""
    started: dict[str, tuple[End, End]] = {}
    yield started
    for one in (one for ends in started.values() for one in ends):
        with one:
            assert one.finish() == 0


def of_kind(processes: dict[str, tuple[End, End]], kind: str) -> tuple[End, End]:
    if kind not in processes:
        processes[kind] = end(kind), end(kind)
    for one in processes[kind]:
        one.ask("forget")
    return processes[kind]


@pytest.fixture
def ends(processes: dict[str, tuple[End, End]], kind: str) -> Iterator[tuple[End, End]]:
    """A sender and a receiver with a fresh channel between them; in the end, nothing of it is left."""
    sender, receiver = of_kind(processes, kind)
    pair(sender, receiver)
    yield sender, receiver
    for one in (sender, receiver):
        one.ask("close_channel")
    for one in (sender, receiver):
        assert_all_free(one)


in_place = pytest.mark.parametrize("kind", ["shm", "cma"], indirect=True)
ucx = pytest.mark.parametrize("kind", ["ucx"], indirect=True)
any_ucx = pytest.mark.parametrize("kind", ["ucx", "ucx-tcp", "ucx-twin"], indirect=True)


def hand_over(sender: End, receiver: End, key: int, source: Spans, target: Spans, blocks: int) -> str | None:
    """Send, receive, release; the receiver's verdict."""
    offer, checksums = sender.ask("send", key, source, blocks)
    receiver.ask("receive", key, offer, target, checksums, max(blocks, 1))
    verdict = receiver.wait_for(("receive", key))
    sender.ask("release", key)
    return verdict


def assert_all_free(one: End, timeout_s: float = 5.0) -> None:
    """Every slot and ticket is back where it began."""
    deadline = time.monotonic() + timeout_s
    while any(free != total for free, total in one.ask("free").values()):
        assert time.monotonic() < deadline, one.ask("free")
        time.sleep(0.02)


# -- both ends live -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, BLOCKS])
def test_shuffled_pages_arrive_and_nothing_else_changes(ends: tuple[End, End], blocks: int) -> None:
    """Different fragmentation on both sides, checksums off and on; bytes beside the runs stay."""
    sender, receiver = ends
    sender.ask("fill", 1)
    receiver.ask("fill", 2)
    source, target = shuffled(PAGES, PAGE, 3), [(BATCH + o, n) for o, n in shuffled(2 * PAGES, PAGE // 2, 4)]
    outside = [(0, BATCH), (2 * BATCH, 2 * BATCH)]
    before = receiver.ask("read", outside)
    assert hand_over(sender, receiver, 7, source, target, blocks) is None
    assert receiver.ask("read", target) == sender.ask("read", source)
    assert receiver.ask("read", outside) == before
    for one in ends:
        assert_all_free(one)
    stats = receiver.ask("stats")
    assert (stats["bytes_received"], stats["batches_received"], stats["errors"]) == (BATCH, 1, 0)
    assert stats["bandwidth"] > 0


def test_contiguous_pages_and_many_batches_arrive(ends: tuple[End, End]) -> None:
    """More batches than slots, some in one run (sent without gathering), in both directions at once."""
    for i, one in enumerate(ends):
        one.ask("fill", 10 + i)
    for key in range(1, 13):
        source = [(0, BATCH)] if key % 2 else shuffled(PAGES, PAGE, key)
        here, there = ends if key % 3 else ends[::-1]
        assert hand_over(here, there, key, source, [(3 * BATCH, BATCH)], BLOCKS) is None
        assert there.ask("read", [(3 * BATCH, BATCH)]) == here.ask("read", source)
    for one in ends:
        assert_all_free(one)


def test_small_and_odd_batches_arrive(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sender.ask("fill", 1)
    for key, nbytes in enumerate((8, 16, 24, 1000, 4104, 70000), 1):
        for blocks in (0, 1):
            assert hand_over(sender, receiver, 2 * key + blocks, [(8, nbytes)], [(3, nbytes)], blocks) is None
            assert receiver.ask("read", [(3, nbytes)]) == sender.ask("read", [(8, nbytes)])


@pytest.mark.parametrize("blocks", [0, 1, BLOCKS])
def test_batches_of_many_slices_arrive_whole(ends: tuple[End, End], blocks: int) -> None:
    """Larger than what is copied in one turn, by several threads, in blocks smaller and larger than a turn's share."""
    sender, receiver = ends
    sender.ask("fill", 1, BIG)
    source, target = shuffled(BIG // 4096, 4096, 1), [(BIG + o, n) for o, n in shuffled(BIG // PAGE, PAGE, 2)]
    assert hand_over(sender, receiver, 1, source, target, blocks) is None
    assert receiver.ask("read", target) == sender.ask("read", source)


@any_ucx
def test_no_more_is_staged_than_the_ring_holds(ends: tuple[End, End]) -> None:
    """Backpressure: a sender whose batches nobody takes is told to wait, and goes on once they are taken."""
    sender, receiver = ends
    spans = shuffled(PAGES, PAGE, 1)
    offers = [sender.ask("send", key, spans, BLOCKS) for key in (1, 2)]
    with pytest.raises(LinkBusy):
        sender.ask("send", 3, spans, BLOCKS)
    free, total = sender.ask("free")["sending"]
    assert total - free == 2 == total // 2  # one peer may hold half of the ring
    for key, (offer, checksums) in enumerate(offers, 1):
        receiver.ask("receive", key, offer, spans, checksums, BLOCKS)
        assert receiver.wait_for(("receive", key)) is None
    assert hand_over(sender, receiver, 100, spans, spans, BLOCKS) is None
    assert_all_free(sender)


def test_both_ends_exit_cleanly(kind: str) -> None:
    """Also with batches offered, asked for and never sent."""
    with end(kind) as sender, end(kind) as receiver:
        pair(sender, receiver)
        offer, checksums = sender.ask("send", 1, shuffled(PAGES, PAGE, 1), BLOCKS)
        sender.ask("hold_still", True)
        receiver.ask("receive", 1, offer, [(0, BATCH)], checksums, BLOCKS)
        time.sleep(0.1)
        assert [receiver.finish(), sender.finish()] == [0, 0]


def test_the_ucx_environment_stays_as_it_was() -> None:
    """Importing a binding sets variables that would reach every other UCX of the process."""
    with End(4096, {**SETTINGS, "order": ["ucx"]}, {"UCX_MAX_RNDV_RAILS": "2"}) as one:
        assert one.ask("environment") == {"UCX_MAX_RNDV_RAILS": "2"}


# -- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shm", "cma", "ucx", "ucx-tcp"], indirect=True)  # from a GPU all is gathered
@pytest.mark.parametrize("byte", [0, 12345, BATCH - 1])
def test_source_bytes_changed_after_the_checksum_are_reported(ends: tuple[End, End], kind: str, byte: int) -> None:
    """The pages changed between announcement and arrival (a reused page): never accepted."""
    sender, receiver = ends
    sender.ask("fill", 1)
    # ucx gathers fragmented pages at once; only what it sends straight from its pages can change
    spans = [(0, BATCH)] if kind.startswith("ucx") else [(o, n) for o, n in shuffled(PAGES, PAGE, 2)]
    offer, checksums = sender.ask("send", 1, spans, BLOCKS)
    old = sender.ask("read", [(byte, 1)])
    sender.ask("set", byte, bytes([old[0] ^ 0x10]))
    receiver.ask("receive", 1, offer, [(0, BATCH)], checksums, BLOCKS)
    verdict = receiver.wait_for(("receive", 1))
    assert verdict is not None
    assert verdict.startswith("damaged: 1 of 8 blocks")
    assert receiver.ask("stats")["errors"] == 1


@pytest.mark.parametrize("kind", ["ucx", "ucx-twin"], indirect=True)
def test_gathered_pages_may_be_reused_at_once(ends: tuple[End, End]) -> None:
    """Once they are sent, what happens to the pages does not reach the receiver."""
    sender, receiver = ends
    sender.ask("fill", 1)
    spans = shuffled(PAGES, PAGE, 2)
    honest = sender.ask("read", spans)
    offer, checksums = sender.ask("send", 1, spans, BLOCKS)
    sender.ask("fill", 99)
    receiver.ask("receive", 1, offer, [(0, BATCH)], checksums, BLOCKS)
    assert receiver.wait_for(("receive", 1)) is None
    assert receiver.ask("read", [(0, BATCH)]) == honest


@pytest.mark.parametrize("blocks", [0, BLOCKS])
@pytest.mark.parametrize("contiguous", [False, True])
def test_a_batch_taken_back_is_never_accepted(ends: tuple[End, End], blocks: int, contiguous: bool) -> None:
    """Released by its sender before the receiver came to it: refused, even with checksums off."""
    sender, receiver = ends
    sender.ask("fill", 1)
    spans = [(0, BATCH)] if contiguous else shuffled(PAGES, PAGE, 2)
    offer, checksums = sender.ask("send", 1, spans, blocks)
    sender.ask("release", 1)
    receiver.ask("receive", 1, offer, [(0, BATCH)], checksums, max(blocks, 1))
    verdict = receiver.wait_for(("receive", 1))
    assert verdict is not None
    assert verdict.startswith("damaged: withdrawn")
    for one in ends:
        assert_all_free(one)


def test_a_batch_that_takes_the_place_of_another_is_not_taken_for_it(ends: tuple[End, End]) -> None:
    """What one was offered in (a slot, a ticket, a descriptor) is used again: without checksums too, late is late."""
    sender, receiver = ends
    sender.ask("fill", 1)
    offer, _ = sender.ask("send", 1, shuffled(PAGES, PAGE, 2), 0)
    sender.ask("release", 1)
    sender.ask("send", 2, shuffled(PAGES, PAGE, 3), 0)
    receiver.ask("receive", 1, offer, [(0, BATCH)], b"", 1)
    assert str(receiver.wait_for(("receive", 1))).startswith("damaged: withdrawn")
    sender.ask("release", 2)


def test_wrong_checksums_are_reported_by_block(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sender.ask("fill", 1)
    offer, checksums = sender.ask("send", 1, shuffled(PAGES, PAGE, 2), BLOCKS)
    forged = checksums[:40] + bytes(8) + checksums[48:]
    receiver.ask("receive", 1, offer, [(0, BATCH)], forged, BLOCKS)
    verdict = receiver.wait_for(("receive", 1))
    assert verdict == "damaged: 1 of 8 blocks differ from their checksums, first 5"


# -- fences ---------------------------------------------------------------------------------------------------------


def test_fenced_batches_write_nothing_and_report_nothing(ends: tuple[End, End]) -> None:
    """Fenced before the link came to them: the pages stay as they are, for good."""
    sender, receiver = ends
    sender.ask("fill", 1)
    receiver.ask("fill", 2)
    before = receiver.ask("read", [(0, SEEN)])
    receiver.ask("hold_still", True)
    for key in (1, 2):
        offer, checksums = sender.ask("send", key, shuffled(PAGES, PAGE, key), BLOCKS)
        receiver.ask("receive", key, offer, [(key * BATCH, BATCH)], checksums, BLOCKS)
    receiver.ask("fence", [1])
    assert receiver.wait_for(("fence", (1,))) is None
    receiver.ask("hold_still", False)
    assert receiver.wait_for(("receive", 2)) is None
    sender.ask("release", 1)
    sender.ask("release", 2)
    after = receiver.ask("read", [(0, SEEN)])
    assert after[: 2 * BATCH] == before[: 2 * BATCH]
    assert after[3 * BATCH :] == before[3 * BATCH :]
    assert ("receive", 1) not in receiver.ask("ended")
    for one in ends:
        assert_all_free(one)


@any_ucx
def test_a_message_that_arrives_after_its_fence_reaches_no_page(ends: tuple[End, End]) -> None:
    """Asked for, fenced, then sent: only its slot takes it, and comes back afterwards."""
    sender, receiver = ends
    sender.ask("fill", 1)
    receiver.ask("fill", 2)
    before = receiver.ask("read", [(0, SEEN)])
    offer, checksums = sender.ask("send", 1, shuffled(PAGES, PAGE, 1), BLOCKS)
    sender.ask("hold_still", True)
    receiver.ask("receive_and_fence", 1, offer, [(0, BATCH)], checksums, BLOCKS)
    free, total = receiver.ask("free")["receiving"]
    assert free == total - 1  # quarantined: the message may come any time
    sender.ask("hold_still", False)
    assert_all_free(receiver)
    assert receiver.ask("read", [(0, SEEN)]) == before
    assert ("receive", 1) not in receiver.ask("ended")
    assert hand_over(sender, receiver, 2, shuffled(PAGES, PAGE, 1), [(0, BATCH)], BLOCKS) is None


# -- lies and mistakes ----------------------------------------------------------------------------------------------


def test_runs_outside_registered_memory_are_refused(ends: tuple[End, End]) -> None:
    """On both sides, whatever the engine or the peer says."""
    sender, receiver = ends
    for spans in ([(MEMORY, 8)], [(MEMORY - 8, 16)], [(0, 8), (1 << 40, 8)]):
        with pytest.raises(LinkError, match="outside the registered memory"):
            sender.ask("send", 1, spans, 0)
    offer, checksums = sender.ask("send", 1, [(0, PAGE)], 1)
    with pytest.raises(LinkError, match="outside the registered memory"):
        receiver.ask("receive", 1, offer, [(MEMORY - 8, PAGE)], checksums, 1)


def test_offers_of_another_length_are_refused(ends: tuple[End, End]) -> None:
    """Longer or shorter than the pages it is for; the pages keep what they hold."""
    sender, receiver = ends
    receiver.ask("fill", 2)
    before = receiver.ask("read", [(0, SEEN)])
    offer, checksums = sender.ask("send", 1, [(0, PAGE)], 1)
    for key, length in enumerate((PAGE - 8, PAGE + 8, 2 * PAGE), 1):
        try:
            receiver.ask("receive", key, offer, [(0, length)], checksums, 1)
            verdict = receiver.wait_for(("receive", key))
        except LinkError as error:
            verdict = str(error)
        assert verdict is not None
        assert f"{length} are expected" in verdict
    assert receiver.ask("read", [(0, SEEN)]) == before


def test_garbage_offers_are_refused_and_the_link_goes_on(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    garbage = [
        b"",
        b"\xc1",
        b"\x80",
        msgpack.packb([]),
        msgpack.packb([1, 2, 3, 4]),
        msgpack.packb([1, -1]),
        msgpack.packb([1 << 63, 1, PAGE, b"\0" * 8]),
        msgpack.packb([4096, 1, 0, b"\xff" * 24]),
        msgpack.packb([4096, 1, 1 << 62, b"\0" * 16]),
        msgpack.packb([4096, 1, "8", None]),
        os.urandom(100),
    ]
    for key, offer in enumerate(garbage, 10):
        try:
            receiver.ask("receive", key, offer, [(0, PAGE)], b"", 1)
            verdict = receiver.wait_for(("receive", key))
        except LinkError as error:
            verdict = str(error)
        assert verdict
    assert hand_over(sender, receiver, 1, shuffled(PAGES, PAGE, 1), [(0, BATCH)], BLOCKS) is None


@in_place
def test_an_offer_of_unmapped_memory_is_an_error(ends: tuple[End, End]) -> None:
    """A lying or late offer makes no pages, and kills nobody."""
    sender, receiver = ends
    at, number, *_ = msgpack.unpackb(sender.ask("send", 1, [(0, PAGE)], 0)[0])
    lie = msgpack.packb([at, number, PAGE, (1 << 20).to_bytes(8, "little")])
    receiver.ask("receive", 1, lie, [(0, PAGE)], b"", 1)
    assert "no such memory" in str(receiver.wait_for(("receive", 1)))
    assert hand_over(sender, receiver, 2, [(0, BATCH)], [(0, BATCH)], BLOCKS) is None


def test_checksums_that_do_not_fit_the_blocks_are_refused(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    offer, checksums = sender.ask("send", 1, [(0, PAGE)], 4)
    for key, (sums, blocks) in enumerate([(checksums, 3), (checksums[:-8], 4), (b"123", 1)], 1):
        try:
            receiver.ask("receive", key, offer, [(0, PAGE)], sums, blocks)
            verdict = receiver.wait_for(("receive", key))
        except LinkError as error:
            verdict = str(error)
        assert verdict is not None
        assert "checksums for" in verdict


@ucx
def test_a_batch_larger_than_a_slot_names_the_setting(ends: tuple[End, End]) -> None:
    sender, _ = ends
    with pytest.raises(LinkError, match=f"raise links.batch_bytes to {BIG + 8}"):
        sender.ask("send", 1, [(0, BIG), (BIG + 16, 8)], 1)
    assert_all_free(sender)


# -- death and stop -------------------------------------------------------------------------------------------------


def start_moving(sender: End, receiver: End) -> None:
    """Two big batches on their way."""
    page = 32 << 10
    spans = shuffled(BIG // page, page, 1)
    offers = [(key, *sender.ask("send", key, spans, BLOCKS)) for key in (1, 2)]
    for key, offer, checksums in offers:
        receiver.ask("receive", key, offer, [((key - 1) * BIG, BIG)], checksums, BLOCKS)


@pytest.mark.parametrize(("blow", "delay_s"), [("SIGKILL", 0.0), ("SIGKILL", 0.004), ("SIGSTOP", 0.002)])
@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_the_other_end_survives(
    processes: dict[str, tuple[End, End]], kind: str, blow: str, delay_s: float, victim: str
) -> None:
    """A peer killed or stopped in the middle of batches: the survivor lives, its channel closes within a deadline,
    every callback owed is called, every slot comes back, and it serves another peer."""
    survivor, other = of_kind(processes, kind)
    with end(kind) as dead:
        sender, receiver = (dead, survivor) if victim == "sender" else (survivor, dead)
        pair(sender, receiver)
        start_moving(sender, receiver)
        time.sleep(delay_s)
        dead.signal(signal.Signals[blow])
        time.sleep(0.05)
        assert survivor.ask("close_channel") < 2.0
        owed = [("receive", 1), ("receive", 2)] if survivor is receiver else []
        verdicts = [survivor.wait_for(key) for key in owed]
        assert all(verdict is None or verdict.startswith(("link: ", "damaged: ")) for verdict in verdicts)
        assert_all_free(survivor)
        pair(other, survivor)
        other.ask("fill", 5)
        spans = shuffled(PAGES, PAGE, 5)
        assert hand_over(other, survivor, 11, spans, [(0, BATCH)], BLOCKS) is None
        assert survivor.ask("read", [(0, BATCH)]) == other.ask("read", spans)


def test_a_peer_that_stood_still_costs_no_descriptors() -> None:
    """A sender stands still in the middle of batches, is given up, goes on, and gives up in turn: UCX keeps nothing of
    the channel on either side."""
    with end("ucx") as sender, end("ucx") as receiver:

        def held() -> list[int]:
            return [len(os.listdir(f"/proc/{one.process.pid}/fd")) for one in (sender, receiver)]

        pair(sender, receiver)  # what stays with the first one
        for one in (sender, receiver):
            one.ask("close_channel")
        for delay_s in (0.0, 0.0, 0.001, 0.002, 0.004):
            before = held()
            pair(sender, receiver)
            start_moving(sender, receiver)
            time.sleep(delay_s)
            sender.signal(signal.SIGSTOP)
            time.sleep(0.05)
            receiver.ask("give_up")
            time.sleep(0.3)
            sender.signal(signal.SIGCONT)
            time.sleep(0.3)
            sender.ask("give_up")
            for one in (sender, receiver):
                assert_all_free(one)
                one.ask("forget")
            until = time.monotonic() + 5.0
            while any(now > old for now, old in zip(held(), before, strict=True)):
                assert time.monotonic() < until, f"descriptors of sender and receiver: {before} -> {held()}"
                time.sleep(0.05)


def test_work_on_a_closed_channel_is_refused(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    offer, checksums = sender.ask("send", 1, [(0, PAGE)], 1)
    for one in ends:
        one.ask("close_channel")
    with pytest.raises(LinkError, match="closed"):
        sender.ask("send", 2, [(0, PAGE)], 1)
    with pytest.raises(LinkError, match="closed"):
        receiver.ask("receive", 1, offer, [(0, PAGE)], checksums, 1)
    assert_all_free(sender)


def test_ends_connect_again_after_a_close(ends: tuple[End, End]) -> None:
    """A partition that healed: late messages of the old channel mean nothing to the new one."""
    sender, receiver = ends
    offer, checksums = sender.ask("send", 1, shuffled(PAGES, PAGE, 1), BLOCKS)
    sender.ask("hold_still", True)
    receiver.ask("receive", 1, offer, [(0, BATCH)], checksums, BLOCKS)
    time.sleep(0.05)
    receiver.ask("close_channel")
    assert str(receiver.wait_for(("receive", 1))).startswith("link: ") or receiver.wait_for(("receive", 1)) is None
    sender.ask("hold_still", False)
    time.sleep(0.05)
    sender.ask("close_channel")
    pair(sender, receiver)
    sender.ask("fill", 3)
    for key in range(20, 26):
        assert hand_over(sender, receiver, key, shuffled(PAGES, PAGE, key), [(0, BATCH)], BLOCKS) is None
    for one in ends:
        assert_all_free(one)


# -- who may connect ------------------------------------------------------------------------------------------------


def test_cma_says_what_it_is_and_ucx_says_why_it_is_used(processes: dict[str, tuple[End, End]]) -> None:
    one, two = of_kind(processes, "cma")
    assert pair(one, two)[0] == "cma: same host; reads pages directly"
    with end("ucx-tcp", order=["cma", "ucx"]) as both:
        ucx_only = of_kind(processes, "ucx-tcp")[0].ask("export")
        assert both.ask("connect", ucx_only) == "ucx (tcp); cma unavailable: the peer does not offer it"


def test_ucx_uses_shared_memory_on_one_host(processes: dict[str, tuple[End, End]]) -> None:
    """And keeps it although every endpoint has error handling, without which a killed peer takes us along."""
    assert pair(*of_kind(processes, "ucx")) == ("ucx (shared memory)", "ucx (shared memory)")


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("host", "another-boot/4:1", "another host"),
        ("start", 1, "is gone"),
        ("cookie", bytes(32), "is not the peer"),
        ("at", 4096, "can't be read"),
        ("pid", 1 << 30, "is gone"),
        ("v", 99, "version 99"),
        ("pid", "1", "does not offer"),
    ],
)
@in_place
def test_links_that_read_refuse_all_but_the_very_process(
    processes: dict[str, tuple[End, End]], kind: str, field: str, value: Any, why: str
) -> None:
    """Another host, a recycled pid, another process: each is refused by what is wrong with it."""
    one, two = of_kind(processes, kind)
    export = msgpack.unpackb(one.ask("export")[kind])
    export[field] = value
    with pytest.raises(LinkUnavailable, match=why):
        two.ask("connect", {kind: msgpack.packb(export)})


def test_another_process_namespace_is_named(processes: dict[str, tuple[End, End]]) -> None:
    one, two = of_kind(processes, "cma")
    export = msgpack.unpackb(one.ask("export")["cma"])
    export["host"] = export["host"].split("/")[0] + "/4:1"
    with pytest.raises(LinkUnavailable, match="another container"):
        two.ask("connect", {"cma": msgpack.packb(export)})


def test_garbage_exports_are_refused() -> None:
    """UCX itself would crash on a damaged address."""
    with end("cma", order=["shm", "cma", "ucx"]) as one:
        for export in (b"", b"\xc1", os.urandom(64), msgpack.packb({"v": 1}), msgpack.packb({"v": 1, "address": b"x"})):
            with pytest.raises(LinkUnavailable, match="no link"):
                one.ask("connect", {"shm": export, "cma": export, "ucx": export})
        damaged = msgpack.unpackb(one.ask("export")["ucx"])
        damaged["address"] = damaged["address"][:-1] + b"\xff"
        with pytest.raises(LinkUnavailable, match="damaged"):
            one.ask("connect", {"ucx": msgpack.packb(damaged)})


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_process_that_may_not_be_read_names_the_remedy() -> None:
    """Then the next link is taken, and says why."""
    every = {"order": ["shm", "cma", "ucx"]}
    with end("ucx-tcp", **every) as one, end("ucx-tcp", **every) as two:
        two.ask("become_nobody")
        why = two.ask("connect", one.ask("export"))
        assert why.startswith("ucx (tcp); shm unavailable: ")
        assert why.count("kernel.yama.ptrace_scope") == 2


def test_a_required_link_is_not_replaced(processes: dict[str, tuple[End, End]]) -> None:
    """links.require refuses by name instead of taking a slower link."""
    ucx_only = of_kind(processes, "ucx")[0].ask("export")
    with end("cma", order=["cma", "ucx"], require="cma") as one:
        assert one.names == ["cma"]
        with pytest.raises(LinkUnavailable, match=r"links.require is 'cma'.*does not offer it"):
            one.ask("connect", ucx_only)


# -- two hosts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them."""
    names = f"pdt{os.getpid()}a", f"pdt{os.getpid()}b"
    ip = shutil.which("ip")
    if ip is None or subprocess.run([ip, "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("needs the right to make network namespaces")
    try:
        commands = [f"netns add {names[1]}", f"link add {names[0]}v type veth peer name {names[1]}v"]
        for number, name in enumerate(names, 1):
            commands += [
                f"link set {name}v netns {name}",
                f"-n {name} addr add 10.213.77.{number}/24 dev {name}v",
                f"-n {name} link set {name}v up",
                f"-n {name} link set lo up",
            ]
        for command in commands:
            subprocess.run([ip, *command.split()], check=True, timeout=10)
        yield names
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True, timeout=10)


@pytest.mark.netns
def test_pages_cross_between_network_namespaces(namespaces: tuple[str, str]) -> None:
    """Two network stacks, one cable: what two hosts see of each other. A dead cable ends in an error on close."""
    with end("ucx-tcp", netns=namespaces[0]) as sender, end("ucx-tcp", netns=namespaces[1]) as receiver:
        assert pair(sender, receiver) == ("ucx (tcp)", "ucx (tcp)")
        sender.ask("fill", 1)
        for key in range(1, 5):
            spans = shuffled(PAGES, PAGE, key)
            assert hand_over(sender, receiver, key, spans, [(0, BATCH)], BLOCKS) is None
            assert receiver.ask("read", [(0, BATCH)]) == sender.ask("read", spans)
        cable = ["ip", "-n", namespaces[0], "link", "set", f"{namespaces[0]}v", "down"]
        subprocess.run(cable, check=True, timeout=10)
        offer, checksums = sender.ask("send", 9, shuffled(PAGES, PAGE, 9), BLOCKS)
        receiver.ask("receive", 9, offer, [(0, BATCH)], checksums, BLOCKS)
        time.sleep(0.2)
        assert ("receive", 9) not in receiver.ask("ended")
        for one in (receiver, sender):
            assert one.ask("close_channel") < 2.0
            assert_all_free(one)
        assert str(receiver.wait_for(("receive", 9))).startswith("link: ")
        assert [receiver.finish(), sender.finish()] == [0, 0]
