"""What a checkpoint's identity depends on: every byte of every tensor, and nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from pdtransport.errors import SettingsError
from pdtransport.kv import checkpoint, digest_cache
from pdtransport.kv.checkpoint import PIECE_BYTES, DigestCancelled, digest_files, digest_tensors, safetensors_header
from pdtransport.kv.digest_cache import DigestCache

DTYPES = {"float32": "F32", "uint8": "U8", "float16": "F16"}


def write(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None, pad: int = 0
) -> Path:
    """A safetensors file; ``pad`` bytes before the first tensor."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = pad
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    raw = json.dumps(header).encode()
    body = bytes(pad) + b"".join(tensor.tobytes() for tensor in tensors.values())
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    return file


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "embed": rng.random((64, 8), dtype=np.float32),
        "layers.0.k_proj": rng.integers(0, 256, (2 * PIECE_BYTES + 12345,), dtype=np.uint8),
        "layers.1.k_proj": rng.random((32, 32), dtype=np.float32).astype(np.float16),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }


def test_tensors_are_what_counts_not_their_files(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One file or several, their names and order, order and place in a file, metadata, threads: the same identity."""
    names = list(tensors)
    whole = write(tmp_path / "model.safetensors", tensors)
    identity = digest_tensors([whole])
    assert identity.startswith("safetensors:")
    assert len(identity) == len("safetensors:") + 32
    turned = write(
        tmp_path / "turned.safetensors", {name: tensors[name] for name in reversed(names)}, {"a": "b"}, pad=8
    )
    parts = [write(tmp_path / f"part-{number}.safetensors", {name: tensors[name]}) for number, name in enumerate(names)]
    assert digest_tensors([turned]) == identity
    assert digest_tensors(parts) == digest_tensors(parts[::-1]) == identity
    assert {digest_tensors([whole], threads=count) for count in (1, 2, 5)} == {identity}


def test_every_byte_counts(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One bit in the middle of a large tensor, or at a border between pieces, makes another identity; so do a name, a
    dtype, a shape, and a tensor more or less."""
    file = write(tmp_path / "model.safetensors", tensors)
    seen = {digest_tensors([file])}
    data = bytearray(file.read_bytes())
    place = next(each.offset for each in safetensors_header(file) if each.name == "layers.0.k_proj")
    for at in (0, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 777, 2 * PIECE_BYTES + 12344):
        data[place + at] ^= 1
        file.write_bytes(data)
        seen.add(digest_tensors([file]))
        data[place + at] ^= 1
    variants = (
        {**tensors, "more": np.zeros(1, dtype=np.uint8)},
        {name: tensor for name, tensor in tensors.items() if name != "empty"},
        {**tensors, "embed": tensors["embed"].reshape(8, 64)},
        {**tensors, "embed": tensors["embed"].view(np.uint8)},
        {"other" if name == "embed" else name: tensor for name, tensor in tensors.items()},
    )
    for variant in variants:
        seen.add(digest_tensors([write(tmp_path / "variant.safetensors", variant)]))
    assert len(seen) == 1 + 5 + len(variants)


def test_tensors_that_change_places_are_others(tmp_path: Path) -> None:
    """Equal bytes under each other's names are another checkpoint."""
    one, two = np.arange(64, dtype=np.float32), np.arange(64, dtype=np.float32)[::-1].copy()
    first = write(tmp_path / "a.safetensors", {"k": one, "v": two})
    second = write(tmp_path / "b.safetensors", {"k": two, "v": one})
    assert digest_tensors([first]) != digest_tensors([second])


def test_a_tensor_in_two_files_counts_once_if_it_is_the_same(tmp_path: Path) -> None:
    """vLLM loads both, and the last one counts: with other contents two checkpoints whose files were swapped would have
    one identity and other weights."""
    one, other = {"w": np.zeros(8, dtype=np.uint8)}, {"w": np.ones(8, dtype=np.uint8)}
    first, again = write(tmp_path / "1.safetensors", one), write(tmp_path / "2.safetensors", one)
    assert digest_tensors([first, again]) == digest_tensors([first])
    write(again, other)
    with pytest.raises(SettingsError, match=r"'w' is in .*2\.safetensors.*model_id"):
        digest_tensors([first, again])


def test_files_of_other_formats_count_whole(tmp_path: Path) -> None:
    """Pickles and GGUF are digested as files, names apart, and their identity says so."""
    a, b = tmp_path / "a.bin", tmp_path / "b.bin"
    a.write_bytes(b"x" * 100)
    b.write_bytes(b"y" * (PIECE_BYTES + 1))
    identity = digest_files([a, b])
    assert identity.startswith("files:")
    a.rename(tmp_path / "c.bin")
    assert digest_files([b, tmp_path / "c.bin"]) == identity
    b.write_bytes(b"y" * PIECE_BYTES + b"z")
    assert digest_files([tmp_path / "c.bin", b]) != identity


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"short",
        (1 << 60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"nope",
        (40_000).to_bytes(8, "little") + b"[" * 40_000,
    ],
)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, raw: bytes) -> None:
    """What is no safetensors file ends in one line that names the file and a remedy, not in a traceback or a giant."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw)
    with pytest.raises(SettingsError, match="not a valid safetensors file") as caught:
        digest_tensors([file])
    assert "\n" not in str(caught.value)
    assert "model_id" in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 5]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F" * 99, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 1, 2]},
    ],
)
def test_hostile_entries_are_refused_in_one_line(tmp_path: Path, entry: object) -> None:
    """An entry of the header that points outside the file, or is none, is refused by name of the tensor."""
    raw = json.dumps({"some\nname": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(SettingsError, match="some") as caught:
        digest_tensors([file])
    assert "\n" not in str(caught.value)


def test_a_digest_can_be_given_up(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A server that ends while its weights are digested does not wait for that."""
    file = write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(DigestCancelled):
        digest_tensors([file], cancelled=lambda: True)


