"""What the shm link adds to the contract of all links (test_links.py): memory of a peer that is mapped, and what
becomes of it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import msgpack
import pytest

from pdtransport.errors import LinkUnavailable
from tests.processes.link_rig import End, pair, shuffled

pytestmark = pytest.mark.timeout(120)

MEMORY = 32 << 20
HALF = MEMORY // 2
PAGE = 8192
SHM: dict[str, Any] = {"batch_bytes": HALF, "staging_bytes": HALF, "probe_bytes": 0, "order": ["shm"]}
IDLE_S = 2.0  # twice what the link waits before it lets go of a peer's pages


def hand_over(sender: End, receiver: End, key: int, source: Any, target: Any) -> None:
    offer, checksums = sender.ask("send", key, source, 8)
    receiver.ask("receive", key, offer, target, checksums, 8)
    assert receiver.wait_for(("receive", key)) is None
    sender.ask("release", key)


def test_the_ends_of_a_region_cross_too() -> None:
    """Its first and last bytes share a page with other data and can't be mapped; they arrive all the same."""
    with End(MEMORY, dict(SHM)) as sender, End(MEMORY, dict(SHM)) as receiver:
        assert pair(sender, receiver)[1] == "shm: same host; copies pages from the peer's mapped memory"
        sender.ask("fill", 1, MEMORY)
        for key, spans in enumerate(([(0, MEMORY)], [(0, 64)], [(MEMORY - 64, 64), (HALF, PAGE), (0, 64)]), 1):
            hand_over(sender, receiver, key, spans, spans)
            assert receiver.ask("read", spans) == sender.ask("read", spans)
        assert [sender.finish(), receiver.finish()] == [0, 0]


def test_a_hundred_connects_hold_nothing() -> None:
    """No descriptor and no mapping stays of a channel that was closed."""
    with End(MEMORY, dict(SHM)) as sender, End(MEMORY, dict(SHM)) as receiver:
        before: list[dict[str, int]] = []
        for key in range(1, 102):
            pair(sender, receiver)
            if key in (1, 101):
                hand_over(sender, receiver, key, shuffled(32, PAGE, key), [(0, 32 * PAGE)])
            for one in (sender, receiver):
                one.ask("close_channel")
                one.ask("forget")
            if key == 1:
                before = [one.ask("held") for one in (sender, receiver)]
        after = [one.ask("held") for one in (sender, receiver)]
        for what, slack in (("descriptors", 0), ("mappings", 2)):  # an allocator may map a little for itself
            assert [one[what] for one in after] <= [one[what] + slack for one in before]


def test_an_idle_receiver_holds_no_pages_of_its_peer() -> None:
    """Resident memory grows while batches come, and is back once none does, with the channel still open."""
    with End(MEMORY, dict(SHM)) as sender, End(MEMORY, dict(SHM)) as receiver:
        for one in (sender, receiver):
            one.ask("fill", 1, MEMORY)
        pair(sender, receiver)
        hand_over(sender, receiver, 1, shuffled(32, PAGE, 1), [(0, 32 * PAGE)])
        time.sleep(IDLE_S)
        before = receiver.ask("held")["resident"]
        hand_over(sender, receiver, 2, [(HALF, HALF)], shuffled(HALF // PAGE, PAGE, 2))
        assert receiver.ask("held")["resident"] > before + HALF // 2
        time.sleep(IDLE_S)
        assert receiver.ask("held")["resident"] < before + HALF // 8
        hand_over(sender, receiver, 3, shuffled(32, PAGE, 3), [(0, 32 * PAGE)])
        assert receiver.ask("read", [(0, 32 * PAGE)]) == sender.ask("read", shuffled(32, PAGE, 3))


def test_an_idle_end_holds_what_its_pages_held() -> None:
    """Opening the link adds next to nothing to resident memory: pages are not held twice, untouched ones not at all."""
    with End(MEMORY, {**SHM, "order": ["cma"]}) as plain, End(MEMORY, dict(SHM)) as shared:
        assert shared.ask("held")["resident"] < plain.ask("held")["resident"] + (8 << 20)


def test_the_memory_of_a_killed_sender_can_still_be_read() -> None:
    """What it offered stands in memory that outlives it: the batch arrives whole, and nothing faults. Afterwards a
    new process of the same kind is another peer."""
    with End(MEMORY, dict(SHM)) as receiver:
        for round_ in range(2):
            with End(MEMORY, dict(SHM)) as sender:
                sender.ask("fill", round_, MEMORY)
                pair(sender, receiver)
                spans = [(HALF // 2 + offset, nbytes) for offset, nbytes in shuffled(HALF // PAGE, PAGE, round_)]
                expected = sender.ask("read", spans)
                offer, checksums = sender.ask("send", 1, spans, 8)
                sender.signal(signal.SIGKILL)
                receiver.ask("receive", 1, offer, [(0, HALF)], checksums, 8)
                assert receiver.wait_for(("receive", 1)) is None
                assert receiver.ask("read", [(0, HALF)]) == expected
                receiver.ask("forget")


def test_a_peer_that_is_gone_is_not_connected() -> None:
    with End(MEMORY, dict(SHM)) as one, End(MEMORY, dict(SHM)) as two:
        export = one.ask("export")
        one.signal(signal.SIGKILL)
        with pytest.raises(LinkUnavailable, match="is gone"):
            two.ask("connect", export)


@pytest.mark.parametrize(
    ("spans", "why"),
    [
        (None, "does not offer it"),
        ([], "damaged"),
        ([[4096, 4096, 0]], "damaged"),
        ([[4096, 4096, "3", 0]], "damaged"),
        ([[4096, 4096, 10_000, 0]], "can't be mapped"),
        ([[4096, 4096, 0, 0]], "is not "),
    ],
)
def test_exports_that_lie_about_memory_are_refused(spans: Any, why: str) -> None:
    """A descriptor that is not there, or that is no sealed memory: refused with a reason, and nothing is held."""
    with End(1 << 20, dict(SHM)) as one, End(1 << 20, dict(SHM)) as two:
        export = msgpack.unpackb(one.ask("export")["shm"])
        export["spans"] = spans
        with pytest.raises(LinkUnavailable, match=why):
            two.ask("connect", {"shm": msgpack.packb(export)})
        assert two.ask("held")["descriptors"] == one.ask("held")["descriptors"]


def test_memory_that_can_not_be_shared_leaves_the_next_link() -> None:
    """Too small to be worth it: cma takes the pair, and says why shm did not."""
    settings = {**SHM, "order": ["shm", "cma"]}
    with End(32 << 10, dict(settings)) as one, End(32 << 10, dict(settings)) as two:
        assert one.names == ["cma"]
        why = pair(one, two)[0]
        assert why.startswith("cma: same host; reads pages directly; shm unavailable: none of the memory can be shared")
        assert os.linesep not in why
