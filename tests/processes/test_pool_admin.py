"""People look into a running pool and move what it holds, while clients store and load."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from pdtransport.errors import PoolUnavailable
from pdtransport.kv.keys import KeySpace
from pdtransport.pool import messages
from pdtransport.pool.admin.pool_admin import AdminError, AdminOutcome, Chosen, PoolAdmin
from pdtransport.pool.admin.prompts import PoolPrompt, find
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.core.key_spaces import Space, whole_salt
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import PoolSettings
from tests.processes.pool_rig import CHUNK, Other, Pages, daemon, key, load, names, status, store, until
from tests.unit.pool_rig import Asker

SPACE = Space.of(
    [KeySpace(model="m", revision="r", dtype="d", layout="l", shard=f"heads {i}", chunk_tokens=4) for i in range(2)]
)


def chosen(*numbers: int) -> Chosen:
    return Chosen(tuple(key(number) for number in numbers))


def tiers(admin: PoolAdmin, *numbers: int) -> list[str]:
    return ["+".join(place.tiers) for place in admin.look([key(number) for number in numbers])]


def test_chunks_move_between_memory_and_disk(directory: Path, tmp_path: Path) -> None:
    """Prefetch brings up, move brings down or up, clear forgets in all tiers; each says for how many it is so now."""
    disk = {"path": tmp_path / "disk", "bytes": 64 * CHUNK}
    made = PoolSettings.parse({"dir": directory, "memory_bytes": 16 * CHUNK, "disk": disk})
    with Pool(made), PoolClient(directory=directory) as client:
        admin = PoolAdmin(client)
        store(client, range(8))
        until(lambda: tiers(admin, *range(8)) == ["memory+disk"] * 8, "chunks were not written")
        assert admin.move(chosen(0, 1, 2, 99), "disk") == AdminOutcome(3, 3)
        assert tiers(admin, 0, 3, 99) == ["disk", "memory+disk", ""]
        assert admin.prefetch(chosen(0, 99)) == AdminOutcome(1, 1)
        assert tiers(admin, 0, 1) == ["memory+disk", "disk"]
        assert admin.move(Chosen(), "below") == AdminOutcome(8, 8)
        assert set(tiers(admin, *range(8))) == {"disk"}
        assert admin.move(Chosen(), "memory") == AdminOutcome(8, 8)
        assert names(load(client, range(8))) == ["READ"] * 8
        with pytest.raises(AdminError, match=r"no tier .redis.*memory, disk, below"):
            admin.move(Chosen(), "redis")
        with pytest.raises(AdminError, match="--disk-codec"):
            admin.compress(Chosen())
        with pytest.raises(PoolUnavailable, match="no tier 'tape' below memory: choose one of disk"):
            client.manage([key(1)], "write", tier="tape").result()
        assert client.lookup([key(1)]).result().there == 1, "a refused wish ends nothing"
        assert admin.clear() == AdminOutcome(8, 8)
        assert tiers(admin, *range(8)) == [""] * 8
        until(lambda: not list((tmp_path / "disk").rglob("*.*")), "files were left behind")


def test_nothing_that_is_used_or_pinned_is_moved(directory: Path, tmp_path: Path) -> None:
    """A chunk under a reader's eyes and a pinned one stay in memory; cleared, the reader's bytes stay whole."""
    disk = ("--disk", str(tmp_path / "disk"), "--disk-bytes", "64MiB")
    with daemon(directory, *disk), PoolClient(directory=directory) as client:
        admin, other = PoolAdmin(client), Other(directory)
        try:
            store(client, range(4))
            until(lambda: tiers(admin, *range(4)) == ["memory+disk"] * 4, "chunks were not written")
            assert admin.pin(chosen(1), "hard", for_s=60) == AdminOutcome(1, 1)
            other.halt_in("load", [0])
            assert admin.move(Chosen(), "disk") == AdminOutcome(2, 4)
            assert tiers(admin, 0, 1, 2, 3) == ["memory+disk", "memory+disk", "disk", "disk"]
            (reading, pinned) = admin.look([key(0), key(1)])
            assert (reading.used, pinned.pin) == (True, "hard")
            assert admin.clear() == AdminOutcome(4, 4)
            assert names(store(client, range(10, 25)))  # whatever was freed is given out again
            assert other.go_on() == (["READ"], "")  # the rig asserts that its bytes are what was stored
            assert admin.pin(chosen(10), "soft") == AdminOutcome(1, 1)
            assert admin.pin(chosen(10), "none") == AdminOutcome(1, 1)
            assert admin.look([key(10)])[0].pin == "none"
        finally:
            other.close()


def test_chunks_are_packed_afterwards(directory: Path, tmp_path: Path) -> None:
    """Chunks that were written before the disk had a codec are written again with it; those on disk alone
    stay there."""
    pytest.importorskip("zstandard")
    options = ("--disk", str(tmp_path / "disk"), "--disk-bytes", "64MiB")
    plain = Pages(4)
    with PoolClient(directory=directory) as client:
        admin = PoolAdmin(client)
        with daemon(directory, *options):
            assert client.store([key(n) for n in range(4)], [plain.runs(p) for p in range(4)]).result().prefix == 4
            until(lambda: admin.status()["tiers"]["disk"]["chunks"] == 4, "chunks were not written")
        with daemon(directory, *options, "--disk-codec", "zstd"):
            until(lambda: admin.status()["chunks"] == 4, "the index was not rebuilt")
            before = admin.status()["tiers"]["disk"]["used_bytes"]
            admin.prefetch(chosen(0))
            assert admin.compress(Chosen()) == AdminOutcome(4, 4)
            assert admin.status()["tiers"]["disk"]["used_bytes"] < before / 10
            assert tiers(admin, 0, 1, 2, 3) == ["memory+disk", "disk", "disk", "disk"]
            assert client.load([key(n) for n in range(4)], [plain.runs(p) for p in range(4)]).result().prefix == 4
            assert not plain.memory.any()


def test_contents_are_told_by_tier_and_tenant(directory: Path, tmp_path: Path) -> None:
    """Sizes by tier and tenant add up; hit rates say where chunks came from; a tenant's chunks can be cleared alone."""
    quotas = ("--quota", "alice=2MiB", "--disk", str(tmp_path / "disk"), "--disk-bytes", "64MiB")
    with (
        daemon(directory, *quotas),
        PoolClient(directory=directory) as client,
        PoolClient(directory=directory, tenant="alice") as alice,
    ):
        admin = PoolAdmin(client)
        store(client, range(3))
        store(alice, range(10, 12))
        until(lambda: admin.status()["tiers"]["disk"]["chunks"] == 5, "chunks were not written")
        admin.move(chosen(0), "disk")
        held = {(row["tier"], row["tenant"]): (row["chunks"], row["bytes"]) for row in admin.status()["held"]}
        assert held["memory", ""] == (2, 2 * CHUNK)
        assert held["memory", "alice"] == (2, 2 * CHUNK)
        assert held["disk", ""][0] == 3
        assert held["disk", "alice"][0] == 2
        assert client.lookup([key(n) for n in (0, 1, 2, 77)]).result().there == 3
        load(client, [0, 1, 77])
        hits = admin.status()["hits"]
        assert (hits["found"], hits["found_in_memory"]) == (0.75, 0.5)
        assert {name: of["chunks"] for name, of in hits["loaded_from"].items()} == {
            "memory": 1, "disk": 1, "waited": 0, "missed": 1,
        }  # fmt: skip
        assert admin.clear("alice") == AdminOutcome(2, 2)
        assert tiers(admin, 10, 1) == ["", "memory+disk"]
        with pytest.raises(PoolUnavailable, match="tenant 'bob' has no quota"):
            admin.clear("bob")


