"""The pool's memory: a shared memory file that the service creates and clients on the host map."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import secrets
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pdtransport.errors import SettingsError
from pdtransport.pool.settings import PoolSettings

SUFFIX = ".memory"
POPULATE_BYTES = 32 << 20  # prefaulted by one madvise call
MADV_POPULATE_WRITE = 23  # Linux 5.14
REGISTER_BYTES = 64 << 20  # pinned by one CUDA call, during which other CUDA calls of the process wait
REMEDY = "CUDA takes memory in /dev/shm or on a hugetlbfs, not on a disk's file system; see pool.dir and memory_dir"

# f_type of statfs(2) for file systems that keep their files in memory alone.
IN_MEMORY = {0x01021994: "tmpfs", 0x958458F6: "hugetlbfs", 0x858458F6: "ramfs"}

logger = logging.getLogger("pdtransport.pool")
_guard = threading.Lock()  # guards _mapped
_mapped: dict[tuple[int, int], Mapping] = {}  # by device and inode: clients in one process share a mapping


class Mapping:
    """A memory file mapped into this process at ``address``, ``nbytes`` long.

    Attributes:
        populated: :meth:`populate` has ended, so that copies cause no more page faults (if the kernel supports it).
        registered: all of it is registered with CUDA.
        problem: why it can't be registered; empty: no attempt has failed.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.populated, self.registered, self.problem = False, False, ""
        self.users = 1
        self._registering = threading.Lock()
        self._device = 0
        self._pieces: list[int] = []  # addresses of registered pieces
        self._map = mmap.mmap(fd, nbytes)
        try:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # this kernel has no huge pages for shared memory: slower, otherwise the same
        self._hold = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._hold)

    def populate(self, stop: Callable[[], bool]) -> None:
        """Prefault all pages, once. Returns early when ``stop()`` is true, which is checked every 32 MiB."""
        libc, done = ctypes.CDLL(None), 0
        while done < self.nbytes and not self.populated and not stop():
            step = min(POPULATE_BYTES, self.nbytes - done)
            if libc.madvise(ctypes.c_void_p(self.address + done), ctypes.c_size_t(step), MADV_POPULATE_WRITE):
                break  # older kernel: pages are faulted in on first access
            done += step
        self.populated = self.populated or not stop()

    def register(self, device: int, stop: Callable[[], bool]) -> None:
        """Register the memory with CUDA, once, so that kernels of any GPU can access it at ``address``.

        Takes about a second for every few GB. Returns early when ``stop()`` is true, which is checked for each piece.
        The result is in :attr:`registered` and :attr:`problem`.
        """
        from pdtransport.kernels import gpu

        with self._registering:
            self._device = device
            while not self.registered and not self.problem and not stop():
                at = len(self._pieces) * REGISTER_BYTES
                try:
                    gpu.register_host(self.address + at, min(REGISTER_BYTES, self.nbytes - at), device)
                except gpu.GpuError as error:
                    self.problem = f"its memory can't be registered with GPU {device} ({error}): {REMEDY}"
                    return
                self._pieces.append(self.address + at)
                self.registered = at + REGISTER_BYTES >= self.nbytes

    def _unregister(self) -> None:
        from pdtransport.kernels import gpu

        for address in self._pieces:
            with suppress(gpu.GpuError):
                gpu.unregister_host(address, self._device)

    def view(self, first: int, nbytes: int) -> memoryview:
        """A view of these bytes; release it before :meth:`close`."""
        return memoryview(self._map)[first : first + nbytes]

    def close(self) -> None:
        """Unmap the memory, unless another client uses it. The caller must no longer use ``address``."""
        with _guard:
            self.users -= 1
            if self.users:
                return
            for place in [place for place, mapping in _mapped.items() if mapping is self]:
                del _mapped[place]
        if self._pieces:
            self._unregister()
        del self._hold
        try:
            self._map.close()
        except BufferError:
            pass  # a failed call's traceback still holds a view: unmapped when the view is collected


def make_memory(settings: PoolSettings) -> tuple[Path, int, int]:
    """Create the pool's memory file and allocate all of its memory.

    Removes files that earlier services of this name left behind.

    Returns:
        Its path, its file descriptor (locked with flock, which marks the file as in use), and its length in bytes.

    Raises:
        SettingsError: there is not enough memory, or the directory can't be used.
    """
    folder = settings.memory_dir or settings.dir
    path, fd = folder, -1
    try:
        remove_stale(folder, settings.name)
        path, fd = _new_file(folder, settings.name)
        unit = max(settings.frame_bytes, os.fstatvfs(fd).f_bsize)  # hugetlbfs takes whole huge pages only
        nbytes = settings.memory_bytes // unit * unit or unit
        # Allocate now: if memory ran out later, the process that touches the page would be killed (SIGBUS).
        os.posix_fallocate(fd, 0, nbytes)
        if not in_memory(fd):
            logger.warning(
                "the pool's memory is in %s, on a disk's file system: GPUs can't use it, and the kernel writes it "
                "back to the disk; set pool.%s to a directory in /dev/shm or on a hugetlbfs",
                folder, "memory_dir" if settings.memory_dir else "dir",
            )  # fmt: skip
    except OSError as error:
        if fd >= 0:
            os.close(fd)
            path.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise SettingsError(
                f"pool.memory_bytes: {folder} does not have {settings.memory_bytes} bytes free: set less, or make room"
            ) from None
        raise SettingsError(f"the pool's memory can't be created in {folder}: {error.strerror}; set pool.dir") from None
    return path, fd, nbytes


def _new_file(folder: Path, name: str) -> tuple[Path, int]:
    """Create an empty memory file and lock it.

    Tries again if another process removed the file before it was locked, taking it for a dead service's.
    """
    while True:
        path = folder / f"{name}-{secrets.token_hex(8)}{SUFFIX}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)


def in_memory(fd: int) -> bool:
    """Whether a file's file system keeps it in memory alone; True if unknown."""
    found = (ctypes.c_long * 64)()  # longer than any struct statfs, which begins with the type
    if ctypes.CDLL(None).fstatfs(fd, ctypes.byref(found)):
        return True
    return found[0] & 0xFFFFFFFF in IN_MEMORY


def map_memory(path: Path, nbytes: int) -> Mapping:
    """Map the service's memory into this process, or share the mapping of another client in it.

    Raises:
        OSError: the file is gone (the service ended), can't be opened, is too short, or is not private to this user.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise OSError(errno.EACCES, "it is not private to this user")
        if found.st_size < nbytes:
            raise OSError(errno.EINVAL, f"it is shorter than {nbytes} bytes")
        with _guard:
            place = found.st_dev, found.st_ino
            mapping = _mapped.get(place)
            if mapping is None or mapping.nbytes != nbytes:
                mapping = _mapped[place] = Mapping(fd, nbytes)
            else:
                mapping.users += 1
            return mapping
    finally:
        os.close(fd)


def remove_stale(folder: Path, name: str) -> None:
    """Remove memory files of this pool name whose service is gone. Clients that map one keep it until they unmap."""
    for path in folder.glob(name + "-" + 16 * "?" + SUFFIX):
        remove_if_stale(path)


def remove_if_stale(path: Path) -> None:
    """Remove a memory file if its service is gone: a killed service leaves it behind, and its memory allocated."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return  # removed already
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        pass  # in use
    finally:
        os.close(fd)
