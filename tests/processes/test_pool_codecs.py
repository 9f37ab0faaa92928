"""Lossy codecs and third parties' ones, through a real pool with a tier on disk."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdtransport import plugins
from pdtransport.errors import SettingsError
from pdtransport.kernels import quant
from pdtransport.kernels.quant import Grid
from pdtransport.kernels.runs import run
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import PoolSettings
from pdtransport.pool.tiers import registry
from pdtransport.pool.tiers.base import TierError
from pdtransport.pool.tiers.codecs import Lossy
from pdtransport.pool.tiers.disk import BLOCK, STRETCH
from pdtransport.pool.tiers.keyed_digest import keep_key
from tests.processes.pool_rig import CHUNK, Bytes, key, names, status, until
from tests.rig.outside_package import install, install_documented

GRID = Grid("bfloat16", 1, 2, 512)


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(f"/dev/shm/pdt-test-{os.getpid()}")
    yield path
    shutil.rmtree(path, ignore_errors=True)


def pool(directory: Path, **disk: Any) -> Pool:
    """Memory for four chunks."""
    tier = {"path": directory / "disk", "bytes": 64 << 20, **disk}
    return Pool(PoolSettings.parse({"dir": directory, "memory_bytes": 4 * CHUNK, "disk": tier}))


def kv(number: int) -> Bytes:
    """A chunk of bfloat16."""
    values = np.random.default_rng(number).standard_normal(CHUNK // 2).astype(np.float32)
    return quant.to_bytes(values, "bfloat16")


def put(client: PoolClient, number: int, what: Bytes, lossy: Lossy | None = None) -> None:
    done = client.store([key(number)], [run(what.ctypes.data, what.size)], lossy=lossy).result()
    assert names(done) == ["WRITE"], done.error
    until(lambda: status(client)["writeback_bytes"] == 0, "write-back hangs")


def get(client: PoolClient, number: int) -> Bytes | None:
    found = np.zeros(CHUNK, dtype=np.uint8)
    done = client.load([key(number)], [run(found.ctypes.data, found.size)]).result()
    return found if names(done) == ["READ"] else None


def flood(client: PoolClient) -> None:
    """Push everything else out of memory."""
    for number in range(1001, 1005):
        if get(client, number) is None:
            put(client, number, kv(number))


def files(directory: Path, number: int) -> list[Path]:
    return list((directory / "disk").glob(f"*/*/{key(number).hex()}.*"))


@pytest.mark.parametrize("direct", ["auto", "off"])
@pytest.mark.parametrize("nbytes", [CHUNK, 3 * 4096 + 8, 8, STRETCH - BLOCK, 2 * STRETCH + 8])
def test_chunks_of_any_length_come_back_from_disk(directory: Path, nbytes: int, direct: str) -> None:
    """Whole blocks or not, round the page cache or through it: what was stored, byte for byte."""
    stored, loaded = np.resize(kv(1), nbytes), np.zeros(nbytes, dtype=np.uint8)
    stored[::4095] = np.arange(len(stored[::4095]), dtype=np.uint32).astype(np.uint8)
    tier = {"path": directory / "disk", "bytes": 64 << 20, "direct": direct}
    made = PoolSettings.parse({"dir": directory, "memory_bytes": 2 * nbytes + (1 << 20), "disk": tier})
    with PoolClient(directory=directory) as client:
        with Pool(made):
            put(client, 1, stored)
        with Pool(made):
            until(lambda: client.lookup([key(1)]).result().there, "it was not found again")
            found = client.load([key(1)], [run(loaded.ctypes.data, nbytes)]).result()
            assert names(found) == ["READ"]
            assert np.array_equal(loaded, stored)
            assert files(directory, 1)[0].stat().st_size == BLOCK + nbytes


@pytest.mark.parametrize(("name", "share"), [("fp8", 0.53), ("int4", 0.28)])
def test_a_chunk_is_packed_with_loss_only_where_asked_for(directory: Path, name: str, share: float) -> None:
    """What comes up is what decoding the codes gives, also after a restart, and verified; its file is as short as the
    codec promises; chunks that did not ask come back exactly, in a tier with a codec of its own too."""
    lossy = Lossy(name, GRID)
    packed, expected = quant.pack(name, GRID, kv(1)), np.empty(CHUNK, dtype=np.uint8)  # type: ignore[arg-type]
    assert packed is not None
    quant.unpack(name, GRID, packed, expected)  # type: ignore[arg-type]
    with PoolClient(directory=directory) as client:
        with pool(directory):
            put(client, 1, kv(1), lossy)
            assert np.array_equal(get(client, 1), kv(1)), "memory holds what was stored"
            put(client, 2, kv(2))
            flood(client)
            assert np.array_equal(get(client, 1), expected)
            assert np.array_equal(get(client, 2), kv(2))
            (file,) = files(directory, 1)
            assert file.stat().st_size < share * CHUNK
        with pool(directory, codec="zstd"):
            until(lambda: client.lookup([key(1)]).result().there, "it was not found again")
            assert np.array_equal(get(client, 1), expected)
            assert np.array_equal(get(client, 2), kv(2))


def test_what_can_not_be_packed_is_stored_exactly(directory: Path) -> None:
    """A chunk with a not-a-number in it, of another grid, or for a codec that this pool lacks: exact, no failure."""
    odd = kv(1)
    odd[:2] = 0xFF
    with pool(directory), PoolClient(directory=directory) as client:
        put(client, 1, odd, Lossy("fp8", GRID))
        put(client, 2, kv(2), Lossy("fp8", Grid("bfloat16", 7, 1, 512)))
        put(client, 3, kv(3), Lossy("nobody-has-it", GRID))
        flood(client)
        for number, what in ((1, odd), (2, kv(2)), (3, kv(3))):
            assert np.array_equal(get(client, number), what)
        assert "disk_write_failed" not in status(client)["counters"]


def test_a_damaged_packed_chunk_is_a_miss(directory: Path) -> None:
    """A flipped bit among the codes, among the scales or in what says how elements lie, and a file cut off: never
    served."""
    with pool(directory), PoolClient(directory=directory) as client:
        places = [BLOCK, BLOCK + 5, BLOCK + 16, BLOCK + CHUNK // 4, -1]
        for number in range(len(places) + 1):
            put(client, number, kv(number), Lossy("fp8", GRID))
        flood(client)
        for number, place in enumerate(places):
            (file,) = files(directory, number)
            raw = bytearray(file.read_bytes())
            raw[place] ^= 0x20
            file.write_bytes(raw)
        os.truncate(files(directory, len(places))[0], BLOCK + 1000)
        assert [get(client, number) for number in range(len(places) + 1)] == [None] * (len(places) + 1)
        assert status(client)["counters"]["disk_read_failed"] == len(places) + 1


# -- third parties ------------------------------------------------------------------------------------------

BROKEN = """
def broken():
    raise RuntimeError("no luck")
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package of docs/adding/tier.md, and one whose codecs can't be had."""
    documented = install_documented(tmp_path, "tier.md")
    points = {"broken": "pdt_broken:broken", "absent": "pdt_broken:Absent"}
    install(tmp_path, "pdt_broken", BROKEN, {"pdtransport.pool.codecs": points})
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    _forget()
    yield
    for module in (documented, "pdt_broken"):
        sys.modules.pop(module, None)
    _forget()


