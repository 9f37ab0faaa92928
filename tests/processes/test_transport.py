"""Whole transfers through the Python API: real sockets, real links, one or several workers a side."""

from __future__ import annotations

import asyncio
import math
import mmap
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import pytest

from pdtransport import InvalidCall, KVGeometry, Settings, TransferFailed, Transport, prompt_digest
from pdtransport.protocol.messages import Code
from tests.rig import twin_gpu
from tests.rig.twin_gpu import TwinEvent

LAYERS, BLOCKS, HEADS, BLOCK_SIZE, SLOT = 3, 40, 4, 16, 64
WAIT_S = 20.0


@dataclass
class Worker:
    kv: np.ndarray
    transport: Transport


@dataclass
class Cluster:
    """``prefill`` and ``decode`` workers of one instance each, with their own memory."""

    prefill: list[Worker]
    decode: list[Worker]

    @property
    def port(self) -> int:
        return self.prefill[0].transport.port


def free_ports(count: int) -> int:
    """The first of ``count`` consecutive ports that are free right now."""
    import socket

    for base in range(23000 + secrets.randbelow(2000), 30000):
        with ExitStack() as stack:
            try:
                for port in range(base, base + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise AssertionError("no free ports")


def worker(
    rank: int, ranks: int, settings: Settings, port: int, fill: int, engine: str, block_size: int, device: int = -1
) -> Worker:
    heads = HEADS // ranks
    shape = (LAYERS, BLOCKS, heads, block_size, SLOT)
    size = math.prod(shape)
    if device < 0:  # not of the heap, which shm does not share
        kv = np.ndarray(shape, dtype=np.uint8, buffer=mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE))
    else:
        kv = twin_gpu.DeviceMemory(size, 0).array(shape)
    kv[:] = fill
    geometry = replace(KVGeometry.of_array(kv, head_lo=rank * heads, total_heads=HEADS), device=device)
    return Worker(kv, Transport(geometry, settings, engine=engine, rank=rank, world=ranks, port=port))


MakeCluster = Callable[..., Cluster]


@pytest.fixture(params=["shm", "cma", "ucx", "cuda_ipc", "ucx-gpu"])
def cluster(request: pytest.FixtureRequest) -> Iterator[MakeCluster]:
    with ExitStack() as stack:
        order, device = request.param.split("-")[0], 0 if request.param in ("cuda_ipc", "ucx-gpu") else -1
        if device >= 0:
            stack.enter_context(twin_gpu.installed())

        def make(p: int = 1, d: int = 1, deadlines: dict | None = None, decode_block: int = BLOCK_SIZE) -> Cluster:
            settings = Settings.parse(
                {
                    "links": {
                        "order": [order],
                        "batch_bytes": 1 << 16,
                        "gpu_batch_bytes": 1 << 16 if order == "cuda_ipc" else 1 << 20,
                        "gpu_slot_bytes": 1 << 16,
                        "gpu_staging_bytes": 1 << 19,
                        "staging_bytes": 1 << 19,
                    },
                    "deadlines": deadlines or {},
                }
            )
            base = free_ports(p)
            prefill = [worker(r, p, settings, base + r, 0, "prefill", BLOCK_SIZE, device) for r in range(p)]
            decode = [worker(r, d, settings, 0, 255, "decode", decode_block, device) for r in range(d)]
            for one in (*prefill, *decode):
                stack.enter_context(one.transport)
            return Cluster(prefill, decode)

        yield make


def fill_pages(cluster: Cluster, pages: list[int], seed: int) -> np.ndarray:
    """Put the same random KV, split by heads, on all prefill workers; returns it for all heads:
    ``[layers, len(pages), heads, tokens, slot]``."""
    whole = np.random.default_rng(seed).integers(0, 255, (LAYERS, len(pages), HEADS, BLOCK_SIZE, SLOT), dtype=np.uint8)
    per = HEADS // len(cluster.prefill)
    for rank, one in enumerate(cluster.prefill):
        one.kv[:, pages] = whole[:, :, rank * per : (rank + 1) * per]
    return whole


def gathered(cluster: Cluster, pages: list[int]) -> np.ndarray:
    return np.concatenate([one.kv[:, pages] for one in cluster.decode], axis=2)


