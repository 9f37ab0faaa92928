"""The shared pool with real processes: what is stored is found and comes back whole, within its limits."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zmq

from pdtransport.errors import PoolUnavailable
from pdtransport.kernels.runs import run
from pdtransport.pool import messages
from pdtransport.pool.admin.pool_admin import AdminOutcome, PoolAdmin
from pdtransport.pool.cli import main
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.core.shared_memory import map_memory
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import PoolSettings
from tests.processes.pool_rig import (
    CHUNK,
    Daemon,
    Other,
    Pages,
    content,
    daemon,
    key,
    load,
    names,
    status,
    store,
    until,
)


def test_a_chunk_stored_by_one_process_is_loaded_by_another(directory: Path) -> None:
    """Bytes go from scattered pages of one process to those of another, and are the same."""
    with daemon(directory), PoolClient(directory=directory) as client:
        other = Other(directory)
        try:
            assert other.ask("store", list(range(8))) == (["WRITE"] * 8, "")
            assert client.lookup([key(n) for n in (*range(8), 99, 1)]).result().there == 8
            assert names(load(client, [*range(8), 99])) == ["READ"] * 8 + ["MISS"]
            assert names(store(client, [7, 8])) == ["HAVE", "WRITE"]
        finally:
            other.close()


def test_an_embedded_pool_serves_its_own_process_and_leaves_nothing_behind(directory: Path) -> None:
    """In-process use is the same code; at the end its memory and socket are gone."""
    with Pool(PoolSettings(dir=directory, memory_bytes=4 << 20)) as pool, PoolClient(directory=directory) as client:
        assert store(client, [1, 2]).prefix == 2
        assert load(client, [1, 2, 3]).prefix == 2
        assert pool.status()["chunks"] == 2
        assert {path.stat().st_mode & 0o777 for path in directory.glob("*.memory")} == {0o600}
    assert [path.name for path in directory.iterdir()] == ["default.lock"]


def test_answers_can_be_awaited(directory: Path) -> None:
    """The same calls serve asyncio, many at once."""

    async def use() -> None:
        memory = Pages(8)
        runs = [memory.runs(place) for place in range(8)]
        for place in range(8):
            memory.put(place, content(place))
        done = await asyncio.gather(*(client.store([key(n)], [runs[n]]) for n in range(8)))
        assert [each.prefix for each in done] == [1] * 8
        memory.memory[:] = 0
        assert (await client.load([key(n) for n in range(8)], runs)).prefix == 8
        assert (await client.lookup([key(0)])).in_memory == 1
        assert all(np.array_equal(memory.get(n), content(n)) for n in range(8))

    with Pool(PoolSettings(dir=directory, memory_bytes=4 << 20)), PoolClient(directory=directory) as client:
        asyncio.run(use())


def test_chunks_of_all_lengths_and_more_than_one_window(directory: Path) -> None:
    """Lengths that fill no frame, partial tails, and streams far longer than one message's grant come back whole."""
    sizes = [8, 4096, 65536, 65544, 3 << 20, 24 << 20, *[1 << 20] * 40]
    total = sum(sizes)
    source = np.random.default_rng(5).integers(0, 256, total, dtype=np.uint8)
    target = np.zeros_like(source)
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    keys = [key(n) for n in range(len(sizes))]
    with (
        Pool(PoolSettings(dir=directory, memory_bytes=96 << 20)),
        PoolClient(directory=directory) as client,
    ):
        there = [run(source.ctypes.data + at, size) for at, size in zip(starts, sizes, strict=True)]
        back = [run(target.ctypes.data + at, size) for at, size in zip(starts, sizes, strict=True)]
        assert client.store(keys, there).result().prefix == len(sizes)
        assert client.load(keys, back).result().prefix == len(sizes)
        assert np.array_equal(source, target)
        assert status(client)["clients"][0]["held_bytes"] == 0


def test_memory_is_never_exceeded_and_what_is_left_is_right(directory: Path) -> None:
    """Four times as much as fits: the newest stay, each byte of them correct."""
    with Pool(PoolSettings(dir=directory, memory_bytes=16 * CHUNK)), PoolClient(directory=directory) as client:
        for number in range(64):
            assert names(store(client, [number])) == ["WRITE"]
        assert names(load(client, range(64))) == ["MISS"] * 48 + ["READ"] * 16
        memory = status(client)["memory"]
        assert memory["used_bytes"] == memory["bytes"] == 16 * CHUNK


