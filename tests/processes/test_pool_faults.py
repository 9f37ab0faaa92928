"""The shared pool under faults: killed and stopped clients, a killed service, damage, full disks. Nothing wrong is ever
served, nothing is lost for good, and engines go on without."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdtransport.errors import PoolUnavailable
from pdtransport.kernels import pages
from pdtransport.pool.admin.pool_admin import PoolAdmin
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import PoolSettings
from tests.processes.pool_rig import (
    CHUNK,
    DAMAGES,
    Bytes,
    Other,
    Pages,
    content,
    daemon,
    key,
    load,
    mine,
    names,
    status,
    store,
    until,
)


@pytest.fixture
def other(directory: Path) -> Iterator[Other]:
    made = Other(directory)
    yield made
    made.close()


def pool(directory: Path, chunks: int = 8, **options: object) -> Pool:
    return Pool(PoolSettings.parse({"dir": directory, "memory_bytes": chunks * CHUNK, **options}))


def test_a_writer_killed_in_its_copy_leaves_nothing_and_the_next_takes_over(directory: Path, other: Other) -> None:
    """SIGKILL in the middle of a store: what it half wrote is never seen; who waited for the key stores it."""
    with pool(directory), PoolClient(directory=directory) as client:
        other.halt_in("store", [1, 2])
        assert client.lookup([key(1)]).result().there == 0
        waiting = threading.Thread(target=lambda: done.append(store(client, [1])))
        done: list = []
        waiting.start()
        room = Pages(1)  # must live as long as the load
        reading = client.load([key(2)], [room.runs(0)])
        until(lambda: mine(client)["requests"] >= 2, "nobody waits")
        other.kill()
        waiting.join(30)
        assert names(done[0]) == ["WRITE"]
        assert names(reading.result()) == ["MISS"]
        assert names(load(client, [1, 2])) == ["READ", "MISS"]
        assert status(client)["memory"]["used_bytes"] == CHUNK


def test_a_stopped_writer_keeps_its_memory_until_it_is_dead(directory: Path, other: Other) -> None:
    """No write lands in memory that was given back: however long a writer is silent, its frames are its own."""
    with pool(directory, chunks=4), PoolClient(directory=directory) as client:
        other.halt_in("store", [1])
        other.signal(signal.SIGSTOP)
        for number in range(10, 20):
            store(client, [number])
        assert status(client)["being_filled"] == 1
        assert names(load(client, range(10, 20))).count("READ") == 3
        other.signal(signal.SIGCONT)
        assert other.go_on() == (["WRITE"], "")
        assert names(load(client, [1])) == ["READ"]


def test_a_reader_killed_in_its_copy_gives_its_chunks_back(directory: Path, other: Other) -> None:
    """SIGKILL in the middle of a load: its references are released, and its chunks can go again."""
    with pool(directory, chunks=4), PoolClient(directory=directory) as client:
        store(client, [1])
        other.halt_in("load", [1])
        for number in range(10, 20):
            store(client, [number])
        assert client.lookup([key(1)]).result().there == 1  # referenced, so the flood passed it over
        other.kill()
        until(lambda: len(status(client)["clients"]) == 1, "the dead client was not noticed")
        for number in range(20, 30):
            store(client, [number])
        assert client.lookup([key(1)]).result().there == 0
        assert status(client)["service"] == {"clients_died": 1}


def test_two_writers_of_one_key_store_it_once(directory: Path, other: Other) -> None:
    """The second waits for the first and is told that the chunk is there."""
    with pool(directory), PoolClient(directory=directory) as client:
        other.halt_in("store", [1])
        done: list = []
        waiting = threading.Thread(target=lambda: done.append(store(client, [1, 2])))
        waiting.start()
        until(lambda: client.lookup([key(2)]).result().there, "the other key was not stored meanwhile")
        assert other.go_on() == (["WRITE"], "")
        waiting.join(30)
        assert names(done[0]) == ["HAVE", "WRITE"]
        assert status(client)["counters"]["stored_chunks"] == 2


@pytest.mark.parametrize("verb", ["store", "load"])
def test_a_killed_service_costs_hits_and_nothing_else(directory: Path, other: Other, verb: str) -> None:
    """SIGKILL of the pool in the middle of a copy: the copy ends safely, the client says so, and finds the next pool.
    What was loaded before is right; what was not confirmed counts as not stored."""
    with PoolClient(directory=directory) as client:
        with daemon(directory) as first:
            if verb == "load":
                store(client, [1, 2])
            other.halt_in(verb, [1, 2])
            first.kill()
            if verb == "load":
                # its bytes were copied and verified, whatever became of the pool
                assert other.go_on()[0] in (["READ", "READ"], ["LOST", "LOST"])
            else:
                assert other.go_on()[0] == ["LOST", "LOST"]
        with pytest.raises(PoolUnavailable):
            client.lookup([key(1)]).result()
        with daemon(directory):
            assert names(load(client, [1])) == ["MISS"]
            assert other.ask("store", [1, 3]) == (["WRITE", "WRITE"], "")
            assert names(load(client, [1, 3])) == ["READ", "READ"]
            assert len(list(directory.glob("*.memory"))) == 1


def test_a_killed_services_memory_is_given_back_by_its_clients(directory: Path) -> None:
    """SIGKILL of the pool leaves a file of shared memory: a client that used it removes it and maps it no longer,
    without being asked anything. Of a pool that lives it removes nothing."""
    with PoolClient(directory=directory) as client, daemon(directory) as first:
        assert names(store(client, [1])) == ["WRITE"]
        [memory] = directory.glob("*.memory")
        with PoolClient(directory=directory, who="another") as leaving:
            assert names(load(leaving, [1])) == ["READ"]
        assert memory.exists()
        first.kill()
        until(lambda: not memory.exists(), "it is still there")
        until(lambda: str(memory) not in Path("/proc/self/maps").read_text(), "it is still mapped")


def test_a_stopped_service_ends_waits_at_their_deadline(directory: Path) -> None:
    """SIGSTOP of the pool: every call ends by its deadline; after SIGCONT all is as it was and nothing is held."""
    with daemon(directory) as service, PoolClient(directory=directory) as client:
        store(client, [1])
        service.kill(signal.SIGSTOP)
        with pytest.raises(PoolUnavailable, match="deadline"):
            client.lookup([key(1)], deadline_s=0.3).result()
        assert names(load(client, [1], deadline_s=0.3)) == ["LOST"]
        assert names(store(client, [2], deadline_s=0.3)) == ["LOST"]
        service.kill(signal.SIGCONT)
        assert names(load(client, [1, 2])) == ["READ", "MISS"]
        until(lambda: mine(client)["requests"] == 0, "requests were left behind")
        assert mine(client)["held_bytes"] == 0
        assert status(client)["memory"]["used_bytes"] == CHUNK


def test_calls_that_wait_for_a_copier_end_at_their_deadline_too(directory: Path) -> None:
    """Every wait has a deadline: a call that queues behind others of its own client ends at its own, not at theirs, and
    its memory is its caller's again (the fault rig's seed 131 waited for five times as long)."""
    with daemon(directory) as service, PoolClient(directory=directory, threads=1) as client:
        store(client, [1])
        service.kill(signal.SIGSTOP)
        room = [Pages(1) for _ in range(3)]
        slow = client.load([key(1)], [room[0].runs(0)], deadline_s=4.0)
        began = time.monotonic()
        calls = [
            client.load([key(1)], [room[1].runs(0)], deadline_s=0.3),
            client.store([key(2)], [room[2].runs(0)], deadline_s=0.6),
        ]
        ended = [call.result() for call in calls]
        assert time.monotonic() - began < 2.0
        assert [names(each) for each in ended] == [["LOST"], ["LOST"]]
        assert all("deadline" in each.error for each in ended)
        assert not slow.future.done()
        service.kill(signal.SIGCONT)
        assert names(slow.result()) == ["READ"]
        assert client.counters["load_lost"] == client.counters["store_lost"] == 1
        assert names(load(client, [1])) == ["READ"]


@pytest.mark.parametrize("verb", ["store", "load"])
def test_a_call_cancelled_between_two_copies_holds_nothing(
    directory: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was granted and is not wanted any more is given back, though all was answered (the fault rig's seed 232)."""
    # of two lengths, granted together: two copies
    keys, rooms = [key(1), key(2)], [Pages(1), Pages(1, CHUNK // 2)]
    runs = [room.runs(0) for room in rooms]
    whole, calls = pages.read_mapped, []

    def cancels(*arguments: Any, **how: Any) -> Any:
        calls.pop().cancel()
        return whole(*arguments, **how)

    with pool(directory, chunks=32), PoolClient(directory=directory) as client:
        if verb == "load":
            assert client.store(keys, runs).result().prefix == 2
        began = threading.Event()
        monkeypatch.setattr(pages, "read_mapped", lambda *given, **how: began.wait(30) and cancels(*given, **how))
        calls.append(call := (client.store if verb == "store" else client.load)(keys, runs))
        began.set()
        assert names(call.result())[1] == "LOST"
        until(lambda: mine(client)["requests"] == 0, "its request is still there")
        assert mine(client)["held_bytes"] == 0
        assert status(client)["being_filled"] == 0
        PoolAdmin(client).clear()
        assert status(client)["memory"]["used_bytes"] == 0


def test_a_cancelled_wait_holds_nothing(directory: Path, other: Other) -> None:
    """Cancelling a load that waits ends it at once, and releases what it holds."""
    with pool(directory), PoolClient(directory=directory) as client:
        store(client, [2])
        other.halt_in("store", [1])
        room = Pages(2)  # must live as long as the load
        pending = client.load([key(1), key(2)], [room.runs(0), room.runs(1)], deadline_s=60.0)
        until(lambda: mine(client)["requests"], "it does not wait")
        pending.cancel()
        assert "LOST" in names(pending.result())
        until(lambda: mine(client)["requests"] == 0, "the request was left behind")


def test_a_damaged_chunk_in_memory_is_a_miss_and_dropped(directory: Path) -> None:
    """One flipped bit in the pool's memory: the reader notices, nobody is served it, and it can be stored anew."""
    with pool(directory), PoolClient(directory=directory) as client:
        store(client, [1, 2])
        flip_a_bit(directory, content(1))
        assert names(load(client, [1, 2])) == ["MISS", "READ"]
        assert client.counters["damaged"] == 1
        until(lambda: client.lookup([key(1)]).result().there == 0, "the damaged chunk is still there")
        assert names(store(client, [1])) == ["WRITE"]
        assert names(load(client, [1])) == ["READ"]


def flip_a_bit(directory: Path, chunk: Bytes) -> None:
    """Of a chunk of one frame or more, in the pool's memory."""
    (file,) = directory.glob("*.memory")
    memory = file.read_bytes()
    at = memory.find(chunk[4096:4160].tobytes())
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(bytes([memory[at] ^ 1]))


@pytest.mark.parametrize(("codec", "direct"), [("none", "auto"), ("none", "off"), ("zstd", "auto")])
def test_what_was_damaged_in_memory_is_not_written_below(
    directory: Path, tmp_path: Path, codec: str, direct: str
) -> None:
    """A flipped bit is noticed on the way to the disk, however it goes there: the good file stays, and is what loads
    get from then on."""
    if codec == "zstd":
        pytest.importorskip("zstandard")
    disk = {"path": tmp_path / "disk", "bytes": 64 << 20, "codec": codec, "direct": direct}
    with pool(directory, disk=disk) as served, PoolClient(directory=directory) as client:
        store(client, [1])
        until(lambda: status(client)["tiers"]["disk"]["chunks"] == 1, "it was not written back")
        flip_a_bit(directory, content(1))
        assert client.manage([key(1)], "write", tier="disk", again=True).result() == 1
        until(lambda: served.status()["counters"].get("damaged_memory") == 1, "it was not noticed")
        assert names(load(client, [1])) == ["READ"]


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_damaged_files_are_misses(directory: Path, tmp_path: Path, codec: str) -> None:
    """However a file was damaged, its chunk is a miss, the others are right, and it can be stored anew."""
    if codec == "zstd":
        pytest.importorskip("zstandard")
    disk = {"path": tmp_path / "disk", "bytes": 64 << 20, "codec": codec}
    count = len(DAMAGES) + 1
    with PoolClient(directory=directory) as client:
        with pool(directory, chunks=16, disk=disk):
            store(client, range(count))
            until(lambda: len(files(tmp_path, count)) == count, "chunks were not written back")
        for number, damage in enumerate(DAMAGES):
            damage(files(tmp_path, count)[number], files(tmp_path, count)[count - 1])
        with pool(directory, chunks=16, disk=disk) as again:
            until(lambda: status(client)["chunks"] >= len(DAMAGES) - 1, "the index was not rebuilt")
            assert names(load(client, range(count))) == ["MISS"] * len(DAMAGES) + ["READ"]
            assert again.status()["counters"]["disk_read_failed"] >= 5
            assert names(store(client, range(count))) == ["WRITE"] * len(DAMAGES) + ["HAVE"]
            assert names(load(client, range(count))) == ["READ"] * count


def files(tmp_path: Path, count: int) -> dict[int, Path]:
    """The chunks' files by number."""
    found = {path.name.partition(".")[0]: path for path in (tmp_path / "disk").glob("t-*/*/*.*")}
    return {number: found[key(number).hex()] for number in range(count) if key(number).hex() in found}


def test_a_full_disk_costs_the_disk_tier_only(directory: Path, tmp_path: Path) -> None:
    """A file system without room: no half file stays or is served, memory serves on, counters say so."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        with (
            pool(directory, chunks=8, disk={"path": small, "bytes": 64 << 20}),
            PoolClient(directory=directory) as client,
        ):
            assert store(client, range(8)).prefix == 8
            until(lambda: status(client)["counters"].get("disk_write_failed", 0) >= 5, "the disk took more than it has")
            until(lambda: status(client)["writeback_bytes"] == 0, "write-back hangs")
            assert names(load(client, range(8))) == ["READ"] * 8
            assert not list(small.glob("new-*"))
            for number in range(20, 28):
                store(client, [number])
            done = load(client, range(8))
            assert set(names(done)) <= {"READ", "MISS"}
            assert names(done).count("READ") <= 3
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_readers_in_an_eviction_storm_see_whole_chunks_or_none(directory: Path, other: Other) -> None:
    """While another process floods the pool, every chunk that is loaded is the one that was asked for."""
    with pool(directory, chunks=6), PoolClient(directory=directory) as client:
        seen, ends = 0, time.monotonic() + 3.0
        flood = range(1000)
        at = 0
        other.begin("store", list(flood[at : at + 4]))
        while time.monotonic() < ends or not seen:
            done = load(client, range(max(0, at - 3), at + 5))
            seen += names(done).count("READ")
            if other._pipe.poll():
                assert set(other.answer()[0]) <= {"WRITE", "FULL", "HAVE"}
                at += 4
                other.begin("store", list(flood[at : at + 4]))
        other.answer()
        found = status(client)
        assert found["counters"]["evicted_chunks"] > 0
        assert "damaged_memory" not in found["counters"]
        assert client.counters["damaged"] == 0
