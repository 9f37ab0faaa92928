"""Logs a SHA-256 of every block sent and received, for byte-equality tests. Off unless ``observe.audit_dir`` is set."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pdtransport.kv.geometry import HOST
from pdtransport.kv.groups import CacheGroups
from pdtransport.system.private_files import make_private_folder, open_private


class Audit:
    """Appends one JSON line per block: both peers, cache group, block index, heads, and the SHA-256 of its bytes in
    stream order."""

    def __init__(self, directory: Path, engine: str, rank: int, groups: CacheGroups) -> None:
        make_private_folder(directory)
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in engine)
        path = directory / f"{name}-{rank}-{os.getpid()}.jsonl"
        fd = open_private(path, os.O_WRONLY | os.O_APPEND)
        self._file = open(fd, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._groups = groups
        self._rank = rank

    def _read(self, address: int, nbytes: int) -> Any:
        if self._groups.device == HOST:
            return (ctypes.c_char * nbytes).from_address(address)
        from pdtransport.kernels.gpu import to_host

        return to_host(address, nbytes, self._groups.device, beside=True)  # the model's stream is busy

    def block(
        self,
        transfer: str,
        role: str,
        peer: str,
        peer_rank: int,
        group: int,
        block: int,
        page: int,
        head_lo: int,
        head_hi: int,
    ) -> None:
        digest = hashlib.sha256()
        for address, nbytes in self._groups[group].runs([page], head_lo, head_hi).tolist():
            digest.update(self._read(address, nbytes))
        line = {
            "transfer": transfer,
            "role": role,
            "peer": peer,
            "peer_rank": peer_rank,
            "rank": self._rank,
            "group": group,
            "block": block,
            "head_lo": head_lo,
            "head_hi": head_hi,
            "sha256": digest.hexdigest(),
        }
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()
