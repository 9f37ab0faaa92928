"""A tier in Mooncake Store: one object a chunk, named ``pdtkv:TENANT:KEY:NBYTES``.

The object is the sealed chunk. Mooncake evicts by its own rules; a chunk that it has dropped is a miss. Its client
can't list names, but its master can over HTTP: with the option ``names``, chunks of earlier runs and other pools are
found. The tier's entry point is ``mooncake``.
"""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pdtransport.errors import SettingsError
from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool.settings import MAX_CHUNK_BYTES
from pdtransport.pool.tiers.base import DIGEST_BYTES, HEADER_BYTES, Place, Stored, Tier, TierDown, TierError, fill
from pdtransport.settings import one_line

PREFIX = "pdtkv"
NOT_THERE, NO_ROOM = -704, -200  # Mooncake's error codes
CLIENTS_OWN = -900  # codes -900 to -999: the client could not reach a peer
CONNECT_S = 2.0
LIST_S = 10.0  # timeout of the master's list of names
MAX_LIST_BYTES = 1 << 30
_NAME = re.compile(rf"{PREFIX}:([A-Za-z0-9._\-]{{0,64}}):([0-9a-f]{{{2 * KEY_BYTES}}}):([0-9]{{1,10}})")


class MooncakeOptions(BaseModel):
    """Options of the tier: ``--tier-option mooncake.NAME=VALUE``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    master: Annotated[str, Field(pattern=r"^[^\s/]+:\d{1,5}$", description="HOST:PORT of mooncake_master.")]
    names: Annotated[str, Field(pattern=r"^(https?://[^\s/@]+:\d{1,5})?$")] = Field(
        "", description="http://HOST:PORT of the master's metrics port, which lists names. Empty: chunks of earlier "
        "runs and other pools are not found."
    )  # fmt: skip
    host: Annotated[str, Field(pattern=r"^[^\s/]+$")] = Field(
        "127.0.0.1", description="Address of this host for Mooncake's other clients (HOST or HOST:PORT)."
    )
    metadata: str = Field("P2PHANDSHAKE", description="Mooncake's metadata server, if it uses one.")
    protocol: Literal["tcp", "rdma"] = Field("tcp", description="Protocol that moves the bytes. rdma is unmeasured.")
    devices: str = Field("", description="RDMA devices.")
    buffer_bytes: int = Field(
        64 << 20,
        ge=1 << 20,
        description="Bytes of the buffer through which chunks pass; it must hold one chunk per thread.",
    )
    threads: int = Field(4, ge=1, le=64, description="Chunks that are read or written at once.")
    rescan_s: float = Field(30.0, ge=0, le=86400, description="Interval between scans for other pools' chunks.")


class MooncakeTier(Tier):
    """Stores chunks in memory that Mooncake's own processes provide (``mooncake_client``). Connects at the first call.

    Raises:
        SettingsError: the package can't be loaded, or an option is wrong.
    """

    name = "mooncake"
    shared = True
    overhead_bytes = HEADER_BYTES
    exposed = "every client of the master may write to it"

    def __init__(self, options: dict[str, Any]) -> None:
        try:
            its = MooncakeOptions.model_validate(options)
        except ValidationError as error:
            raise SettingsError(f"tier mooncake: {one_line(error)}") from None
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            raise SettingsError(
                f"tier mooncake: its package can't be loaded ({error}): pip install 'pdtransport[pool-mooncake]', or "
                "mooncake-transfer-engine where there is CUDA"
            ) from None
        self.threads, self.rescan_s, self._its = its.threads, its.rescan_s, its
        self._make, self._made, self._making = MooncakeDistributedStore, None, threading.Lock()

    @property
    def _store(self) -> Any:
        with self._making:
            if self._made is None:
                self._made = self._connected()
            return self._made

    def _connected(self) -> Any:
        its = self._its
        host, _, port = its.master.rpartition(":")
        try:  # first, since Mooncake's own client would retry for 90 seconds
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        except OSError as error:
            raise TierDown(f"the master at {its.master} can't be reached: {error}") from None
        made = self._make()
        code = made.setup(its.host, its.metadata, 0, its.buffer_bytes, its.protocol, its.devices, its.master)
        if code:
            raise TierDown(f"the master at {its.master} refuses a client at {its.host} (Mooncake's code {code})")
        return made

    def probe(self) -> None:
        if self._store.is_exist(f"{PREFIX}:probe") < 0:
            raise TierDown("the master does not answer")

    def scan(self) -> Iterator[Stored]:
        store, names = self._store, self._its.names
        if not names:
            return
        try:
            with urllib.request.urlopen(f"{names}/get_all_keys", timeout=LIST_S) as answer:
                listed = answer.read(MAX_LIST_BYTES).decode("ascii", "replace")
        except (OSError, ValueError) as error:
            raise TierDown(f"the master's list of names can't be fetched: {error}") from None
        for line in listed.splitlines():
            match = _NAME.fullmatch(line)
            if match is None or not 0 < int(match[3]) <= MAX_CHUNK_BYTES:
                continue
            stored = int(store.get_size(line))
            if 0 < stored <= MAX_CHUNK_BYTES + HEADER_BYTES + DIGEST_BYTES:
                yield Stored(bytes.fromhex(match[2]), match[1], int(match[3]), stored)

    def write(self, key: bytes, tenant: str, nbytes: int, pieces: Sequence[bytes | memoryview]) -> int:
        code = self._store.upsert_parts(_name(key, tenant, nbytes), *pieces)
        if code == NO_ROOM:
            raise TierError("the store has no room")
        if code:
            raise self._trouble(code)
        return sum(map(len, pieces))

    def read(self, key: bytes, tenant: str, nbytes: int, place: Place) -> None:
        name = _name(key, tenant, nbytes)
        found = self._store.get_buffer(name)
        if found is None:
            code = int(self._store.get_size(name))
            if code < 0:
                raise self._trouble(code)
            raise TierError(
                f"chunk {key.hex()[:16]} does not fit into mooncake.buffer_bytes: raise it, or lower mooncake.threads"
            )
        fill(memoryview(found).cast("B"), place)

    def delete(self, key: bytes, tenant: str, nbytes: int) -> None:
        # True: remove even while it is being read; the checksum reveals a read of removed bytes.
        code = self._store.remove(_name(key, tenant, nbytes), True)
        if code not in (0, NOT_THERE):
            raise self._trouble(code)

    def _trouble(self, code: int) -> TierError:
        if code == NOT_THERE:
            return TierError("the object no longer exists")
        kind = TierDown if code <= CLIENTS_OWN else TierError
        return kind(f"the store refused (Mooncake's code {code})")


def _name(key: bytes, tenant: str, nbytes: int) -> str:
    return f"{PREFIX}:{tenant}:{key.hex()}:{nbytes}"
