"""Links whose receiver reads the sender's pages: what it accepts. The real `cma` link, this process being both ends."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pdtransport.errors import LinkError
from pdtransport.kernels.runs import Runs, run
from pdtransport.links.base import Region
from pdtransport.links.cma import CmaLink
from pdtransport.links.memory import Regions
from pdtransport.links.reading import PullChannel

BLOCK, BLOCKS = 1024, 4
NBYTES = BLOCK * BLOCKS


class End:
    """One end of a pair, with its memory."""

    def __init__(self, fill: int) -> None:
        self.memory = np.full(NBYTES, fill, dtype=np.uint8)
        self.link = CmaLink(Regions([Region(self.memory.ctypes.data, NBYTES, self.memory)]))
        self.channel: PullChannel
        self.told: list[str | None] = []

    @property
    def runs(self) -> Runs:
        return run(self.memory.ctypes.data, NBYTES)

    def receive(self, offer: bytes, checksums: bytes, *, key: int = 1) -> None:
        self.channel.receive(key, offer, self.runs, checksums, BLOCKS, self.told.append)

    def progress(self) -> list[str | None]:
        while self.link.progress():
            pass
        told, self.told = self.told, []
        return told


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    sender, receiver = End(0), End(255)
    sender.memory[:] = np.random.default_rng(3).integers(0, 255, NBYTES, dtype=np.uint8)
    for one, other in ((sender, receiver), (receiver, sender)):
        one.channel = one.link.connect(other.link.export(), "")
    yield sender, receiver
    for one in (sender, receiver):
        one.link.close()


def test_what_was_offered_arrives(ends: tuple[End, End]) -> None:
    """The rig's own proof."""
    sender, receiver = ends
    receiver.receive(*sender.channel.send(1, sender.runs, BLOCKS))
    assert receiver.progress() == [None]
    assert (receiver.memory == sender.memory).all()


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("bit", [0, 7, 31, 32, 40, 63])
def test_a_checksum_that_differs_in_any_bit_is_damage(ends: tuple[End, End], block: int, bit: int) -> None:
    """All 64 bits of every block's checksum are compared, and the block is named."""
    sender, receiver = ends
    offer, checksums = sender.channel.send(1, sender.runs, BLOCKS)
    words = np.frombuffer(checksums, dtype="<u8").copy()
    words[block] ^= np.uint64(1) << np.uint64(bit)
    receiver.receive(offer, words.tobytes())
    (error,) = receiver.progress()
    assert error == f"damaged: 1 of {BLOCKS} blocks differ from their checksums, first {block}"


@pytest.mark.parametrize("nbytes", [0, BLOCK, NBYTES - 8])
def test_an_offer_of_another_length_is_not_read(ends: tuple[End, End], nbytes: int) -> None:
    """Nobody vouches for what an offer says: a shorter one touches no page of ours."""
    sender, receiver = ends
    offer, _ = sender.channel.send(1, run(sender.memory.ctypes.data, nbytes), 0)
    receiver.receive(offer, b"")
    (error,) = receiver.progress()
    assert error == f"link: the offer is {nbytes} bytes long, {NBYTES} are expected"
    assert (receiver.memory == 255).all()


def test_a_fenced_batch_is_never_written_and_others_are(ends: tuple[End, End]) -> None:
    """After the fence its pages belong to somebody else: neither they change, nor is its callback called."""
    sender, receiver = ends
    for key in (1, 2):
        receiver.receive(*sender.channel.send(key, sender.runs, BLOCKS), key=key)
    fenced: list[str] = []
    receiver.channel.fence([1, 2], lambda: fenced.append("done"))
    assert (fenced, receiver.progress()) == (["done"], [])
    assert (receiver.memory == 255).all()
    receiver.receive(*sender.channel.send(3, sender.runs, BLOCKS), key=3)
    receiver.channel.fence([4], lambda: None)
    assert receiver.progress() == [None]


def test_a_batch_that_was_taken_back_is_never_accepted(ends: tuple[End, End]) -> None:
    """Without checksums, too: the sender's ticket is looked at before and after."""
    sender, receiver = ends
    offer, _ = sender.channel.send(1, sender.runs, 0)
    sender.channel.release(1)
    receiver.receive(offer, b"")
    assert receiver.progress() == ["damaged: withdrawn by its sender before or while it was read"]
    assert (receiver.memory == 255).all()


def test_memory_that_was_not_registered_is_neither_offered_nor_written(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    other = np.zeros(NBYTES, dtype=np.uint8)
    outside = run(other.ctypes.data, NBYTES)
    with pytest.raises(LinkError, match="outside the registered memory"):
        sender.channel.send(1, outside, BLOCKS)
    offer, checksums = sender.channel.send(2, sender.runs, BLOCKS)
    with pytest.raises(LinkError, match="outside the registered memory"):
        receiver.channel.receive(2, offer, outside, checksums, BLOCKS, receiver.told.append)


def test_the_end_of_a_peer_gives_back_all_that_was_offered_to_it(ends: tuple[End, End]) -> None:
    """A table's tickets are few: peers that die with offers outstanding must not use them up. And what reads such an
    offer late is told that it is void."""
    sender, receiver = ends
    before = sender.link.tickets.free
    offered = [sender.channel.send(key, sender.runs, BLOCKS) for key in range(3)]
    assert sender.link.tickets.free == before - 3
    sender.channel.close()
    assert sender.link.tickets.free == before
    for offer, checksums in offered:
        receiver.receive(offer, checksums)
    assert all(error is not None and error.startswith("damaged") for error in receiver.progress())
    assert (receiver.memory == 255).all()
