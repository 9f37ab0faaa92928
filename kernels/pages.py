"""Page kernels for host memory: copy between run lists, checksum them, and read another process's pages.

Another process's pages are read through the kernel (process_vm_readv) or where they are mapped here. Runs are (n, 2)
uint64 arrays of ``[address, nbytes]`` in stream order (:mod:`pdtransport.kernels.runs`).

The caller is responsible for the validity of every address in this process.

With ``blocks`` > 0 a function also returns the checksums (uint64, shape (blocks,)) of that many equally long blocks of
the stream, computed from the bytes at the destination in the same pass. A block's length must be a multiple of 8 bytes.
``README.md`` beside this file defines the checksum.

The C kernels (``csrc/pages.c``) release the GIL; without them numpy does the work, see :data:`BACKEND`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Literal

import numpy as np

from pdtransport.kernels import reference
from pdtransport.kernels.runs import Runs, as_runs, run, stream_bytes

Checksums = reference.Checksums
Ticket = reference.Ticket


def _load() -> ctypes.CDLL | None:
    try:
        from pdtransport.kernels import _pages  # type: ignore[attr-defined]
    except ImportError:  # built without a C compiler
        return None
    library = ctypes.CDLL(_pages.__file__)
    pointer, count = ctypes.c_void_p, ctypes.c_uint64
    for name, arguments in {
        "pdt_checksum": (pointer, count, count, pointer),
        "pdt_choose": (ctypes.c_int,),
        "pdt_copy": (pointer, count, pointer, count, count, pointer),
        "pdt_translate": (pointer, count, pointer, count, pointer),
        "pdt_read_remote": (ctypes.c_int64, pointer, count, pointer, count, count, pointer, ctypes.c_int, count, count),
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return library


_C = _load()
BACKEND: Literal["c", "numpy"] = "c" if _C is not None else "numpy"


def checksum(runs: Runs, blocks: int) -> Checksums:
    """Checksums of ``blocks`` equally long blocks of the stream.

    Raises:
        ValueError: the stream can't be cut into that many blocks of whole 8-byte words.
    """
    if _C is None:
        return reference.checksum(runs, blocks)
    runs = as_runs(runs)
    sums = _room(blocks)
    _check(_C.pdt_checksum(runs.ctypes.data, len(runs), blocks, sums.ctypes.data), runs, runs, blocks)
    return sums


def copy_runs(src: Runs, dst: Runs, blocks: int = 0) -> Checksums:
    """Copy the stream ``src`` into the runs ``dst``, which may be cut differently. The two must not overlap.

    Raises:
        ValueError: the streams differ in length, or ``blocks`` does not fit.
    """
    if _C is None:
        return reference.copy_runs(src, dst, blocks)
    src, dst = as_runs(src), as_runs(dst)
    sums = _room(blocks)
    code = _C.pdt_copy(src.ctypes.data, len(src), dst.ctypes.data, len(dst), blocks, sums.ctypes.data)
    _check(code, src, dst, blocks)
    return sums


def gather(runs: Runs, address: int, blocks: int = 0) -> Checksums:
    """Copy the stream ``runs`` to contiguous memory of the same length at ``address``.

    Raises:
        ValueError: as :func:`copy_runs`.
    """
    runs = as_runs(runs)
    return copy_runs(runs, run(address, stream_bytes(runs)), blocks)


def scatter(address: int, runs: Runs, blocks: int = 0) -> Checksums:
    """Copy contiguous memory at ``address`` into ``runs``.

    Raises:
        ValueError: as :func:`copy_runs`.
    """
    runs = as_runs(runs)
    return copy_runs(run(address, stream_bytes(runs)), runs, blocks)


def read_remote(
    pid: int, remote: Runs, local: Runs, blocks: int = 0, *, threads: int = 1, ticket: Ticket | None = None
) -> Checksums:
    """Copy ``remote`` runs of process ``pid`` into ``local`` runs of this process with process_vm_readv.

    Args:
        threads: maximum number of threads for a large stream (at most 8).
        ticket: (address, number): the peer's 64-bit word at ``address`` must hold the number before and after the copy.

    Raises:
        ValueError: the streams differ in length, or ``blocks`` does not fit; nothing was written.
        OSError: ESTALE (the ticket is not valid: discard what was read), EFAULT (an address is not mapped), EPERM (not
            permitted), ESRCH (no such process), ...; some of ``local`` may have been written.
    """
    if _C is None:
        return reference.read_remote(pid, remote, local, blocks, ticket=ticket)
    if pid <= 0:
        raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
    return _read(pid, remote, local, blocks, threads, ticket)


def read_mapped(
    mapped: Runs, local: Runs, blocks: int = 0, *, threads: int = 1, ticket: Ticket | None = None
) -> Checksums:
    """Copy ``mapped`` runs, which another process may be writing, into ``local`` runs.

    Uses plain loads; large streams are stored past the CPU cache. The caller is also responsible for the ticket's
    address.

    Args, Raises: as :func:`read_remote`, with ESTALE the only OSError. Checksums are those of the bytes that were
    stored.
    """
    if _C is None:
        return reference.read_mapped(mapped, local, blocks, ticket=ticket)
    return _read(0, mapped, local, blocks, threads, ticket)


def translate(runs: Runs, spans: reference.Spans) -> Runs | None:
    """Translate a peer's ``runs`` to addresses in this process; None if a run is not within one span.

    Args:
        spans: shape (n, 3), dtype uint64, ascending: ``[low, high, shift]`` of each part of the peer's memory mapped
            here. An address moves up by its span's shift, modulo 2**64.
    """
    if _C is None:
        return reference.translate(runs, spans)
    runs, spans = np.ascontiguousarray(runs), np.ascontiguousarray(spans)
    here = np.empty_like(runs)
    code = _C.pdt_translate(runs.ctypes.data, len(runs), spans.ctypes.data, len(spans), here.ctypes.data)
    return here if code == 0 else None


def _read(pid: int, remote: Runs, local: Runs, blocks: int, threads: int, ticket: Ticket | None) -> Checksums:
    assert _C is not None
    remote, local = as_runs(remote), as_runs(local)
    sums = _room(blocks)
    address, number = ticket or (0, 0)
    code = _C.pdt_read_remote(
        pid,
        remote.ctypes.data,
        len(remote),
        local.ctypes.data,
        len(local),
        blocks,
        sums.ctypes.data,
        threads,
        address,
        number,
    )
    _check(code, remote, local, blocks)
    return sums


def _room(blocks: int) -> Checksums:
    if not 0 <= blocks <= 1 << 20:
        raise ValueError(f"{blocks} blocks in one stream; 0 to {1 << 20} are allowed")
    return np.empty(blocks, dtype=np.uint64)


def _check(code: int, src: Runs, dst: Runs, blocks: int) -> None:
    if code == 0:
        return
    if code == -errno.EINVAL and stream_bytes(src) != stream_bytes(dst):
        raise ValueError(f"the source is {stream_bytes(src)} bytes long, the destination {stream_bytes(dst)}")
    if code in (-errno.EINVAL, -errno.EOVERFLOW):
        raise ValueError(
            f"a stream of {stream_bytes(dst)} bytes does not hold {blocks} equally long blocks of whole words"
        )
    raise OSError(-code, os.strerror(-code))
