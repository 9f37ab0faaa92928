"""The Transport API called wrongly, too late, or from asyncio: an error of one line at the call, never a hang."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from pdtransport import (
    InvalidCall,
    KVGeometry,
    Offer,
    Outcome,
    PDTransportError,
    TimedOut,
    TransferFailed,
    Transport,
    TransportClosed,
    TransportStatus,
    prompt_digest,
)

SHAPE = (2, 8, 2, 4, 16)  # layers, blocks, heads, tokens, slot
TOKENS, PAGES = 10, [1, 2, 3]  # the last of three pages is not full
DIGEST = prompt_digest(range(TOKENS))
WAIT_S = 20.0


def opened() -> Transport:
    return Transport(KVGeometry.of_array(np.zeros(SHAPE, np.uint8)), port=0)


@pytest.fixture
def transport() -> Iterator[Transport]:
    with opened() as one:
        yield one


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    assert isinstance(caught.value, PDTransportError)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


WRONG: dict[str, tuple[Callable[[Transport, Offer], Any], str]] = {
    "offered twice": (lambda t, o: t.offer("t", DIGEST, TOKENS), "t was offered before"),
    "no id": (lambda t, o: t.offer("", DIGEST, TOKENS), "transfer=''"),
    "odd id": (lambda t, o: t.offer("a b\n", DIGEST, TOKENS), "transfer='a b"),
    "id of another type": (lambda t, o: t.offer(7, DIGEST, TOKENS), "transfer=7"),  # type: ignore[arg-type]
    "no digest": (lambda t, o: t.offer("u", b"", TOKENS), "prompt_digest"),
    "text digest": (lambda t, o: t.offer("u", "0" * 32, TOKENS), "prompt_digest"),  # type: ignore[arg-type]
    "no tokens": (lambda t, o: t.offer("u", DIGEST, 0), "tokens=0"),
    "more pages ready": (lambda t, o: o.ready([1, 2, 3, 4], TOKENS), "4 pages: the prompt has room for 3"),
    "more tokens ready": (lambda t, o: o.ready(PAGES, TOKENS + 1), "a prompt of 10 tokens"),
    "negative tokens": (lambda t, o: o.ready(PAGES, -1), "tokens=-1"),
    "page that is not there": (lambda t, o: o.ready([1, 2, 8], TOKENS), "the geometry has 0..7"),
    "negative page": (lambda t, o: o.ready([-2, 2], TOKENS), "the geometry has 0..7"),
    "more pages received": (
        lambda t, o: t.receive("u", DIGEST, TOKENS, [1, 2, 3, 4], host="127.0.0.1", port=1),
        "4 pages: the prompt has room for 3",
    ),
    "more from a later block": (
        lambda t, o: t.receive("u", DIGEST, TOKENS, [1, 2], first_block=2, host="127.0.0.1", port=1),
        "2 pages: the prompt has room for 1",
    ),
    "block beyond the prompt": (
        lambda t, o: t.receive("u", DIGEST, TOKENS, [], first_block=4, host="127.0.0.1", port=1),
        "first_block=4",
    ),
    "received into nowhere": (
        lambda t, o: t.receive("u", DIGEST, TOKENS, [1, 2, 99], host="127.0.0.1", port=1),
        "the geometry has 0..7",
    ),
    "no geometry": (lambda t, o: Transport(np.zeros(SHAPE)), "not ndarray"),  # type: ignore[arg-type]
    "rank": (lambda t, o: Transport(t.groups.groups, rank=1, world=1, port=0), "rank=1"),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_what_cannot_be_raises_at_the_call(what: str, transport: Transport) -> None:
    """And changes nothing: the offer that was there before is handed over."""
    call, says = WRONG[what]
    offer = transport.offer("t", DIGEST, TOKENS)
    with pytest.raises(InvalidCall) as caught:
        call(transport, offer)
    assert says in one_line(caught)
    with opened() as other:
        receipt = other.receive("t", DIGEST, TOKENS, PAGES, host="127.0.0.1", port=transport.port)
        offer.ready(PAGES, TOKENS)
        offer.finish()
        assert receipt.result(WAIT_S).ok
        assert offer.result(WAIT_S).ok


def test_one_of_many_threads_offers_a_transfer(transport: Transport) -> None:
    """Methods may be called from any thread: of eight that offer the same one at once, one does."""
    at_once = threading.Barrier(8)

    def offer(_: int) -> bool:
        at_once.wait(WAIT_S)
        try:
            transport.offer("t", DIGEST, TOKENS)
        except InvalidCall:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(offer, range(8))) == 1


def test_everything_after_close_says_that_it_is_closed() -> None:
    with opened() as transport:
        offer = transport.offer("t", DIGEST, TOKENS)
        receipt = transport.receive("u", DIGEST, TOKENS, PAGES, host="127.0.0.1", port=1)
    transport.close()  # twice is once
    calls: list[Callable[[], Any]] = [
        lambda: transport.offer("v", DIGEST, TOKENS),
        lambda: transport.receive("v", DIGEST, TOKENS, PAGES, host="127.0.0.1", port=1),
        lambda: transport.claim("v", host="127.0.0.1", port=1),
        transport.status,
        lambda: offer.ready(PAGES, TOKENS),
        offer.finish,
        offer.cancel,
        lambda: offer.let_go("no"),
        lambda: offer.withdraw(1.0),
        receipt.cancel,
    ]
    for call in calls:
        with pytest.raises(TransportClosed) as caught:
            call()
        assert "closed" in one_line(caught)
    for handle in (offer, receipt):  # what was under way has ended
        with pytest.raises(TransferFailed, match=r"closed|no connection|refused") as failed:
            handle.result(WAIT_S)
        one_line(failed)


def test_waits_that_end_too_early_say_how_long_and_for_what(transport: Transport) -> None:
    offer = transport.offer("t", DIGEST, TOKENS)
    with pytest.raises(TimedOut, match=r"transfer t has not ended within 0\.01 s") as caught:
        offer.result(0.01)
    one_line(caught)
    assert isinstance(caught.value, TimeoutError)  # as before there was a name for it
    busy, go_on = threading.Event(), threading.Event()

    def hold(transfer_engine: Any) -> None:
        busy.set()
        go_on.wait(WAIT_S)

    transport._call(hold)
    assert busy.wait(WAIT_S)
    try:
        for call in (lambda: transport.status(timeout_s=0.01), lambda: offer.withdraw(0.01)):
            with pytest.raises(TimedOut, match=r"I/O thread did not answer within 0\.01 s") as caught:
                call()
            one_line(caught)
    finally:
        go_on.set()


def test_asyncio_all_the_way() -> None:
    """``async with``, ``await``: and a wait that is given up leaves the transfer as it is."""

    async def main() -> tuple[Outcome, Outcome]:
        async with opened() as prefill, opened() as decode:
            offer = prefill.offer("t", DIGEST, TOKENS)
            receipt = decode.receive("t", DIGEST, TOKENS, PAGES, host=prefill.host, port=prefill.port)
            offer.ready(PAGES[:1], 4)

            async def wait() -> Outcome:
                return await receipt

            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(wait(), 0.05)
            assert not receipt.future.cancelled()
            assert not receipt.future.cancel()
            offer.ready(PAGES, TOKENS)
            offer.finish()
            ends = await asyncio.wait_for(wait(), WAIT_S), await offer
        with pytest.raises(TransportClosed):
            prefill.status()
        return ends

    assert [outcome.ok for outcome in asyncio.run(main())] == [True, True]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_tensors_of_the_host_are_handed_over_and_outlive_their_names(kind: str) -> None:
    """A torch tensor of bfloat16 and a numpy array, both temporary: the geometries keep their memory."""
    torch = pytest.importorskip("torch")

    def geometry(fill: float) -> KVGeometry:
        if kind == "torch":
            return KVGeometry.of_array(torch.full(SHAPE, fill, dtype=torch.bfloat16))
        return KVGeometry.of_array(np.full(SHAPE, fill, np.float16))

    def first_bytes(of: KVGeometry, page: int) -> np.ndarray:
        runs = of.runs([page], 0, 2)
        memory = (np.ctypeslib.ctypes.c_ubyte * int(runs[0, 1])).from_address(int(runs[0, 0]))
        return np.frombuffer(memory, np.uint8).copy()

    sent, got = geometry(1.5), geometry(0)
    gc.collect()
    with Transport(sent, port=0) as prefill, Transport(got, port=0) as decode:
        offer = prefill.offer("t", DIGEST, TOKENS)
        receipt = decode.receive("t", DIGEST, TOKENS, [4, 5, 6], host=prefill.host, port=prefill.port)
        offer.ready(PAGES, TOKENS)
        offer.finish()
        assert receipt.result(WAIT_S).blocks == 3
    assert (first_bytes(got, 4) == first_bytes(sent, 1)).all()
    assert first_bytes(got, 4).any()
    assert not first_bytes(got, 3).any()


def test_status_is_what_its_type_says(transport: Transport) -> None:
    """The keys of :class:`TransportStatus`, no more and no less, of peers and transfers too."""
    with opened() as decode:
        offer = transport.offer("t", DIGEST, TOKENS)
        receipt = decode.receive("t", DIGEST, TOKENS, PAGES, host=transport.host, port=transport.port)
        offer.ready(PAGES, TOKENS)
        offer.finish()
        receipt.result(WAIT_S)
        status: TransportStatus = decode.status()
    assert set(status) == set(TransportStatus.__annotations__)
    (peer,), (transfer,) = status["peers"], status["transfers"]
    from pdtransport import PeerStatus, TransferStatus

    assert set(peer) == set(PeerStatus.__annotations__)
    assert set(transfer) == set(TransferStatus.__annotations__)
    assert transfer["state"] == "ready"
