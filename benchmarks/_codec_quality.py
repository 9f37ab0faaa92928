"""What `benchmarks.codecs` measures of a model: its answers after KV went through a codec, and the codec's speed."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pdtransport.kernels.quant import DType, Grid
from pdtransport.pool.tiers.codecs import LOSSY, Codec, Quantised, ShuffledZstd

DTYPES: dict[DType, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODECS = ("none", "zstd", *LOSSY)
Cache = list[tuple[torch.Tensor, torch.Tensor]]  # of each layer: keys and values, [heads, tokens, head size]


def load(path: str, dtype: DType) -> tuple[Any, Any]:
    """A model with weights of this type, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).eval()
    return model, AutoTokenizer.from_pretrained(path)


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, texts: Sequence[str], dtype: DType, how: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {name: {"loss": [], "other": [], "greedy": [], "first": []} for name in CODECS}
    need = how.prefix + how.rest
    caches = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[0, 1:]
        for start in np.linspace(0, len(ids) - need, how.samples, dtype=int).tolist():
            piece = torch.cat([torch.tensor([tokenizer.bos_token_id]), ids[start : start + need - 1]])[None]
            exact = prefill(model, piece[:, : how.prefix])
            caches.append(exact)
            for name in CODECS:
                cache = through(codec_of(name, dtype), exact, how, dtype)
                own = found[name]
                loss, best = read(model, cache, piece[:, how.prefix - 1 :])
                own["loss"].append(loss)
                own["best"] = best
                own["other"].append(float((best != found["none"]["best"]).float().mean()))
                own["text"] = generate(model, cache, piece[:, how.prefix - 1], how.greedy)
                differs = own["text"] != found["none"]["text"]
                own["greedy"].append(float(differs.float().mean()))
                own["first"].append(int(differs.nonzero()[0]) if differs.any() else how.greedy)
    sizes = {name: speed(codec_of(name, dtype), caches[0], how, dtype) for name in CODECS}
    return {
        name: {
            **sizes[name],
            "perplexity": math.exp(sum(own["loss"]) / len(own["loss"])),
            "other likeliest token": sum(own["other"]) / len(own["other"]),
            "greedy tokens that differ": sum(own["greedy"]) / len(own["greedy"]),
            "answers that differ": sum(first < how.greedy for first in own["first"]) / len(own["first"]),
            "samples": len(own["loss"]),
        }
        for name, own in found.items()
    }


def codec_of(name: str, dtype: DType) -> Codec | None:
    if name in LOSSY:
        return Quantised(name, LOSSY[name])  # type: ignore[arg-type]
    return ShuffledZstd(4 if dtype == "float32" else 2) if name == "zstd" else None


# -- the model ----------------------------------------------------------------------------------------------


def prefill(model: Any, ids: torch.Tensor) -> Cache:
    """KV of all of ``ids`` but the last, which is read again: its logits are the first that the KV decides."""
    made = model(ids[:, :-1], use_cache=True).past_key_values
    return [(layer.keys[0], layer.values[0]) for layer in made.layers]


def restored(cache: Cache) -> DynamicCache:
    made = DynamicCache()
    for number, (keys, values) in enumerate(cache):
        made.update(keys[None].clone(), values[None].clone(), number)
    return made


def read(model: Any, cache: Cache, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean cross-entropy of ``ids`` after the first, and the likeliest token at each place."""
    logits = model(ids[:, :-1], past_key_values=restored(cache), use_cache=True).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])), logits.argmax(-1)


def generate(model: Any, cache: Cache, last: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy tokens after ``last``."""
    past, ids, found = restored(cache), last[None], []
    for _ in range(count):
        ids = model(ids, past_key_values=past, use_cache=True).logits[:, -1].argmax(-1)[None]
        found.append(int(ids))
    return torch.tensor(found)


# -- chunks ---------------------------------------------------------------------------------------------------


def chunks(cache: Cache, how: argparse.Namespace) -> np.ndarray:
    """Whole chunks as the pool gets them from the CPU engine, shape [chunks, bytes]: block, layer, head, keys then
    values."""
    heads, tokens, size = cache[0][0].shape
    blocks = tokens // how.chunk * how.chunk // how.block
    both = torch.stack([torch.stack(layer) for layer in cache])[:, :, :, : blocks * how.block]
    both = both.reshape(len(cache), 2, heads, blocks, how.block * size)
    raw = both.permute(3, 0, 2, 1, 4).contiguous().view(torch.uint8).numpy()
    return raw.reshape(blocks * how.block // how.chunk, -1)


def unchunk(raw: np.ndarray, cache: Cache, how: argparse.Namespace) -> Cache:
    """The cache with these chunks in it; the partial one behind them stays."""
    heads, tokens, size = cache[0][0].shape
    blocks = tokens // how.chunk * how.chunk // how.block
    flat = torch.from_numpy(raw.reshape(-1)).view(cache[0][0].dtype)
    both = flat.reshape(blocks, len(cache), heads, 2, how.block, size).permute(1, 3, 2, 0, 4, 5)
    both = both.reshape(len(cache), 2, heads, blocks * how.block, size)
    return [
        (torch.cat([k, keys[:, k.shape[1] :]], 1), torch.cat([v, values[:, v.shape[1] :]], 1))
        for (k, v), (keys, values) in zip(both, cache, strict=True)
    ]


def grid_of(cache: Cache, how: argparse.Namespace, dtype: DType) -> Grid:
    return Grid(dtype, 1, 1, how.block * cache[0][0].shape[2])


def through(codec: Codec | None, cache: Cache, how: argparse.Namespace, dtype: DType) -> Cache:
    if codec is None:
        return cache
    raw = chunks(cache, how)
    for chunk in raw:
        packed = codec.encode([memoryview(chunk)], grid_of(cache, how, dtype))
        assert packed is not None
        codec.decode(packed, [memoryview(chunk)])
    return unchunk(raw, cache, how)


def speed(codec: Codec | None, cache: Cache, how: argparse.Namespace, dtype: DType) -> dict[str, float]:
    raw, grid = chunks(cache, how), grid_of(cache, how, dtype)
    found: dict[str, list[float]] = {"encode": [], "decode": []}
    packed: list[bytes] = [chunk.tobytes() for chunk in raw]
    target = np.empty_like(raw[0])
    for _ in range(9):
        begin = time.perf_counter()
        if codec is not None:
            packed = [codec.encode([memoryview(chunk)], grid) or b"" for chunk in raw]
        middle = time.perf_counter()
        for each in packed:
            if codec is not None:
                codec.decode(each, [memoryview(target)])
        found["encode"].append(middle - begin)
        found["decode"].append(time.perf_counter() - middle)
    speeds = {f"{what} GB/s": raw.size / median(taken) / 1e9 if codec else 0.0 for what, taken in found.items()}
    return {"bytes": sum(map(len, packed)) / raw.size, **speeds}
