"""The identity of a checkpoint's weights: a digest over every byte of every tensor.

The identity of a safetensors checkpoint covers its tensors (name, dtype, shape, bytes), not their files or their order.
Files of other formats are digested whole. Each tensor is hashed (SHA-256) in pieces of fixed size: several threads can
share a tensor of any size, and the result depends on nothing but the bytes. 128 bits of it are the identity.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtransport.errors import SettingsError

PIECE_BYTES = 4 << 20  # part of the digest's definition, as is ALGORITHM
ALGORITHM = "sha256/4MiB/1"
READ_BYTES = 256 << 10  # one read of a thread: small enough to stay in its core's cache until it is hashed
IDENTITY_DIGITS = 32  # hexadecimal: 128 bits
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_TENSORS = 1 << 20  # per checkpoint
MAX_DIMENSIONS = 32
MAX_NAME = 4096  # characters
MAX_THREADS = 8  # more are limited by memory bandwidth on most hosts, and the model is loading meanwhile

TENSORS = "safetensors"  # kind of identity: the tensors of safetensors files
FILES = "files"  # kind of identity: whole files


class DigestCancelled(Exception):
    """The caller cancelled the computation of a digest."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: ``nbytes`` bytes from ``offset`` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Piece:
    item: int
    number: int
    file: int
    offset: int
    nbytes: int


def safetensors_header(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file.

    Raises:
        SettingsError: ``file`` is not a safetensors file, or is damaged.
        OSError: ``file`` can't be read.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(file, f"its header would have {length} bytes, the file has {size}")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise _damaged(file, "its header is not JSON") from None
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise _damaged(file, "its header is not a table of tensors")
    base = 8 + length
    return [_tensor(file, str(name), entry, base, size) for name, entry in header.items() if name != "__metadata__"]


def _tensor(file: Path, name: str, entry: Any, base: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = (
            len(name) <= MAX_NAME
            and isinstance(dtype, str)
            and len(dtype) <= 32
            and isinstance(shape, list)
            and len(shape) <= MAX_DIMENSIONS
            and all(type(each) is int and each >= 0 for each in (*shape, begin, end))
            and begin <= end <= size - base
        )
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        raise _damaged(file, f"its header's entry for {name[:80]!r} does not describe a tensor")
    return StoredTensor(name, dtype, tuple(shape), base + begin, end - begin)


def _damaged(file: Path, why: str) -> SettingsError:
    return SettingsError(
        f"{str(file)[:300]!r} is not a valid safetensors file: {why}; download it again, or set model_id"
    )


def digest_tensors(
    files: Sequence[Path], *, threads: int | None = None, cancelled: Callable[[], bool] = lambda: False
) -> str:
    """Identity of the tensors in safetensors ``files``: ``safetensors:`` and 32 hexadecimal digits.

    A tensor that is in several files counts once.

    Raises:
        SettingsError: a file is not a valid safetensors file, or two files have different tensors of the same name:
            the loader would choose which one counts.
        OSError: a file can't be read.
        DigestCancelled: ``cancelled`` returned True.
    """
    tensors = [(number, tensor) for number, file in enumerate(files) for tensor in safetensors_header(file)]
    if len(tensors) > MAX_TENSORS:
        raise SettingsError(f"{len(tensors)} tensors are more than {MAX_TENSORS}: set model_id to name these weights")
    spans = [(number, tensor.offset, tensor.nbytes) for number, tensor in tensors]
    digests = _digest_spans(files, spans, threads, cancelled)
    lines: dict[str, str] = {}
    for (number, tensor), digest in zip(tensors, digests, strict=True):
        line = json.dumps([tensor.name, tensor.dtype, tensor.shape, digest])
        if lines.setdefault(tensor.name, line) != line:
            raise SettingsError(
                f"tensor {tensor.name[:80]!r} is in {str(files[number])[:300]!r} and, with another content, in another "
                "weight file of the same model: remove the wrong one, or set model_id to name these weights"
            )
    return _identity(TENSORS, list(lines.values()))


def digest_files(
    files: Sequence[Path], *, threads: int | None = None, cancelled: Callable[[], bool] = lambda: False
) -> str:
    """Identity of the contents of ``files``, without their names: ``files:`` and 32 hexadecimal digits.

    Raises:
        OSError: a file can't be read.
        DigestCancelled: ``cancelled`` returned True.
    """
    spans = [(number, 0, file.stat().st_size) for number, file in enumerate(files)]
    digests = _digest_spans(files, spans, threads, cancelled)
    return _identity(
        FILES, [json.dumps([nbytes, digest]) for (_, _, nbytes), digest in zip(spans, digests, strict=True)]
    )


def _identity(kind: str, lines: Sequence[str]) -> str:
    whole = hashlib.sha256(f"{kind} {ALGORITHM}\n".encode())
    for line in sorted(lines):
        whole.update(line.encode() + b"\n")
    return f"{kind}:{whole.hexdigest()[:IDENTITY_DIGITS]}"


def _digest_spans(
    files: Sequence[Path],
    spans: Sequence[tuple[int, int, int]],
    threads: int | None,
    cancelled: Callable[[], bool],
) -> list[str]:
    """SHA-256 over the SHA-256s of each span's pieces; a span is ``(file, offset, bytes)``."""
    found: list[list[bytes]] = [[b""] * -(-nbytes // PIECE_BYTES) for _, _, nbytes in spans]
    pieces = _pieces(spans)
    lock = threading.Lock()
    errors: list[BaseException] = []
    opened = [os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in files]

    def work() -> None:
        room = memoryview(bytearray(READ_BYTES))
        try:
            while not errors:
                with lock:
                    piece = next(pieces, None)
                if piece is None:
                    return
                if cancelled():
                    raise DigestCancelled
                found[piece.item][piece.number] = _hash(opened[piece.file], piece, room)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            errors.append(error)

    try:
        count = threads or _threads(sum(nbytes for _, _, nbytes in spans))
        others = [threading.Thread(target=work, name="pdtransport-digest", daemon=True) for _ in range(count - 1)]
        for thread in others:
            thread.start()
        work()
        for thread in others:
            thread.join()  # each ends after its current piece
    finally:
        for descriptor in opened:
            os.close(descriptor)
    if errors:
        raise errors[0]
    return [hashlib.sha256(b"".join(each)).hexdigest() for each in found]


def _threads(nbytes: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_THREADS, cores, nbytes // PIECE_BYTES))


def _pieces(spans: Sequence[tuple[int, int, int]]) -> Iterator[_Piece]:
    """All pieces in file order, the order in which a model loader reads the files too."""
    for item in sorted(range(len(spans)), key=spans.__getitem__):
        file, offset, nbytes = spans[item]
        for number, begin in enumerate(range(0, nbytes, PIECE_BYTES)):
            yield _Piece(item, number, file, offset + begin, min(PIECE_BYTES, nbytes - begin))


def _hash(descriptor: int, piece: _Piece, room: memoryview) -> bytes:
    state = hashlib.sha256()
    at, end = piece.offset, piece.offset + piece.nbytes
    while at < end:
        count = os.preadv(descriptor, [room[: min(len(room), end - at)]], at)
        if count <= 0:
            raise OSError(f"a weight file became shorter while it was read (at byte {at})")
        state.update(room[:count])
        at += count
    return state.digest()