def receive_all(cluster: Cluster, transfer: str, digest: bytes, tokens: int, pages: list[int], first: int = 0) -> list:
    return [
        one.transport.receive(
            transfer,
            digest,
            tokens,
            pages,
            host="127.0.0.1",
            port=cluster.port,
            ranks=len(cluster.prefill),
            first_block=first,
        )
        for one in cluster.decode
    ]


@pytest.mark.parametrize(("p", "d"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (1, 4)])
def test_pages_arrive_byte_for_byte_whatever_the_tensor_parallel_sizes(cluster: MakeCluster, p: int, d: int) -> None:
    c = cluster(p, d)
    tokens, digest, transfer = 10 * BLOCK_SIZE - 3, prompt_digest(range(157)), secrets.token_hex(16)
    source, target = [3, 9, 1, 30, 31, 2, 8, 5, 20, 4], [7, 6, 5, 4, 3, 2, 1, 0, 39, 38]
    receipts = receive_all(c, transfer, digest, tokens, target)
    offers = [one.transport.offer(transfer, digest, tokens) for one in c.prefill]
    whole = fill_pages(c, source, seed=p * 10 + d)
    for done in (40, 100, tokens):  # chunked prefill
        for offer in offers:
            offer.ready(source, done)
    for offer in offers:
        offer.finish()
    assert all(handle.result(WAIT_S).ok for handle in [*receipts, *offers])
    assert np.array_equal(gathered(c, target), whole)
    untouched = [page for page in range(BLOCKS) if page not in target]
    assert (gathered(c, untouched) == 255).all(), "a page that was not granted was written"


