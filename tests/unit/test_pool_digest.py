"""Chunks on tiers that others can write to carry a digest that only holders of a key can make."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdtransport.errors import SettingsError
from pdtransport.kernels import pages
from pdtransport.kernels.runs import run
from pdtransport.pool.server.key_space_file import spaces_path
from pdtransport.pool.server.open_tiers import lower_tiers
from pdtransport.pool.settings import DiskSettings, PoolSettings
from pdtransport.pool.tiers.base import HEADER_BYTES, Tier, TierError, fill
from pdtransport.pool.tiers.codecs import Codec
from pdtransport.pool.tiers.disk import DiskTier
from pdtransport.pool.tiers.envelope import Opening, seal
from pdtransport.pool.tiers.keyed_digest import Forged, Signer, keep_key, load_signer, wants_key
from pdtransport.pool.tiers.mooncake import MooncakeTier
from pdtransport.pool.tiers.redis import RedisTier
from pdtransport.pool.tiers.s3 import S3Tier
from tests.unit.pool_rig import MemoryTier, key

OURS, THEIRS = "0123456789abcdef" * 2, "fedcba9876543210" * 2
NBYTES = 4096


class Halves(Codec):
    """Packs content whose second half repeats the first; notes what it was given to unpack."""

    name, number = "halves", 99

    def __init__(self) -> None:
        self.unpacked: list[bytes] = []

    def encode(self, parts: Any, grid: Any) -> bytes:
        return b"".join(parts)[: NBYTES // 2]

    def decode(self, payload: Any, parts: Any) -> None:
        self.unpacked.append(bytes(payload))
        parts[0][:] = bytes(payload) * 2


def chunk(number: int = 1) -> np.ndarray:
    half = np.random.default_rng(number).integers(0, 256, NBYTES // 2, dtype=np.uint8)
    return np.concatenate([half, half])


def sealed(signer: Signer | None, number: int = 1, codec: Codec | None = None) -> bytes:
    content = chunk(number)
    checksum = int(pages.checksum(run(content.ctypes.data, NBYTES), 1)[0])
    return b"".join(seal(key(number), [content.data], checksum, codec, None, signer))


def opened(value: bytes, signer: Signer | None, number: int = 1) -> np.ndarray:
    """As a pool reads it from a tier.

    Raises:
        TierError: it does not.
    """
    found = np.zeros(NBYTES, dtype=np.uint8)
    opening = Opening(key(number), [found.data], signer)
    fill(value, opening.place)
    opening.finish()
    return found


def refused(value: bytes, signer: Signer) -> str:
    """Why it is not read."""
    with pytest.raises(Forged) as caught:
        opened(value, signer)
    return caught.value.kind


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> Halves:
    made = Halves()
    monkeypatch.setattr("pdtransport.pool.tiers.envelope.decoder", lambda number: made)
    return made


@pytest.mark.parametrize("packed", [False, True])
def test_what_was_signed_is_read_by_whoever_has_the_key(halves: Halves, packed: bool) -> None:
    """On any host, packed or not; and with the digest switched off again."""
    value = sealed(Signer([OURS]), codec=halves if packed else None)
    for signer in (Signer([OURS]), Signer([THEIRS, OURS]), None):
        assert np.array_equal(opened(value, signer), chunk())


@pytest.mark.parametrize("packed", [False, True])
def test_no_byte_of_a_signed_chunk_can_be_changed(halves: Halves, packed: bool) -> None:
    """Of header, content and digest alike; and nothing unpacks bytes whose digest is wrong."""
    signer = Signer([OURS])
    value = sealed(signer, codec=halves if packed else None)
    for place in [*range(HEADER_BYTES), *range(HEADER_BYTES, len(value), 97), *range(len(value) - 32, len(value))]:
        changed = bytearray(value)
        changed[place] ^= 1
        with pytest.raises(TierError):
            opened(bytes(changed), signer)
    for cut in (value[:-1], value[:-32], value + b"\0"):
        with pytest.raises(TierError):
            opened(cut, signer)
    assert halves.unpacked == []


def test_a_forger_without_the_key_is_refused_by_name() -> None:
    """Right checksums do not help: no digest, one by a key of its own, one under the number of ours, one of another
    chunk."""
    signer = Signer([OURS])
    good = sealed(signer)
    assert refused(sealed(None), signer) == "missing"
    assert refused(sealed(Signer([THEIRS])), signer) == "unknown_key"
    pretender = Signer([THEIRS])
    pretender._keys[signer.id] = pretender._keys[pretender.id]
    pretender.id = signer.id
    assert refused(sealed(pretender), signer) == "wrong"
    assert refused(good[:-32] + sealed(signer, 2)[-32:], signer) == "wrong"
    with pytest.raises(TierError, match="is not that of chunk"):
        opened(good, signer, number=2)


def test_a_key_can_be_changed_without_losing_chunks() -> None:
    """The first key of the file signs, all of them verify; without the old one its chunks are misses."""
    old, both, new = Signer([OURS]), Signer([THEIRS, OURS]), Signer([THEIRS])
    assert np.array_equal(opened(sealed(old), both), chunk())
    assert np.array_equal(opened(sealed(both), new), chunk())
    assert refused(sealed(old), new) == "unknown_key"


def test_chunks_without_digests_have_the_format_that_they_had() -> None:
    """A disk of our own is read by earlier versions, and theirs by this one: golden."""
    value = sealed(None)
    assert len(value) == HEADER_BYTES + NBYTES
    assert value[:16] == b"pdtkv-1\0" + bytes(8)


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        (OURS, 0o640, "chmod 600 it"),
        (OURS, 0o604, "chmod 600 it"),
        ("short", 0o600, "at least 32 are needed"),
        (f"{OURS}\nshort", 0o600, "key 2 of"),
        ("\n", 0o600, "has no key"),
        ("\n".join(OURS + str(number) for number in range(5)), 0o600, "at most 4"),
        (None, 0o600, "can't read"),
    ],
)
def test_key_files_that_can_not_be_used_are_one_line_without_a_key(
    text: str | None, mode: int, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(SettingsError, match=says) as caught:
        load_signer(path)
    told = str(caught.value)
    assert told.startswith("pool.digest_key_file: ")
    assert "\n" not in told
    assert OURS not in told
    assert "short" not in told


def test_a_kept_key_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    """Two starts at once, or one after the other, use one key."""
    path = tmp_path / "run" / "pool.digest"
    keep_key(path)
    first = path.read_text()
    keep_key(path)
    assert path.read_text() == first
    assert len(first.strip()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]
    assert load_signer(path).id


# -- which tiers need one -------------------------------------------------------------------------------------------


def folder(path: Path, mode: int) -> dict[str, Any]:
    path.mkdir()
    path.chmod(mode)
    return {"disk": {"path": path, "bytes": 1 << 20}}


def exposed(path: Path) -> dict[str, Any]:
    return folder(path, 0o770)


def readable(path: Path) -> dict[str, Any]:
    return folder(path, 0o755)


def strangers(path: Path) -> dict[str, Any]:
    made = folder(path, 0o700)
    if os.getuid():
        pytest.skip("only root gives directories away")
    os.chown(path, 65534, -1)
    return made


def on_redis(path: Path) -> dict[str, Any]:
    pytest.importorskip("redis")
    return {"redis": {"url": "redis://127.0.0.1:1/0", "bytes": 1 << 20}}


def on_s3(path: Path) -> dict[str, Any]:
    pytest.importorskip("botocore")
    return {"s3": {"bucket": "kv-chunks", "endpoint": "http://127.0.0.1:1", "bytes": 1 << 20}}


@pytest.mark.parametrize("tier", [exposed, readable, strangers, on_redis, on_s3])
def test_a_tier_that_others_can_write_to_does_not_go_without(
    tier: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """Without a key the pool does not start, and one line says why and what to do; with one, chunks are signed. Whoever
    trusts all who can write there says so."""
    raw = tier(tmp_path / "tier")
    keep_key(tmp_path / "key")
    with pytest.raises(SettingsError, match=r"pool\.digest_key_file") as caught:
        lower_tiers(PoolSettings.parse(raw), 2)
    assert "\n" not in str(caught.value)
    (lower,) = lower_tiers(PoolSettings.parse({**raw, "digest_key_file": tmp_path / "key"}), 2)
    assert lower.signer is not None
    assert lower.overhead_bytes == lower.tier.overhead_bytes + 32
    (lower,) = lower_tiers(PoolSettings.parse({**raw, "digest": "off"}), 2)
    assert lower.signer is None
    assert wants_key(PoolSettings.parse(raw))
    assert not wants_key(PoolSettings.parse({**raw, "digest": "off"}))


@pytest.mark.parametrize("there", [False, True])
def test_a_directory_of_our_own_costs_no_digest(there: bool, tmp_path: Path) -> None:
    """One that the pool made, or that is closed to others; unless every tier is to have one."""
    raw: dict[str, Any] = {"disk": {"path": tmp_path / "tier", "bytes": 1 << 20}}
    if there:
        folder(tmp_path / "tier", 0o700)
    keep_key(tmp_path / "key")
    assert not wants_key(PoolSettings.parse(raw))
    for more in ({}, {"digest_key_file": tmp_path / "key"}):
        (lower,) = lower_tiers(PoolSettings.parse({**raw, **more}), 2)
        assert lower.signer is None
    every = PoolSettings.parse({**raw, "digest": "all", "digest_key_file": tmp_path / "key"})
    assert wants_key(every)
    (lower,) = lower_tiers(every, 2)
    assert lower.signer is not None
    with pytest.raises(SettingsError, match=r"pool\.digest is all"):
        lower_tiers(PoolSettings.parse({**raw, "digest": "all"}), 2)


def test_tiers_of_other_packages_count_as_exposed() -> None:
    """Whoever knows better says so: a tier without a word of its own is one that others can write to."""
    assert MemoryTier().exposed
    assert [made.exposed != "" for made in (Tier, RedisTier, S3Tier, MooncakeTier)] == [True] * 4


def test_what_engines_told_of_their_keys_is_not_kept_where_others_can_write(tmp_path: Path) -> None:
    """Else whoever can write there would choose which chunks a prompt is looked up by."""
    own = {"dir": tmp_path / "own"}
    private, shared = folder(tmp_path / "a", 0o700), folder(tmp_path / "b", 0o770)
    assert spaces_path(PoolSettings.parse({**own, **private})) == tmp_path / "a" / "spaces.json"
    assert spaces_path(PoolSettings.parse({**own, **shared})) == tmp_path / "own" / "default.spaces"


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_file_that_somebody_else_left_in_a_directory_of_ours_is_not_read(tmp_path: Path) -> None:
    """The directory was open to others before it was closed."""
    tier = DiskTier(DiskSettings(path=tmp_path / "tier", bytes=1 << 20))
    for number in (1, 2):
        tier.write(key(number), "", NBYTES, [sealed(None, number)[:HEADER_BYTES], chunk(number).data])
    (path,) = (tmp_path / "tier").rglob(f"{key(1).hex()}.*")
    os.chown(path, 65534, -1)
    assert {found.key for found in tier.scan()} == {key(2)}
    with pytest.raises(TierError, match="not the pool's own"):
        tier.read(key(1), "", NBYTES, lambda header: [])
    found = np.zeros(NBYTES, dtype=np.uint8)
    tier.read(key(2), "", NBYTES, lambda header: [found.data])
    assert np.array_equal(found, chunk(2))


@pytest.mark.parametrize("part", ["", f"/{key(1).hex()[:3]}"])
def test_no_link_leads_out_of_a_directory_that_others_can_write_to(part: str, tmp_path: Path) -> None:
    """Nothing is written, read, listed or removed elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / key(1).hex()[:3]).mkdir(parents=True)
    for precious in (elsewhere / "new-letter", elsewhere / key(1).hex()[:3] / "new-letter"):
        precious.write_text("dear")
    within = elsewhere if part else elsewhere / key(1).hex()[:3]
    (within / f"{key(1).hex()}.{NBYTES}").write_text("dear")
    folder(tmp_path / "tier", 0o777)
    place = tmp_path / "tier" / f"t-{part}"
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(elsewhere)
    tier = DiskTier(DiskSettings(path=tmp_path / "tier", bytes=1 << 20))
    pieces = [sealed(None)[:HEADER_BYTES], chunk().data]
    assert list(tier.scan()) == []
    for refused_call in (
        lambda: tier.write(key(1), "", NBYTES, pieces),
        lambda: tier.read(key(1), "", NBYTES, lambda header: []),
        lambda: tier.delete(key(1), "", NBYTES),
    ):
        with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
            refused_call()
    assert [path.read_text() for path in elsewhere.rglob("*") if path.is_file()] == ["dear"] * 3
    assert [path.name for path in (tmp_path / "tier").rglob("new-*")] == []


def test_a_pipe_in_place_of_a_file_holds_nobody_up(tmp_path: Path) -> None:
    folder(tmp_path / "tier", 0o777)
    tier = DiskTier(DiskSettings(path=tmp_path / "tier", bytes=1 << 20))
    place = tmp_path / "tier" / "t-" / key(1).hex()[:3] / f"{key(1).hex()}.{NBYTES}"
    place.parent.mkdir(parents=True)
    os.mkfifo(place)
    with pytest.raises((TierError, OSError)):  # a pipe has no direct I/O
        tier.read(key(1), "", NBYTES, lambda header: [])
    assert list(tier.scan()) == []
