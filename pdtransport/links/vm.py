"""This process's address space: its memory areas, and the mmap/madvise calls that change how an area is backed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pdtransport.links.memory import PAGE

MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
DONTNEED, HUGEPAGE, NOHUGEPAGE, DONTDUMP, POPULATE_WRITE = 4, 14, 15, 16, 23  # madvise(2)
TOUCHED = np.uint64(3 << 62)  # bits of a /proc/self/pagemap entry: page present, or swapped out


@dataclass(frozen=True)
class Area:
    """One mapping, addresses ``low .. high``; ``flags`` are the ``VmFlags`` of /proc/self/smaps."""

    low: int
    high: int
    permissions: str
    inode: int
    name: str
    flags: frozenset[str]


def areas() -> list[Area]:
    """The mappings of this process, in ascending order.

    Raises:
        OSError: there is no /proc/self/smaps.
    """
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
        return list(_parse(file))


def within(known: list[Area], low: int, high: int) -> list[Area]:
    """Areas that overlap ``low .. high``, clipped to it."""
    return [
        replace(area, low=max(low, area.low), high=min(high, area.high))
        for area in known
        if area.low < high and low < area.high
    ]


def _parse(lines: Iterator[str]) -> Iterator[Area]:
    """Parse smaps: per area a line with its addresses, then its figures, ``VmFlags`` last."""
    head: list[str] = []
    for line in lines:
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            head = line.split(maxsplit=5)
        elif first == "VmFlags:":
            low, high = (int(word, 16) for word in head[0].split("-"))
            name = head[5].strip() if len(head) > 5 else ""
            yield Area(low, high, head[1], int(head[4]), name, frozenset(rest.split()))


def touched(low: int, high: int) -> list[tuple[int, int]]:
    """Pages of ``low .. high`` that hold anything (present or swapped out), as stretches (address, nbytes).

    The whole range if the kernel does not report them.
    """
    first, count = low // PAGE, (high - low) // PAGE
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            entries = np.frombuffer(os.pread(pagemap, 8 * count, 8 * first), dtype=np.uint64)
        finally:
            os.close(pagemap)
    except OSError:
        return [(low, high - low)]
    if len(entries) != count:
        return [(low, high - low)]
    return stretches((entries & TOUCHED) != 0, low)


def stretches(marked: npt.NDArray[np.bool_], low: int) -> list[tuple[int, int]]:
    """(address, nbytes) of each run of marked pages; the first page starts at ``low``."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], marked, [False])).astype(np.int8)))
    return [(low + PAGE * int(a), PAGE * int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def map_file(address: int | None, nbytes: int, fd: int, offset: int, *, write: bool, shared: bool) -> int:
    """Map a file and return the address.

    If ``address`` is given, the mapping replaces what is there; a thread that touches it meanwhile waits and then sees
    the file.

    Raises:
        OSError: the kernel refuses.
    """
    flags = (MAP_SHARED if shared else MAP_PRIVATE) | (MAP_FIXED if address is not None else 0)
    return _map(address or 0, nbytes, PROT_READ | (PROT_WRITE if write else 0), flags, fd, offset)


def reserve(nbytes: int) -> int:
    """Reserve ``nbytes`` of address space without memory behind it."""
    return _map(0, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)


def unmap(address: int, nbytes: int) -> None:
    _libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))


def advise(address: int, nbytes: int, advice: int) -> bool:
    """madvise, best effort; False: the kernel did not accept the advice."""
    done: int = _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_int(advice))
    return done == 0


def _map(address: int, nbytes: int, protection: int, flags: int, fd: int, offset: int) -> int:
    libc = _libc()
    libc.mmap.restype = ctypes.c_void_p
    place: int | None = libc.mmap(
        ctypes.c_void_p(address),
        ctypes.c_size_t(nbytes),
        ctypes.c_int(protection),
        ctypes.c_int(flags),
        ctypes.c_int(fd),
        ctypes.c_long(offset),
    )
    if place is None or place == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return place


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
