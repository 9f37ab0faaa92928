"""The tier on disk, or on any mounted file system: one checksummed file a chunk, ``t-TENANT/KEY[:3]/KEY.NBYTES``.

A file is published whole by renaming it, and its name says all that the index needs: a start after any end reads
directories, not files. Nothing is synced, since nothing relies on it: a file that a crash left damaged fails its
checks when it is read, counts as a miss, and is removed.

Where the file system has direct I/O (``O_DIRECT``), bytes go round the page cache, for the pool is the cache, and
through a buffer of huge pages: from frames of small ones the disk would get more and shorter pieces.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from pdtransport.errors import SettingsError
from pdtransport.kernels import pages
from pdtransport.kernels.runs import Runs, cut_runs, run, stream_bytes
from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool.settings import MAX_CHUNK_BYTES, DiskSettings
from pdtransport.pool.tiers import HEADER_BYTES, Place, Stored, Tier, TierError, address_of, check, runs_of

logger = logging.getLogger("pdtransport.pool")

IOV_LIMIT = 1024  # Linux' IOV_MAX
BLOCK = 4096  # what direct I/O aligns to; the payload's place in a file
STRETCH = 4 << 20  # bytes of a file that are written or read at once
HUGE = 2 << 20
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
        self._local = threading.local()
        self._run = f"{_TEMPORARY}{secrets.token_hex(8)}-"  # names of our own unfinished files begin so
        self._numbers = itertools.count()
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._flags = os.O_DIRECT if settings.direct == "auto" and self._probe_direct() else 0
            self._staged = bool(self._flags)  # bytes pass through a buffer
        except OSError as error:
            raise SettingsError(f"pool.disk.path: {self._root} can't be written ({error.strerror})") from None

    def _probe_direct(self) -> bool:
        """Whether files can be written here, round the page cache even."""
        probe = self._root / f"{self._run}probe"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            fd = os.open(probe, os.O_WRONLY | os.O_DIRECT)
            try:
                os.pwrite(fd, self._buffer()[:BLOCK], 0)
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
        return self._write(key, tenant, nbytes, pieces, None)

    def write_checked(
        self, key: bytes, tenant: str, nbytes: int, pieces: Sequence[bytes | memoryview], checksum: int
    ) -> int:
        if self._staged and BLOCK + nbytes <= STRETCH:
            return self._write(key, tenant, nbytes, pieces, checksum)
        return super().write_checked(key, tenant, nbytes, pieces, checksum)

    def _write(
        self, key: bytes, tenant: str, nbytes: int, pieces: Sequence[bytes | memoryview], checksum: int | None
    ) -> int:
        temporary = self._root / f"{self._run}{next(self._numbers)}"
        header = bytes(pieces[0]).ljust(BLOCK, b"\0")
        total = BLOCK + sum(map(len, pieces[1:]))
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | self._flags, 0o600)
            try:
                if self._staged:
                    self._write_staged(fd, header, runs_of(pieces[1:]), checksum)
                else:
                    _write_all(fd, [header, *pieces[1:]])
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

    def read(self, key: bytes, tenant: str, nbytes: int, place: Place) -> int | None:
        fd = os.open(self._path(key, tenant, nbytes), os.O_RDONLY | os.O_CLOEXEC | self._flags)
        try:
            size = os.fstat(fd).st_size
            if self._staged:
                return self._read_staged(fd, size, place)
            parts = place(os.pread(fd, HEADER_BYTES, 0))
            _check_length(size, parts)
            _read_all(fd, parts, BLOCK)
            return None
        finally:
            os.close(fd)

    def _write_staged(self, fd: int, header: bytes, content: Runs, checksum: int | None) -> None:
        """Header and content; with a ``checksum``, nothing unless the content, which fits the buffer, has it."""
        buffer, first, skip = self._buffer(), 0, len(header)
        total = len(header) + stream_bytes(content)
        buffer[:skip] = header
        bounds = [0, *range(STRETCH - skip, total - skip, STRETCH), total - skip]
        for stretch in cut_runs(content, bounds):
            nbytes = stream_bytes(stretch)
            found = pages.read_mapped(stretch, run(address_of(buffer) + skip, nbytes), 0 if checksum is None else 1)
            if checksum is not None:
                check(int(found[0]), checksum)
            nbytes += skip
            ends = -(-nbytes // BLOCK) * BLOCK
            buffer[nbytes:ends] = bytes(ends - nbytes)  # cut off again below
            self._to_file(fd, ends, first)
            first, skip = first + nbytes, 0
        if total % BLOCK:
            os.truncate(fd, total)

    def _read_staged(self, fd: int, size: int, place: Place) -> int | None:
        """The checksum of the payload, if the file fits the buffer."""
        buffer = self._buffer()
        self._from_file(fd, size, 0)
        parts = place(bytes(buffer[:HEADER_BYTES]))
        _check_length(size, parts)
        content = runs_of(parts)
        if size <= STRETCH:
            blocks = 1 if size % 8 == 0 else 0  # a packed chunk may have any length, and its checksum is not asked for
            found = pages.read_mapped(run(address_of(buffer) + BLOCK, size - BLOCK), content, blocks)
            return int(found[0]) if blocks else None
        bounds = [0, *(end - BLOCK for end in range(STRETCH, size, STRETCH)), size - BLOCK]
        for first, stretch in zip(bounds, cut_runs(content, bounds), strict=False):
            nbytes, skip = stream_bytes(stretch), 0 if first else BLOCK
            if first:
                self._from_file(fd, nbytes, BLOCK + first)
            pages.read_mapped(run(address_of(buffer) + skip, nbytes), stretch)
        return None

    def _to_file(self, fd: int, nbytes: int, offset: int) -> None:
        """Write the first bytes of this thread's buffer."""
        buffer, at = self._buffer(), 0
        while at < nbytes:
            at += os.pwrite(fd, buffer[at:nbytes], offset + at)

    def _from_file(self, fd: int, nbytes: int, offset: int) -> None:
        """Read so many bytes, or as many as fit, into this thread's buffer."""
        buffer, got = self._buffer(), 0
        while got < min(nbytes, STRETCH):
            more = os.preadv(fd, [buffer[got:]], offset + got)
            if more == 0:
                raise TierError("the file ends early")
            got += more

    def _buffer(self) -> memoryview:
        """This thread's, of ``STRETCH`` bytes."""
        found: memoryview | None = getattr(self._local, "buffer", None)
        if found is None:
            memory = mmap.mmap(-1, STRETCH + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
            skip = -address_of(memoryview(memory)) % HUGE
            found = self._local.buffer = memoryview(memory)[skip : skip + STRETCH]
        return found

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


def _check_length(size: int, parts: Sequence[memoryview]) -> None:
    if size != BLOCK + sum(map(len, parts)):
        raise TierError("the chunk is damaged: its file has another length")


def _write_all(fd: int, pieces: Sequence[bytes | memoryview]) -> None:
    left = [memoryview(piece) for piece in pieces]
    while left:
        _advance(left, os.writev(fd, left[:IOV_LIMIT]))


def _read_all(fd: int, parts: Sequence[memoryview], offset: int) -> None:
    left = list(parts)
    while left:
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
