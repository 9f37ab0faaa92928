"""A record of every block's bytes, for tests of byte equality. Off unless ``observe.audit_dir`` is set."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from pathlib import Path

from pdtransport.kv.geometry import KVGeometry


class Audit:
    """Appends one JSON line a block: who, which block and heads, and the SHA-256 of its bytes in stream order."""

    def __init__(self, directory: Path, engine: str, rank: int, geometry: KVGeometry) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in engine)
        self._file = open(directory / f"{name}-{rank}-{os.getpid()}.jsonl", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._geometry = geometry
        self._rank = rank

    def block(
        self, transfer: str, role: str, peer: str, peer_rank: int, block: int, page: int, head_lo: int, head_hi: int
    ) -> None:
        digest = hashlib.sha256()
        for address, nbytes in self._geometry.runs([page], head_lo, head_hi).tolist():
            digest.update(_bytes_at(address, nbytes))
        line = {
            "transfer": transfer,
            "role": role,
            "peer": peer,
            "peer_rank": peer_rank,
            "rank": self._rank,
            "block": block,
            "head_lo": head_lo,
            "head_hi": head_hi,
            "sha256": digest.hexdigest(),
        }
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def _bytes_at(address: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """The bytes at an address of host or GPU memory; those of a GPU as they are once all its work is done."""
    host = (ctypes.c_char * nbytes).from_address(address)
    cupy = sys.modules.get("cupy")  # whoever moves pages of a GPU has it loaded
    if cupy is None or cupy.cuda.runtime.pointerGetAttributes(address).type != cupy.cuda.runtime.memoryTypeDevice:
        return host
    copy = ctypes.create_string_buffer(nbytes)
    cupy.cuda.runtime.deviceSynchronize()
    cupy.cuda.runtime.memcpy(ctypes.addressof(copy), address, nbytes, cupy.cuda.runtime.memcpyDeviceToHost)
    return copy
