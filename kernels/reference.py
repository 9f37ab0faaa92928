"""The page kernels in numpy: defines what ``csrc/pages.c`` must do, and is the fallback without a C compiler.

Clear rather than fast. Same functions, arguments and errors as :mod:`pdtransport.kernels.pages`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pdtransport.kernels.runs import Runs, as_runs, cut_runs, run, stream_bytes

Checksums = npt.NDArray[np.uint64]
Ticket = tuple[int, int]
Spans = npt.NDArray[np.uint64]

LANES = 128
STRIPE_BYTES = 8 * LANES
IOV_LIMIT = 1024  # Linux' IOV_MAX
REMOTE_CHUNK = 1 << 20

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_KEY_SEED = np.uint64(0x7064747061676573)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64, a bijection on 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


KEYS = _mix(_KEY_SEED + np.arange(1, LANES + 1, dtype=np.uint64) * _GOLDEN)


def memory(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """``nbytes`` bytes at ``address`` of this process as an array. The caller is responsible for the address."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def block_checksum(block: npt.NDArray[np.uint8]) -> np.uint64:
    """Checksum of one block: see ``README.md`` beside this file."""
    length = block.size
    padded = np.zeros(-(-length // STRIPE_BYTES) * STRIPE_BYTES, dtype=np.uint8)
    padded[:length] = block
    words = padded.view("<u8").reshape(-1, LANES)
    with np.errstate(over="ignore"):
        keyed = words ^ KEYS
        products = ((keyed & _LOW) * (keyed >> _HALF)).sum(axis=1, dtype=np.uint64)
        plain = keyed.sum(axis=1, dtype=np.uint64)
        numbers = np.arange(1, len(words) + 1, dtype=np.uint64) * _GOLDEN
        stripes = _mix(products + _mix(plain + numbers)).sum(dtype=np.uint64)
    return np.uint64(finish(np.array([stripes], dtype=np.uint64), length)[0])


def finish(sums: Checksums, length: int) -> Checksums:
    """Checksums of blocks of ``length`` bytes, given the sums of their stripes' values."""
    return _mix(sums ^ _tail(length))


@functools.lru_cache(maxsize=64)
def _tail(length: int) -> Checksums:
    return _mix(np.array([length], dtype=np.uint64) + _GOLDEN)


def checksum(runs: Runs, blocks: int) -> Checksums:
    """See :func:`pdtransport.kernels.pages.checksum`."""
    runs = as_runs(runs)
    total = stream_bytes(runs)
    if blocks == 0:
        return np.empty(0, dtype=np.uint64)
    if blocks < 0 or total % blocks or total // blocks % 8:
        raise ValueError(f"a stream of {total} bytes does not hold {blocks} equally long blocks of whole words")
    stream = np.empty(total, dtype=np.uint8)
    _copy(runs, run(stream.ctypes.data, total))
    return np.array([block_checksum(block) for block in stream.reshape(blocks, total // blocks)], dtype=np.uint64)


def copy_runs(src: Runs, dst: Runs, blocks: int = 0) -> Checksums:
    """See :func:`pdtransport.kernels.pages.copy_runs`."""
    src, dst = _fitting(src, dst)
    _copy(src, dst)
    return checksum(dst, blocks)


def gather(runs: Runs, address: int, blocks: int = 0) -> Checksums:
    """See :func:`pdtransport.kernels.pages.gather`."""
    runs = as_runs(runs)
    return copy_runs(runs, run(address, stream_bytes(runs)), blocks)


def scatter(address: int, runs: Runs, blocks: int = 0) -> Checksums:
    """See :func:`pdtransport.kernels.pages.scatter`."""
    runs = as_runs(runs)
    return copy_runs(run(address, stream_bytes(runs)), runs, blocks)


def read_remote(pid: int, remote: Runs, local: Runs, blocks: int = 0, *, ticket: Ticket | None = None) -> Checksums:
    """See :func:`pdtransport.kernels.pages.read_remote`."""
    remote, local = _fitting(remote, local)
    total = stream_bytes(local)
    bounds = [*range(0, total, REMOTE_CHUNK), total]
    _check_ticket(pid, ticket)
    try:
        for source, target in zip(cut_runs(remote, bounds), cut_runs(local, bounds), strict=True):
            _read_chunk(pid, source, target)
    except OSError as error:
        if error.errno == errno.EFAULT:
            _check_ticket(pid, ticket)
        raise
    _check_ticket(pid, ticket)
    return checksum(local, blocks)


def read_mapped(mapped: Runs, local: Runs, blocks: int = 0, *, ticket: Ticket | None = None) -> Checksums:
    """See :func:`pdtransport.kernels.pages.read_mapped`."""
    mapped, local = _fitting(mapped, local)
    _check_mapped_ticket(ticket)
    _copy(mapped, local)
    _check_mapped_ticket(ticket)
    return checksum(local, blocks)


def translate(runs: Runs, spans: Spans) -> Runs | None:
    """See :func:`pdtransport.kernels.pages.translate`."""
    first, length = runs[:, 0], runs[:, 1]
    index = np.searchsorted(spans[:, 0], first, side="right").astype(np.int64) - 1
    low, high, shift = spans[np.maximum(index, 0)].T
    if not ((first >= low) & (first <= high) & (length <= high - first)).all():
        return None
    here = runs.copy()
    with np.errstate(over="ignore"):
        here[:, 0] += shift
    return here


def _check_mapped_ticket(ticket: Ticket | None) -> None:
    if ticket is not None and int(memory(ticket[0], 8).view(np.uint64)[0]) != ticket[1]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def _check_ticket(pid: int, ticket: Ticket | None) -> None:
    if ticket is None:
        return
    word = np.zeros(1, dtype=np.uint64)
    try:
        _read_chunk(pid, run(ticket[0], 8), run(word.ctypes.data, 8))
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
    if int(word[0]) != ticket[1]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def _fitting(src: Runs, dst: Runs) -> tuple[Runs, Runs]:
    src, dst = as_runs(src), as_runs(dst)
    if stream_bytes(src) != stream_bytes(dst):
        raise ValueError(f"the source is {stream_bytes(src)} bytes long, the destination {stream_bytes(dst)}")
    return src, dst


def _pairs(src: Runs, dst: Runs) -> Iterator[tuple[int, int, int]]:
    """Yields (source address, destination address, bytes) of the longest pieces that are contiguous on both sides."""
    sources, targets = iter(src.tolist()), iter(dst.tolist())
    a = b = a_left = b_left = 0
    for _ in range(len(src) + len(dst) + 1):
        while not a_left:
            a, a_left = next(sources, (0, -1))
        while not b_left:
            b, b_left = next(targets, (0, -1))
        if a_left < 0 or b_left < 0:
            return
        count = min(a_left, b_left)
        yield a, b, count
        a, b, a_left, b_left = a + count, b + count, a_left - count, b_left - count


def _copy(src: Runs, dst: Runs) -> None:
    for source, target, count in _pairs(src, dst):
        ctypes.memmove(target, source, count)


def _read_chunk(pid: int, remote: Runs, local: Runs) -> None:
    """process_vm_readv until all bytes are read. A local run has the layout of ``struct iovec``."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    total, have = stream_bytes(local), 0
    while have < total:
        target, source = (cut_runs(runs, [have, total])[0][:IOV_LIMIT] for runs in (local, remote))
        got = libc.process_vm_readv(
            ctypes.c_int(pid),
            ctypes.c_void_p(target.ctypes.data),
            ctypes.c_ulong(len(target)),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_ulong(len(source)),
            ctypes.c_ulong(0),
        )
        if got < 0 and ctypes.get_errno() == errno.EINTR:
            continue
        if got <= 0:
            code = ctypes.get_errno() if got < 0 else errno.EIO
            raise OSError(code, os.strerror(code))
        have += got