def test_pins_and_drops_over_the_wire(directory: Path) -> None:
    """Operators can keep chunks, and have them forgotten."""
    with Pool(PoolSettings(dir=directory, memory_bytes=16 * CHUNK)), PoolClient(directory=directory) as client:
        store(client, [1, 2])
        assert client.manage([key(1), key(9)], "pin", pin="hard").result() == 1
        for number in range(10, 40):
            store(client, [number])
        assert names(load(client, [1, 2])) == ["READ", "MISS"]
        assert client.manage([key(1), key(9)], "drop").result() == 1
        assert PoolAdmin(client).clear() == AdminOutcome(15, 15)
        assert status(client)["chunks"] == 0


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_restarted_pool_finds_what_it_had_on_disk(directory: Path, tmp_path: Path, codec: str) -> None:
    """After a clean end and after SIGKILL; unfinished files of a crash are removed."""
    if codec == "zstd":
        pytest.importorskip("zstandard")
    disk = ("--disk", str(tmp_path / "disk"), "--disk-bytes", "64MiB", "--disk-codec", codec)
    with PoolClient(directory=directory) as client:
        with daemon(directory, *disk) as first:
            assert store(client, range(20)).prefix == 20
            _wait_written(client, 20)
            first.kill()
        (tmp_path / "disk" / "new-0123-1").write_bytes(b"half a chunk")
        with daemon(directory, *disk):
            _wait_chunks(client, 20)
            found = client.lookup([key(n) for n in range(20)]).result()
            assert (found.there, found.in_memory) == (20, 0)
            assert names(load(client, range(20))) == ["READ"] * 20
            assert client.lookup([key(n) for n in range(20)]).result().in_memory == 20
            assert not list((tmp_path / "disk").glob("new-*"))
            assert len(list(directory.glob("*.memory"))) == 1  # the killed one's is gone


def test_what_memory_evicts_comes_back_from_disk(directory: Path, tmp_path: Path) -> None:
    """The disk holds more than memory; its own limit holds as well."""
    made = PoolSettings.parse(
        {
            "dir": directory,
            "memory_bytes": 8 * CHUNK,
            "disk": {"path": tmp_path / "disk", "bytes": 20 * (CHUNK + 4096)},
        }
    )
    with Pool(made), PoolClient(directory=directory) as client:
        for number in range(40):
            assert names(store(client, [number])) == ["WRITE"]
            _wait_written(client, number + 1)
        assert names(load(client, range(20, 28))) == ["READ"] * 8
        assert load(client, range(40)).verdicts.count(2) == 20
        files = [path for path in (tmp_path / "disk").rglob("*.*") if path.is_file()]
        assert len(files) == 20
        assert sum(path.stat().st_size for path in files) <= made.disk.bytes if made.disk else False


def test_no_pool_is_no_hit_at_once(directory: Path) -> None:
    """Without a pool nothing waits for a deadline; one that comes up later is found."""
    directory.mkdir(mode=0o700)
    with PoolClient(directory=directory, deadline_s=30.0) as client:
        with pytest.raises(PoolUnavailable, match="running"):
            client.lookup([key(1)]).result()
        done = store(client, [1])
        assert (names(done), "running" in done.error) == (["LOST"], True)
        with Pool(PoolSettings(dir=directory, memory_bytes=1 << 20)):
            assert names(store(client, [1])) == ["WRITE"]
        done = load(client, [1])
        assert names(done) == ["LOST"]
        assert client.counters["unavailable"] == 3


def test_a_directory_that_is_not_ours_alone_is_not_used_by_clients_either(directory: Path, tmp_path: Path) -> None:
    """Whoever makes the pool's directory first must not get our pages: clients look at it as the service does."""
    theirs = tmp_path / "theirs"
    with Pool(PoolSettings(dir=directory, memory_bytes=1 << 20)):
        assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
        theirs.symlink_to(directory)
        with PoolClient(directory=theirs) as client, pytest.raises(PoolUnavailable, match="mode 0700"):
            client.lookup([key(1)]).result()
        for mode in (0o755, 0o770, 0o701):
            directory.chmod(mode)
            with PoolClient(directory=directory) as client, pytest.raises(PoolUnavailable, match="mode 0700"):
                client.lookup([key(1)]).result()
        directory.chmod(0o700)
        if os.getuid() == 0:
            os.chown(directory, 65534, -1)
            with PoolClient(directory=directory) as client, pytest.raises(PoolUnavailable, match="of user 0"):
                client.lookup([key(1)]).result()
            os.chown(directory, 0, -1)
        with PoolClient(directory=directory) as client:
            assert client.lookup([key(1)]).result().there == 0


