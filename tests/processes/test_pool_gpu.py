"""The pool for KV in GPU memory: over a stand-in for the GPU (see tests/rig/twin_gpu.py), or, with PDT_DEVICE=cuda, on
a real one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdtransport.kernels.runs import Runs
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import PoolSettings
from tests.processes.pool_rig import Bytes, Daemon, Other, content, daemon, key, names, status, until
from tests.rig import twin_gpu

REAL = os.environ.get("PDT_DEVICE") == "cuda"
PAGE, CHUNK, PLACES = 32 << 10, 256 << 10, 32
PER = CHUNK // PAGE
ANSWER_S = 30.0

only_twin = pytest.mark.skipif(REAL, reason="looks into the stand-in")


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with nullcontext() if REAL else twin_gpu.installed():
        twin_gpu.strict = True
        yield
        twin_gpu.strict = False
        twin_gpu.going.set()
        assert not twin_gpu.registered, "memory was left registered"
        twin_gpu.unregistered.clear()


class Engine:
    """Chunks scattered over pages of GPU memory in no order."""

    def __init__(self) -> None:
        from pdtransport.kernels.watch import DeviceMemory

        self.memory = DeviceMemory(PLACES * CHUNK, 0)
        self.pages = np.random.default_rng(0).permutation(PLACES * PER).reshape(PLACES, PER)
        for place in range(PLACES):
            self.put(place, content(1000 + place))

    def runs(self, place: int) -> Runs:
        runs = np.empty((PER, 2), dtype=np.uint64)
        runs[:, 0] = self.memory.address + self.pages[place] * PAGE
        runs[:, 1] = PAGE
        return runs

    def put(self, place: int, what: Bytes) -> None:
        from pdtransport.kernels.gpu import from_host

        for page, part in zip(self.pages[place].tolist(), what.reshape(PER, PAGE), strict=True):
            from_host(self.memory.address + page * PAGE, part.tobytes())

    def get(self, place: int) -> Bytes:
        from pdtransport.kernels.gpu import to_host

        raw = [to_host(self.memory.address + page * PAGE, PAGE) for page in self.pages[place].tolist()]
        return np.frombuffer(b"".join(raw), dtype=np.uint8)

    def store(self, client: PoolClient, numbers: list[int], **how: Any) -> Any:
        for place, number in enumerate(numbers):
            self.put(place, content(number))
        return client.store([key(n) for n in numbers], [self.runs(p) for p in range(len(numbers))], **how)

    def load(self, client: PoolClient, numbers: list[int], first: int = 16, **how: Any) -> Any:
        """Into places from ``first`` on."""
        runs = [self.runs(first + place) for place in range(len(numbers))]
        return client.load([key(n) for n in numbers], runs, **how)


class Busy:
    """Work on the GPU that goes on until :meth:`end`; ``event`` is recorded behind it."""

    def __init__(self) -> None:
        self._go = threading.Event()
        self.event: Any = None
        if not REAL:
            self.event = twin_gpu.TwinEvent()
            return
        import cupy

        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._stream.launch_host_func(lambda _: self._go.wait(ANSWER_S), None)
        self.event = cupy.cuda.Event(disable_timing=True)
        self.event.record(self._stream)

    def end(self) -> None:
        self._go.set()
        if not REAL:
            self.event.happen()


@pytest.fixture
def client(directory: Path) -> Iterator[PoolClient]:
    with (
        Pool(PoolSettings(dir=directory, memory_bytes=32 << 20)),
        PoolClient(directory=directory, device=0, deadline_s=ANSWER_S) as made,
    ):
        # What a test keeps the GPU busy with goes on until the test ends it, and registering waits for the GPU.
        until(lambda: (s := made._wire.session) is not None and s.prepared.is_set(), "the memory is not registered")
        yield made


def test_pages_of_a_gpu_come_back_into_other_pages_and_no_others(client: PoolClient) -> None:
    """What was stored out of GPU memory is what is loaded into it, and nothing else changes."""
    engine = Engine()
    numbers = list(range(16))
    before = [engine.get(place) for place in range(24, PLACES)]
    assert engine.store(client, numbers).result().prefix == 16
    assert engine.load(client, numbers[:8]).result().prefix == 8
    for place in range(8):
        assert np.array_equal(engine.get(16 + place), content(place))
    assert all(np.array_equal(engine.get(24 + i), each) for i, each in enumerate(before))
    assert names(engine.load(client, [99]).result()) == ["MISS"]
    assert status(client)["clients"][0]["held_bytes"] == 0


def test_chunks_of_a_gpu_and_of_host_memory_are_the_same_chunks(directory: Path, client: PoolClient) -> None:
    """One's kernels verify what the other's stored: checksums and bytes agree, both ways."""
    engine, other = Engine(), Other(directory)
    try:
        assert engine.store(client, [0, 1, 2]).result().prefix == 3
        assert other.ask("load", [0, 1, 2]) == (["READ"] * 3, "")  # asserts their content
        assert other.ask("store", [3, 4]) == (["WRITE"] * 2, "")
        assert engine.load(client, [3, 4]).result().prefix == 2
        assert np.array_equal(engine.get(16), content(3))
        assert np.array_equal(engine.get(17), content(4))
    finally:
        other.close()


def test_a_store_waits_for_the_kernels_that_fill_its_pages(client: PoolClient) -> None:
    """Pages are read once the event behind the step has passed, and not before; nobody waits on the host meanwhile."""
    engine, busy = Engine(), Busy()
    pending = engine.store(client, [1], after=busy.event)
    time.sleep(0.1)
    assert not pending.future.done()
    engine.put(0, content(2))
    busy.end()
    assert names(pending.result()) == ["WRITE"]
    assert engine.load(client, [1]).result().prefix == 1
    assert np.array_equal(engine.get(16), content(2))


def test_a_load_waits_for_the_kernels_that_still_use_its_pages(client: PoolClient) -> None:
    """Pages of a former owner keep their content until the event has passed."""
    engine = Engine()
    assert engine.store(client, [1]).result().prefix == 1
    before, busy = engine.get(16), Busy()
    pending = engine.load(client, [1], after=busy.event)
    time.sleep(0.1)
    assert not pending.future.done()
    assert np.array_equal(engine.get(16), before)
    busy.end()
    assert pending.result().prefix == 1
    assert np.array_equal(engine.get(16), content(1))


def test_a_cancelled_copy_ends_before_it_is_told(client: PoolClient) -> None:
    """When the result is there no kernel uses the pages: a preempted request's may be overwritten at once."""
    engine = Engine()
    assert engine.store(client, [1]).result().prefix == 1
    assert engine.load(client, [1]).result().prefix == 1  # the kernels of both directions are there
    busy = Busy()
    loading, storing = engine.load(client, [1], after=busy.event), engine.store(client, [2], after=busy.event)
    time.sleep(0.1)
    for pending in (loading, storing):
        pending.cancel()
    time.sleep(0.1)
    assert not loading.future.done()
    assert not storing.future.done()
    busy.end()
    assert names(loading.result()) in (["READ"], ["LOST"])  # it was over when it was heard
    assert names(storing.result()) == ["LOST"]
    engine.put(0, content(7))
    engine.put(16, content(7))
    time.sleep(0.05)
    assert np.array_equal(engine.get(16), content(7))
    until(lambda: not status(client)["clients"][0]["held_bytes"], "something is still held")
    if engine.load(client, [2]).result().prefix:
        assert np.array_equal(engine.get(16), content(2))


