"""Converts private memory of this process, in place and with its content, into memory that peers may map.

An engine allocates its KV cache as it likes. Before anything is in flight, the whole pages of each registered region
move into a memfd that is mapped over them: same addresses, same content, so that the engine's pointers stay valid. This
happens slice by slice, so that at most one slice is held twice; pages that were never touched stay unallocated.

Seals keep the memfd from shrinking and from getting new writers. A peer that maps it can only read, and never gets a
bus error, even if this process dies.

Some memory stays private: the ends of a region that share a page with other data, small regions, and memory that is
mapped from a file, locked, or excluded from forks (registered with a device).

Share memory before it is registered with a device: a device would keep using the old *physical* pages.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pdtransport.kernels.reference import memory
from pdtransport.links import vm
from pdtransport.links.base import Region
from pdtransport.links.memory import PAGE

SLICE_BYTES = 4 << 20  # converted at a time, and held twice meanwhile
MIN_BYTES = 64 << 10  # smaller regions are not worth a mapping, and are mostly in the heap
MAX_SPANS = 1024  # per process; the rest stays private
HUGE = 2 << 20  # offset in the file == address modulo this, so that huge pages fit
NAME = "pdtransport"
SEALS = 0x0001 | 0x0002 | 0x0004 | 0x0010  # no new seals, no shrinking, no growing, no future writers
NOEXEC_SEAL, ALLOW_SEALING = 0x0008, 0x0002  # memfd_create(2)
KEPT = {"lo": "locked", "ht": "of huge pages", "dc": "kept from forks", "io": "a device's", "pf": "a device's"}
KEPT |= {"wf": "wiped on fork", "um": "watched by userfaultfd", "uw": "watched by userfaultfd"}


@dataclass(frozen=True)
class Span:
    """``nbytes`` bytes at ``address`` are backed by file ``fd`` from ``offset``; all are whole pages."""

    address: int
    nbytes: int
    fd: int
    offset: int


@dataclass(eq=False)
class _File:
    """A memfd and the spans that it backs; lives as long as a link uses it."""

    fd: int
    inode: int
    regions: list[Region]  # the regions that contain the spans; keeps their memory alive
    spans: list[Span] = field(default_factory=list)
    users: int = 0


_lock = threading.Lock()  # I/O threads of several transports may open links at once
_files: list[_File] = []


class SharedMemory:
    """Memory that is shared for one link, until :meth:`close`.

    Args:
        regions: host memory, valid until :meth:`close`. While this runs, nothing may write it, and no device may have
            it registered.
        own_words: number of 64-bit words of new shared memory to allocate as :attr:`own`.

    Raises:
        OSError: there is no memfd, no /proc, or not enough memory. All memory is then as before.
    """

    def __init__(self, regions: Iterable[Region], own_words: int) -> None:
        known = list(regions)
        self.registered = sum(high - low for low, high in _merged(known))
        self.left: dict[str, int] = {}  # reason why bytes stay private -> number of bytes
        self._own_fd, self.own = _own_words(own_words)
        try:
            with _lock:
                self._files, pieces = self._plan(known)
                if pieces:
                    self._files.append(_turn_all(known, pieces))
                for file in self._files:
                    file.users += 1
        except OSError:
            os.close(self._own_fd)
            raise

    @property
    def spans(self) -> list[Span]:
        """Spans that peers may map; the words of :attr:`own` come first."""
        own = Span(self.own.ctypes.data, _whole_pages(self.own.nbytes), self._own_fd, 0)
        return [own, *(span for file in self._files for span in file.spans)]

    @property
    def nbytes(self) -> int:
        """Bytes of the regions that are shared now."""
        return self.registered - sum(self.left.values())

    def close(self) -> None:
        """Give up this link's use of the files. Call it once.

        Once no link uses a file, its memory becomes private again (copy on write). Peers may keep their mapping; they
        see no further changes.
        """
        os.close(self._own_fd)
        with _lock:
            for file in self._files:
                file.users -= 1
                if not file.users:
                    _files.remove(file)
                    _restore(file)
                    os.close(file.fd)

    def _plan(self, regions: list[Region]) -> tuple[list[_File], list[vm.Area]]:
        """Returns (files that already back some of ``regions``, areas that can be shared in addition)."""
        files: list[_File] = []
        pieces: list[vm.Area] = []
        areas = vm.areas()
        for low, high in _merged(regions):
            if high - low < MIN_BYTES:
                self._leave(f"regions below {MIN_BYTES >> 10} KiB", high - low)
                continue
            first, last = _whole_pages(low), high // PAGE * PAGE
            self._leave("parts of pages at the ends", high - low - (last - first))
            for area in vm.within(areas, first, last):
                file = next((file for file in _files if _backs(file, area)), None)
                if file is not None:
                    files += [file] if file not in files else []
                elif why := _why_not(area):
                    self._leave(why, area.high - area.low)
                elif len(pieces) >= MAX_SPANS:
                    self._leave(f"more than {MAX_SPANS} regions", area.high - area.low)
                else:
                    pieces.append(area)
        return files, pieces

    def _leave(self, why: str, nbytes: int) -> None:
        if nbytes:
            self.left[why] = self.left.get(why, 0) + nbytes


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _merged(regions: Iterable[Region]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for low, high in sorted((region.address, region.address + region.nbytes) for region in regions):
        if spans and low <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(high, spans[-1][1])
        else:
            spans.append((low, high))
    return spans


def _backs(file: _File, area: vm.Area) -> bool:
    return area.inode == file.inode and area.permissions == "rw-s" and f"memfd:{NAME}" in area.name


def _why_not(area: vm.Area) -> str:
    """Why an area can't be converted; empty if it can."""
    if area.permissions != "rw-p":
        return "memory that is shared already" if area.permissions.endswith("s") else "memory that can't be written"
    if area.inode and f"memfd:{NAME}" not in area.name:  # a memfd of an earlier link that is private again is fine
        return "memory mapped from a file"
    if area.name in ("[heap]", "[stack]"):
        return f"memory in the {area.name[1:-1]}"
    return next((f"memory that is {why}" for flag, why in KEPT.items() if flag in area.flags), "")