def test_a_clear_of_many_chunks_stalls_no_reader(directory: Path) -> None:
    """100,000 chunks are listed, counted and cleared while another client's lookups go on, none of which waits for
    the whole."""
    made = PoolSettings.parse({"dir": directory, "memory_bytes": 400 << 20, "frame_bytes": 4096, "max_chunks": 200_000})
    with Pool(made) as pool, PoolClient(directory=directory) as client, PoolClient(directory=directory) as reader:
        chunk_store, count = pool._service.store, 100_000
        asker = Asker(chunk_store)
        for first in range(0, count, 500):
            pool._reactor.ask(lambda first=first: asker.put(*range(first, first + 500)), 30.0)
        longest, done = 0.0, threading.Event()

        def read() -> None:
            nonlocal longest
            while not done.is_set():
                began = time.monotonic()
                reader.lookup([key(5)]).result()
                longest = max(longest, time.monotonic() - began)

        thread = threading.Thread(target=read)
        thread.start()
        began = time.monotonic()
        admin = PoolAdmin(client)
        assert admin.status()["held"] == [{"tier": "memory", "tenant": "", "chunks": count, "bytes": count * 4096}]
        assert admin.clear() == AdminOutcome(count, count)
        whole = time.monotonic() - began
        done.set()
        thread.join()
        assert client.status().result()["chunks"] == 0
        assert longest < max(0.25, whole / 2), (longest, whole)