def test_a_damaged_chunk_is_a_miss(directory: Path, client: PoolClient) -> None:
    """The GPU's checksum of what arrived is compared with the stored one."""
    engine = Engine()
    assert engine.store(client, [1]).result().prefix == 1
    (memory,) = directory.glob("*.memory")
    raw = memory.read_bytes()
    at = raw.index(content(1)[:64].tobytes())
    with memory.open("r+b") as file:
        file.seek(at + 100)
        file.write(bytes([raw[at + 100] ^ 4]))
    assert names(engine.load(client, [1]).result()) == ["MISS"]
    assert client.counters["damaged"] == 1


def test_memory_that_can_not_be_registered_costs_copies_and_says_why(
    client: PoolClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, directory: Path
) -> None:
    """One line says what CUDA said. Nothing is copied, nothing hangs, questions are answered."""
    from pdtransport.kernels import gpu

    def refuse(*_: int) -> None:
        raise gpu.GpuError("cudaErrorNotSupported: not here")

    client.close()
    monkeypatch.setattr(gpu, "register_host", refuse)
    engine = Engine()
    with PoolClient(directory=directory, device=0, deadline_s=ANSWER_S) as ours:
        done = engine.store(ours, [1, 2]).result()
        assert names(done) == ["LOST"] * 2
        assert done.error.startswith(
            "its memory can't be registered with GPU 0 (cudaErrorNotSupported: not here): CUDA"
        )
        assert ours.lookup([key(1)]).result().there == 0
    assert sum("can't be registered" in record.message for record in caplog.records) == 1


