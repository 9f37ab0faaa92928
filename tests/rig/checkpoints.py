"""Second checkpoints that look like the first: the same files, names, sizes and ends, and other weights inside."""

from __future__ import annotations

import shutil
from pathlib import Path

from pdtransport.kv.checkpoint import safetensors_header

LAYER = 4  # of tiny-lm's eight
SIGN = 0x80  # of a bfloat16, in its second byte


def altered(model: Path, folder: Path, layer: int = LAYER) -> Path:
    """A copy of ``model`` in ``folder`` whose keys and values of one inner layer have the other sign."""
    shutil.copytree(model, folder)
    alter(folder, layer)
    return folder


def alter(folder: Path, layer: int = LAYER) -> None:
    """Turn the sign of one layer's keys and values, in place; doing it twice changes nothing."""
    for file in sorted(folder.glob("*.safetensors")):
        data = bytearray(file.read_bytes())
        for tensor in safetensors_header(file):
            if f"layers.{layer}." in tensor.name and tensor.name.split(".")[-2] in ("k_proj", "v_proj"):
                assert tensor.dtype == "BF16"
                for at in range(tensor.offset + 1, tensor.offset + tensor.nbytes, 2):
                    data[at] ^= SIGN
        file.write_bytes(data)