@pytest.mark.parametrize(("p", "d"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("told", [1234, None])
def test_decode_learns_the_first_token_that_it_promised_to_go_on_from(
    cluster: MakeCluster, p: int, d: int, told: int | None
) -> None:
    """Prefill hears of the promise before it is finished, and nothing is handed over before; each of decode's workers
    then learns what prefill named, or that it named nothing."""
    pair, pages, digest = cluster(p, d), [3, 4], prompt_digest(range(32))
    whole = fill_pages(pair, pages, 1)
    heard = [threading.Event() for _ in pair.prefill]
    offers = [
        one.transport.offer("t", digest, 32, on_promise=event.set)
        for one, event in zip(pair.prefill, heard, strict=True)
    ]
    receipts = [
        one.transport.receive("t", digest, 32, [7, 8], host="127.0.0.1", port=pair.port, ranks=p, first_token=True)
        for one in pair.decode
    ]
    for offer in offers:
        offer.ready(pages, 32)
    assert all(event.wait(WAIT_S) for event in heard)
    with pytest.raises(TimeoutError):
        receipts[0].result(0.3)
    for offer in offers:
        offer.finish(told)
    assert [receipt.result(WAIT_S).first_token for receipt in receipts] == [told] * d
    assert (gathered(pair, [7, 8]) == whole).all()
    for offer in offers:
        offer.result(WAIT_S)


def test_prefill_lets_go_only_of_what_decode_has_not_granted(cluster: MakeCluster) -> None:
    """What was granted is delivered all the same; what was not is free at once, and a grant that comes later fails."""
    c = cluster()
    tokens, digest = 2 * BLOCK_SIZE, prompt_digest(range(32))
    whole = fill_pages(c, [3, 4], 1)
    (granted,) = receive_all(c, "granted", digest, tokens, [7, 8])
    offer = c.prefill[0].transport.offer("granted", digest, tokens)
    offer.ready([3, 4], BLOCK_SIZE)
    ends = time.monotonic() + WAIT_S
    while c.decode[0].transport.status()["counters"].get("blocks_received", 0) < 1:
        assert time.monotonic() < ends
        time.sleep(0.01)
    offer.let_go("kept elsewhere")
    offer.ready([3, 4], tokens)
    offer.finish()
    assert granted.result(WAIT_S).ok
    assert offer.result(WAIT_S).ok
    assert np.array_equal(gathered(c, [7, 8]), whole)

    waiting = c.prefill[0].transport.offer("waiting", digest, tokens)
    waiting.ready([3, 4], tokens)
    waiting.finish()
    waiting.let_go("kept elsewhere")
    ended = waiting.future.result(WAIT_S)
    assert (ended.code, ended.reason) == ("cancelled", "kept elsewhere")
    (record,) = [r for r in c.prefill[0].transport.status()["transfers"] if r["transfer"] == "waiting"]
    assert (record["role"], record["reason"]) == ("producer", "kept elsewhere")
    (late,) = receive_all(c, "waiting", digest, tokens, [7, 8])
    assert not late.future.result(WAIT_S).ok


def test_blocks_that_decode_holds_are_not_sent(cluster: MakeCluster) -> None:
    c = cluster()
    tokens, digest, transfer = 8 * BLOCK_SIZE, prompt_digest(range(128)), secrets.token_hex(16)
    source, target = list(range(8)), [20, 21, 22]
    whole = fill_pages(c, source, seed=1)
    offer = c.prefill[0].transport.offer(transfer, digest, tokens)
    offer.ready(source, tokens)
    offer.finish()
    (receipt,) = receive_all(c, transfer, digest, tokens, target, first=5)
    outcome = receipt.result(WAIT_S)
    assert np.array_equal(gathered(c, target), whole[:, 5:])
    assert outcome.nbytes == whole[:, 5:].nbytes == offer.result(WAIT_S).nbytes


def test_a_grant_of_nothing_frees_prefill_at_once(cluster: MakeCluster) -> None:
    c = cluster()
    digest, transfer = prompt_digest([1, 2, 3]), secrets.token_hex(16)
    offer = c.prefill[0].transport.offer(transfer, digest, 3)
    offer.ready([0], 3)
    offer.finish()
    (receipt,) = receive_all(c, transfer, digest, 3, [], first=1)
    assert receipt.result(WAIT_S).nbytes == 0
    assert offer.result(WAIT_S).ok


def test_another_prompt_under_the_same_transfer_is_refused(cluster: MakeCluster) -> None:
    """Promise 1: the wrong prompt's KV is never taken, even if a router mixes ids up."""
    c = cluster()
    transfer = secrets.token_hex(16)
    offer = c.prefill[0].transport.offer(transfer, prompt_digest([1, 2, 3]), 3)
    (receipt,) = receive_all(c, transfer, prompt_digest([1, 2, 4]), 3, [0])
    with pytest.raises(TransferFailed, match="different prompts"):
        receipt.result(WAIT_S)
    offer.finish()
    with pytest.raises(TransferFailed):
        offer.result(WAIT_S)
    assert (c.decode[0].kv == 255).all()


def test_an_unknown_transfer_ends_with_a_reason(cluster: MakeCluster) -> None:
    c = cluster(deadlines={"arrival_s": 0.5})
    (receipt,) = receive_all(c, secrets.token_hex(16), prompt_digest([1]), 20, [0, 1])
    with pytest.raises(TransferFailed, match="did not reach prefill"):
        receipt.result(WAIT_S)


def test_a_transfer_id_used_twice_is_refused_on_both_sides(cluster: MakeCluster) -> None:
    c = cluster()
    digest, transfer = prompt_digest([1, 2]), secrets.token_hex(16)
    for attempt in range(2):
        if attempt:
            with pytest.raises(InvalidCall, match="offered before"):
                c.prefill[0].transport.offer(transfer, digest, 2)
            c.prefill[0].transport._offered.clear()  # nor is it forgotten further down
        offer = c.prefill[0].transport.offer(transfer, digest, 2)
        offer.ready([0], 2)
        offer.finish()
        (receipt,) = receive_all(c, transfer, digest, 2, [0])
        if attempt == 0:
            assert receipt.result(WAIT_S).ok
            assert offer.result(WAIT_S).ok
            continue
        for handle in (offer, receipt):
            with pytest.raises(TransferFailed, match="used before"):
                handle.result(WAIT_S)


def test_a_second_offer_under_a_live_transfer_id_can_not_touch_the_first(cluster: MakeCluster) -> None:
    """Promise 1: two requests with one transfer id: only the first one's pages are sent, and it alone may end it."""
    c = cluster()
    digest, transfer = prompt_digest([5]), secrets.token_hex(16)
    whole = fill_pages(c, [3], seed=3)
    first = c.prefill[0].transport.offer(transfer, digest, 4)
    with pytest.raises(InvalidCall, match="offered before"):
        c.prefill[0].transport.offer(transfer, digest, 4)
    c.prefill[0].transport._offered.clear()  # the state machines hold of themselves
    second = c.prefill[0].transport.offer(transfer, digest, 4)
    with pytest.raises(TransferFailed, match=r"in use|used before"):
        second.result(WAIT_S)
    second.ready([4], 4)
    second.finish()
    second.cancel()
    first.ready([3], 4)
    first.finish()
    (receipt,) = receive_all(c, transfer, digest, 4, [0])
    (again,) = receive_all(c, transfer, digest, 4, [1])
    with pytest.raises(TransferFailed):
        again.result(WAIT_S)
    again.cancel()
    assert receipt.result(WAIT_S).ok
    assert first.result(WAIT_S).ok
    assert np.array_equal(gathered(c, [0]), whole)
    assert (gathered(c, [1]) == 255).all()


def test_an_abort_after_everything_was_acked_is_a_delivery(cluster: MakeCluster) -> None:
    """A router may drop its connection to prefill once decode has answered: nothing was lost."""
    c = cluster()
    digest, transfer = prompt_digest([5]), secrets.token_hex(16)
    offer = c.prefill[0].transport.offer(transfer, digest, 4)
    offer.ready([3], 4)
    (receipt,) = receive_all(c, transfer, digest, 4, [0])
    assert receipt.result(WAIT_S).ok
    deadline = time.monotonic() + WAIT_S
    while not c.prefill[0].transport.status(transfer)["transfers"][0]["events"].get("acked"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    offer.cancel()
    assert offer.result(WAIT_S).ok


def test_pages_nobody_takes_are_given_back(cluster: MakeCluster) -> None:
    c = cluster(deadlines={"hold_s": 0.3})
    offer = c.prefill[0].transport.offer(secrets.token_hex(16), prompt_digest([1]), 5)
    offer.ready([0], 5)
    offer.finish()
    with pytest.raises(TransferFailed, match="hold_s"):
        offer.result(WAIT_S)


@pytest.mark.parametrize(("p", "d"), [(1, 1), (2, 1), (1, 2)])
def test_pages_that_decode_declines_are_given_back_at_once(cluster: MakeCluster, p: int, d: int) -> None:
    """Its request is gone before it granted: no deadline has to pass, on either side, and what is booked is why."""
    c = cluster(p, d)
    digest, transfer = prompt_digest([1]), secrets.token_hex(16)
    offers = [one.transport.offer(transfer, digest, 5) for one in c.prefill]
    for offer in offers:
        offer.ready([0], 5)
        offer.finish()
    for one in c.decode:
        one.transport.decline(transfer, Code.REJECTED, "too long", host="127.0.0.1", port=c.port, ranks=p)
    for offer in offers:
        with pytest.raises(TransferFailed, match="too long") as failed:
            offer.result(WAIT_S)
        assert failed.value.code == "rejected"
    for one in c.decode:
        status = one.transport.status(transfer)
        assert [(record["state"], record["code"]) for record in status["transfers"]] == [("declined", "rejected")]
        assert not any(status["live"].values())


@pytest.mark.parametrize(("p", "d"), [(1, 1), (2, 1), (1, 2)])
def test_decode_learns_what_prefill_found_in_its_caches(cluster: MakeCluster, p: int, d: int) -> None:
    """With the outcome that brings the pages; a prefill that does not say leaves it open."""
    c = cluster(p, d)
    for cached in (0, 16, None):
        digest, transfer = prompt_digest([1]), secrets.token_hex(16)
        offers = [one.transport.offer(transfer, digest, 20) for one in c.prefill]
        receipts = receive_all(c, transfer, digest, 20, [0, 1])
        for offer in offers:
            if cached is not None:
                offer.cached(cached)
            offer.ready([0, 1], 20)
            offer.finish()
        assert [receipt.result(WAIT_S).cached_tokens for receipt in receipts] == [cached] * d


def test_a_claim_keeps_pages_longer_than_the_hold(cluster: MakeCluster) -> None:
    c = cluster(deadlines={"hold_s": 0.3})
    digest, transfer = prompt_digest([1]), secrets.token_hex(16)
    c.decode[0].transport.claim(transfer, host="127.0.0.1", port=c.port)
    offer = c.prefill[0].transport.offer(transfer, digest, 5)
    offer.ready([0], 5)
    time.sleep(0.2)
    offer.finish()
    time.sleep(0.6)
    (receipt,) = receive_all(c, transfer, digest, 5, [0])
    assert receipt.result(WAIT_S).ok


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_an_abort_on_one_side_ends_the_other(cluster: MakeCluster, side: str) -> None:
    c = cluster()
    digest, transfer = prompt_digest(range(64)), secrets.token_hex(16)
    offer = c.prefill[0].transport.offer(transfer, digest, 64)
    (receipt,) = receive_all(c, transfer, digest, 64, [0, 1, 2, 3])
    offer.ready([0, 1, 2, 3], 32)
    deadline = time.monotonic() + WAIT_S
    while c.decode[0].transport.status()["counters"].get("blocks_received", 0) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (offer if side == "prefill" else receipt).cancel()
    offer.finish()
    for handle in (offer, receipt):
        with pytest.raises(TransferFailed):
            handle.result(WAIT_S)
    for one in (*c.prefill, *c.decode):
        live = one.transport.status()["live"]
        assert not any(live.values()), f"left behind: {live}"


def test_a_preempted_prefill_sends_what_it_computes_again(cluster: MakeCluster) -> None:
    c = cluster()
    tokens, digest, transfer = 6 * BLOCK_SIZE, prompt_digest(range(96)), secrets.token_hex(16)
    prefill = c.prefill[0]
    offer = prefill.transport.offer(transfer, digest, tokens)
    fill_pages(c, [0, 1, 2], seed=1)
    offer.ready([0, 1, 2], 3 * BLOCK_SIZE)
    offer.withdraw(WAIT_S)
    prefill.kv[:] = 77  # the engine gave the pages to somebody else
    (receipt,) = receive_all(c, transfer, digest, tokens, [9, 8, 7, 6, 5, 4])
    source = [30, 31, 32, 33, 34, 35]
    whole = fill_pages(c, source, seed=2)
    offer.ready(source, tokens)
    offer.finish()
    assert receipt.result(WAIT_S).ok
    assert np.array_equal(gathered(c, [9, 8, 7, 6, 5, 4]), whole)


def test_peers_of_another_block_size_are_refused_by_the_name_of_the_field(cluster: MakeCluster) -> None:
    c = cluster(decode_block=BLOCK_SIZE * 2)
    (receipt,) = receive_all(c, secrets.token_hex(16), prompt_digest([1]), 20, [0])
    with pytest.raises(TransferFailed, match="block_size") as caught:
        receipt.result(WAIT_S)
    assert caught.value.code == "refused"


def test_a_prefill_that_is_not_there_ends_with_a_reason() -> None:
    settings = Settings.parse({"control": {"connect_s": 0.5}, "links": {"order": ["cma"]}})
    one = worker(0, 1, settings, 0, 0, "decode", BLOCK_SIZE)
    with one.transport as transport:
        receipt = transport.receive(
            secrets.token_hex(16), prompt_digest([1]), 20, [0], host="127.0.0.1", port=free_ports(1)
        )
        with pytest.raises(TransferFailed) as caught:
            receipt.result(WAIT_S)
        assert caught.value.code == "peer_lost"


def test_many_transfers_at_once_do_not_mix(cluster: MakeCluster) -> None:
    c = cluster()
    jobs = []
    for i in range(12):
        source, target = [i, 20 + i], [i + 20, i]
        digest, transfer = prompt_digest([i] * 32), secrets.token_hex(16)
        jobs.append((fill_pages(c, source, seed=i), target, transfer, digest, source))
    receipts = [receive_all(c, t, digest, 32, target)[0] for _, target, t, digest, _ in jobs]
    for _, _, transfer, digest, source in jobs:
        offer = c.prefill[0].transport.offer(transfer, digest, 32)
        offer.ready(source, 32)
        offer.finish()
    for receipt, (whole, target, *_) in zip(receipts, jobs, strict=True):
        assert receipt.result(WAIT_S).ok
        assert np.array_equal(gathered(c, target), whole)


def test_a_handle_can_be_awaited(cluster: MakeCluster) -> None:
    c = cluster()
    digest, transfer = prompt_digest([7]), secrets.token_hex(16)
    offer = c.prefill[0].transport.offer(transfer, digest, 1)
    offer.ready([0], 1)
    offer.finish()

    async def wait() -> bool:
        (receipt,) = receive_all(c, transfer, digest, 1, [0])
        return (await asyncio.wait_for(receipt, WAIT_S)).ok

    assert asyncio.run(wait())


def test_closing_a_transport_ends_its_transfers() -> None:
    settings = Settings.parse({"links": {"order": ["cma"]}})
    one = worker(0, 1, settings, 0, 0, "prefill", BLOCK_SIZE)
    offer = one.transport.offer(secrets.token_hex(16), prompt_digest([1]), 1)
    one.transport.close()
    with pytest.raises(TransferFailed, match="closed"):
        offer.result(WAIT_S)


def test_a_pair_is_measured_once_and_says_what_it_found(cluster: MakeCluster) -> None:
    """Promise 5: which link carries a pair, why, and how fast."""
    c = cluster()
    digest, transfer = prompt_digest([7]), secrets.token_hex(16)
    offer = c.prefill[0].transport.offer(transfer, digest, 1)
    offer.ready([0], 1)
    offer.finish()
    (receipt,) = receive_all(c, transfer, digest, 1, [0])
    assert receipt.result(WAIT_S).ok
    (peer,) = c.decode[0].transport.status()["peers"]
    assert peer["link"] in peer["why"]
    assert peer["probe_bytes_s"] > 0


def test_a_link_below_the_wanted_bandwidth_is_refused_not_taken_in_silence() -> None:
    """Promise 5: a policy can refuse."""
    settings = Settings.parse({"links": {"order": ["cma"], "min_bandwidth_bytes_s": 1e15}})
    source = worker(0, 1, Settings.parse({"links": {"order": ["cma"]}}), free_ports(1), 0, "prefill", BLOCK_SIZE)
    target = worker(0, 1, settings, 0, 0, "decode", BLOCK_SIZE)
    with source.transport, target.transport as transport:
        receipt = transport.receive(
            secrets.token_hex(16), prompt_digest([1]), 20, [0], host="127.0.0.1", port=source.transport.port
        )
        with pytest.raises(TransferFailed, match="min_bandwidth_bytes_s") as caught:
            receipt.result(WAIT_S)
        assert caught.value.code == "refused"


def test_pages_on_a_gpu_leave_when_their_event_has_passed() -> None:
    """What was prepared while the GPU computed is sent only afterwards, with the bytes that were computed; pages that
    were taken back meanwhile are prepared anew."""
    with twin_gpu.installed(), ExitStack() as stack:
        settings = Settings.parse({"links": {"order": ["cuda_ipc"]}})
        prefill = worker(0, 1, settings, free_ports(1), 0, "prefill", BLOCK_SIZE, device=0)
        decode = worker(0, 1, settings, 0, 255, "decode", BLOCK_SIZE, device=0)
        for one in (prefill, decode):
            stack.enter_context(one.transport)
        c = Cluster([prefill], [decode])
        tokens, digest, transfer = 8 * BLOCK_SIZE, prompt_digest(range(128)), secrets.token_hex(16)
        source, moved, target = list(range(8)), list(range(8, 16)), list(range(20, 28))
        offer = prefill.transport.offer(transfer, digest, tokens)
        (receipt,) = receive_all(c, transfer, digest, tokens, target)
        granted_by = time.monotonic() + WAIT_S
        while not any(record["events"].get("granted") for record in prefill.transport.status()["transfers"]):
            assert time.monotonic() < granted_by
            time.sleep(0.01)
        first, second, again = TwinEvent(), TwinEvent(), TwinEvent()
        offer.ready(source, 64, after=first)
        offer.ready(source, tokens, after=second)
        time.sleep(0.2)
        assert prefill.transport.status()["counters"].get("bytes_sent", 0) == 0, "sent before they were computed"
        assert decode.transport.status()["counters"].get("batches_foreseen", 0) == 2, "decode was not told ahead"
        fill_pages(c, source, seed=5)
        first.happen()
        sent_by = time.monotonic() + WAIT_S
        while prefill.transport.status()["counters"].get("blocks_sent", 0) != 4:
            assert time.monotonic() < sent_by
            time.sleep(0.01)
        offer.withdraw(WAIT_S)  # preempted: the second step's pages were never announced
        offer.ready(moved, tokens, after=again)
        whole = fill_pages(c, moved, seed=6)
        second.happen()
        again.happen()
        offer.finish()
        assert receipt.result(WAIT_S).ok
        assert offer.result(WAIT_S).ok
        assert np.array_equal(gathered(c, target)[:, 4:], whole[:, 4:])