def _forget() -> None:
    registry._codec.cache_clear()
    registry.decoder.cache_clear()


def test_third_parties_add_codecs_and_tiers(directory: Path, foreign: None, tmp_path: Path) -> None:
    """Named by their entry points, both are used as if they were ours; what their codec packed is read back without
    being named. Chunks there carry digests, of which the tier knows nothing; a damaged one is a miss."""
    keep_key(tmp_path / "key")
    file = str(tmp_path / "chunks.db")
    tiers = {"sqlite": {"bytes": 64 << 20, "codec": "deflate", "options": {"path": file}}}
    raw = {"dir": directory, "memory_bytes": 4 * CHUNK, "digest_key_file": tmp_path / "key", "tiers": tiers}
    zeros = np.zeros(CHUNK, dtype=np.uint8)
    with PoolClient(directory=directory) as client:
        with Pool(PoolSettings.parse(raw)):
            put(client, 1, zeros)
            ((stored,),) = ask(file, "SELECT length(value) FROM chunks")
            assert stored < CHUNK // 4
            flood(client)
            assert np.array_equal(get(client, 1), zeros)
            assert status(client)["tiers"]["sqlite"]["chunks"] == 5
        tiers["sqlite"]["codec"] = "none"
        for number in (1001, 1002):
            ask(file, "UPDATE chunks SET value = substr(value, 1, 999) WHERE key = ?", key(number))
        ask(file, "UPDATE chunks SET value = zeroblob(length(value)) WHERE key = ?", key(1003))
        with Pool(PoolSettings.parse(raw)):
            until(lambda: client.lookup([key(1)]).result().there, "it was not found again")
            assert np.array_equal(get(client, 1), zeros)
            assert [get(client, number) for number in (1001, 1002, 1003)] == [None] * 3
            assert np.array_equal(get(client, 1004), kv(1004))


def ask(file: str, statement: str, *values: bytes) -> list[tuple[Any, ...]]:
    """What a statement finds in the documented tier's file."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as base:
        return base.execute(statement, values).fetchall()


def test_a_tier_that_refuses_its_options_is_said_at_start(directory: Path, foreign: None) -> None:
    """Its own line is what the pool ends with."""
    raw = {"dir": directory, "memory_bytes": 4 * CHUNK, "tiers": {"sqlite": {"bytes": 64 << 20}}}
    with pytest.raises(SettingsError, match=r"^tiers\.sqlite\.options\.path is not set: name the database's file$"):
        Pool(PoolSettings.parse(raw))


@pytest.mark.parametrize("last_first", [False, True])
def test_a_codec_that_can_not_be_loaded_is_in_no_other_ones_way(
    foreign: None, monkeypatch: pytest.MonkeyPatch, last_first: bool
) -> None:
    """A chunk is unpacked by the package that packed it, whatever else is installed, and in whatever order; where it is
    not found, the error says what could not be looked at."""
    points = sorted(plugins.installed(registry.CODECS).values(), reverse=last_first)
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    assert registry.decoder(77).name == "deflate"
    with pytest.raises(TierError, match=r"codec number 78, which is not installed here.*no luck"):
        registry.decoder(78)


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        ("nobody", "deflate"),
        ("broken", "no luck"),
        ("absent", "can't be loaded"),
        ("fp8", "only engines can select it"),
    ],
)
def test_a_codec_that_can_not_be_had_is_said_at_start(directory: Path, foreign: None, codec: str, says: str) -> None:
    """One line with the cause; a lossy one is refused, for chunks of engines that want exact bytes would pass it."""
    with pytest.raises(SettingsError, match=says):
        pool(directory, codec=codec)
