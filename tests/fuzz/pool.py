"""The ``pool`` target: what clients say to a real pool, over its socket and its HTTP API, and what lies on its tiers.

The first byte of an input says which door the rest goes to (:data:`DOORS`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import shutil
import tempfile
from http.client import HTTPConnection
from pathlib import Path

import zmq

from pdtransport.pool import messages
from pdtransport.pool.core.index import MEMORY
from pdtransport.pool.core.locks import LockFile
from pdtransport.pool.core.tier_state import TierState
from pdtransport.pool.remote.remote_messages import from_remote, to_remote
from pdtransport.pool.server.key_space_file import SpaceFile
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import DiskSettings, PoolSettings
from pdtransport.pool.tiers.base import DIGEST_BYTES, TierError
from pdtransport.pool.tiers.disk import BLOCK, DiskTier
from pdtransport.pool.tiers.envelope import Envelope, Opening
from pdtransport.pool.tiers.keyed_digest import UNSIGNED, Signer
from pdtransport.protocol.messages import WireError
from tests.fuzz.faults import Faults
from tests.fuzz.split import SEPARATOR
from tests.unit.pool_rig import chunk_store, key

ANSWER_S = 10.0  # of a service that needs a fraction of a millisecond
MAX_FRAMES = 16  # of one input
LAST = (1 << 63) - 1  # the request with which each conversation ends
NBYTES = 4096  # of the chunk in a file
FRAMES, WISH, FILE, NAMES, SPACES = b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"
PATHS = ("lookup", "hint", "pin", "unpin", "prefetch", "move", "clear", "compress")
WISH_ANSWERS = {200, 400, 409, 413, 503}


def pool(data: bytes) -> None:
    """Whatever arrives: the pool answers in its own words, serves the next one, holds nothing for who has gone, takes
    no chunk from a file but the one that was written, and no fault is logged."""
    door = DOORS.get(data[:1])
    if door is not None:
        faults().begin()
        door(data[1:])
        faults().check()


@functools.cache
def faults() -> Faults:
    return Faults()


class Rig:
    """A pool with a tier on disk and an HTTP API, for all inputs of a process."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pdt-fuzz-pool-"))
        (self.folder / "keys").write_text("secret\n")
        (self.folder / "keys").chmod(0o600)
        self.settings = PoolSettings.parse(
            {
                "name": "fuzz",
                "dir": str(self.folder / "pool"),
                "memory_bytes": 1 << 20,
                "frame_bytes": 4096,
                "client_bytes": 1 << 20,
                "max_chunks": 256,
                "disk": {"path": str(self.folder / "disk"), "bytes": 1 << 20},
                "http": {"listen": "127.0.0.1:0", "key_file": str(self.folder / "keys"), "max_body_bytes": 1 << 16},
            }
        )
        self.pool = Pool(self.settings)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        atexit.register(self.close)

    def close(self) -> None:
        self.pool.close()
        self.context.destroy(0)
        shutil.rmtree(self.folder, ignore_errors=True)


@functools.cache
def rig() -> Rig:
    return Rig()


def frames(data: bytes) -> None:
    """A client says Hello, then this."""
    here = rig()
    lock = LockFile(here.settings.lock_path)
    socket = here.context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    try:
        socket.connect(f"ipc://{here.settings.socket_path}")
        socket.send(messages.encode(messages.PoolHello(lock=lock.take_any(), name="fuzz")))
        for frame in data.split(SEPARATOR)[:MAX_FRAMES]:
            socket.send(frame)
            for parse in (from_remote, to_remote):  # what other hosts and agents say is read by the same rules
                with contextlib.suppress(WireError):
                    messages.encode(parse(frame))
        socket.send(messages.encode(messages.PoolStatusRequest(request=LAST)))
        while True:
            assert socket.poll(int(1000 * ANSWER_S)), "the pool does not answer"
            answer = messages.from_pool(socket.recv())
            if getattr(answer, "request", 0) == LAST:
                break
        socket.send(messages.encode(messages.Bye()))
        socket.send(messages.encode(messages.PoolStatusRequest(request=LAST)))
        while not isinstance(answer, messages.PoolRefused) or answer.what != "hello":
            assert socket.poll(int(1000 * ANSWER_S)), "the pool does not answer"
            answer = messages.from_pool(socket.recv())
    finally:
        socket.close(0)
        lock.close()
    status = here.pool.status()
    assert not [client for client in status["clients"] if client["name"] == "fuzz"], "a client that said Bye is kept"
    assert not status["being_filled"], f"chunks of a client that said Bye are being filled: {status['being_filled']}"


