"""Tiers in other projects' stores, with the real thing: Mooncake Store with its master and a node, NIXL's POSIX plugin.

Neither is among the development tools, for their size: ``pip install mooncake-transfer-engine-non-cuda nixl``.
"""

from __future__ import annotations

import importlib.util
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from pdtransport.errors import SettingsError
from pdtransport.pool.admin.pool_admin import Chosen, PoolAdmin
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.tiers.keyed_digest import keep_key
from pdtransport.pool.tiers.mooncake import MooncakeTier
from pdtransport.pool.tiers.nixl import NixlTier
from tests.processes.pool_rig import (
    CHUNK,
    DAMAGES,
    PAGE,
    Daemon,
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
from tests.rig.ports import HOST, Ports, listens

MEMORY = str(4 * CHUNK)  # of a pool: four chunks
START_S = 60.0


def missing(module: str) -> str:
    """Why it can't be used; empty if it can. Nothing of it is loaded here."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{module} is not installed"
    tried = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    return tried.stderr.strip().rpartition("\n")[2]


def registered(name: str) -> str:
    found = [point for point in entry_points(group="pdtransport.pool.tiers") if point.name == name]
    return "" if found else "this pdtransport was installed before it had the entry point: make env"


NO_MOONCAKE = missing("mooncake.store") or registered("mooncake")
NO_NIXL = missing("nixl._api") or registered("nixl")


def up(client: PoolClient, tier: str) -> bool:
    return bool(status(client)["tiers"][tier]["up"])


def written(client: PoolClient) -> None:
    until(lambda: not status(client)["writeback_bytes"], "write-back hangs")


def flood(client: PoolClient, first: int) -> None:
    """Push everything else out of memory."""
    for number in range(first, first + 4):
        assert names(store(client, [number])) == ["WRITE"]
        written(client)


# -- Mooncake Store ---------------------------------------------------------------------------------------------------


class Mooncake:
    """A master, and a node that lends 64 MiB."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ports = folder, Ports()
        self._rpc, self._names, self._node = (self.ports.take() for _ in range(3))
        self.start_master()
        self.node = self._run(
            "mooncake_client", f"--host={HOST}", f"--master_server_address={HOST}:{self._rpc}", "--protocol=tcp",
            "--metadata_server=P2PHANDSHAKE", "--global_segment_size=67108864", f"--port={self._node}",
        )  # fmt: skip
        self._await(self.node, self._node)

    def start_master(self) -> None:
        self.master = self._run(
            "mooncake_master", f"--rpc_port={self._rpc}", f"--rpc_address={HOST}", f"--metrics_port={self._names}",
            "--enable_metric_reporting=false",
        )  # fmt: skip
        self._await(self.master, self._rpc)

    def _run(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        where = importlib.util.find_spec("mooncake")
        assert where is not None
        assert where.submodule_search_locations
        path = shutil.which(program, path=where.submodule_search_locations[0])
        assert path, f"no {program} in the package"
        with (self.folder / f"{program}.log").open("a") as log:
            return subprocess.Popen([path, *options], stdout=log, stderr=log)

    def _await(self, process: subprocess.Popen[bytes], port: int) -> None:
        ends = time.monotonic() + START_S
        while not listens([process.pid], port):
            assert process.poll() is None, f"it ended; see {self.folder}"
            assert time.monotonic() < ends, f"it does not start; see {self.folder}"
            time.sleep(0.05)

    def options(self, size: str = "64MiB") -> list[str]:
        given = {"master": f"{HOST}:{self._rpc}", "names": f"http://{HOST}:{self._names}", "buffer_bytes": 16 << 20}
        told = [f"mooncake.{name}={value}" for name, value in given.items()] + ["mooncake.rescan_s=0.2"]
        tier = ["--tier", f"mooncake={size}", *(part for each in told for part in ("--tier-option", each))]
        keep_key(self.folder / "digest.key")
        return [*tier, "--digest-key-file", str(self.folder / "digest.key")]

    def close(self) -> None:
        for process in (self.node, self.master):
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def mooncake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mooncake]:
    made = Mooncake(tmp_path_factory.mktemp("mooncake"))
    yield made
    made.close()


@pytest.mark.skipif(bool(NO_MOONCAKE), reason=NO_MOONCAKE)
def test_chunks_in_mooncake_outlive_the_pool_and_reach_others(directory: Path, mooncake: Mooncake) -> None:
    """Written back, found by a pool that runs already and by one that starts anew, read and verified, and deleted."""
    with PoolClient(directory=directory) as client, PoolClient("b", directory) as other:
        with daemon(directory, *mooncake.options(), memory=MEMORY):
            assert names(store(client, [1, 2])) == ["WRITE"] * 2
            flood(client, 10)
            assert names(load(client, [1, 2, 3])) == ["READ", "READ", "MISS"]
            assert status(client)["counters"]["mooncake_hits"] == 2
            with daemon(directory, "--name", "b", *mooncake.options(), memory=MEMORY):
                until(lambda: other.lookup([key(1), key(2)]).result().there == 2, "the other pool did not find them")
                assert names(load(other, [1, 2])) == ["READ", "READ"]
        with daemon(directory, *mooncake.options(), memory=MEMORY):
            until(lambda: client.lookup([key(1), key(2)]).result().there == 2, "they were not found again")
            assert names(load(client, [1, 2])) == ["READ", "READ"]
            assert PoolAdmin(client).drop(Chosen()).done >= 2
        with daemon(directory, *mooncake.options(), memory=MEMORY):
            until(lambda: up(client, "mooncake"), "it is not up")
            time.sleep(0.5)  # two looks at the names
            assert client.lookup([key(1)]).result().there == 0


@pytest.mark.skipif(bool(NO_MOONCAKE), reason=NO_MOONCAKE)
def test_a_pool_does_without_a_master_that_is_gone(directory: Path, mooncake: Mooncake) -> None:
    """Killed: loads from it end as misses, memory serves on, a pool starts without it; once there is a master again,
    it is used."""
    with PoolClient(directory=directory) as client:
        with daemon(directory, *mooncake.options(), memory=MEMORY):
            assert names(store(client, [101])) == ["WRITE"]
            flood(client, 110)
            mooncake.master.kill()
            mooncake.master.wait()
            assert names(load(client, [101], deadline_s=30)) == ["MISS"]
            assert names(load(client, [113])) == ["READ"]
            assert not up(client, "mooncake")
        with daemon(directory, *mooncake.options(), memory=MEMORY):
            until(lambda: not up(client, "mooncake"), "it counts as up")
            assert names(store(client, [102])) == ["WRITE"]
            mooncake.start_master()
            until(lambda: up(client, "mooncake"), "its return was not noticed")

            def goes_down() -> bool:  # its node has to notice, too
                PoolAdmin(client).drop(Chosen())
                store(client, [103])
                written(client)
                return "mooncake" in PoolAdmin(client).look([key(103)])[0].tiers

            until(goes_down, "nothing was written after its return")


@pytest.mark.skipif(bool(NO_MOONCAKE), reason=NO_MOONCAKE)
def test_what_mooncake_evicted_is_a_miss(directory: Path, mooncake: Mooncake) -> None:
    """And is stored anew. The pool's own limit is beyond what the node has."""
    with daemon(directory, *mooncake.options("1GiB"), memory=MEMORY), PoolClient(directory=directory) as client:
        for first in range(1000, 1320, 4):  # more than the node has
            store(client, range(first, first + 4))
            written(client)
        found = [name for number in range(1000, 1320) for name in names(load(client, [number]))]
        assert set(found) == {"READ", "MISS"}
        lost = 1000 + found.index("MISS")
        assert names(store(client, [lost])) == ["WRITE"]
        assert names(load(client, [lost])) == ["READ"]


# -- NIXL -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(NO_NIXL), reason=NO_NIXL)
def test_chunks_in_files_that_nixl_writes(directory: Path, tmp_path: Path) -> None:
    """Of all sizes, packed or not: written, read and verified, after a restart too; a disk tier reads the same files,
    and each kind of damage is a miss."""
    folder = tmp_path / "files"
    options = ["--tier", "nixl=1GiB", "--tier-option", f"nixl.path={folder}", "--tier-option", "nixl.threads=2"]
    with PoolClient(directory=directory) as client:
        with daemon(directory, *options, memory=MEMORY):
            flood(client, 0)
            flood(client, 4)
            flood(client, 10)
            assert names(load(client, range(8))) == ["READ"] * 8
            assert status(client)["counters"]["nixl_hits"] == 8
        with daemon(directory, *options, "--tier-option", "nixl.codec=zstd", memory=MEMORY):
            until(lambda: client.lookup([key(n) for n in range(8)]).result().there == 8, "they were not found again")
            assert names(load(client, range(8))) == ["READ"] * 8
        files = {path.name.partition(".")[0]: path for path in folder.rglob("*.*")}
        for number, damage in enumerate(DAMAGES):
            damage(files[key(number).hex()], files[key(7).hex()])
        with daemon(directory, *options, memory=MEMORY):
            until(lambda: client.lookup([key(7)]).result().there, "it was not found again")
            assert set(names(load(client, range(len(DAMAGES))))) == {"MISS"}
        disk = ["--disk", str(folder), "--disk-bytes", "1GiB"]
        with daemon(directory, *disk, memory=MEMORY):
            until(lambda: client.lookup([key(7)]).result().there, "a disk tier did not find it")
            assert names(load(client, [7])) == ["READ"]


@pytest.mark.skipif(bool(NO_NIXL), reason=NO_NIXL)
def test_nixl_moves_chunks_of_several_stretches(directory: Path, tmp_path: Path) -> None:
    """Longer than the buffer that they pass through."""
    options = ["--tier", "nixl=1GiB", "--tier-option", f"nixl.path={tmp_path / 'files'}"]
    with daemon(directory, *options, memory="64MiB"), PoolClient(directory=directory) as client:
        for number, nbytes in enumerate(((9 << 20), (4 << 20) - PAGE, 4 << 20, (4 << 20) + PAGE)):
            memory, there = Pages(1, nbytes), content(number, nbytes)
            memory.put(0, there)
            assert names(client.store([key(number)], [memory.runs(0)]).result()) == ["WRITE"]
            written(client)
            assert PoolAdmin(client).move(Chosen((key(number),)), "nixl").done == 1
            memory.put(0, there * 0)
            assert names(client.load([key(number)], [memory.runs(0)]).result()) == ["READ"]
            assert (memory.get(0) == there).all()


@pytest.mark.skipif(bool(NO_NIXL), reason=NO_NIXL)
def test_a_disk_that_is_full_costs_nixl_the_chunk_only(directory: Path, tmp_path: Path) -> None:
    """Chunks that can't be written stay in memory alone; once there is room, others are written and read."""
    options = ["--tier", "nixl=1GiB", "--tier-option", f"nixl.path={tmp_path / 'files'}"]
    with daemon(directory, *options, memory="16MiB") as made, PoolClient(directory=directory) as client:
        resource.prlimit(made.process.pid, resource.RLIMIT_FSIZE, (CHUNK // 2, resource.RLIM_INFINITY))
        assert names(store(client, range(40))) == ["WRITE"] * 40
        written(client)
        assert status(client)["counters"]["nixl_write_failed"] == 40
        resource.prlimit(made.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert names(store(client, [50])) == ["WRITE"]
        written(client)
        assert PoolAdmin(client).move(Chosen((key(50),)), "nixl").done == 1
        assert names(load(client, [50, 1])) == ["READ"] * 2


@pytest.mark.skipif(bool(NO_NIXL), reason=NO_NIXL)
def test_a_plugin_that_can_not_be_had_is_said_at_start(directory: Path, tmp_path: Path) -> None:
    options = ["--tier", "nixl=1GiB", "--tier-option", f"nixl.path={tmp_path}", "--tier-option", "nixl.plugin=TAPE"]
    status_, errors = Daemon(directory, *options, expect=False).outcome()
    assert status_ == 2
    assert [line for line in errors.splitlines() if line.startswith("pdpool: tier nixl: plugin TAPE ")], errors


# -- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "options", "says"),
    [
        (MooncakeTier, {}, "tier mooncake: master: "),
        (MooncakeTier, {"master": "h"}, "tier mooncake: master: "),
        (MooncakeTier, {"master": "h:1", "protocol": "pigeon"}, "tier mooncake: protocol: "),
        (NixlTier, {}, "tier nixl: path: "),
        (NixlTier, {"path": "x", "plugin": "posix"}, "tier nixl: plugin: "),
        (NixlTier, {"path": "x", "speed": 1}, "tier nixl: speed: "),
    ],
)
def test_options_that_can_not_be_used_are_said_in_one_line(made: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        made(options)
    assert "\n" not in str(caught.value)
