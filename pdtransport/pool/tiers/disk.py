"""The tier on disk, or on any mounted file system: one checksummed file a chunk, ``t-TENANT/KEY[:3]/KEY.NBYTES``.

A file is published atomically by a rename, and its name has all that the index needs. So a start, even after a crash,
reads directories and no files. Files are not synced to disk: a file that a crash has damaged fails its checks when it
is read, counts as a miss, and is removed.

The directory is opened once. All files are reached from its descriptor and through no symbolic link, so a user who can
rename a directory above it can't substitute another one. If the directory is private to this user, files in it must be
this user's; else chunks need digests (:attr:`Tier.exposed`).

If the file system has direct I/O (``O_DIRECT``), bytes bypass the page cache, since the pool is a cache itself. They
pass through a buffer of huge pages: directly from frames on small pages the disk would get more and shorter segments.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import secrets
import stat
import threading
import weakref
from collections.abc import Iterator, Sequence

from pdtransport.errors import SettingsError
from pdtransport.kernels import pages
from pdtransport.kernels.runs import Runs, cut_runs, run, stream_bytes
from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool.settings import MAX_CHUNK_BYTES, DiskSettings
from pdtransport.pool.tiers.base import (
    DIGEST_BYTES,
    HEADER_BYTES,
    Place,
    Stored,
    Tier,
    TierError,
    address_of,
    check,
    runs_of,
)
from pdtransport.system.private_files import closed_to_others, make_private_folder

logger = logging.getLogger("pdtransport.pool")

IOV_LIMIT = 1024  # IOV_MAX of Linux
BLOCK = 4096  # alignment of direct I/O; offset of the payload in a file
STRETCH = 4 << 20  # bytes that one read or write moves; length of a thread's buffer
HUGE = 2 << 20  # size of a huge page
_TENANT = "t-"
_TEMPORARY = "new-"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class DiskTier(Tier):
    """Stores chunks below ``settings.path``, which is created if it is missing.

    Raises:
        SettingsError: the directory can't be created or written.
    """

    name = "disk"
    overhead_bytes = BLOCK

    def __init__(self, settings: DiskSettings) -> None:
        self.threads = settings.threads
        self._root = settings.path
        self._local = threading.local()
        self._run = f"{_TEMPORARY}{secrets.token_hex(8)}-"  # prefix of this run's unfinished files
        self._numbers = itertools.count()
        try:
            make_private_folder(self._root)
            self._top = os.open(self._root, _FOLDER)
            self._closing = weakref.finalize(self, os.close, self._top)
            self.exposed = self._why_exposed()
            self._flags = os.O_DIRECT if settings.direct == "auto" and self._probe_direct() else 0
            self._staged = bool(self._flags)  # bytes pass through a buffer
        except OSError as error:
            raise SettingsError(f"pool.disk.path: {self._root} can't be written ({error.strerror})") from None

    def _why_exposed(self) -> str:
        found = os.fstat(self._top)
        if closed_to_others(found):
            return ""
        mode = stat.S_IMODE(found.st_mode)
        return (
            f"{self._root} (owner {found.st_uid}, mode {mode:04o}) is not a directory of user {os.getuid()} with mode "
            "0700"
        )

    def _probe_direct(self) -> bool:
        """Whether direct I/O works here.

        Raises:
            OSError: the directory can't be written.
        """
        probe = f"{self._run}probe"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._top))
        try:
            fd = os.open(probe, os.O_WRONLY | os.O_DIRECT, dir_fd=self._top)
            try:
                os.pwrite(fd, self._buffer()[:BLOCK], 0)
            finally:
                os.close(fd)
            return True
        except OSError as error:
            logger.warning("pool tier disk: %s has no direct I/O (%s): slower", self._root, error.strerror)
            return False
        finally:
            os.unlink(probe, dir_fd=self._top)

    def scan(self) -> Iterator[Stored]:
        with os.scandir(self._top) as folders:
            for folder in folders:
                if folder.name.startswith(_TENANT):
                    yield from self._scan_tenant(folder.name)
                else:
                    self._tidy(folder, self._top)

    def _scan_tenant(self, name: str) -> Iterator[Stored]:
        with _listed(name, self._top) as (parts, within):
            for part in parts:
                with _listed(part.name, within) as (files, at):
                    for file in files:
                        found = self._parsed(file, name.removeprefix(_TENANT))
                        if found is not None:
                            yield found
                        else:
                            self._tidy(file, at)

    def _parsed(self, file: os.DirEntry[str], tenant: str) -> Stored | None:
        name, _, size = file.name.partition(".")
        try:
            key, nbytes, about = bytes.fromhex(name), int(size), file.stat(follow_symlinks=False)
        except (ValueError, OSError):
            return None
        most = MAX_CHUNK_BYTES + BLOCK + DIGEST_BYTES
        fits = len(key) == KEY_BYTES and 0 < nbytes <= MAX_CHUNK_BYTES and about.st_size <= most
        return Stored(key, tenant, nbytes, about.st_size) if fits and self._ours(about) else None

    def _ours(self, file: os.stat_result) -> bool:
        """Whether this file may be read: it must be regular, and in a private directory it must be this user's.

        The directory may have been open to others earlier, so it may contain a file of another user.
        """
        return stat.S_ISREG(file.st_mode) and (bool(self.exposed) or file.st_uid == os.getuid())

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
        temporary = f"{self._run}{next(self._numbers)}"
        header = bytes(pieces[0]).ljust(BLOCK, b"\0")
        total = BLOCK + sum(map(len, pieces[1:]))
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | self._flags
            fd = os.open(temporary, flags, 0o600, dir_fd=self._top)
            try:
                if self._staged:
                    self._write_staged(fd, header, runs_of(pieces[1:]), checksum)
                else:
                    _write_all(fd, [header, *pieces[1:]])
            finally:
                os.close(fd)
            with self._folder(key, tenant, make=True) as folder:
                os.replace(temporary, _name(key, nbytes), src_dir_fd=self._top, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._top)
            raise
        return total

    def read(self, key: bytes, tenant: str, nbytes: int, place: Place) -> int | None:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | self._flags  # a pipe must not block open
        with self._folder(key, tenant) as folder:
            fd = os.open(_name(key, nbytes), flags, dir_fd=folder)
        try:
            about = os.fstat(fd)
            if not self._ours(about):
                raise TierError(f"chunk {key.hex()[:16]}: its file is not the pool's own")
            size = about.st_size
            if self._staged:
                return self._read_staged(fd, size, place)
            parts = place(os.pread(fd, HEADER_BYTES, 0))
            _check_length(size, parts)
            _read_all(fd, parts, BLOCK)
            return None
        finally:
            os.close(fd)

    def _write_staged(self, fd: int, header: bytes, content: Runs, checksum: int | None) -> None:
        """Write header and content through this thread's buffer.

        With a ``checksum``, the content must fit the buffer, and nothing is written if its checksum differs.

        Raises:
            Damaged: the checksum differs.
        """
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
            buffer[nbytes:ends] = bytes(ends - nbytes)  # padding for direct I/O; truncated below
            self._to_file(fd, ends, first)
            first, skip = first + nbytes, 0
        if total % BLOCK:
            os.truncate(fd, total)

    def _read_staged(self, fd: int, size: int, place: Place) -> int | None:
        """Read a file through this thread's buffer; returns the checksum of its payload if the file fits the buffer."""
        buffer = self._buffer()
        self._from_file(fd, size, 0)
        parts = place(bytes(buffer[:HEADER_BYTES]))
        _check_length(size, parts)
        content = runs_of(parts)
        if size <= STRETCH:
            # A checksum needs a multiple of 8 bytes. Other lengths are packed chunks, for which it is not used.
            blocks = 1 if size % 8 == 0 else 0
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
        """Write the first ``nbytes`` of this thread's buffer."""
        buffer, at = self._buffer(), 0
        while at < nbytes:
            at += os.pwrite(fd, buffer[at:nbytes], offset + at)

    def _from_file(self, fd: int, nbytes: int, offset: int) -> None:
        """Read ``nbytes``, or as many as fit, into this thread's buffer."""
        buffer, got = self._buffer(), 0
        while got < min(nbytes, STRETCH):
            more = os.preadv(fd, [buffer[got:]], offset + got)
            if more == 0:
                raise TierError("the file ends early")
            got += more

    def _buffer(self) -> memoryview:
        """This thread's buffer: ``STRETCH`` bytes, aligned to a huge page."""
        found: memoryview | None = getattr(self._local, "buffer", None)
        if found is None:
            memory = mmap.mmap(-1, STRETCH + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
            skip = -address_of(memoryview(memory)) % HUGE
            found = self._local.buffer = memoryview(memory)[skip : skip + STRETCH]
        return found

    def close(self) -> None:
        self._closing()

    def delete(self, key: bytes, tenant: str, nbytes: int) -> None:
        with contextlib.suppress(FileNotFoundError), self._folder(key, tenant) as folder:
            os.unlink(_name(key, nbytes), dir_fd=folder)

    @contextlib.contextmanager
    def _folder(self, key: bytes, tenant: str, *, make: bool = False) -> Iterator[int]:
        """Open the directory of a chunk's file; yields its descriptor."""
        opened = [self._top]
        try:
            for name in (f"{_TENANT}{tenant}", key.hex()[:3]):
                try:
                    opened.append(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=opened[-1]))
                except FileNotFoundError:
                    if not make:
                        raise
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=opened[-1])
                    opened.append(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=opened[-1]))
            yield opened[-1]
        finally:
            for fd in opened[1:]:
                os.close(fd)

    def _tidy(self, found: os.DirEntry[str], folder: int) -> None:
        """Remove a file if it is an unfinished one of an earlier run; leave all others alone."""
        if found.name.startswith(_TEMPORARY) and not found.name.startswith(self._run):
            with contextlib.suppress(OSError):
                os.unlink(found.name, dir_fd=folder)


def _name(key: bytes, nbytes: int) -> str:
    return f"{key.hex()}.{nbytes}"


@contextlib.contextmanager
def _listed(name: str, within: int) -> Iterator[tuple[Iterator[os.DirEntry[str]], int]]:
    """Open a directory; yields its entries and its descriptor. No entries if it is not a directory or can't be read."""
    try:
        fd = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=within)
    except OSError:
        yield iter(()), within
        return
    try:
        with os.scandir(fd) as found:
            yield found, fd
    finally:
        os.close(fd)


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
    """Remove the first ``done`` bytes from the list of buffers."""
    whole = 0
    while whole < len(left) and done >= len(left[whole]):
        done -= len(left[whole])
        whole += 1
    del left[:whole]
    if done:
        left[0] = left[0][done:]