def test_engines_tell_of_what_their_keys_are_made(directory: Path) -> None:
    """The pool keeps it without the salt, hears it again when it starts anew, and forgets nobody's but the oldest; a
    prompt's keys follow from it, each part's."""
    with PoolClient(directory=directory) as engine, PoolClient(directory=directory) as client:
        admin = PoolAdmin(client)
        with Pool(PoolSettings(dir=directory, memory_bytes=1 << 20)):
            engine.lookup([]).result()
            engine.introduce(SPACE.model_dump_json())
            until(lambda: admin.spaces() == [SPACE], "it was not told")
            for number in range(70):
                client.introduce(json.dumps({"who": number}))  # another version's: not shown
        with Pool(PoolSettings(dir=directory, memory_bytes=1 << 20)):
            engine.lookup([]).result()
            until(lambda: admin.spaces() == [SPACE], "it was not told again")
    parts = SPACE.parts(range(10))
    assert [len(each) for each in parts] == [2, 2]
    assert parts != SPACE.parts(range(10), salt="s") != SPACE.parts(range(10), cache_salt="s")
    assert whole_salt("a", "b") != whole_salt("ab", "")


@pytest.mark.parametrize("disk", [True, False])
def test_a_prompt_is_found_after_a_restart_without_an_engine(directory: Path, tmp_path: Path, disk: bool) -> None:
    """What engines told of their keys outlives the pool's process, killed or not: beside the chunks on disk, or in its
    directory. Salts are nowhere in it; what is no key space, or damaged, is left out."""
    tokens, salt = list(range(32)), "a-secret-salt"
    options = ("--disk", str(tmp_path / "disk"), "--disk-bytes", "64MiB") if disk else ()
    kept = tmp_path / "disk" / "spaces.json" if disk else directory / "default.spaces"
    space = SPACE.model_copy(update={"salted": True})
    with PoolClient(directory=directory) as client:
        with daemon(directory, *options), PoolClient(directory=directory) as engine:
            engine.lookup([]).result()
            for text in (json.dumps({"salt": salt}), space.model_dump_json()):
                engine.introduce(text)
            until(lambda: client.spaces().result(), "it was not told")
            keys = [key for chunk in space.parts(tokens, salt=salt) for key in chunk]
            memory = Pages(1)
            engine.store(keys, [memory.runs(0)] * len(keys)).result()
            until(lambda: not status(client)["writeback_bytes"], "chunks were not written")
            until(kept.exists, "it was not kept")
        with daemon(directory, *options):
            until(lambda: client.lookup(keys).result().there == (len(keys) if disk else 0), "chunks were not found")
            (found,) = find(PoolAdmin(client), PoolPrompt(tokens, salt=salt))
            assert found.there == (len(found.tiers) if disk else 0)
        assert salt not in kept.read_text()
        assert kept.stat().st_mode & 0o077 == 0
        kept.write_text("{" * 5000)
        with daemon(directory, *options):
            assert PoolAdmin(client).spaces() == []


def test_one_message_has_bounds(directory: Path) -> None:
    """More keys than may be managed at a time are refused, whoever sends them."""
    with pytest.raises(ValueError, match="at most 512"):
        messages.Manage(request=1, keys=bytes(32 * 513), action="drop")


def test_whoever_watches_hears_of_every_chunk_that_goes(directory: Path) -> None:
    """Evicted and dropped ones; and once, that the pool itself went."""
    heard: list[list[bytes] | None] = []
    with PoolClient(directory=directory) as client:
        with Pool(PoolSettings(dir=directory, memory_bytes=8 * CHUNK)) as pool:
            client.watch(lambda keys: heard.append(None if keys is None else list(keys)))
            until(lambda: heard == [[]], "the watch did not begin")
            store(client, range(12))
            PoolAdmin(client).drop(chosen(11))
            gone = {key(n) for n in (0, 1, 2, 3, 11)}
            until(lambda: {each for keys in heard for each in keys or ()} == gone, "not all were told of")
            with PoolClient(directory=directory) as other:
                other.watch(lambda _keys: None)
                other.lookup([]).result()
            assert pool._service.store.gone is not None
        until(lambda: heard[-1] is None, "its end was not told of")
        with Pool(PoolSettings(dir=directory, memory_bytes=8 * CHUNK)) as pool:
            store(client, range(12))
            assert pool._service.store.gone is None
            assert heard[-1] is None