class Counted:
    def __init__(self, identity: str = "safetensors:" + "a" * 32) -> None:
        self.identity, self.calls = identity, 0

    def __call__(self) -> str:
        self.calls += 1
        return self.identity


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """They count as settled at once: a change time can't be set."""
    monkeypatch.setattr(digest_cache, "SETTLED_S", -2.0)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.write_bytes(b"weights")
    return files


def test_a_digest_is_computed_once(tmp_path: Path, weights: list[Path]) -> None:
    """Unchanged files are not read again, in whatever order they are named; another kind of digest is another one."""
    cache, compute = DigestCache(tmp_path / "cache"), Counted()
    assert cache.identity("safetensors", weights, compute, 1) == compute.identity
    assert DigestCache(tmp_path / "cache").identity("safetensors", weights[::-1], compute, 1) == compute.identity
    assert compute.calls == 1
    cache.identity("files", weights, compute, 1)
    assert compute.calls == 2


def test_files_that_changed_just_now_are_read_again(
    tmp_path: Path, weights: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change right after the digest may leave the times as they are: the old digest would pass for the new bytes.
    Copies that keep their modification time are as new as others."""
    monkeypatch.setattr(digest_cache, "SETTLED_S", 3600.0)
    for file in weights:
        os.utime(file, (0.0, 0.0))
    cache, compute = DigestCache(tmp_path / "cache"), Counted()
    for _ in range(2):
        assert cache.identity("safetensors", weights, compute, 1) == compute.identity
    assert compute.calls == 2


def test_a_changed_file_is_read_again(tmp_path: Path, weights: list[Path]) -> None:
    """New bytes of the same size count, also where the modification time was put back: the change time was not."""
    cache, compute = DigestCache(tmp_path / "cache"), Counted()
    cache.identity("safetensors", weights, compute, 1)
    before = weights[0].stat()
    weights[0].write_bytes(b"WEIGHTS")
    os.utime(weights[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    cache.identity("safetensors", weights, compute, 1)
    assert compute.calls == 2


def test_files_that_change_meanwhile_have_no_identity(tmp_path: Path, weights: list[Path]) -> None:
    """A digest of files that were replaced while they were read is nobody's; it is refused, and not remembered."""

    def replace() -> str:
        weights[0].write_bytes(b"others")
        return "safetensors:" + "b" * 32

    cache, compute = DigestCache(tmp_path / "cache"), Counted()
    with pytest.raises(SettingsError, match="changed while they were read"):
        cache.identity("safetensors", weights, replace, 1)
    cache.identity("safetensors", weights, compute, 1)
    assert compute.calls == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "[" * 10_000,
        json.dumps({"files": [], "identity": "safetensors:" + "a" * 32}),
        json.dumps({"files": 5, "identity": 5}),
        json.dumps({"identity": "x" * 10}),
    ],
)
def test_a_damaged_entry_is_ignored_with_one_line(
    tmp_path: Path, weights: list[Path], content: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever stands in an entry, the digest is right; one line says that it was ignored."""
    cache, compute = DigestCache(tmp_path / "cache"), Counted()
    cache.identity("safetensors", weights, compute, 1)
    (entry,) = (tmp_path / "cache").glob("*.json")
    entry.write_text(content)
    assert cache.identity("safetensors", weights, compute, 1) == compute.identity
    assert compute.calls == 2
    assert "is ignored" in caplog.text
    cache.identity("safetensors", weights, compute, 1)
    assert compute.calls == 2


def test_a_link_or_an_open_entry_or_folder_is_not_trusted(
    tmp_path: Path, weights: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """What others may have written says nothing: a symbolic link, an entry or a folder that others may write."""
    directory = tmp_path / "cache"
    cache, compute = DigestCache(directory), Counted()
    cache.identity("safetensors", weights, compute, 1)
    (entry,) = directory.glob("*.json")
    entry.chmod(0o666)
    cache.identity("safetensors", weights, compute, 1)
    assert compute.calls == 2
    content = entry.read_text()
    entry.unlink()
    (tmp_path / "elsewhere").write_text(content)
    entry.symlink_to(tmp_path / "elsewhere")
    cache.identity("safetensors", weights, compute, 1)
    assert compute.calls == 3
    directory.chmod(0o777)
    cache.identity("safetensors", weights, compute, 1)
    assert compute.calls == 4
    assert "writable by other users" in caplog.text


def test_without_a_folder_it_is_computed(tmp_path: Path, weights: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    """A home that can't be written costs a line and the time of a digest, not the start."""
    (tmp_path / "file").write_text("")
    compute = Counted()
    assert DigestCache(tmp_path / "file" / "cache").identity("safetensors", weights, compute, 1) == compute.identity
    assert "not cached" in caplog.text


def _slowly(directory: Path, weights: list[Path], log: Path) -> None:
    def compute() -> str:
        with log.open("a") as stream:
            stream.write("computed\n")
        time.sleep(0.3)
        return "safetensors:" + "c" * 32

    assert DigestCache(directory).identity("safetensors", weights, compute, 30) == "safetensors:" + "c" * 32


def test_several_processes_compute_it_once(tmp_path: Path, weights: list[Path]) -> None:
    """The workers of a host all start at the same time: one reads the checkpoint, the others wait for what it says."""
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_slowly, args=(tmp_path / "cache", weights, log)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert log.read_text() == "computed\n"


def test_a_lock_that_is_never_let_go_has_a_deadline(tmp_path: Path, weights: list[Path]) -> None:
    """A process that hangs with the lock costs the others a wait, not their start."""
    cache, inside, go = DigestCache(tmp_path / "cache"), threading.Event(), threading.Event()

    def hang() -> str:
        inside.set()
        go.wait(30)
        return "safetensors:" + "a" * 32

    other = threading.Thread(target=lambda: cache.identity("safetensors", weights, hang, 1))
    other.start()
    assert inside.wait(10)
    compute = Counted()
    assert cache.identity("safetensors", weights, compute, 0.1) == compute.identity
    assert compute.calls == 1
    go.set()
    other.join(10)


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    """``$XDG_CACHE_HOME`` where it is an absolute path, else ``~/.cache``."""
    from pdtransport.kv.digest_cache import default_directory

    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_directory() == Path("/somewhere/pdtransport/weights")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_directory() == Path.home() / ".cache/pdtransport/weights"


def test_a_user_without_a_home_has_no_cache(
    tmp_path: Path, weights: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container with a user id that nobody knows: a digest is computed at each start, and a line says so."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    compute = Counted()
    assert DigestCache().identity("safetensors", weights, compute, 1) == compute.identity
    assert "no home folder" in caplog.text
    assert not (tmp_path / "~").exists()


def test_threads_are_bounded() -> None:
    """However large a checkpoint and a host are."""
    assert checkpoint._threads(1 << 50) <= checkpoint.MAX_THREADS
    assert checkpoint._threads(0) == 1