def test_memory_that_is_not_ours_alone_is_not_mapped(tmp_path: Path) -> None:
    """A link, a device, a file that others may write: never taken for the pool's memory."""
    good, link = tmp_path / "good", tmp_path / "link"
    good.write_bytes(b"\0" * 8192)
    good.chmod(0o600)
    map_memory(good, 8192).close()
    link.symlink_to(good)
    for path in (link, Path("/dev/zero")):
        with pytest.raises(OSError):
            map_memory(path, 8192)
    good.chmod(0o620)
    with pytest.raises(OSError, match="private to this user"):
        map_memory(good, 8192)


def test_mistakes_are_one_line(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two pools of one name, an open directory, too much memory, a bad setting: refused at start, with a remedy."""
    tmp_path.chmod(0o755)
    with Pool(PoolSettings(dir=directory, memory_bytes=1 << 20)):
        for arguments, remedy in [
            (["--dir", str(directory)], "choose another name"),
            (["--dir", str(tmp_path)], "mode 0700"),
            (["--dir", str(directory), "--name", "b", "--memory-bytes", "100TiB"], "set less"),
            (["--dir", str(directory), "--name", "b", "--frame-bytes", "5000"], "multiple of 4096"),
            (["--dir", "/dev/shm/" + "x" * 100], "107"),
            (["--dir", str(directory), "--disk-bytes", "1GiB"], "disk.path"),
        ]:
            assert main(arguments) == 2
            text = capsys.readouterr().err
            assert (text.count("\n"), remedy in text) == (1, True), text


def test_the_command_tells_its_status(directory: Path) -> None:
    """``pdpool --status`` prints the running pool's sizes and counters."""
    with daemon(directory):
        command = [sys.executable, "-m", "pdtransport.pool.cli", "--dir", str(directory), "--status"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert '"bytes": 16777216' in done.stdout


@pytest.mark.parametrize("option", ["--dir", "--memory-dir"])
def test_memory_on_a_disks_file_system_is_warned_of_at_start(directory: Path, option: str) -> None:
    """In one line that names the directory, the setting and the remedy; nothing is said of memory that is memory."""
    with tempfile.TemporaryDirectory(prefix="pdt-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o700)
        if _kind_of(folder) in ("tmpfs", "ramfs"):
            pytest.skip("/var/tmp lies in memory")
        made = Daemon(directory, option, folder, memory="1MiB")
        made.process.send_signal(signal.SIGTERM)
        status_, text = made.outcome()
        assert (status_, text.count("\n"), folder in text, f"pool.{option[2:].replace('-', '_')} " in text) == (
            0, 1, True, True,
        ), text  # fmt: skip
    made = Daemon(directory, memory="1MiB")
    made.process.send_signal(signal.SIGTERM)
    assert made.outcome() == (0, "")


def _kind_of(folder: str) -> str:
    command = ["stat", "--file-system", "--format", "%T", folder]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_garbage_and_strangers_change_nothing(directory: Path) -> None:
    """What is no message, another version, before Hello, or under a lock that is not held: answered and counted."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with Pool(PoolSettings(dir=directory, memory_bytes=1 << 20)) as pool, PoolClient(directory=directory) as client:
        store(client, [1])
        stranger = context.socket(zmq.DEALER)
        stranger.set(zmq.LINGER, 0)
        stranger.set(zmq.RCVTIMEO, 10_000)
        stranger.connect(f"ipc://{directory}/default.sock")
        hello = messages.encode(messages.PoolHello(lock=12345, name="x"))
        for frame, answer in [
            (b"garbage", "not a msgpack"),
            (hello.replace(b"\xa1v" + bytes([messages.POOL_VERSION]), b"\xa1v\x63"), "version 99"),
            (messages.encode(messages.Manage(request=1, keys=b"", action="drop")), "say Hello"),
            (messages.encode(messages.Lookup(request=1, keys=b"").model_copy(update={"keys": b"123"})), "32 bytes"),
            (hello, "does not hold byte"),
        ]:
            stranger.send(frame)
            refused = messages.from_pool(stranger.recv())
            assert isinstance(refused, messages.PoolRefused)
            assert answer in refused.reason
        stranger.send_multipart([b"a", b"b"])
        assert isinstance(messages.from_pool(stranger.recv()), messages.PoolRefused)
        stranger.close()
        assert names(load(client, [1])) == ["READ"]
        assert pool.status()["service"]["garbage"] == 4
    context.term()


def _wait_written(client: PoolClient, chunks: int) -> None:
    def done() -> bool:
        found = status(client)
        written = found["counters"].get("disk_written_bytes", 0)
        return bool(found["writeback_bytes"] == 0 and written and found["counters"]["stored_chunks"] >= chunks)

    until(done, "chunks were not written back")


def _wait_chunks(client: PoolClient, chunks: int) -> None:
    until(lambda: status(client)["chunks"] == chunks, "the index was not rebuilt")