def wish(data: bytes) -> None:
    """A request for the HTTP API: its first byte says which path."""
    if not data:
        return
    path = PATHS[data[0] % len(PATHS)]
    http = HTTPConnection("127.0.0.1", int(rig().pool.url.rpartition(":")[2]), timeout=ANSWER_S)
    try:
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        http.request("POST", f"/pool/{path}", data[1:], headers)
        answer = http.getresponse()
        body = json.loads(answer.read())
    finally:
        http.close()
    assert answer.status in WISH_ANSWERS, f"{answer.status}: {body}"
    assert answer.status == 200 or set(body["error"]) == {"message", "type", "param", "code"}, body


@functools.cache
def disk_path() -> Path:
    path = Path(tempfile.mkdtemp(prefix="pdt-fuzz-disk-"))
    (path / "t-").mkdir(mode=0o700)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def disk() -> DiskTier:
    return DiskTier(DiskSettings.model_validate({"path": disk_path(), "bytes": 1 << 20}))


_KEY = key(1)


@functools.cache
def _signer() -> Signer:
    return Signer(["k" * 32])


def file(data: bytes) -> None:
    """A chunk's file: a header that is sound but for its codec, lengths and checksum (first byte 0), or any bytes. It
    is read, or it is a :class:`TierError`, whether the pool has keys of digests or not."""
    flags = data[1:2] or b"\0"
    signer = _signer() if flags[0] & 128 else None
    if data[:1] == b"\0":
        signed = bool(flags[0] & 64)
        rest, checksum = data[10:], int.from_bytes(data[2:10], "little")
        length = max(0, len(rest) - DIGEST_BYTES * signed)
        header = Envelope(flags[0] % 64 % 6, _signer().id if signed else UNSIGNED, NBYTES, length, checksum, _KEY)
        data = header.packed().ljust(BLOCK, b"\0") + rest
    tier = disk()
    path = disk_path() / "t-" / _KEY.hex()[:3] / f"{_KEY.hex()}.{NBYTES}"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(data)
    memory = memoryview(bytearray(NBYTES))
    opening = Opening(_KEY, [memory], signer)
    with contextlib.suppress(TierError, OSError):
        tier.read(_KEY, "", NBYTES, opening.place)
        assert 0 <= opening.finish() < 1 << 64


def names(data: bytes) -> None:
    """Names of folders and files on a disk that somebody else can write to."""
    root = Path(tempfile.mkdtemp(prefix="pdt-fuzz-names-"))
    try:
        for name in data.split(SEPARATOR)[:MAX_FRAMES]:
            parts = [part[:200] for part in name.replace(b"\0", b"").split(b"/") if part not in (b"", b".", b"..")]
            if parts:
                with contextlib.suppress(OSError):
                    at = os.path.join(os.fsencode(root), *parts)
                    os.makedirs(os.path.dirname(at), exist_ok=True)
                    with open(at, "wb") as made:
                        made.write(bytes(8))
        tier = TierState(
            DiskTier(DiskSettings.model_validate({"path": root, "bytes": 1 << 20})), MEMORY << 1, 1 << 20, "lru"
        )
        on = chunk_store(lower=[tier])
        for found in itertools.islice(tier.tier.scan(), 64):
            on.adopt(tier, found)
            with contextlib.suppress(TierError, OSError):
                buffer = bytearray(found.nbytes)
                tier.tier.read(found.key, found.tenant, found.nbytes, Opening(found.key, [memoryview(buffer)]).place)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def spaces(data: bytes) -> None:
    """What an earlier run is said to have kept of engines' key spaces."""
    path = rig().folder / "spaces.json"
    path.write_bytes(data)
    kept = SpaceFile(path).read()
    assert all(isinstance(each, str) for each in kept)


DOORS = {FRAMES: frames, WISH: wish, FILE: file, NAMES: names, SPACES: spaces}
