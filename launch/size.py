"""``pdlaunch size``: the size of a model's KV cache, and how long its pages take over links of given rates.

Everything is computed from the model's ``config.json``; nothing is measured and no weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtransport.errors import PDTransportError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1}
# GB/s in one direction, as stated by the makers; benchmarks.links measures what a link reaches on a machine.
NOMINAL_RATES = {
    "NVLink 4 (18 links)": 450.0,
    "PCIe 5.0 x16": 63.0,
    "400 Gb/s NIC": 50.0,
    "100 Gb/s NIC": 12.5,
    "25 Gb/s NIC": 3.1,
}
DEFAULT_TOKENS = (512, 2048, 8192, 32768)
CHUNK_TOKENS = (64, 256, 1024)
ATTENTION_FREE = ("mamba", "linear", "recurrent", "conv")  # substrings of vLLM's and transformers' layer type names


class SizeError(PDTransportError):
    """The file can't be read or lacks required information."""


@dataclass(frozen=True)
class KVSize:
    """KV cache of one model.

    Args:
        layers: layers with a KV cache.
        heads: KV heads per layer; 1 for multi-head latent attention, where every rank holds the one latent.
        token_layer_bytes: bytes of one token in one layer, all heads.
        block_size: tokens per block.
        tp: tensor-parallel ranks.
        latent: multi-head latent attention: ranks hold the same bytes instead of a share each.
        window: tokens that sliding-window layers look back; 0 without such layers. These layers are counted in full.
    """

    layers: int
    heads: int
    token_layer_bytes: int
    block_size: int
    tp: int
    latent: bool = False
    window: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers and heads, counted once."""
        return self.layers * self.token_layer_bytes

    @property
    def rank_token_bytes(self) -> int:
        """Bytes of one token on one rank. With more ranks than KV heads, several ranks hold the same head."""
        if self.latent:
            return self.token_bytes
        return self.token_bytes // self.heads * -(-self.heads // self.tp)

    def prompt_bytes(self, tokens: int) -> int:
        """Bytes transferred for a prompt: whole blocks, all prefill ranks together, each byte once."""
        return -(-tokens // self.block_size) * self.block_size * self.token_bytes


def read_config(model: Path) -> dict[str, Any]:
    """The part of ``config.json`` that describes the language model.

    Args:
        model: a model's folder, or the file itself.

    Raises:
        SizeError: no such file, or not a JSON object.
    """
    file = model / "config.json" if model.is_dir() else model
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SizeError(f"{file}: {error.strerror}; name a model's folder or its config.json") from None
    except (ValueError, RecursionError) as error:
        raise SizeError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise SizeError(f"{file} is not a JSON object")
    text = config.get("text_config")
    if isinstance(text, dict):
        return {**{key: config[key] for key in ("dtype", "torch_dtype") if key in config}, **text}
    return config


def kv_size(config: Mapping[str, Any], *, tp: int = 1, block_size: int = 16, dtype: str = "auto") -> KVSize:
    """KV cache size of a model with this configuration.

    Args:
        dtype: data type of the KV cache; ``auto``: that of the weights.

    Raises:
        SizeError: the configuration lacks a number, has an invalid value, or names layers that keep a state instead of
            KV pages.
    """
    if tp < 1 or block_size < 1:
        raise SizeError(f"tp {tp} and block size {block_size}: both must be 1 or more")
    kinds = config.get("layer_types")
    kinds = [str(kind) for kind in kinds] if isinstance(kinds, list) else []
    if other := sorted({kind for kind in kinds if any(part in kind for part in ATTENTION_FREE)}):
        raise SizeError(
            f"layers of type {', '.join(other)} keep a state instead of pages: the connector refuses such models"
        )
    element = _element_bytes(config, dtype)
    layers = _number(config, "num_hidden_layers")
    window = config.get("sliding_window")
    windowed = any("sliding" in kind for kind in kinds) if kinds else config.get("use_sliding_window", True)
    window = window if isinstance(window, int) and windowed else 0
    if config.get("kv_lora_rank"):
        slot = _number(config, "kv_lora_rank") + _number(config, "qk_rope_head_dim")
        return KVSize(layers, 1, slot * element, block_size, tp, latent=True, window=window)
    queries = _number(config, "num_attention_heads")
    heads = _number(config, "num_key_value_heads", queries)
    if config.get("head_dim") is None:
        dim = _number(config, "hidden_size") // queries
    else:
        dim = _number(config, "head_dim")
    if max(heads, tp) % min(heads, tp):
        raise SizeError(f"{heads} KV heads can't be split over tp {tp}: one must be a multiple of the other")
    return KVSize(layers, heads, 2 * heads * dim * element, block_size, tp, window=window)


def _number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise SizeError(f"config.json has no {key!r}")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise SizeError(f"config.json: {key!r} is {value!r}, not a positive integer")
    return value


def _element_bytes(config: Mapping[str, Any], dtype: str) -> int:
    if dtype == "auto":
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if dtype not in DTYPE_BYTES:
        raise SizeError(f"KV data type {dtype!r}: must be one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def parse_rate(text: str) -> tuple[str, float]:
    """Parse ``NAME=GB/s`` as given to ``--rate``.

    Raises:
        SizeError: another format.
    """
    name, _, number = text.rpartition("=")
    try:
        rate = float(number)
    except ValueError:
        rate = 0.0
    if not name or not 0 < rate < float("inf"):
        raise SizeError(f"--rate {text!r}: give NAME=GB/s, such as --rate 'our NIC=22.5'")
    return name, rate


def report(size: KVSize, tokens: Sequence[int], rates: Mapping[str, float]) -> dict[str, Any]:
    """All figures as one JSON-ready object: bytes, and seconds at each rate."""
    return {
        "bytes_per_token": size.token_bytes,
        "bytes_per_token_and_rank": size.rank_token_bytes,
        "bytes_per_token_and_layer": size.token_layer_bytes,
        "block_size": size.block_size,
        "bytes_per_block": size.block_size * size.token_bytes,
        "page_bytes": size.block_size * size.rank_token_bytes // size.layers,
        "sliding_window": size.window,
        "chunk_bytes": {count: size.prompt_bytes(count) for count in CHUNK_TOKENS},
        "prompts": [
            {
                "tokens": count,
                "bytes": size.prompt_bytes(count),
                "seconds": {name: size.prompt_bytes(count) / (rate * 1e9) for name, rate in rates.items()},
            }
            for count in tokens
        ],
    }


def as_text(size: KVSize, tokens: Sequence[int], rates: Mapping[str, float]) -> str:
    """The report for people."""
    kind = "one latent" if size.latent else f"{size.heads} KV heads"
    lines = [
        f"KV of one token: {_bytes(size.token_bytes)} ({size.layers} layers, {kind})"
        + (f"; on each of {size.tp} ranks: {_bytes(size.rank_token_bytes)}" if size.tp > 1 else ""),
        f"a block of {size.block_size} tokens: {_bytes(size.block_size * size.token_bytes)} "
        f"in pages of {_bytes(size.block_size * size.rank_token_bytes // size.layers)}",
        "a pool chunk: " + ", ".join(f"{_bytes(size.prompt_bytes(count))} of {count} tokens" for count in CHUNK_TOKENS),
    ]
    if size.window:
        lines.append(f"sliding-window layers are counted in full; vLLM keeps {size.window} tokens of them")
    width = max(len(name) for name in rates) + 12
    lines += ["", "transfer time of a prompt".ljust(width) + "".join(f"{count:>12,}" for count in tokens) + "  tokens"]
    lines.append("".ljust(width) + "".join(f"{_bytes(size.prompt_bytes(count)):>12}" for count in tokens))
    for name, rate in rates.items():
        times = "".join(f"{_time(size.prompt_bytes(count) / (rate * 1e9)):>12}" for count in tokens)
        lines.append(f"{name}, {rate:g} GB/s".ljust(width) + times)
    return "\n".join(lines)


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
