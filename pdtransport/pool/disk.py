"""The tier on disk, or on any mounted file system: one checksummed file a chunk, ``t-TENANT/KEY[:3]/KEY.NBYTES``.

A file is published whole by renaming it, and its name says all that the index needs: a start after any end reads
directories, not files. Nothing is synced, since nothing relies on it: a file that a crash left damaged fails its
checks when it is read, counts as a miss, and is removed.

A chunk's header has a block of its own, so that its payload can go straight between the pool's frames and the disk,
round the page cache (``O_DIRECT``) where the file system does that: the pool is the cache, and writes through another
took up to four times as long.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pdtransport.errors import SettingsError
from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool.settings import MAX_CHUNK_BYTES, DiskSettings
from pdtransport.pool.tiers import HEADER_BYTES, Place, Stored, Tier, TierError

logger = logging.getLogger("pdtransport.pool")

IOV_LIMIT = 1024  # Linux' IOV_MAX
BLOCK = 4096  # what direct I/O aligns to, addresses too; the payload's place in a file
_TENANT = "t-"
_TEMPORARY = "new-"


class DiskTier(Tier):
    """Chunks below ``settings.path``, which is made if it is missing.

    Raises:
        SettingsError: it can't be made or written.
    """

    name = "disk"
    overhead_bytes = BLOCK

    def __init__(self, settings: DiskSettings) -> None:
        self.threads = settings.threads
        self._root = settings.path
        self._run = f"{_TEMPORARY}{secrets.token_hex(8)}-"  # names of our own unfinished files begin so
        self._numbers = itertools.count()
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._direct = settings.direct == "auto" and self._probe_direct()
        except OSError as error:
            raise SettingsError(f"pool.disk.path: {self._root} can't be written ({error.strerror})") from None

    def _probe_direct(self) -> bool:
        """Whether files can be written here, round the page cache even."""
        probe = self._root / f"{self._run}probe"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            fd = os.open(probe, os.O_WRONLY | os.O_DIRECT)
            try:
                os.writev(fd, [_aligned(BLOCK)])
            finally:
                os.close(fd)
            return True
        except OSError as error:
            logger.warning("pool tier disk: %s has no direct I/O (%s): slower", self._root, error.strerror)
            return False
        finally:
            probe.unlink()

    def scan(self) -> Iterator[Stored]:
        for folder in _folders(self._root):
            if not folder.name.startswith(_TENANT):
                self._tidy(folder)
                continue
            tenant = folder.name.removeprefix(_TENANT)
            for part in _folders(Path(folder.path)):
                for file in _folders(Path(part.path)):
                    found = _parsed(file, tenant)
                    if found is not None:
                        yield found
                    else:
                        self._tidy(file)

    def write(self, key: bytes, tenant: str, nbytes: int, pieces: Sequence[bytes | memoryview]) -> int:
        temporary = self._root / f"{self._run}{next(self._numbers)}"
        header = _aligned(BLOCK)
        header[:HEADER_BYTES] = pieces[0]
        payload = [memoryview(piece) for piece in pieces[1:]]
        total = BLOCK + sum(map(len, payload))
        try:
            flags = os.O_DIRECT if self._direct else 0
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | flags, 0o600)
            try:
                _write_all(fd, [header, *(_blocks(payload) if self._direct else payload)])
                if self._direct and total % BLOCK:
                    os.truncate(fd, total)
            finally:
                os.close(fd)
            path = self._path(key, tenant, nbytes)
            try:
                os.replace(temporary, path)
            except FileNotFoundError:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        return total

    def read(self, key: bytes, tenant: str, nbytes: int, place: Place) -> None:
        flags = os.O_DIRECT if self._direct else 0
        fd = os.open(self._path(key, tenant, nbytes), os.O_RDONLY | os.O_CLOEXEC | flags)
        try:
            header = _aligned(BLOCK)
            os.preadv(fd, [header], 0)
            parts = place(bytes(header[:HEADER_BYTES]))
            length = sum(map(len, parts))
            if os.fstat(fd).st_size != BLOCK + length:
                raise TierError(f"chunk {key.hex()[:16]} is damaged: its file has another length")
            whole = _whole_blocks(parts) if self._direct else len(parts)
            rest = parts[whole:]
            copy = [_aligned(sum(map(len, rest)))] if rest else []
            _read_all(fd, [*parts[:whole], *copy], BLOCK, length)
            first = 0
            for part in rest:
                part[:] = copy[0][first : first + len(part)]
                first += len(part)
        finally:
            os.close(fd)

    def delete(self, key: bytes, tenant: str, nbytes: int) -> None:
        self._path(key, tenant, nbytes).unlink(missing_ok=True)

    def _path(self, key: bytes, tenant: str, nbytes: int) -> Path:
        name = key.hex()
        return self._root / f"{_TENANT}{tenant}" / name[:3] / f"{name}.{nbytes}"

    def _tidy(self, found: os.DirEntry[str]) -> None:
        """Remove what an earlier run did not finish; leave everything else alone."""
        if found.name.startswith(_TEMPORARY) and not found.name.startswith(self._run):
            with contextlib.suppress(OSError):
                os.unlink(found.path)


def _folders(path: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            yield from found
    except (NotADirectoryError, FileNotFoundError):
        return


def _parsed(file: os.DirEntry[str], tenant: str) -> Stored | None:
    name, _, size = file.name.partition(".")
    try:
        key, nbytes, stored = bytes.fromhex(name), int(size), file.stat(follow_symlinks=False).st_size
    except (ValueError, OSError):
        return None
    fits = len(key) == KEY_BYTES and 0 < nbytes <= MAX_CHUNK_BYTES and stored <= MAX_CHUNK_BYTES + BLOCK
    return Stored(key, tenant, nbytes, stored) if fits else None


def _aligned(nbytes: int) -> memoryview:
    """Memory of at least so many bytes that begins and ends at blocks."""
    return memoryview(mmap.mmap(-1, -(-nbytes // BLOCK) * BLOCK))


def _whole_blocks(parts: Sequence[memoryview]) -> int:
    """How many parts from the first on begin and end at blocks in memory."""
    whole = 0
    while whole < len(parts) and not (len(parts[whole]) | _address(parts[whole])) % BLOCK:
        whole += 1
    return whole


def _blocks(parts: Sequence[memoryview]) -> list[memoryview]:
    """The same bytes in memory that direct I/O can write: those that are not there yet, copied, zeros behind them."""
    whole = _whole_blocks(parts)
    rest, first = parts[whole:], 0
    copy = [_aligned(sum(map(len, rest)))] if rest else []
    for part in rest:
        copy[0][first : first + len(part)] = part
        first += len(part)
    return [*parts[:whole], *copy]


def _address(part: memoryview) -> int:
    return int(np.frombuffer(part, dtype=np.uint8).ctypes.data) if len(part) else 0


def _write_all(fd: int, pieces: Sequence[bytes | memoryview]) -> None:
    left = [memoryview(piece) for piece in pieces]
    while left:
        _advance(left, os.writev(fd, left[:IOV_LIMIT]))


def _read_all(fd: int, parts: Sequence[memoryview], offset: int, length: int) -> None:
    """Read ``length`` bytes into ``parts``, which may be longer."""
    left, ends = list(parts), offset + length
    while offset < ends:
        got = os.preadv(fd, left[:IOV_LIMIT], offset)
        if got == 0:
            raise TierError("the file ends early")
        offset += got
        _advance(left, got)


def _advance(left: list[memoryview], done: int) -> None:
    """Take the first ``done`` bytes off."""
    whole = 0
    while whole < len(left) and done >= len(left[whole]):
        done -= len(left[whole])
        whole += 1
    del left[:whole]
    if done:
        left[0] = left[0][done:]
