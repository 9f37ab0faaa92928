"""What a checkpoint, a configuration or an adapter *is*, read from its files alone: the rig's own verdict of which
pairs are equal. Knows safetensors' format and nothing of pdtransport's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HEADER_LENGTH = 8  # bytes, little-endian, before safetensors' JSON header
# Fields of config.json that no key or value depends on: names, versions, and what only training or sampling reads.
IDLE_FIELDS = frozenset(
    {
        "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "pretraining_tp",
        "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
# Fields of adapter_config.json that what an adapter computes depends on.
ADAPTER_FIELDS = ("r", "lora_alpha", "use_rslora", "bias", "modules_to_save")


def weights(folder: Path) -> str:
    """Digest of the name, dtype, shape and bytes of every tensor, whichever file each lies in."""
    return _digest(sorted((name, *tensor) for file in folder.glob("*.safetensors") for name, *tensor in tensors(file)))


def config(folder: Path, overrides: Mapping[str, Any] | None = None) -> str:
    """Digest of the configuration as vLLM uses it, with ``--hf-overrides``; both spellings of RoPE's are one."""
    fields = {**json.loads((folder / "config.json").read_text()), **(overrides or {})}
    rope = dict(fields.pop("rope_parameters", None) or {"rope_type": "default"})
    if "rope_theta" in fields:  # as transformers wrote it before version 5
        rope["rope_theta"] = fields.pop("rope_theta")
    return _digest(sorted({**fields, "rope": sorted(rope.items())}.items(), key=str), IDLE_FIELDS)


def adapter(folder: Path) -> str:
    """Digest of a LoRA adapter's tensors and of the fields that scale and place them."""
    fields = json.loads((folder / "adapter_config.json").read_text())
    used = [(name, fields.get(name) or None) for name in ADAPTER_FIELDS]
    return _digest([*used, weights(folder)])


def tensors(file: Path) -> Iterator[tuple[str, str, list[int], str]]:
    """Name, dtype, shape and SHA-256 of each tensor of a safetensors file."""
    data = file.read_bytes()
    start = HEADER_LENGTH + int.from_bytes(data[:HEADER_LENGTH], "little")
    header: dict[str, Any] = json.loads(data[HEADER_LENGTH:start])
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield name, entry["dtype"], entry["shape"], hashlib.sha256(data[start + first : start + last]).hexdigest()


def _digest(rows: list[Any], without: frozenset[str] = frozenset()) -> str:
    kept = [row for row in rows if not (isinstance(row, tuple) and row[0] in without)]
    return hashlib.sha256(json.dumps(kept, default=str).encode()).hexdigest()[:16]