def _memfd(nbytes: int) -> int:
    try:
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | ALLOW_SEALING | NOEXEC_SEAL)
    except OSError:  # Linux before 6.3 does not know NOEXEC_SEAL
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def _own_words(count: int) -> tuple[int, npt.NDArray[np.uint64]]:
    """Returns a file and the words in it; they stay valid as long as the array is referenced."""
    fd = _memfd(_whole_pages(8 * count))
    try:
        words = np.frombuffer(mmap.mmap(fd, _whole_pages(8 * count)), dtype=np.uint64, count=count)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd, words


def _turn_all(regions: list[Region], pieces: list[vm.Area]) -> _File:
    """Move ``pieces`` into one new file, which backs them from then on."""
    spans: list[tuple[vm.Area, int]] = []
    end = 0
    for area in pieces:
        offset = end + (area.low - end) % HUGE
        spans.append((area, offset))
        end = offset + area.high - area.low
    fd = _memfd(end)
    file = _File(fd, os.fstat(fd).st_ino, regions)
    try:
        for area, offset in spans:
            file.spans.append(Span(area.low, area.high - area.low, fd, offset))
            _turn(area, fd, offset)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError:
        _restore(file)
        os.close(fd)
        raise
    _files.append(file)
    return file


def _turn(area: vm.Area, fd: int, offset: int) -> None:
    """Copy the content of ``area`` to ``offset`` of the file and map the file over the pages, slice by slice."""
    low = area.low
    while low < area.high:
        high = min(area.high, (low // SLICE_BYTES + 1) * SLICE_BYTES)
        used = _used(low, high) if area.inode else vm.touched(low, high)
        for address, nbytes in used:
            _write(fd, memory(address, nbytes), offset + address - area.low)
        vm.map_file(low, high - low, fd, offset + low - area.low, write=True, shared=True)
        vm.advise(low, high - low, vm.NOHUGEPAGE if "nh" in area.flags else vm.HUGEPAGE)
        if "dd" in area.flags:
            vm.advise(low, high - low, vm.DONTDUMP)
        for address, nbytes in used:  # else each page would fault on its next use
            vm.advise(address, nbytes, vm.POPULATE_WRITE)
        low = high


def _used(low: int, high: int) -> list[tuple[int, int]]:
    """Pages of ``low .. high`` with non-zero content, as stretches (address, nbytes)."""
    marked: npt.NDArray[np.bool_] = memory(low, high - low).view(np.uint64).reshape(-1, PAGE // 8).max(axis=1) != 0
    return vm.stretches(marked, low)


def _write(fd: int, content: npt.NDArray[np.uint8], offset: int) -> None:
    done = 0
    while done < content.size:
        done += os.pwrite(fd, content[done:].data, offset + done)


def _restore(file: _File) -> None:
    """Make the memory that the file backs private again: same content, copied on write.

    If the owner unmapped memory meanwhile, something else may be at its address; that is left alone.
    """
    areas = vm.areas()
    for span in file.spans:
        for area in vm.within(areas, span.address, span.address + span.nbytes):
            if _backs(file, area):
                offset = span.offset + area.low - span.address
                vm.map_file(area.low, area.high - area.low, file.fd, offset, write=True, shared=False)
