"""Turns private memory of this process into memory that peers may map, in place and with its content.

An engine allocates its KV cache as it likes. Before anything is in flight, the whole pages of each registered region
move into a memfd that is mapped over them: same addresses, same content, and the engine's pointers never notice. It is
done slice by slice, so that no more than a slice is held twice; pages that were never touched stay unallocated. The
memfd can't shrink and takes no new writers (seals), so a peer that maps it can read, never write, and never gets a bus
error, whatever becomes of us.

What can't be turned is left as it is: the ends of a region that share a page with something else, small regions, and
memory that is mapped from a file, locked, or kept from forks (registered with a device). Nobody else may hold the
*physical* pages: share memory before it is registered with a device.
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

SLICE_BYTES = 4 << 20  # turned at a time: so much memory is held twice
MIN_BYTES = 64 << 10  # less is not worth a mapping, and mostly lies in the heap
MAX_SPANS = 1024  # of one process; the rest stays private
HUGE = 2 << 20  # a span's place in its file is its address modulo this, so that huge pages fit
NAME = "pdtransport"
SEALS = 0x0001 | 0x0002 | 0x0004 | 0x0010  # no new seals, no shrinking, no growing, no future writers
NOEXEC_SEAL, ALLOW_SEALING = 0x0008, 0x0002  # memfd_create(2)
KEPT = {"lo": "locked", "ht": "of huge pages", "dc": "kept from forks", "io": "a device's", "pf": "a device's"}
KEPT |= {"wf": "wiped on fork", "um": "watched by userfaultfd", "uw": "watched by userfaultfd"}


@dataclass(frozen=True)
class Span:
    """``nbytes`` bytes at ``address`` are those at ``offset`` of file ``fd``; all whole pages."""

    address: int
    nbytes: int
    fd: int
    offset: int


@dataclass(eq=False)
class _File:
    """A memfd and the spans that it backs, for as long as links use it."""

    fd: int
    inode: int
    regions: list[Region]  # what they are part of; keeps it alive
    spans: list[Span] = field(default_factory=list)
    users: int = 0


_lock = threading.Lock()  # the I/O threads of several transports may open links at once
_files: list[_File] = []


class SharedMemory:
    """Memory that is shared for one link, until :meth:`close`.

    Args:
        regions: host memory that nobody writes, and no device knows, while this runs. It must stay valid until
            :meth:`close`.
        own_words: 64-bit words of fresh shared memory to lay out beside it, as :attr:`own`.

    Raises:
        OSError: there is no memfd, no /proc, or no memory for it. Everything is as before then.
    """

    def __init__(self, regions: Iterable[Region], own_words: int) -> None:
        known = list(regions)
        self.registered = sum(high - low for low, high in _merged(known))
        self.left: dict[str, int] = {}  # why some bytes are not shared -> how many
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
        """What peers may map: our own words first."""
        own = Span(self.own.ctypes.data, _whole_pages(self.own.nbytes), self._own_fd, 0)
        return [own, *(span for file in self._files for span in file.spans)]

    @property
    def nbytes(self) -> int:
        """Bytes of the regions that are shared now."""
        return self.registered - sum(self.left.values())

    def close(self) -> None:
        """Once no link uses a file any more, its memory is private again, copied on write; peers may keep what they
        mapped, and see no change any more. Call it once."""
        os.close(self._own_fd)
        with _lock:
            for file in self._files:
                file.users -= 1
                if not file.users:
                    _files.remove(file)
                    _restore(file)
                    os.close(file.fd)

    def _plan(self, regions: list[Region]) -> tuple[list[_File], list[vm.Area]]:
        """(files that back some of ``regions`` already, what can be shared besides)."""
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
    """Why an area can't be turned; empty if it can."""
    if area.permissions != "rw-p":
        return "memory that is shared already" if area.permissions.endswith("s") else "memory that can't be written"
    if area.inode and f"memfd:{NAME}" not in area.name:  # ours: an earlier link's, private again
        return "memory mapped from a file"
    if area.name in ("[heap]", "[stack]"):
        return f"memory in the {area.name[1:-1]}"
    return next((f"memory that is {why}" for flag, why in KEPT.items() if flag in area.flags), "")


def _memfd(nbytes: int) -> int:
    try:
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | ALLOW_SEALING | NOEXEC_SEAL)
    except OSError:  # Linux before 6.3 does not know the last one
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def _own_words(count: int) -> tuple[int, npt.NDArray[np.uint64]]:
    """A file, and the words in it; they stay valid for as long as someone holds the array."""
    fd = _memfd(_whole_pages(8 * count))
    try:
        words = np.frombuffer(mmap.mmap(fd, _whole_pages(8 * count)), dtype=np.uint64, count=count)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd, words


def _turn_all(regions: list[Region], pieces: list[vm.Area]) -> _File:
    """Move ``pieces`` into one new file, which from then on backs them."""
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
    """Copy the content to ``offset`` of the file and map that over the pages, slice by slice."""
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
        for address, nbytes in used:  # or each page would fault at its next use
            vm.advise(address, nbytes, vm.POPULATE_WRITE)
        low = high


def _used(low: int, high: int) -> list[tuple[int, int]]:
    """The stretches of pages ``low .. high`` that hold something, as (address, nbytes)."""
    marked: npt.NDArray[np.bool_] = memory(low, high - low).view(np.uint64).reshape(-1, PAGE // 8).max(axis=1) != 0
    return vm.stretches(marked, low)


def _write(fd: int, content: npt.NDArray[np.uint8], offset: int) -> None:
    done = 0
    while done < content.size:
        done += os.pwrite(fd, content[done:].data, offset + done)


def _restore(file: _File) -> None:
    """Make what the file backs private: same content, from now on copied where it is written. Where the owner unmapped
    his memory meanwhile, something else may stand there: that is left alone."""
    areas = vm.areas()
    for span in file.spans:
        for area in vm.within(areas, span.address, span.address + span.nbytes):
            if _backs(file, area):
                offset = span.offset + area.low - span.address
                vm.map_file(area.low, area.high - area.low, file.fd, offset, write=True, shared=False)