def test_a_pool_that_starts_again_is_registered_again(directory: Path) -> None:
    """Its memory is another file: the old one is let go of, the new one registered, and bytes are right in both."""
    engine = Engine()
    with PoolClient(directory=directory, device=0, deadline_s=ANSWER_S) as client:
        assert names(engine.store(client, [1]).result()) == ["LOST"]
        for run in range(2):
            with daemon(directory) as service:
                assert engine.store(client, [run, 5]).result().prefix == 2
                assert engine.load(client, [5]).result().prefix == 1
                assert np.array_equal(engine.get(16), content(5))
                assert REAL or sum(twin_gpu.registered.values()) == 16 << 20
                service.kill()
                until(lambda: client._wire.session is None, "the client did not notice")
            assert REAL or (len(twin_gpu.unregistered), twin_gpu.registered) == (run + 1, {})


@only_twin
def test_clients_of_one_process_register_once(directory: Path) -> None:
    """Those for loads and for stores share a mapping; the last one lets go of it."""
    with (
        Pool(PoolSettings(dir=directory, memory_bytes=160 << 20)),
        PoolClient(directory=directory, device=0) as first,
    ):
        engine = Engine()
        with PoolClient(directory=directory, device=0) as second:
            assert engine.store(first, [1]).result().prefix == 1
            assert engine.load(second, [1]).result().prefix == 1
            assert list(twin_gpu.registered.values()) == [64 << 20, 64 << 20, 32 << 20]
        assert len(twin_gpu.registered) == 3
        assert engine.load(first, [1]).result().prefix == 1


@only_twin
def test_a_store_while_memory_is_being_registered_waits_and_can_be_cancelled(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large pool takes a while; a preemption need not wait for that."""
    go, plain = threading.Event(), twin_gpu.register_host

    def slow(*what: int) -> None:
        go.wait(ANSWER_S)
        plain(*what)

    monkeypatch.setattr(twin_gpu, "register_host", slow)
    with Pool(PoolSettings(dir=directory, memory_bytes=8 << 20)), PoolClient(directory=directory, device=0) as client:
        engine = Engine()
        first, second = engine.store(client, [1]), engine.store(client, [2])
        time.sleep(0.1)
        assert not first.future.done()
        first.cancel()
        assert names(first.result()) == ["LOST"]
        go.set()
        assert names(second.result()) == ["WRITE"]


@pytest.mark.more
def test_the_pool_killed_in_the_middle_of_copies_serves_nothing_wrong(directory: Path) -> None:
    """Its memory stays mapped and registered until the kernels are through."""
    engine = Engine()
    numbers = list(range(16))
    with PoolClient(directory=directory, device=0, deadline_s=ANSWER_S) as client:
        for _ in range(3):
            service = Daemon(directory)
            try:
                assert engine.store(client, numbers).result().prefix == 16
                pending = [engine.load(client, numbers) for _ in range(4)]
                service.kill()
                ended = [each.result() for each in pending]
            finally:
                service.close()
            if {verdict.name for verdict in ended[-1].verdicts} == {"READ"}:
                assert all(np.array_equal(engine.get(16 + n), content(n)) for n in numbers)
